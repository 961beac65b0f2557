"""`calmix.compress`: from a model to a smaller one and its report card."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from calmix.calibration.dataset import saved_set
from calmix.compression.card import CARD_PAGE, Card, read_card
from calmix.compression.estimate import StageCost, check_room, stage_costs
from calmix.compression.folder import begun, check_foreign
from calmix.compression.plan import check_request, wide_embeddings
from calmix.compression.recipe import with_recipe
from calmix.compression.run_stages import RunStage, SayStage, run_stages, stages
from calmix.compression.search import Search
from calmix.compression.stages import Draw, Prune, Stage
from calmix.errors import NotKeptError
from calmix.evaluation.retention import Retention, bounds
from calmix.evaluation.suites import suite_file
from calmix.files import check_apart, check_output_folder, check_unlocked
from calmix.options import Compression, checked
from calmix.progress import Progress
from calmix.shown import Shown, rounded_percent


@dataclass(frozen=True, repr=False)
class Compressed(Shown):
    """A result of `compress`: the smaller model in `model`, the report card in `card`."""

    folder: Path

    @property
    def model(self) -> Path:
        """The GGUF file, or the folder that transformers loads."""
        return self._card.model

    @property
    def card(self) -> Path:
        """The report card, an HTML page."""
        return self.folder / CARD_PAGE

    @property
    def retention(self) -> Retention:
        """Retention on the suite with intervals: of right answers, or without any of likelihood."""
        dense, scores = self._card.pairs[0]
        return scores.retention(dense)

    @cached_property
    def _card(self) -> Card:
        """The card, cached because reading it hashes the whole model."""
        return read_card(self.folder)

    def to_dict(self) -> dict[str, Any]:
        """Return paths, behaviour and retention."""
        return {
            "model": str(self.model),
            "card": str(self.card),
            "behaviour": self._card.behaved.to_dict(),
            "retention": self.retention.to_dict(),
        }

    def _line(self) -> str:
        return f"{self.model}, {self._card.shortly}; {self.card}"

    def _rows(self) -> list[dict[str, Any]]:
        does, likelihood = self._card.behaved, self._card.kept
        tables = {
            "right answers": does.right.estimates if does.right else {},
            "right answers kept": {one.name: one.share for one in does.abilities},
            "likelihood kept": likelihood.estimates if likelihood else {},
        }
        return [
            {"measure": measure, "dimension": name, "%": rounded_percent(one.value), **bounds(one)}
            for measure, estimates in tables.items()
            for name, one in estimates.items()
        ]


def compress(
    model: str | Path, output: str | Path, *, shown: bool = True, **options: Any
) -> Compressed:
    """Quantise a model (or prune and distil it), evaluate it, and write its report card.

    If interrupted, call it again to resume.

    Args:
        model: hub id, folder, `.gguf` file or `builtin:NAME`.
        output: folder to write, or to resume in.
        shown: whether to show progress.
        **options: those of `calmix compress` that decide the result, such as `sparsity=0.6`,
            `type="Q3_K_M"`, `bits=2.8`, `pattern="2:4"`, `effort="quick"`,
            `calibration="mine.csv"`, `no_corpus=True` (text that the model writes itself);
            `keep={"code": 2, "general": 1}`, shares of dimensions in the calibration text;
            `keep_at_least="code=0.9"`, and `within="2h"` to limit the time of its search.
            `recipe="recipe.yaml"` reads options from a file, those given beside it first.

    Raises:
        NotKeptError: no candidate meets the floors of `keep_at_least`.
        CalmixError: an error the user can fix, raised before any work or download if possible.
    """
    values = {"model": model, **options}
    values = {key: str(one) if isinstance(one, Path) else one for key, one in values.items()}
    recipe, folder = values.pop("recipe", None), Path(output)
    request = checked(Compression, values)
    if recipe is not None:
        request = with_recipe(request, Path(recipe))
    search, _ = make(request, folder, shown=shown)
    if search.floors and search.bits is None:
        yet = " yet" * bool(search.left)
        raise NotKeptError(f"no candidate keeps {request.keep_at_least}{yet}: {search.why()}")
    return Compressed(folder)


def begin(options: Compression, out: Path) -> Search:
    """Return the search in OUT with the checked request, without candidates unless floors are
    given; refuse an OUT that is an input or holds something else."""
    inputs = [
        options.model,
        saved_set(options.calibration),
        options.imatrix,
        options.prompts,
        options.like,
        suite_file(options.suite),
    ]
    check_apart(out, inputs)
    check_unlocked(out)
    check_foreign(out)
    if not begun(out):
        check_output_folder(out)
    return Search(check_request(options), out)


def dry(search: Search) -> list[StageCost]:
    """Return the cost of all stages; of a search, the most that there can be. Text from the user's
    own files is drawn, without a leakage check, to see whether it is enough."""
    parts = [(search.request, stages(search.request, search.out))]
    if search.floors:
        parts = [(search.at(search.rates[0]), search.opening())]
        parts += [(search.at(bits), search.building(bits)) for bits in search.path]
    for one in (stage.request for _, listed in parts for stage in listed):
        if isinstance(one, Draw) and not one.written and one.request.files:
            with Progress() as bar:
                replace(one, draw={**one.draw, "leakage": "off"}).drawn(bar)
    return [cost for request, listed in parts for cost in stage_costs(request, listed)]


def make(options: Compression, out: Path, *, shown: bool = True) -> tuple[Search, dict[str, float]]:
    """Compress a model, and return the search and the seconds of each stage run now, none if no
    candidate passes."""
    search = begin(options, out)
    request = search.request
    if search.floors:
        with _staged(len(search.longest()), shown) as (run, say):
            search.run(run, say, options.within or math.inf)
        if search.bits is None:
            return search, {}
        request = search.at(search.bits)
    check_room(request, out)
    with _staged(len(stages(request, out)), shown, wide_embeddings(request)) as (run, say):
        return search, run_stages(request, out, run, say)


@contextmanager
def _staged(most: int, shown: bool, warning: str = "") -> Iterator[tuple[RunStage, SayStage]]:
    """Yield functions that run a stage and announce it, quantisation with a warning; there are at
    most `most`."""

    def run(stage: Stage) -> None:
        with Progress(shown=shown) as inside:
            stage.run(inside)

    def say(stage: Stage, done: bool) -> None:
        if warning and not done and isinstance(stage.request, Prune):
            bar.note(warning)
        bar.note(f"{stage.name}: already done" if done else f"$ {stage.command}")
        bar.begin(stage.name)

    with Progress(most, shown=shown) as bar:
        yield run, say
