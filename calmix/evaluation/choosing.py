"""Which of several models to use: the smallest that is not worse than the best by a margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from calmix import words
from calmix.evaluation.answers import Answers, compare_answers
from calmix.evaluation.behaviour import (
    Counted,
    Pair,
    common_tasks,
    deficit,
    item_pairs,
    paired,
    proportion,
    repeat_pairs,
)
from calmix.evaluation.retention import Estimate
from calmix.evaluation.scores import CapabilityScores

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
        return item_pairs(common_tasks([self.pair], "written"), "values")

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


def comparable(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates with only the tasks in which all of them, and the dense model, generated
    answers; none if there is no such task."""
    tasks = (common_tasks([one.pair], "written") for one in candidates)
    shared = set[str].intersection(*({before.name for before, _ in some} for some in tasks))

    def part(scores: CapabilityScores) -> CapabilityScores:
        some, repeat = (
            tuple(task for task in of if task.name in shared)
            for of in (scores.tasks, scores.repeat)
        )
        return replace(scores, tasks=some, repeat=repeat)

    pairs = ((part(dense), part(small)) for dense, small in (one.pair for one in candidates))
    return [replace(one, pair=pair) for one, pair in zip(candidates, pairs, strict=True) if shared]


def choose_smallest(candidates: Sequence[Candidate], dense: str, margin: float) -> Choice:
    """Choose among `comparable` candidates of one dense model, which may be the best itself.

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


def model_rows(candidates: Sequence[Candidate], choice: Choice) -> list[dict[str, Any]]:
    """Return the rows of the table of several models, the smallest first, and last the dense
    model and its own repeat."""
    rows = list[dict[str, Any]]()
    timed = any(one.speed for one in candidates)  # servers are
    pair = candidates[0].pair
    dense = [Candidate("dense", (pair[0], pair[0]))]
    repeated = [Candidate("dense, again", one) for one in repeat_pairs([pair])]
    ordered = sorted(candidates, key=lambda one: one.size or math.inf)
    for one in (*ordered, *dense, *repeated):
        counts, changed, distance = one.counted, one.answers, one.pair[1].distance
        if one in dense:
            good = words.with_span(proportion(counts.pruned, counts.asked))
            best = {} if choice.best in choice.behind else {"#behind best": "0.0"}
            rows.append({**dict.fromkeys(rows[0]), "model": one.name, "#good %": good, **best})
            continue
        rows.append(
            {
                "model": one.name,
                "#MB": one.size and words.megabytes(one.size),
                "#bits": one.bits and f"{one.bits:.2f}",
                **({"#tokens/s": one.speed and f"{one.speed:.0f}"} if timed else {}),
                "#good %": words.with_span(proportion(counts.pruned, counts.asked)),
                "#lost": counts.lost,
                "#gained": counts.gained,
                "#p": words.p_value(counts.p),
                "#behind best": "0.0"
                if one.name == choice.best
                else words.with_span(choice.behind.get(one.name)),
                "#identical %": changed and words.with_span(changed.identical),
                "#KL": distance and words.number(distance["total"]["kl_mean"]),
            }
        )
    return rows


def choice_text(candidates: Sequence[Candidate], choice: Choice) -> str:
    """Return which model to use, and what that rests on."""
    margin, best = f"{words.percent(choice.margin)} points", choice.best
    sizes = {one.name: one.size for one in candidates if one.size is not None}
    unknown = [one.name for one in candidates if one.name not in sizes]
    if choice.smallest is None and choice.near:
        text = (
            f"Not worse than the best ({best}) by {margin} or more: {words.listed(choice.near)}. "
        )
        text += "Which is the smallest is not known."
    elif choice.smallest is None:
        nearest, apart = min(choice.behind.items(), key=lambda one: one[1].value or 0.0)
        text = f"No model is shown to be within {margin} of the best ({best}). Nearest is "
        text += f"{nearest}, {words.percent(apart.value)} behind, at most "
        text += f"{words.percent(apart.high)}: use a larger one, or ask more prompts."
    elif choice.smallest == best == min(sizes, key=lambda name: sizes[name]):
        text = f"Use {best}: the best, and the smallest."
    elif choice.smallest == best:
        text = f"Use {best}: the best; no smaller one is shown to be within {margin} of it."
        open_ = [
            f"{name} ({words.with_span(apart)} behind)"
            for name, apart in choice.behind.items()
            if sizes.get(name, math.inf) < sizes[best] and (apart.low or 0.0) <= 0
        ]
        if open_:
            text += f" Nor shown to be worse: {words.listed(open_)}; more prompts would tell."
    else:
        name = choice.smallest
        text = f"Use {name}: the smallest that is not worse than the best ({best}) by {margin}"
        text += f" or more; at most {words.percent(choice.behind[name].high)} behind."
    if unknown:
        text += f" Size unknown: {words.listed(unknown)}."
    changed = candidates[0].answers
    if changed is not None and changed.right is None:
        text += " No prompt has an answer or a check, so this rests on faults alone."
    return text


def short_names(models: Sequence[str]) -> list[str]:
    """Return names of models for columns: addresses of servers, and the shortest ends of paths that
    tell them apart."""
    for parts in range(1, max(map(len, models))):
        names = [
            one if "://" in one else "/".join(one.rstrip("/").split("/")[-parts:]) for one in models
        ]
        if len({*names}) == len(names):
            return names
    return [*models]
