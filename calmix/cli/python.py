"""`calmix.compress`: the verb as a function, and what it gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmix.cli.compress import make
from calmix.errors import NotKeptError
from calmix.options import Compression, checked
from calmix.shown import Shown, percent

if TYPE_CHECKING:
    from calmix.evaluation.retention import Retention
    from calmix.report.card import Card


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
        from calmix.evaluation.scores import load_pairs

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
    given = {"model": model, **options}
    given = {key: str(one) if isinstance(one, Path) else one for key, one in given.items()}
    asked, folder = checked(Compression, given), Path(output)
    found, _ = make(asked, folder, shown=shown)
    if found is not None and found.bits is None:
        yet = " yet" * bool(found.left)
        raise NotKeptError(f"no candidate keeps {asked.keep_at_least}{yet}: {found.why()}")
    return Compressed(folder)
