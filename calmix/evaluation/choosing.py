"""Which of several models to use: the smallest that is not worse than the best by a margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calmix.evaluation.answers import Answers, compare_answers
from calmix.evaluation.behaviour import Counted, Pair, columns, common_tasks, deficit, paired
from calmix.evaluation.retention import Estimate

MARGIN = 0.05  # share of right answers by which a model may be worse


@dataclass(frozen=True)
class Candidate:
    """A model beside the dense one: `size` in bytes, `bits` per weight and `speed` in tokens per
    second are None where they are not known."""

    name: str
    pair: Pair
    size: int | None = None
    bits: float | None = None
    speed: float | None = None

    @property
    def values(self) -> list[tuple[float, float]]:
        """Whether each answer of the dense model and its own counts: is right, or without a check
        has no fault."""
        return columns(common_tasks([self.pair], "written"), "values")

    @property
    def counted(self) -> Counted:
        """Its answers that count beside the dense model's."""
        return paired("answers", self.values)

    @property
    def answers(self) -> Answers | None:
        """What changed in answers to a user's prompts."""
        return compare_answers(self.pair)


@dataclass(frozen=True)
class Choice:
    """The `smallest` model that is not worse than the `best` by more than the `margin`, None if
    none is; `behind` is how far each one is behind the best, by name."""

    best: str
    smallest: str | None
    behind: dict[str, Estimate]
    margin: float


def choose_smallest(candidates: Sequence[Candidate], dense: str, margin: float) -> Choice:
    """Choose among candidates of one dense model, which may be the best itself.

    A model is not worse if the upper end of the 95 % interval of its deficit is at most `margin`.
    """
    known = {one.name: [small for _, small in one.values] for one in candidates}
    all_of = {dense: [before for before, _ in candidates[0].values], **known}
    best = max(all_of, key=lambda name: sum(all_of[name]))
    apart = {
        name: deficit(paired(name, [*zip(all_of[best], values, strict=True)]))
        for name, values in known.items()
        if name != best
    }
    if best in known:
        apart[best] = Estimate(0.0, 0.0, 0.0)
    fine = [
        one
        for one in candidates
        if one.size is not None and (apart[one.name].high or 0.0) <= margin
    ]
    smallest = min(fine, key=lambda one: one.size or 0, default=None)
    return Choice(best, None if smallest is None else smallest.name, apart, margin)
