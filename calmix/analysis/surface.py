"""Retention as a function of the mix: surfaces fitted to a study's mixes of sources, how far they
err on mixes they have not seen, and the mix they expect most of. Pure functions.

A set is a point of the simplex, its sources' shares; sources whose shares are always in one
proportion count as one component, and so do those that are put together. Forms, for the lost part
L = 1 - retention and the shares r:

* `mean`: the same everywhere, for comparison;
* `linear`: L = b . r, the linear regression of RegMix (arXiv 2407.01492);
* `exponential`: L = c + exp(t . r), the data mixing law (arXiv 2403.16952, section 3);
* `saturating` (ours): the same law of g(r) = log(1 + r / s) / log(1 + 1 / s), by which the first
  rows of a source count most.

All are ridge regressions (ours: the law is fitted to log(L - c), weighted by (L - c)^2 so that
errors count as retention); c, s and the ridge are the ones with the least leave-one-out error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from calmix.analysis.bootstrap import Estimate
from calmix.analysis.cells import Cells
from calmix.analysis.statistics import LEVEL, Array
from calmix.calibration.mix import make_mix, rows_per_source
from calmix.errors import InputError, nearest

Form = Literal["mean", "linear", "exponential", "saturating"]

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # times the number of sets
FLOORS = (0.05, 0.1, 0.2, 0.4, 0.8)  # how far c lies below the least loss
SHARES = (1 / 64, 1 / 16, 1 / 4, 1.0)  # s
LEAST = 8  # sets a surface can be fitted to
CANDIDATES = 20_000
STEPS = (1 / 8, 1 / 16, 1 / 32, 1 / 64)


@dataclass(frozen=True)
class Setting:
    """One way to fit a form: the ridge, and c's distance below the least loss and s, if any."""

    ridge: float
    floor: float | None = None
    share: float | None = None


def settings_of(form: Form) -> list[Setting]:
    """Return every setting that a form is tried with."""
    if form == "mean":
        return [Setting(0.0)]
    floors: Sequence[float | None] = (None,) if form == "linear" else FLOORS
    shares: Sequence[float | None] = SHARES if form == "saturating" else (None,)
    return [Setting(*each) for each in itertools.product(RIDGES, floors, shares)]


@dataclass(frozen=True)
class _Solved:
    predict: Callable[[Array], Array]
    left_out: Array


def _solve(x: Array, y: Array, setting: Setting) -> _Solved:
    """Fit one setting, and predict every point from the others (closed form).

    Without components in `x` it is the mean, whatever the points asked for have.
    """
    share, floor = setting.share, setting.floor
    lost = 1 - y
    base = 0.0 if floor is None else float(lost.min()) - floor

    def features(points: Array) -> Array:
        own = points[:, : x.shape[1]]
        if share is not None:
            own = np.log1p(own / share) / math.log1p(1 / share)
        return np.hstack([np.ones((len(points), 1)), own])

    def value(told: Array) -> Array:
        return 1 - told if floor is None else 1 - base - np.exp(told)

    design = features(x)
    target = lost if floor is None else np.log(lost - base)
    weight = np.ones(len(y)) if floor is None else (lost - base) ** 2
    weight = weight / weight.mean()
    penalty = setting.ridge * len(y) * np.diag([0.0, *np.ones(x.shape[1])])
    gram = design.T @ (weight[:, None] * design) + penalty
    hat = np.linalg.solve(gram, (weight[:, None] * design).T)
    coefficients = hat @ target
    fitted = design @ coefficients
    leverage = np.einsum("sf,fs->s", design, hat)
    left_out = target - (target - fitted) / np.maximum(1 - leverage, 1e-9)
    return _Solved(lambda points: value(features(points) @ coefficients), value(left_out))


@dataclass(frozen=True)
class Surface:
    """A form fitted to the retention of some sets.

    Attributes:
        error: root mean square of retention less what is predicted from all other sets, their
            own setting chosen anew (nested leave-one-out); a share, 1.0 is 100 %.
        predict: retention by shares, shape (points, components) to (points,).
        without: the same fitted without each of the sets.
        residuals: retention less what `without` predicts, shape (sets,).
    """

    form: Form
    error: float
    predict: Callable[[Array], Array]
    without: tuple[Callable[[Array], Array], ...]
    residuals: Array


def fit(x: Array, y: Array, form: Form) -> Surface:
    """Fit a form to retention `y` (sets,) of shares `x` (sets, components)."""

    def best(points: Array, values: Array) -> _Solved:
        used = points[:, :0] if form == "mean" else points
        tried = [_solve(used, values, setting) for setting in settings_of(form)]
        return min(tried, key=lambda one: _error(values - one.left_out))

    rest = [np.arange(len(y)) != at for at in range(len(y))]
    without = tuple(best(x[keep], y[keep]).predict for keep in rest)
    residuals = y - np.array([one(x[at : at + 1])[0] for at, one in enumerate(without)])
    return Surface(form, _error(residuals), best(x, y).predict, without, residuals)


def _error(residuals: Array) -> float:
    return float(np.sqrt(np.square(residuals).mean()))


@dataclass(frozen=True)
class Surfaces:
    """The surfaces of a condition's dimensions.

    Attributes:
        components: for each the proportions of its sources, which sum to 1.
        sets: names of the sets they are fitted to; `shares` has these by component.
        values: retention of the dimensions, shape (sets, dimensions).
        tried: every form by dimension; `chosen` is the one with the least error.
    """

    dimensions: tuple[str, ...]
    components: tuple[dict[str, float], ...]
    sets: tuple[str, ...]
    shares: Array
    values: Array
    tried: dict[str, dict[Form, Surface]]

    @property
    def chosen(self) -> dict[str, Surface]:
        """The form with the least error, by dimension."""
        return {name: min(forms.values(), key=lambda one: one.error)
                for name, forms in self.tried.items()}  # fmt: skip

    def mix(self, point: Array) -> dict[str, float]:
        """Return the sources' shares at a point."""
        return {
            name: float(share * part)
            for share, sources in zip(point, self.components, strict=True)
            for name, part in sources.items()
            if share > 0
        }


def surfaces(cells: Cells, together: Sequence[Sequence[str]] = ()) -> Surfaces:
    """Fit every form to every dimension of a condition, over all sets made of sources.

    Args:
        together: sources that count as one component whatever their proportions, which are
            then those of all sets at once.

    Raises:
        InputError: a source that no set is made of, fewer than `LEAST` such sets, or fewer mixes
            of components than components (a surface over corners alone is a guess in between:
            ours).
    """
    known = [at for at, mix in enumerate(cells.mixes) if mix]
    names = list(dict.fromkeys(name for at in known for name in cells.mixes[at]))
    whole = np.array([[cells.mixes[at].get(name, 0.0) for name in names] for at in known])
    for name in itertools.chain.from_iterable(together):
        if name not in names:
            raise InputError(f"no set is made of '{name}': {nearest(name, names)}")
    groups = [[names.index(name) for name in group] for group in together]
    components, shares = _components(names, whole, groups) if known else ((), np.zeros((0, 0)))
    inside = int(np.count_nonzero((shares > 0).sum(1) > 1))
    if len(known) < LEAST or inside < len(components):
        raise InputError(
            f"{cells.condition.label}: {len(known)} sets made of sources, {inside} of them mixes, "
            f"are too few for a surface over {len(components)} components: it takes {LEAST} sets "
            "and as many mixes as components (calmix study design writes such a study)"
        )
    width = len(cells.quantities)
    values = cells.means[known, 1:width]
    tried: dict[str, dict[Form, Surface]] = {}
    for number, name in enumerate(cells.dimensions):
        if not np.isnan(values[:, number]).any():
            tried[name] = {form: fit(shares, values[:, number], form) for form in get_args(Form)}
    sets = tuple(cells.sets[at] for at in known)
    return Surfaces(cells.dimensions, components, sets, shares, values, tried)


def _components(
    names: Sequence[str], whole: Array, given: Sequence[Sequence[int]] = ()
) -> tuple[tuple[dict[str, float], ...], Array]:
    """Put sources together that are given so, or whose shares are everywhere in one proportion."""
    groups = [list(group) for group in given]
    for at in range(len(names)):
        if any(at in group for group in given):
            continue
        for group in groups[len(given) :]:
            first = whole[:, group[0]]
            if np.allclose(whole[:, at] * first.sum(), first * whole[:, at].sum(), atol=1e-9):
                group.append(at)
                break
        else:
            groups.append([at])
    parts = whole.sum(0)
    found = tuple(
        {names[at]: float(parts[at] / parts[group].sum()) for at in group} for group in groups
    )
    return found, np.stack([whole[:, group].sum(1) for group in groups], axis=1)


@dataclass(frozen=True)
class Proposal:
    """A mix that was not run, and what is expected of it.

    Attributes:
        mix: sources with their shares, in whole rows.
        retention: weighted, with its 95 % prediction interval (jackknife+, Barber et al. 2021,
            arXiv 1905.02928, eq. 7).
        dimensions: the same for each that has weight.
        gain: over the set with the highest measured weighted retention, `best`.
        error: root mean square of the weighted retention less what the surfaces predict from all
            other sets; `spread` is that of the mean alone. A surface is flat, or not seen, where
            the first is no smaller.
        forms: the form of each weighted dimension.
    """

    condition: str
    weights: dict[str, float]
    mix: dict[str, float]
    retention: Estimate
    dimensions: dict[str, Estimate]
    gain: Estimate
    best: str
    error: float
    spread: float
    forms: dict[str, Form]

    @property
    def flat(self) -> bool:
        """Whether the surfaces predict no better than the mean of all sets."""
        return self.error >= self.spread

    @property
    def text(self) -> str:
        """The mix as `--calibration` takes it."""
        return ",".join(f"{name}:{share:.4g}" for name, share in self.mix.items())


def propose(
    cells: Cells,
    weights: dict[str, float],
    seed: int = 0,
    together: Sequence[Sequence[str]] = (),
) -> Proposal:
    """Return the mix with the highest expected weighted retention, whether it was run or not.

    Searched for among `CANDIDATES` seeded points, then by shifting shares between components.

    Args:
        weights: of the dimensions, which sum to 1.
        together: as for `surfaces`.

    Raises:
        InputError: as `surfaces`, or a dimension that has weight has no value for some set.
    """
    found = surfaces(cells, together)
    if lacking := [name for name, weight in weights.items() if weight and name not in found.tried]:
        raise InputError(
            f"{cells.condition.label}: {lacking[0]} has no retention, so no surface of it"
        )
    used = {name: weight for name, weight in weights.items() if weight}
    best_forms = found.chosen
    chosen = {name: best_forms[name] for name in used}

    def expected(points: Array) -> Array:
        return sum(weight * chosen[name].predict(points) for name, weight in used.items())  # type: ignore[return-value]

    point = _highest(expected, found.shares.shape[1], seed)
    mix = _in_rows(found.mix(point), cells.condition.rows)
    parts = [sum(mix.get(name, 0.0) for name in sources) for sources in found.components]
    at = np.array([parts])
    columns = [found.dimensions.index(name) for name in used]
    share = np.array(list(used.values()))
    measured = found.values[:, columns] @ share
    best = int(np.argmax(measured))
    total = float(expected(at)[0])
    left = [sum(weight * chosen[name].without[one](at)[0] for name, weight in used.items())
            for one in range(len(found.sets))]  # fmt: skip
    residuals = np.stack([chosen[name].residuals for name in used], axis=1) @ share
    low, high = _interval(np.array(left), residuals)
    ahead = float(measured[best])
    return Proposal(
        cells.condition.label, weights, mix, Estimate(total, low, high),
        {name: Estimate(float(one.predict(at)[0]),
                        *_interval(np.array([rest(at)[0] for rest in one.without]), one.residuals))
         for name, one in chosen.items()},
        Estimate(total - ahead, low - ahead, high - ahead), found.sets[best],
        _error(residuals), fit(found.shares, measured, "mean").error,
        {name: one.form for name, one in chosen.items()},
    )  # fmt: skip


def _highest(expected: Callable[[Array], Array], components: int, seed: int) -> Array:
    """Return the point of the simplex where `expected` is highest."""
    rng = np.random.default_rng(seed)
    points = np.concatenate([
        np.full((1, components), 1 / components),
        np.eye(components),
        rng.dirichlet(np.ones(components), CANDIDATES // 2),
        rng.dirichlet(np.full(components, 0.3), CANDIDATES // 2),
    ])  # fmt: skip
    best = points[int(np.argmax(expected(points)))]
    for step in STEPS:
        while True:
            near = [best]
            for giver, taker in itertools.permutations(range(components), 2):
                moved = best.copy()
                moved[taker] += min(step, moved[giver])
                moved[giver] -= min(step, moved[giver])
                near.append(moved)
            values = expected(np.array(near))
            at = int(np.argmax(values))
            if values[at] <= values[0] + 1e-9:
                break
            best = near[at]
    return best


def _in_rows(mix: dict[str, float], rows: int) -> dict[str, float]:
    """Return the shares that the mix has in so many rows, the largest first."""
    counts = rows_per_source(make_mix(mix, "proposal"), rows)
    kept = sorted(((n, c) for n, c in counts.items() if c), key=lambda each: -each[1])
    return {name: count / rows for name, count in kept}


def _interval(left_out: Array, residuals: Array) -> tuple[float, float]:
    """Return the jackknife+ prediction interval from leave-one-out predictions and residuals."""
    count = len(residuals)
    rank = min(count, math.ceil(LEVEL * (count + 1)))
    low = np.sort(left_out - np.abs(residuals))[count - rank]
    high = np.sort(left_out + np.abs(residuals))[rank - 1]
    return float(low), float(high)
