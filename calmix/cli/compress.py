"""`compress`, which is `calmix.compress` too, `report` and `check`: a smaller model, its card, and
whether it keeps enough."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from calmix.cli.common import line, note, print_json, print_table, print_taken
from calmix.cli.root import app
from calmix.cli.verbs import verb
from calmix.errors import InputError, NotKeptError
from calmix.evaluation.scores import load_pairs, load_scores
from calmix.files import check_output_file, write_json, write_text
from calmix.options import Compression, Share, checked, option, path_option
from calmix.progress import duration
from calmix.shown import Shown, percent

if TYPE_CHECKING:
    from calmix.evaluation.retention import Retention
    from calmix.report.card import Card


@verb("compress")
def compress_verb(
    asked: Compression,
    output: Path = path_option("Folder to write, or to resume in."),
    dry_run: bool = option(False, "Print commands, time, memory, disk; write nothing."),
    resume: bool = option(
        False, "Resume an interrupted run, as compress always does.", advanced=True
    ),
    open: bool = option(False, "Show the card in the browser at the end."),
) -> None:
    """Quantise a model (or prune it and distil into it), evaluate it, and write its report card.

    Every stage keeps its result in the output folder. Run the same command again to resume. calmix
    check OUT tests the result against floors of your own.
    """
    from calmix.compression import ladder
    from calmix.report import words
    from calmix.report.card import read_card

    if dry_run:
        wanted, taken = ladder.dry(asked, output)
        title = f"{asked.model} at {wanted.target}, effort {asked.effort}, on this machine"
        if asked.keep_at_least is not None:
            title = f"{asked.model} to keep {asked.keep_at_least}, with all candidates"
        print_json([asdict(one) | {"command": one.stage.command} for one in taken])
        print_taken(taken, title)
        if asked.keep_at_least is not None:
            line(words.wrapped(ladder.provable(wanted)))
        return
    found, seconds = ladder.make(asked, output, _run, note)
    told: dict[str, Any] = {"output": str(output), "model": None}
    if found is not None:
        told |= {"ladder": asdict(found)}
        print_table(found.rows(), title="candidates: kept % (proven %)")
        for said in (found.why(), *found.promise):
            line(words.wrapped(said))
        if found.bits is None:
            said = f"refused: no candidate keeps what is asked. {ladder.HELPS}"
            if found.left:
                said = "stopped: no candidate keeps what is asked yet."
            print_json(told)
            line(words.wrapped(said))
            raise typer.Exit(1)
    page, card = output / "card.html", read_card(output)
    told |= {"model": str(output / "model"), "card": str(page), "seconds": seconds,
             "behaviour": asdict(card.behaved)}  # fmt: skip
    print_json(told)
    for said in (
        card.shortly, f"size: {card.sizes}", f"speed: {card.SPEED}",
        f"card: {page}, after {duration(sum(seconds.values()))}", f"next: {card.next}",
    ):  # fmt: skip
        line(said)
    if card.instead:
        line(f"at this size: {card.instead}")
    if open:
        webbrowser.open(page.resolve().as_uri())


def _run(arguments: Sequence[str]) -> None:
    """Run a command line in this process; what it refuses, it raises."""
    code = app(list(arguments), prog_name="calmix", standalone_mode=False)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(f"calmix {arguments[0]} ended with {code}")


@dataclass(frozen=True, repr=False)
class Compressed(Shown):
    """A folder of `compress`: in `model` the smaller model, in `card` the report card's page."""

    folder: Path

    @property
    def model(self) -> Path:
        """The model's folder, which transformers loads."""
        return self.folder / "model"

    @property
    def card(self) -> Path:
        """The report card, an HTML page."""
        return self.folder / "card.html"

    @property
    def retention(self) -> Retention:
        """What the suite's scores say is kept, with intervals: likelihood, of most suites."""
        from calmix.compression.plan import SCORES

        [(dense, scores)] = load_pairs([self.folder / SCORES])
        return scores.retention(dense)

    @cached_property
    def _told(self) -> Card:
        """The card, read once: that hashes the whole model."""
        from calmix.report.card import read_card

        return read_card(self.folder)

    def to_dict(self) -> dict[str, Any]:
        """Return the paths and what was kept."""
        return {"model": str(self.model), "card": str(self.card),
                "behaviour": asdict(self._told.behaved),
                "retention": self.retention.to_dict()}  # fmt: skip

    def _line(self) -> str:
        return f"{self.model}, {self._told.shortly}; {self.card}"

    def _rows(self) -> list[dict[str, Any]]:
        card = self._told
        answers = [
            {"kept": "answers", "dimension": one.name, "kept %": percent(one.share.value),
             "from": percent(one.share.low), "to": percent(one.share.high)}
            for one in card.behaved.abilities
        ]  # fmt: skip
        likelihood = card.kept._rows() if card.kept else []
        return [*answers, *({"kept": "likelihood", **row} for row in likelihood)]


def compress(
    model: str | Path, output: str | Path, *, shown: bool = True, **options: Any
) -> Compressed:
    """Quantise a model (or prune it and distil into it), evaluate it, and write its report card.

    If interrupted, call it again to resume.

    Args:
        model: hub id, folder, `.gguf` file or `builtin:NAME`.
        output: folder to write, or to resume in.
        shown: show a line of progress, in a notebook too.
        **options: those of `calmix compress` that decide the result, such as `sparsity=0.6`,
            `bits=2.8`, `pattern="2:4"`, `effort="quick"`, `calibration="mine.csv"`,
            `text_field="prompt"`, `no_corpus=True` (text that the model writes itself);
            `keep={"code": 2, "general": 1}`, shares of dimensions in the calibration text;
            `keep_at_least="code=0.9"`, with `within="2h"` the time to look for it.

    Raises:
        NotKeptError: no candidate keeps what `keep_at_least` asks for.
        CalmixError: anything a user can mend, before work or download where that can be known.
    """
    from calmix.compression import ladder

    given = {"model": model, **options}
    given = {key: str(one) if isinstance(one, Path) else one for key, one in given.items()}
    asked, folder = checked(Compression, given), Path(output)
    found, _ = ladder.make(asked, folder, _run, note if shown else None)
    if found is not None and found.bits is None:
        yet = " yet" * bool(found.left)
        raise NotKeptError(f"no candidate keeps {asked.keep_at_least}{yet}: {found.why()}")
    return Compressed(folder)


@verb("report", json=False)
def report(
    folders: tuple[Path, ...] = option(..., "Folders of calmix compress.", argument=True),
    output: Path | None = path_option(
        "Page to write; needed for several.", default=None, shown="OUT/card.html"
    ),
) -> None:
    """Write the report card of a compressed model, or one page of several."""
    from calmix.report.card import card_page, model_card, read_card, several_page

    if output is not None:  # beside the default page another may stand
        held = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
        inputs = [path for path in held if path.suffix != ".html"]
        check_output_file(output, inputs=inputs, overwrite=True)
    if len(folders) == 1:
        card = read_card(folders[0])
        output = output or folders[0] / "card.html"
        write_text(output, card_page(card))
        write_text(folders[0] / "model" / "README.md", model_card(card))
    elif output is None:
        raise InputError("several models need a page to stand on: name it with -o")
    else:
        write_text(output, several_page([read_card(folder) for folder in folders]))
    line(f"report: {output}")


@verb("check")
def check(
    results: tuple[Path, ...] = option(
        ..., "Folder of calmix compress, or files of calmix evaluate -o.", argument=True
    ),
    keep_at_least: str | None = option(
        None,
        "Shares to keep, e.g. 0.9 or code=0.9,general=80%.",
        metavar="FLOORS",
        shown="those the folder was made for",
    ),
    confidence: Share | None = option(
        None, "Confidence of the test, e.g. 0.99.", ge=0.8, le=0.999, shown="0.95"
    ),
    output: Path | None = path_option("JSON file to write.", default=None, shown="OUT/check.json"),
    overwrite: bool = option(False, "Replace the output file."),
) -> None:
    """Test whether a model keeps what it must; the exit code is 1 if it does not.

    No model is opened: the scores that compress, or evaluate --against, has written are read.
    """
    from calmix.compression.running import read_record
    from calmix.evaluation.floors import CONFIDENCE, FILE, judge, parse_floors, proven, record
    from calmix.report import words

    folders, files, asked = [path for path in results if path.is_dir()], results, {}
    if folders:
        if len(results) > 1:
            raise InputError("a folder is checked by itself: name one folder, or files alone")
        asked = read_record(folders[0])["request"]
        files = _measured(folders[0])
    told = keep_at_least or asked.get("keep_at_least")
    if told is None:
        raise InputError("--keep-at-least is missing: name the floors, e.g. code=0.9,general=80%")
    floors, carded = parse_floors(told), output is None and bool(folders)
    place = folders[0] / FILE if carded else output
    if place is not None:
        check_output_file(place, inputs=files, overwrite=overwrite or carded)
    pairs = load_pairs(files)
    verdict = judge(floors, pairs, confidence or asked.get("confidence") or CONFIDENCE)
    made = record(verdict, floors, pairs)
    if place is not None:
        write_json(place, made)
    print_json(made)
    rows = [
        {"ability": one.ability, "measure": one.measure, "items": one.items,
         "kept %": words.percent(one.kept), "proven %": proven(one.bound),
         "asked %": words.percent(one.floor), "": "kept" if one.passed else "not kept"}
        for one in verdict.tested
    ]  # fmt: skip
    dense, pruned = pairs[0]
    print_table(rows, title=f"{pruned.model} against {dense.model}", least=["measure", "items"])
    for said in verdict.lines():
        line(words.wrapped(said))
    if place is not None:
        note(f"wrote {place}")
    if carded:
        note(f"next: calmix report {folders[0]} puts it on the card")
    if not verdict.passed:
        raise typer.Exit(1)


def _measured(folder: Path) -> tuple[Path, ...]:
    """Return the files of scores in a folder of `calmix compress`."""
    from calmix.compression.plan import BEHAVIOUR, SCORES
    from calmix.evaluation.behaviour import answered

    scores, answers = folder / SCORES, folder / BEHAVIOUR
    if not scores.exists():
        raise InputError(f"{folder} is not finished: it lacks {scores.name}; run its calmix "
                         "compress again")  # fmt: skip
    if answers.exists():
        return (answers,)
    if not any(map(answered, load_scores(scores).tasks)):
        note(f"what the model writes was not measured: {answers} is missing (calmix report shows "
             "how)")  # fmt: skip
    return (scores,)
