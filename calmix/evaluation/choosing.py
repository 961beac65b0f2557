"""Which of several models to use: the smallest that is not worse than the best by a margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    none of known size is; `behind` is how far each one is behind the best, by name."""

    best: str
    smallest: str | None
    behind: dict[str, Estimate]
    margin: float

    @property
    def near(self) -> list[str]:
        """The models that are not worse than the best by more than the margin."""
        return [name for name, one in self.behind.items() if (one.high or 0.0) <= self.margin]


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
    choice = Choice(best, None, apart, margin)
    sizes = {one.name: one.size for one in candidates if one.size is not None}
    near = [name for name in choice.near if name in sizes]
    return replace(choice, smallest=min(near, key=sizes.__getitem__, default=None))
