"""What must be kept: floors of retention by ability, tested one-sided. Pure functions over scores.

An ability is judged by the first measure that its suites hold:

    generated answers   of those the dense model gets right, the share still right; exact lower
                        bound of a binomial share (Clopper and Pearson 1934)
    accuracy            of choices above chance, tasks with signal pooled; quantile of the bootstrap
                        over the items and one more that is lost (ours: without it the bound is too
                        high where few are lost; with it, it is within an item of the exact one)
    likelihood          retention of the primary score; quantile of the bootstrap

No bound is above what as many items would prove if all were kept. All abilities must pass, so the
number of them needs no correction (intersection-union test, Berger 1982).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from calmix.errors import InputError
from calmix.evaluation.behaviour import FEW, Pair, TaskPair, check_pairs, counted, held
from calmix.evaluation.measures import RIGHT_OR_WRONG, Measure, has_signal, parts
from calmix.evaluation.records import TaskScores
from calmix.evaluation.retention import retention
from calmix.evaluation.scores import CapabilityScores
from calmix.evaluation.suites import WRITTEN
from calmix.manifest import sealed, versions
from calmix.options import parse_share

CONFIDENCE = 0.95
FILE = "check.json"  # in a folder of calmix compress: a verdict of `calmix check`
FLAG = "--keep-at-least"
ANSWERS, ACCURACY, LIKELIHOOD = "generated answers", "accuracy", "likelihood"
FITS: dict[str, Callable[[TaskScores], bool]] = {
    ANSWERS: lambda task: bool(task.values) and task.metric in WRITTEN,
    ACCURACY: lambda task: bool(task.values) and task.metric not in WRITTEN,
    LIKELIHOOD: lambda task: task.primary not in RIGHT_OR_WRONG,
}


@dataclass(frozen=True)
class Expected:
    """What can be proven of an ability at best, from the dense model's scores alone.

    `measure` is None without signal; `items` are those the dense model gets right, all of them for
    likelihood; `needed` of them prove the floor if all are kept, and `provable` is the highest
    floor that those there are can prove.
    """

    ability: str
    measure: str | None
    floor: float
    items: int
    needed: int
    provable: float

    @property
    def possible(self) -> bool:
        """Whether the floor can be proven at all."""
        return self.measure is not None and self.provable >= self.floor


@dataclass(frozen=True)
class Tested:
    """An ability's floor against what is kept: a share, and its lower bound at the confidence."""

    ability: str
    measure: str
    floor: float
    items: int
    kept: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the bound reaches the floor."""
        return self.bound >= self.floor

    @property
    def basis(self) -> str:
        """What the bound rests on, in words."""
        of = {ANSWERS: ANSWERS, ACCURACY: "right choices"}.get(self.measure, "items by likelihood")
        return f"{self.items} {of}"


@dataclass(frozen=True)
class Verdict:
    """Whether a model keeps what it must; abilities without signal are `untested`, tasks that run
    code may be `not_run`."""

    confidence: float
    tested: tuple[Tested, ...]
    untested: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every ability is proven to keep its floor."""
        return all(one.passed for one in self.tested)

    @property
    def promise(self) -> str:
        """One line: what is proven of which abilities, or which are not."""
        sure = f"{100 * self.confidence:g} % confidence"
        if self.passed:
            kept = ", ".join(f"{one.ability} {100 * one.floor:g} % ({one.basis})"
                             for one in self.tested)  # fmt: skip
            return (
                f"Kept at {sure}, at least: {kept}. This holds for items like these and for this "
                "checkpoint; another draw of calibration text may keep more or less."
            )
        missed = ", ".join(
            f"{one.ability} (keeps {_percent(one.kept)}, proven {_percent(one.bound)}, asked "
            f"{100 * one.floor:g} %; {one.basis}"
            f"{'; more items may prove it' * (one.kept > one.floor)})"
            for one in self.tested if not one.passed
        )  # fmt: skip
        return f"Not kept at {sure}: {missed}. This holds for items like these and this checkpoint."

    def lines(self) -> list[str]:
        """Return the promise, and what was left out of it."""
        said = [self.promise]
        if self.untested:
            said.append(f"Not tested, the dense model has no signal: {', '.join(self.untested)}.")
        if self.not_run:
            said.append(
                f"Not run: {', '.join(self.not_run)} (--allow-code-execution runs them); their "
                "ability is judged by its other tasks."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable data."""
        rows = [asdict(one) | {"passed": one.passed} for one in self.tested]
        told = {"tested": rows, "untested": [*self.untested], "not_run": [*self.not_run]}
        return asdict(self) | told | {"passed": self.passed, "lines": self.lines()}


def record(verdict: Verdict, floors: Mapping[str, float], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return what a check leaves as a file, sealed by its hash."""
    dense, pruned = pairs[0]
    return sealed({
        "kind": "check", "floors": dict(floors), **verdict.to_dict(),
        "model": pruned.fingerprint, "dense": dense.fingerprint,
        "suites": [one.suite for _, one in pairs], "versions": versions(),
    })  # fmt: skip


def parse_floors(text: str) -> dict[str, float]:
    """Return floors by ability from `0.9`, `code=0.9,general=80%` or both; key "" is the floor of
    every ability with signal that is not named.

    Raises:
        InputError: a floor is not between 0 and 1, an ability is named twice, or the form is
            another.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.rpartition("="))
        if not value or bool(equals) != bool(name):
            form = "0.9 or ABILITY=0.9,..."
            raise InputError(f"{FLAG} '{text}': '{part.strip()}' is not of the form {form}")
        if name in found:
            raise InputError(f"{FLAG} '{text}' gives {name or 'a floor of all abilities'} twice")
        try:
            found[name] = parse_share(value)
        except ValueError as error:
            raise InputError(f"{FLAG} '{text}': {error}") from None
        if not 0 < found[name] < 1:
            raise InputError(f"{FLAG} '{text}': a floor is between 0 and 1, such as 0.9, "
                             f"not {value}")  # fmt: skip
    return found


def needed(floor: float, confidence: float = CONFIDENCE) -> int:
    """Return how many right answers prove a floor if all are kept."""
    return math.ceil(math.log(1 - confidence) / math.log(floor) - 1e-9)


def provable(items: int, confidence: float = CONFIDENCE) -> float:
    """Return the highest floor that so many right answers prove if all are kept."""
    return float((1 - confidence) ** (1 / items)) if items else 0.0


def lower_bound(kept: int, of: int, confidence: float = CONFIDENCE) -> float:
    """Return the exact one-sided lower bound of a share of items (Clopper and Pearson 1934)."""
    from scipy.special import betaincinv

    return float(betaincinv(kept, of - kept + 1, 1 - confidence)) if kept else 0.0


def expected(
    floors: Mapping[str, float],
    dense: Sequence[CapabilityScores],
    confidence: float = CONFIDENCE,
) -> tuple[Expected, ...]:
    """Return what can be proven at best of every ability with a floor, from the dense model's
    scores on one or several suites.

    Raises:
        InputError: an ability is asked for that no suite has.
    """
    return tuple(one for one, _ in _planned(floors, [(one, one) for one in dense], confidence))


def judge(
    floors: Mapping[str, float], pairs: Sequence[Pair], confidence: float = CONFIDENCE
) -> Verdict:
    """Test whether a pruned model keeps at least the floors of `parse_floors`.

    `pairs` are (dense, pruned) scores on one or several suites, 0.5 < confidence < 1.

    Raises:
        InputError: an ability is asked for that no suite has, that the dense model has no signal
            in, or whose items are too few to prove the floor even if all are kept.
    """
    check_pairs(pairs)
    planned = _planned(floors, pairs, confidence)
    check_possible([one for one, _ in planned], floors, confidence)
    tested, untested = [], []
    for one, tasks in planned:
        if one.measure is None:
            untested.append(one.ability)
        else:
            kept, bound = _bounded(one, tasks, confidence)
            tested.append(Tested(one.ability, one.measure, one.floor, one.items, kept, bound))
    run = {task.name for dense, _ in pairs for task in dense.tasks if task.values}
    missing = (name for _, pruned in pairs for name in pruned.not_run if name not in run)
    return Verdict(confidence, tuple(tested), tuple(untested), tuple(dict.fromkeys(missing)))


def check_possible(
    found: Sequence[Expected], floors: Mapping[str, float], confidence: float = CONFIDENCE
) -> None:
    """Refuse floors that nothing could prove, with the nearest that can be proven."""
    silent = [one.ability for one in found if one.measure is None]
    if named := [name for name in silent if name in floors]:
        raise InputError(
            f"{FLAG} {named[0]}={floors[named[0]]:g}: the dense model has no signal in {named[0]}, "
            "so nothing can be proven to be kept: leave it out, or evaluate more items"
        )
    if len(silent) == len(found):
        raise InputError("the dense model has no signal in any ability: evaluate more items")
    if few := [one for one in found if one.measure and not one.possible]:
        short = ", ".join(
            f"{one.ability}={one.floor:g} needs {one.needed} "
            f"{'items' if one.measure == LIKELIHOOD else 'right answers'} and has {one.items}"
            for one in few
        )
        nearest = dict(floors) | {one.ability: math.floor(100 * one.provable) / 100 for one in few}
        asked = ",".join(f"{name}={floor:g}" if name else f"{floor:g}"
                         for name, floor in nearest.items())  # fmt: skip
        raise InputError(
            f"{FLAG} cannot be proven at {100 * confidence:g} % confidence even if all is kept: "
            f"{short}; evaluate more items, or ask for {FLAG} {asked}"
        )


def _planned(
    floors: Mapping[str, float], pairs: Sequence[Pair], confidence: float
) -> list[tuple[Expected, list[TaskPair]]]:
    """Return by which tasks every ability with a floor is judged, and what they could prove."""
    tasks = {measure: held(pairs, fits) for measure, fits in FITS.items()}
    known = list(dict.fromkeys(one[0].dimension for some in tasks.values() for one in some))
    for name in floors:
        if name and name not in known:
            left = {task for both in pairs for one in both for task in one.not_run}
            more = f" (not run without --allow-code-execution: {', '.join(sorted(left))})"
            raise InputError(f"{FLAG} names '{name}', which the scores lack: they have "
                             f"{', '.join(known)}{more if left else ''}")  # fmt: skip
    planned = []
    for ability in known if "" in floors else [name for name in known if name in floors]:
        floor = floors.get(ability, floors.get("", 0.0))
        for measure, of in tasks.items():
            score: Measure = "accuracy" if measure == ACCURACY else "primary"
            some = [one for one in of if one[0].dimension == ability
                    and (measure == ANSWERS or has_signal(one[0], score))]  # fmt: skip
            if some:
                planned.append((_at_best(ability, measure, floor, some, confidence), some))
                break
        else:
            planned.append((Expected(ability, None, floor, 0, needed(floor, confidence), 0.0), []))
    return planned


def _at_best(
    ability: str, measure: str, floor: float, tasks: Sequence[TaskPair], confidence: float
) -> Expected:
    dense = [before for before, _ in tasks]
    if measure == LIKELIHOOD:
        items = whole = float(sum(len(task.items) for task in dense))
    else:
        items = whole = math.fsum(value for task in dense for value in task.values)
    if measure == ACCURACY:  # a right answer counts for more than one above chance
        whole = math.fsum(float(parts(task, task, "accuracy").whole.sum()) for task in dense)
    if measure == ANSWERS and items < FEW:
        return Expected(ability, None, floor, round(items), needed(floor, confidence), 0.0)
    each = items / whole
    best = 1 - each * (1 - provable(round(items), confidence))
    strict = max(1 - (1 - floor) / each, 1e-9)
    known = measure if best >= 0.01 else None
    return Expected(ability, known, floor, round(items), needed(strict, confidence), best)


def _bounded(one: Expected, tasks: Sequence[TaskPair], confidence: float) -> tuple[float, float]:
    """Return the share that is kept and its lower bound."""
    if one.measure == ANSWERS:
        count = counted(one.ability, tasks)
        assert count is not None
        return count.kept / count.dense, lower_bound(count.kept, count.dense, confidence)
    level = 2 * confidence - 1
    if one.measure == ACCURACY:
        made = [parts(*both, "accuracy") for both in tasks]
        value = sum(some.kept.sum() for some in made) / sum(some.whole.sum() for some in made)
        drawn = retention(
            *zip(*_one_more_lost(tasks), strict=True), measure="accuracy", level=level
        )
        low = drawn.of(one.ability).low
    else:
        kept = retention(*zip(*tasks, strict=True), level=level).of(one.ability)
        value, low = kept.value, kept.low
    assert value is not None
    assert low is not None
    return float(value), min(low, one.provable)


def _one_more_lost(tasks: Sequence[TaskPair]) -> list[TaskPair]:
    """Return choices with one more, in the largest task, that is right and then wrong."""
    most = max(tasks, key=lambda both: len(both[0].items))

    def more(task: TaskScores, value: float) -> TaskScores:
        return replace(task, items=(*task.items, ""), values=(*task.values, value))

    return [(more(both[0], 1.0), more(both[1], 0.0)) if both is most else both for both in tasks]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
