"""Power: how small a difference of two calibration sets so many draws and items can tell.

A difference of two means of k draws each has, of the draws and of the items, the variance

    2 s^2 / k + v^2

s the standard deviation of one draw, pooled over sets, and v that of the paired difference over
other items; v^2 falls with the number of items. Two readings: on these items (v = 0), and for
other items too. A difference counts as told if its two-sided 95 % interval by Student's t leaves
out 0; *detectable* is what is told in 80 % of studies (noncentral t). The degrees of freedom are
those of s, and Satterthwaite's where items are part of the error. The s at hand is taken for the
true one, and its freedom as given: draws still to come would add some (ours: the safe side).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calmix.analysis.cells import select, tables
from calmix.analysis.statistics import LEVEL, scipy_stats
from calmix.evaluation.measures import Z
from calmix.study.results import StudyResults, Trial
from calmix.study.trials import Condition, Planned, condition_names

if TYPE_CHECKING:
    from calmix.analysis.noise import Noise

POWER = 0.80
Z_POWER = 0.8416212335729143  # normal quantile of it
MOST = 1_000_000  # draws beyond which none are counted; freedom beyond which t is normal


@dataclass(frozen=True)
class Needed:
    """What tells a difference.

    Attributes:
        difference: a share, as retention is (0.01 is a point).
        draws: of each set, for other draws on these items.
        draws_items: for other items too; None where no number of draws is enough.
        items: times the items at hand that are needed at the least, with however many draws.
    """

    difference: float
    draws: int
    draws_items: int | None
    items: float


def detectable(draws: int, draw: float, freedom: float, item: float = 0.0) -> float:
    """Return the difference that so many draws of each set tell in 80 % of studies.

    Args:
        draws: k, at least 1.
        draw: s, with its degrees of `freedom` (above 0).
        item: v; 0 for other draws on these items.
    """
    drawn = draw * math.sqrt(2 / draws)
    error = math.hypot(drawn, item)
    if error == 0:
        return 0.0
    share = (drawn / error) ** 2  # of the variance
    return _noncentrality(freedom / share**2 if share > 0 else math.inf) * error


def _noncentrality(freedom: float) -> float:
    """Return how many standard errors are told in 80 % of studies: 2.8 with much freedom."""
    if freedom >= MOST:
        return Z + Z_POWER
    stats = scipy_stats()
    critical = float(stats.t.ppf((1 + LEVEL) / 2, freedom))
    low, high = 0.0, 4 * critical  # freedom far below 1 would need more
    for _ in range(50):
        middle = (low + high) / 2
        enough = stats.nct.sf(critical, freedom, middle) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high


def needed(difference: float, draw: float, freedom: float, item: float) -> Needed:
    """Return the draws and items that tell a difference (above 0); arguments as `detectable`."""
    on_these = 2 * (_noncentrality(freedom) * draw / difference) ** 2
    times = ((Z + Z_POWER) * item / difference) ** 2
    return Needed(
        difference,
        max(1, math.ceil(on_these * (1 - 1e-12))),
        None if times >= 1 else _draws(difference, draw, freedom, item),
        times,
    )


def _draws(difference: float, draw: float, freedom: float, item: float) -> int | None:
    """Return the least k at which a difference is detectable; what is falls with k."""
    low, high = 0, 1
    while detectable(high, draw, freedom, item) > difference:
        low, high = high, 2 * high
        if low > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if detectable(middle, draw, freedom, item) > difference:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True)
class Power:
    """The noise of one quantity, and what tells each difference; none where no set has two
    draws."""

    noise: Noise
    needed: tuple[Needed, ...]


def power(noises: Iterable[Noise], differences: Sequence[float]) -> list[Power]:
    """Return what tells differences (shares) in each quantity."""
    return [
        Power(
            one,
            ()
            if one.draw is None
            else tuple(needed(d, one.draw, one.freedom, one.item or 0.0) for d in differences),
        )
        for one in noises
    ]


def noises(
    results: StudyResults,
    *,
    method: str | None = None,
    sparsity: str | None = None,
    measure: Any = "primary",
) -> list[Noise]:
    """Return the noise of every quantity under every condition of a study that calibrates.

    Raises:
        InputError: nothing has finished, or a method or sparsity it does not have.
    """
    trials = [t for t in select(results, method=method, sparsity=sparsity) if t.strategy != "none"]
    from calmix.analysis.bootstrap import joint
    from calmix.analysis.noise import noise_of

    return [
        one
        for cells in tables(results, trials, measure)
        for one in noise_of(cells, joint(cells, resamples=2, seed=0))  # noise needs no resamples
    ]


@dataclass(frozen=True)
class Reach:
    """What a planned condition will tell apart in the total, by the noise of an earlier study.

    Attributes:
        draws: of a set, as planned; one `Reach` for each number there is.
        on_these, with_items: detectable differences, shares, on these items and for others too;
            None where no set is planned with two draws, or the earlier study has no such noise.
    """

    condition: str
    draws: int
    on_these: float | None
    with_items: float | None


def reach(planned: Sequence[Planned], results: StudyResults) -> list[Reach]:
    """Return what planned trials will tell apart, by the noise that an earlier study found under
    the same condition (model by its label); degrees of freedom are those of the plan."""
    found = []
    groups: dict[Condition, Counter[str]] = {}
    for trial in planned:
        if trial.rows:
            groups.setdefault(trial.condition, Counter())[trial.calibration] += 1
    names = condition_names(groups)
    for condition, counts in groups.items():
        freedom = sum(count - 1 for count in counts.values())
        alike = tuple(trial for trial in results.trials if _condition(trial) == condition[:-1])
        own = noises(results.model_copy(update={"trials": alike})) if alike else []
        total = next((one for one in own if one.kind == "total" and one.draw is not None), None)
        for draws in sorted(set(counts.values())):
            on_these = with_items = None
            if total is not None and total.draw is not None and freedom:
                on_these = detectable(draws, total.draw, freedom)
                with_items = detectable(draws, total.draw, freedom, total.item or 0.0)
            found.append(Reach(names[condition], draws, on_these, with_items))
    return found


def _condition(trial: Trial) -> tuple[Any, ...]:
    """Return a trial's condition as `Planned.condition` has it, damping apart."""
    return (
        trial.model, trial.method, trial.pattern, trial.rows, trial.length, trial.propagation,
    )  # fmt: skip
