"""Which of several models to use: the smallest that is not worse than the best by a margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from calmix.evaluation.answers import Answers, compare_answers
from calmix.evaluation.behaviour import Counted, Pair, TaskPair, answered, behind, held, paired
from calmix.evaluation.retention import Estimate

MARGIN = 0.05  # share of right answers by which a model may be worse


@dataclass(frozen=True)
class Candidate:
    """A model beside the dense one: `size` in bytes, its number of `weights` and its `speed` in
    tokens per second are None where they are not known."""

    name: str
    pair: Pair
    size: int | None = None
    weights: int | None = None
    speed: float | None = None

    @property
    def bits(self) -> float | None:
        """Bits per weight of its file."""
        return 8 * self.size / self.weights if self.size and self.weights else None

    @property
    def values(self) -> list[float]:
        """Whether each of its answers counts: is right, or without a check has no fault."""
        return [*chain.from_iterable(small.values for _, small in self.tasks)]

    @property
    def counted(self) -> Counted:
        """Its answers that count beside the dense model's."""
        dense = chain.from_iterable(before.values for before, _ in self.tasks)
        return paired("answers", [*zip(dense, self.values, strict=True)])

    @property
    def answers(self) -> Answers | None:
        """What changed in answers to a user's prompts."""
        return compare_answers(self.pair)

    @property
    def tasks(self) -> list[TaskPair]:
        """The tasks with generated answers."""
        return held([self.pair], answered)


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
    known = {one.name: one.values for one in candidates}
    before = [*chain.from_iterable(task.values for task, _ in candidates[0].tasks)]
    all_of = {dense: before, **known}
    best = max(all_of, key=lambda name: sum(all_of[name]))
    apart = {name: behind(all_of[best], values) for name, values in known.items()}
    fine = [
        one
        for one in candidates
        if one.size is not None and (apart[one.name].high or 0.0) <= margin
    ]
    smallest = min(fine, key=lambda one: one.size or 0, default=None)
    return Choice(best, None if smallest is None else smallest.name, apart, margin)
