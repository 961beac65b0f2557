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
DRAW = (
    "rows", "length", "seed", "packing", "select", "leakage", "leakage_tokens", "licence", "own",
)  # fmt: skip


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


def prune_requests(
    *,
    method: str = "sparsegpt",
    sparsity: str | None = None,
    pattern: str | None = None,
    **options: Any,
) -> list[PruneRequest]:
    """Check a prune to one or several targets: every method with every sparsity or pattern.

    Args:
        method: a name or several, as `sparsegpt,wanda`.
        sparsity: a share or several, as `0.5,0.6`; or
        pattern: `N:M` or several.
        **options: as for `prune_request`; with several methods each takes those it has a use for.

    Raises:
        InputError: as `prune_request`, or the same target is named twice.
    """
    methods = _listed("method", method)
    if (sparsity is None) == (pattern is None):
        return [prune_request(method=methods[0], **options)]  # which tells what is wrong
    wanted: list[dict[str, Any]] = [
        {"sparsity": _share(text)} for text in _listed("sparsity", sparsity)
    ] + [{"pattern": text} for text in _listed("pattern", pattern)]
    if len(methods) == 1:
        return [prune_request(method=method, **target, **options) for target in wanted]
    given = {name: value for name, value in options.items() if value is not None}
    useful = {name: given if name != "magnitude" else {} for name in methods}
    for name in methods:
        if name != "sparsegpt":
            useful[name] = {k: v for k, v in useful[name].items() if k != "damping"}
    idle = set(given) - {key for part in useful.values() for key in part}
    if idle:
        raise InputError(f"--{min(idle)} has no effect with methods {method}: leave it out")
    return [
        prune_request(method=name, **target, **useful[name])
        for name in methods
        for target in wanted
    ]


def target_name(request: PruneRequest) -> str:
    """Return a folder name for a target, such as `sparsegpt-0.6` or `wanda-2of4`."""
    if request.pattern is not None:
        return f"{request.method}-{'of'.join(p.strip() for p in request.pattern.split(':'))}"
    return f"{request.method}-{request.sparsity:g}"


def _listed(option: str, text: str | None) -> list[str]:
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if "" in parts:
        raise InputError(f"--{option} '{text}' has nothing between its commas")
    for part in parts:
        if parts.count(part) > 1:
            raise InputError(f"--{option} names {part} twice")
    return parts


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--sparsity {text} is no number, such as 0.6") from None
