"""What a user can ask for, checked before any work is done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from calmix.errors import InputError, nearest

METHODS = ("sparsegpt", "wanda", "magnitude")
Packing = Literal["concat", "window"]
Propagation = Literal["sequential", "block"]

ROWS, LENGTH, SEED, DAMPING = 64, 512, 0, 0.01

_CALIBRATION = ("calibration", "rows", "length", "seed", "packing", "propagation")


@dataclass(frozen=True)
class PruneRequest:
    """A complete, checked request to prune one model. Fields a method has no use for are None."""

    method: str
    sparsity: float | None
    pattern: str | None
    calibration: str | None
    rows: int | None
    length: int | None
    seed: int | None
    packing: Packing | None
    propagation: Propagation | None
    damping: float | None


def prune_request(
    *,
    method: str = "sparsegpt",
    sparsity: float | None = None,
    pattern: str | None = None,
    **options: Any,
) -> PruneRequest:
    """Check the options of a prune and fill in defaults.

    Args:
        method: `sparsegpt`, `wanda` or `magnitude`.
        sparsity: share to prune, in (0, 1); or
        pattern: `N:M`. Exactly one of the two.
        **options: calibration, rows, length, seed, packing, propagation, damping; None means
            not given.

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
    given = {name for name, value in options.items() if value is not None}
    useless = given & set(_CALIBRATION) if method == "magnitude" else set()
    useless |= given & {"damping"} if method != "sparsegpt" else set()
    if useless:
        raise InputError(
            f"--{min(useless)} has no effect with method {method}: leave it out, or choose "
            "another method"
        )
    if method == "magnitude":
        return PruneRequest(method, sparsity, pattern, *[None] * 7)
    if options.get("calibration") is None:
        raise InputError(
            f"method {method} needs --calibration, such as uniform:python-stdlib,encyclopedia "
            "(calmix sources ls) or a .txt, .jsonl or .parquet file"
        )
    filled: dict[str, Any] = {
        "rows": ROWS,
        "length": LENGTH,
        "seed": SEED,
        "packing": "concat",
        "propagation": "sequential",
        "damping": DAMPING if method == "sparsegpt" else None,
    } | {name: options[name] for name in given}
    for name in ("rows", "length"):
        if filled[name] < 1:
            raise InputError(f"--{name} {filled[name]} is not positive")
    if filled["seed"] < 0:
        raise InputError(f"--seed {filled['seed']} is negative")
    for name, values in (("packing", get_args(Packing)), ("propagation", get_args(Propagation))):
        if filled[name] not in values:
            raise InputError(f"unknown {name} '{filled[name]}': {nearest(filled[name], values)}")
    damping = filled["damping"]
    if damping is not None and not (math.isfinite(damping) and damping > 0):
        raise InputError(f"--damping {damping} is not a positive number")
    return PruneRequest(method=method, sparsity=sparsity, pattern=pattern, **filled)
