"""What a user can ask for when pruning, checked before any work is done."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from calmix.errors import InputError, nearest

METHODS = ("sparsegpt", "wanda", "magnitude")
Propagation = Literal["sequential", "block"]

ROWS, LENGTH, SEED, DAMPING = 64, 512, 0, 0.01

# What draws a calibration set beside its specification; calmix.calibration.resolve has defaults.
DRAW = ("rows", "length", "seed", "packing", "select", "leakage", "leakage_tokens", "own")


@dataclass(frozen=True)
class PruneRequest:
    """A checked request to prune one model. What a method has no use for is None or empty.

    Attributes:
        calibration: what to calibrate on, as `calmix.calibration.resolve` takes it.
        draw: the options of the draw that were given.
    """

    method: str
    sparsity: float | None
    pattern: str | None
    calibration: str | None = None
    draw: dict[str, Any] = field(default_factory=dict)
    propagation: Propagation | None = None
    damping: float | None = None


def prune_request(
    *,
    method: str = "sparsegpt",
    sparsity: float | None = None,
    pattern: str | None = None,
    **options: Any,
) -> PruneRequest:
    """Check the options of a prune and fill in the method's defaults.

    Args:
        method: `sparsegpt`, `wanda` or `magnitude`.
        sparsity: share to prune, in (0, 1); or
        pattern: `N:M`. Exactly one of the two.
        **options: calibration, propagation, damping and those in `DRAW`; None means not given.

    Raises:
        InputError: an unknown name, a value out of range, something needed that is missing, or
            an option that the method would ignore.
    """
    if method not in METHODS:
        raise InputError(f"unknown method '{method}': {nearest(method, METHODS)}")
    if (sparsity is None) == (pattern is None):
        raise InputError("give either --sparsity (such as 0.5) or --pattern (such as 2:4)")
    if sparsity is not None and not 0 < sparsity < 1:
        raise InputError(f"sparsity {sparsity} is not between 0 and 1 (exclusive)")
    given = {name: value for name, value in options.items() if value is not None}
    useless = set(given) if method == "magnitude" else set(given) & {"damping"}
    if useless and method != "sparsegpt":
        option = {"own": "sources"}.get(min(useless), min(useless)).replace("_", "-")
        raise InputError(
            f"--{option} has no effect with method {method}: leave it out, or choose another method"
        )
    if method == "magnitude":
        return PruneRequest(method, sparsity, pattern)
    if "calibration" not in given:
        raise InputError(
            f"method {method} needs --calibration, such as uniform:python-stdlib,encyclopedia "
            "(calmix sources ls) or a .txt, .jsonl or .parquet file"
        )
    draw = {name: given[name] for name in DRAW if name in given}
    for name in ("rows", "length"):
        if draw.get(name, 1) < 1:
            raise InputError(f"--{name} {draw[name]} is not positive")
    if draw.get("seed", 0) < 0:
        raise InputError(f"--seed {draw['seed']} is negative")
    propagation = given.get("propagation", "sequential")
    if propagation not in get_args(Propagation):
        known = get_args(Propagation)
        raise InputError(f"unknown propagation '{propagation}': {nearest(propagation, known)}")
    damping = given.get("damping", DAMPING if method == "sparsegpt" else None)
    if damping is not None and not (math.isfinite(damping) and damping > 0):
        raise InputError(f"--damping {damping} is not a positive number")
    return PruneRequest(method, sparsity, pattern, given["calibration"], draw, propagation, damping)
