"""Minimum retention by ability (floors), tested one-sided. Pure functions over scores.

Each ability is judged by the first of these measures in which the dense model has signal:

    generated answers   right answers relative to the dense model's, pooled over tasks
    accuracy            accuracy above chance, pooled over tasks
    likelihood          mean retention of the primary score over tasks

The bound is `lower_mean`. Its one more item is lost or, by likelihood, loses as much as the worst,
or all that a mean item has (`LOST` times that in `bits`, which `smoothed` bounds and nothing else
does). A bound never exceeds what the same number of items proves if nothing is lost, and is that
then. All abilities must pass, so their number needs no correction (intersection-union test, Berger
1982).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np

from calmix.errors import InputError
from calmix.evaluation import behaviour
from calmix.evaluation.behaviour import Pair
from calmix.evaluation.measures import Array, Measure, TaskPair, has_signal, parts
from calmix.evaluation.retention import RESAMPLES
from calmix.evaluation.scores import CapabilityScores
from calmix.manifest import sealed, versions
from calmix.options import parse_share

CONFIDENCE = 0.95
FILE = "check.json"  # result of `calmix check` in an output folder of calmix compress
FLAG = "--keep-at-least"
LOST = 3.0  # times what a mean item has: the loss of one more item in bits, which have no limit
MOST = 2 * 10**5  # resamples
ANSWERS, ACCURACY, LIKELIHOOD = "generated answers", "accuracy", "likelihood"
# The field of tasks that a measure applies to, the score it uses, and what its items are called.
MEASURES: dict[str, tuple[str, Measure, str]] = {
    ANSWERS: ("written", "accuracy", "right answers"),
    ACCURACY: ("chosen", "accuracy", "right choices"),
    LIKELIHOOD: ("likely", "primary", "items by likelihood"),
}


@dataclass(frozen=True)
class TestedFloor:
    """The test of one ability: its floor, the retention `kept` and the lower `bound` of it.

    `items` counts those the dense model gets right (for likelihood, all). `needed` is how many
    would prove the floor if all were kept, and `provable` the highest floor that `items` can prove.
    `lost` and `gained` count items that only one model gets right; None by likelihood. `called` is
    what the items are; `silent` are tasks left out because the dense model has no signal in them.
    """

    ability: str
    measure: str
    floor: float
    items: int
    needed: int
    provable: float
    kept: float
    bound: float
    called: str
    silent: list[str]
    lost: int | None = None
    gained: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the lower bound reaches the floor."""
        return self.bound >= self.floor

    @property
    def too_few(self) -> bool:
        """Whether the items cannot prove the floor even if all are kept."""
        return self.provable < self.floor

    @property
    def lack(self) -> str:
        """How many items the floor needs, and what those there are can prove."""
        what = "items" if self.measure == LIKELIHOOD else self.called
        least = math.floor(100 * self.provable) / 100
        most = f"at most {least:g}" if least > 0 else "nothing"
        return (
            f"{self.ability}={self.floor:g} needs {self.needed} {what} and has {self.items}, which "
            f"can prove {most}"
        )

    @property
    def counts(self) -> str:
        """The items behind the bound, as text."""
        text = f"{self.items} {self.called}"
        if self.lost is not None:
            text = f"{self.lost} of {text} lost, {self.gained} gained"
        return f"{text}, by accuracy above chance" if self.measure == ACCURACY else text

    @property
    def text(self) -> str:
        """What is kept and proven, and how many items are enough to prove the floor at this rate:
        a bound comes nearer at least as fast as the root of their number grows."""
        if self.too_few:
            return f"{self.lack}: evaluate more items"
        text = (
            f"{self.ability} keeps {100 * self.kept:.1f} % ({self.counts}), proven "
            f"{proven(self.bound)} %, required {100 * self.floor:g} %"
        )
        if self.kept <= self.floor or self.passed:
            return text
        many = self.items * ((self.kept - self.bound) / (self.kept - self.floor)) ** 2
        step = 10 ** max(0, math.floor(math.log10(many)) - 1)
        return f"{text}: about {step * math.ceil(many / step):,} such items are enough"


@dataclass(frozen=True)
class CheckResult:
    """Whether a model keeps every floor, with the abilities `untested` for lack of signal and the
    tasks `not_run` because they run code; `draws` is the number of calibration samples tested."""

    confidence: float
    tested: tuple[TestedFloor, ...]
    untested: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()
    draws: int = 1

    @property
    def passed(self) -> bool:
        """Whether every ability provably keeps its floor."""
        return all(one.passed for one in self.tested)

    def lines(self) -> list[str]:
        """Summarise: abilities proven or missed, then those left out."""
        sure = f"{100 * self.confidence:g} % confidence"
        if self.passed:
            proofs = ", ".join(
                f"{one.ability} {100 * one.floor:g} % ({one.counts})" for one in self.tested
            )
            others = "another sample of calibration text may keep more or less"
            if self.draws > 1:
                others = f"the models of all {self.draws} samples of calibration text keep it"
            lines = [
                f"Kept at {sure}, at least: {proofs}. This holds for items like these and for "
                f"this checkpoint; {others}."
            ]
        else:
            missed = [one for one in self.tested if not one.passed]
            which = "Not proven" if all(one.too_few for one in missed) else "Not kept"
            lines = [
                f"{which} at {sure}: {'; '.join(one.text for one in missed)}. This holds for items "
                "like these and this checkpoint."
            ]
        if silent := [name for one in self.tested for name in one.silent]:
            lines.append(f"Left out (no signal in the dense model): {', '.join(silent)}.")
        if self.untested:
            lines.append(f"Not tested (no signal in the dense model): {', '.join(self.untested)}.")
        if self.not_run:
            lines.append(
                f"Not run: {', '.join(self.not_run)} (--allow-code-execution runs them); their "
                "abilities are judged by other tasks, if any."
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable data."""
        rows = [asdict(one) | {"passed": one.passed, "text": one.text} for one in self.tested]
        lists = {"tested": rows, "untested": [*self.untested], "not_run": [*self.not_run]}
        return asdict(self) | lists | {"passed": self.passed, "lines": self.lines()}


def record(
    result: CheckResult, floors: Mapping[str, float], pairs: Sequence[Pair]
) -> dict[str, Any]:
    """Return the content of a check's file, sealed by its hash."""
    dense, pruned = pairs[0]
    return sealed(
        {
            "kind": "check",
            "floors": dict(floors),
            **result.to_dict(),
            "model": pruned.fingerprint,
            "dense": dense.fingerprint,
            "suites": [one.suite for _, one in pairs],
            "versions": versions(),
        }
    )


def parse_floors(text: str) -> dict[str, float]:
    """Parse floors by ability: `0.9`, `code=0.9,general=80%` or both. The key "" is the floor of
    all other abilities with signal.

    Raises:
        InputError: a floor is not between 0 and 1, an ability is named twice, or the syntax is
            wrong.
    """
    floors: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.rpartition("="))
        try:
            if not value or bool(equals) != bool(name):
                raise ValueError(f"'{part.strip()}' is not of the form 0.9 or ABILITY=0.9,...")
            if name in floors:
                raise ValueError(f"{name or 'the floor of all abilities'} is given twice")
            floors[name] = parse_share(value)
            if not 0 < floors[name] < 1:
                raise ValueError(f"a floor must be between 0 and 1, e.g. 0.9, not {value}")
        except ValueError as error:
            raise InputError(f"{FLAG} '{text}': {error}") from None
    return floors


def items_needed(floor: float, confidence: float = CONFIDENCE) -> int:
    """Return how many right answers prove a floor if all of them are kept."""
    return math.ceil(math.log(1 - confidence) / math.log(floor) - 1e-9)


def proven(bound: float) -> str:
    """Format a lower bound in per cent, rounded down so that it never overstates."""
    return f"{math.floor(1000 * bound + 1e-9) / 10:.1f}"


def lower_bound(retained: int, of: int, confidence: float = CONFIDENCE) -> float:
    """Return the exact one-sided lower bound of a proportion (Clopper and Pearson 1934). With all
    kept, it is the highest floor that so many right answers prove."""
    from scipy.special import betaincinv

    return float(betaincinv(retained, of - retained + 1, 1 - confidence)) if retained else 0.0


def random_weights(counts: tuple[float, ...]) -> Array:
    """Return random weights of items that occur so often, uniform but for their sum, shape
    (resamples, items). The fewer differ, the more resamples."""
    resamples = min(round(RESAMPLES * sum(counts) / len(counts)), MOST)
    return np.random.default_rng(0).gamma(counts, size=(resamples, len(counts)))


def lower_mean(
    tasks: Sequence[tuple[Array, Array]],
    lost: Sequence[Array],
    confidence: float = CONFIDENCE,
    counts: Sequence[Array] | None = None,
) -> Array:
    """Return a one-sided lower bound of the mean retention of tasks, shape (models,).

    Each task has its `retained` and `whole`, of shape (models, items), and may have `counts` of
    equal items, of shape (items,). The bound is a quantile over random weights of the items and of
    one more, in the task where it does most harm; `lost` is what it loses there, of shape (models,)
    by task, of the mean of the items that either model has. It is Gaffke's bound of a mean (2005),
    which is that of Clopper and Pearson if nothing is gained.
    """
    counts = counts or [np.ones(whole.shape[1]) for _, whole in tasks]
    weights = random_weights((1.0, *np.concatenate(counts)))
    by_task = np.split(weights[:, 1:], np.cumsum([len(many) for many in counts])[:-1], axis=1)
    sums = [whole @ many for (_, whole), many in zip(tasks, counts, strict=True)]
    harm = [most / of for of, most in zip(sums, lost, strict=True)]
    ratios = []
    for at, ((retained, whole), many) in enumerate(zip(tasks, counts, strict=True)):
        more = weights[:, :1] * (np.argmax(harm, 0) == at)
        mean = sums[at] / np.maximum(1, ((retained != 0) | (whole != 0)) @ many)
        of = by_task[at] @ whole.T + more * mean
        left = by_task[at] @ retained.T + more * (mean - lost[at])
        ratios.append(np.divide(left, of, out=np.full_like(of, np.nan), where=of > 0))
    return np.nanquantile(np.mean(ratios, 0), 1 - confidence, axis=0)


def most_lost(retained: Array, whole: Array, times: float = 1.0) -> Array:
    """Return what one more item may lose by likelihood, shape (models,)."""
    return np.maximum(times * whole.mean(1), (whole - retained).max(1))


def check_floors(
    floors: Mapping[str, float], pairs: Sequence[Pair], confidence: float = CONFIDENCE
) -> CheckResult:
    """Test whether a pruned model keeps the floors of `parse_floors`.

    `pairs` are (dense, pruned) scores on one or several suites; 0.5 < confidence < 1.

    Raises:
        InputError: a named ability is in no suite, or the dense model has no signal in it.
    """
    tasks = {
        measure: behaviour.common_tasks(pairs, field) for measure, (field, *_) in MEASURES.items()
    }
    known = list(dict.fromkeys(one[0].dimension for some in tasks.values() for one in some))
    if unknown := [name for name in floors if name and name not in known]:
        left = ", ".join(behaviour.not_run(pairs))
        more = f" (not run without --allow-code-execution: {left})" if left else ""
        raise InputError(
            f"{FLAG} names '{unknown[0]}', which the scores lack: they have "
            f"{', '.join(known)}{more}"
        )
    chosen = known if "" in floors else [name for name in known if name in floors]
    tests = {
        name: _judged(name, floors.get(name, floors.get("", 0.0)), tasks, confidence)
        for name in chosen
    }
    tested = tuple(one for one in tests.values() if one is not None)
    silent = tuple(name for name, one in tests.items() if one is None)
    if named := [name for name in silent if name in floors]:
        raise InputError(
            f"{FLAG} {named[0]}={floors[named[0]]:g}: the dense model has no signal in {named[0]}, "
            "so retention cannot be proven: leave it out, or evaluate more items"
        )
    if not tested:
        raise InputError("the dense model has no signal in any ability: evaluate more items")
    return CheckResult(confidence, tested, silent, behaviour.not_run(pairs))


def check_provable(
    floors: Mapping[str, float], dense: Sequence[CapabilityScores], confidence: float
) -> None:
    """Raise an `InputError` if the dense model has too few items to prove a floor even if all are
    kept."""
    tested = check_floors(floors, [(one, one) for one in dense], confidence).tested
    if few := [one.lack for one in tested if one.too_few]:
        raise InputError(
            f"{FLAG} cannot be proven at {100 * confidence:g} % confidence even if all is kept: "
            f"{'; '.join(few)}: lower the floor, or evaluate more items"
        )


def _judged(
    ability: str,
    floor: float,
    tasks: Mapping[str, Sequence[TaskPair]],
    confidence: float,
) -> TestedFloor | None:
    """Test an ability by the first measure with signal; None if there is none."""
    for measure, (_, score, _) in MEASURES.items():
        of = [both for both in tasks[measure] if both[0].dimension == ability]
        pairs = [both for both in of if has_signal(both[0], score)]
        if pairs:
            break
    else:
        return None
    scored = [parts(*both, score) for both in pairs]
    called = MEASURES[measure][2]
    each, changed = 1.0, dict[str, int]()  # `each`: what a lost item loses, in mean items
    if measure == LIKELIHOOD:
        rows = [(one.kept[None], one.whole[None]) for one in scored]
        many: list[Array] = [np.ones(len(one.whole)) for one in scored]
        items = sum(len(before.items) for before, _ in pairs)
        each = LOST if any(before.primary == "bits" for before, _ in pairs) else 1.0
        most = [most_lost(*row, each) for row in rows]
    else:
        pooled = np.hstack([np.stack([one.kept, one.whole]) for one in scored])
        (retained, whole), equal = np.unique(pooled, axis=1, return_counts=True)
        rows, many, most = [(retained[None], whole[None])], [equal.astype(float)], [np.ones(1)]
        count = behaviour.paired(ability, behaviour.item_pairs(pairs, "values"))
        items, changed = count.dense, {"lost": count.lost, "gained": count.gained}
        each = items / float(whole @ equal)
        own = chain.from_iterable(dense.properties for dense, _ in pairs if dense.prompts)
        if any("right" not in one for one in own):
            called = "good answers"
    best = 1 - each * (1 - lower_bound(items, items, confidence))
    if best < 0.01 and measure != LIKELIHOOD:
        return None
    low = best
    if any((retained < whole).any() for retained, whole in rows):
        low = min(best, float(lower_mean(rows, most, confidence, many)[0]))
    shares = [
        (retained @ of / (whole @ of))[0] for (retained, whole), of in zip(rows, many, strict=True)
    ]
    return TestedFloor(
        ability,
        measure,
        floor,
        items,
        items_needed(max(1 - (1 - floor) / each, 1e-9), confidence),
        best,
        float(np.mean(shares)),
        low,
        called,
        [both[0].name for both in of if both not in pairs],
        **changed,
    )
