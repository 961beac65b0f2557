"""Surfaces over mixes: planted ones are found, and noise is told to be flat."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from calmix.analysis.cells import Cells, Condition, Task
from calmix.analysis.surface import (
    Setting,
    _components,
    _interval,
    _solve,
    fit,
    propose,
    settings_of,
    surfaces,
)
from calmix.errors import InputError
from calmix.study.design import design

NAMES = ("prose", "code", "math")
AT = Condition("m", "sparsegpt", "60%", 0.6, None, 60, 512, "offline", "SparseGPT 60%",
               "SparseGPT", "SparseGPT 60%")  # fmt: skip
TASKS = tuple(Task(f"{name}1", name, "bits", 50, 0.5, True) for name in ("general", "code"))


def points(mixes: int, count: int = 3) -> np.ndarray:
    names = {f"s{at}": [f"s{at}"] for at in range(count)}
    sets = design(names, mixes=mixes, rows=60).values()
    return np.array([[mix.get(name, 0) / 60 for name in names] for mix in sets])


def law(x: np.ndarray, t: tuple[float, ...], share: float | None = None) -> np.ndarray:
    if share is not None:
        x = np.log1p(x / share) / np.log1p(1 / share)
    return 1 - 0.15 - np.exp(x @ np.array(t))


def study(x: np.ndarray, values: np.ndarray, names: tuple[str, ...] = NAMES) -> Cells:
    """Cells of sets that keep `values` (sets, 2) of general and code."""
    whole = np.hstack([values.mean(1, keepdims=True), values, values])
    mixes = tuple({n: float(s) for n, s in zip(names, row, strict=True) if s} for row in x)
    count = len(x)
    return Cells(
        AT, tuple(f"set{at}" for at in range(count)), ("mix",) * count, ("",) * count,
        ((),) * count, mixes, (0,), ("general", "code"), TASKS,
        tuple((at, 0) for at in range(count)), (), whole[:, None], whole[:, None, :3], {}, (),
        np.zeros((count, 0)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("form", "share"), [("linear", None), ("exponential", None), ("saturating", 1 / 16)]
)
def test_a_planted_surface_is_found_between_its_points(form: str, share: float | None) -> None:
    x, more = points(12), np.random.default_rng(7).dirichlet(np.ones(3), 50)

    def truth(at: np.ndarray) -> np.ndarray:
        return (
            at @ np.array([0.6, 0.3, 0.5]) if form == "linear" else law(at, (-0.4, -2, -1), share)
        )

    y = truth(x)
    errors = {
        each: fit(x, y, each).error for each in ("mean", "linear", "exponential", "saturating")
    }  # type: ignore[arg-type]
    assert errors[form] < 0.01 < errors["mean"]
    np.testing.assert_allclose(fit(x, y, form).predict(more), truth(more), atol=0.02)  # type: ignore[arg-type]


def test_left_out_predictions_are_those_of_fits_without_the_point() -> None:
    rng = np.random.default_rng(0)
    x, y = points(9), rng.uniform(0.2, 0.7, 13)
    for setting in (Setting(0.01), Setting(0.1, 0.2), Setting(0.001, 0.4, 1 / 16)):
        solved = _solve(x, y, setting)
        for at in range(len(y)):
            # The weights of the others stay those of the whole: leave it in with a weight of next
            # to nothing by repeating nothing but its own prediction as its value.
            own = y.copy()
            for _ in range(200):
                own[at] = _solve_fixed(x, y, own, at, setting)
            np.testing.assert_allclose(solved.left_out[at], own[at], rtol=1e-6)


def _solve_fixed(x: np.ndarray, y: np.ndarray, own: np.ndarray, at: int, setting: Setting) -> float:
    """One step of the fixed point that defines leaving out: the point's value is its prediction."""
    lost = 1 - y
    base = 0.0 if setting.floor is None else lost.min() - setting.floor
    if setting.share is not None:
        x = np.log1p(x / setting.share) / np.log1p(1 / setting.share)
    design_ = np.hstack([np.ones((len(x), 1)), x])
    weight = np.ones(len(y)) if setting.floor is None else (lost - base) ** 2
    weight = weight / weight.mean()
    moved = 1 - own
    target = moved if setting.floor is None else np.log(moved - base)
    penalty = setting.ridge * len(y) * np.diag([0.0, *np.ones(x.shape[1])])
    coefficients = np.linalg.solve(
        design_.T @ (weight[:, None] * design_) + penalty, design_.T @ (weight * target)
    )
    told = float(design_[at] @ coefficients)
    return 1 - told if setting.floor is None else float(1 - base - np.exp(told))


def test_the_interval_is_jackknife_plus() -> None:
    left, residuals = np.array([0.5, 0.6, 0.4]), np.array([0.1, -0.2, 0.05])
    assert _interval(left, residuals) == (pytest.approx(0.35), pytest.approx(0.8))
    many = np.linspace(0, 1, 99)
    low, high = _interval(np.zeros(99), many)
    assert (low, high) == (-many[94], many[94])  # the 95th of 99, of 100 the next lies beyond 5


def test_sources_in_one_proportion_are_one_component() -> None:
    whole = np.array([[0.25, 0.25, 0.5], [0.1, 0.1, 0.8], [0.5, 0.5, 0.0]])
    components, shares = _components(["a", "b", "c"], whole)
    assert components == ({"a": 0.5, "b": 0.5}, {"c": 1.0})
    np.testing.assert_allclose(shares, [[0.5, 0.5], [0.2, 0.8], [1, 0]])


def test_sources_that_are_put_together_are_one_component_in_any_proportion() -> None:
    x = points(14, 4)
    names = ("prose", "python", "math", "rust")
    both = np.stack([x[:, 0], x[:, 1] + x[:, 3], x[:, 2]], axis=1)
    kept = np.stack([law(both, (-1, -2, -0.5)), law(both, (-2, -0.5, -1))], axis=1)
    cells = study(x, kept, names)
    found = surfaces(cells, [["rust", "python"]])
    assert [sorted(one) for one in found.components] == [["python", "rust"], ["prose"], ["math"]]
    np.testing.assert_allclose(found.shares, both[:, [1, 0, 2]])
    total = x.sum(0)
    assert found.components[0]["rust"] == pytest.approx(total[3] / (total[1] + total[3]))
    for one in found.chosen.values():
        assert one.error < 0.005
    mix = propose(cells, {"general": 0.5, "code": 0.5}, together=[["python", "rust"]]).mix
    assert min(mix["python"], mix["rust"]) > 0
    with pytest.raises(InputError, match="no set is made of 'go': known: math, prose"):
        surfaces(cells, [["go"]])


def test_the_proposal_is_the_planted_best_and_its_interval_holds() -> None:
    x = points(14)
    rng = np.random.default_rng(3)
    truth = [(-0.9, -0.3, -0.5), (-0.2, -1.6, -1.0)]

    def kept(at: np.ndarray) -> np.ndarray:
        return np.stack([law(at, t, 1 / 16) for t in truth], axis=1)

    hits, near = 0, 0
    grid = np.array([p for p in itertools.product(range(21), repeat=3) if sum(p) == 20]) / 20
    for _ in range(8):
        cells = study(x, kept(x) + 0.004 * rng.standard_normal((len(x), 2)))
        found = propose(cells, {"general": 0.5, "code": 0.5})
        assert not found.flat
        at = np.array([[found.mix.get(name, 0.0) for name in NAMES]])
        value = kept(at).mean()
        near += value > kept(grid).mean(1).max() - 0.01
        hits += found.retention.low <= value <= found.retention.high
        counts = [share * 60 for share in found.mix.values()]
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)
    assert near >= 7
    assert hits >= 7


def test_weights_move_the_proposal() -> None:
    x = points(14)
    kept = np.stack([law(x, (-3, -0.1, -0.1)), law(x, (-0.1, -3, -0.1))], axis=1)
    cells = study(x, kept)
    assert propose(cells, {"general": 1.0, "code": 0.0}).mix["prose"] > 0.9
    assert propose(cells, {"general": 0.0, "code": 1.0}).mix["code"] > 0.9
    same = [propose(cells, {"general": 0.5, "code": 0.5}, seed=4) for _ in range(2)]
    assert same[0] == same[1]


def test_noise_is_flat() -> None:
    x = points(14)
    rng = np.random.default_rng(5)
    flat = 0
    for _ in range(6):
        cells = study(x, 0.6 + 0.01 * rng.standard_normal((len(x), 2)))
        found = propose(cells, {"general": 0.5, "code": 0.5})
        flat += found.flat or found.gain.low < 0
    assert flat == 6


def test_too_few_mixes_are_refused() -> None:
    corners = np.eye(9)
    names = tuple(f"s{at}" for at in range(9))
    for x in (corners, np.vstack([corners, np.full((1, 9), 1 / 9)]), points(2)[:5]):
        cells = study(x, np.full((len(x), 2), 0.5), names[: x.shape[1]])
        with pytest.raises(InputError, match="calmix study design writes such a study"):
            surfaces(cells)


def test_every_form_has_its_settings() -> None:
    assert [len(settings_of(form)) for form in ("mean", "linear", "exponential", "saturating")] == [
        1, 5, 25, 100,
    ]  # fmt: skip
