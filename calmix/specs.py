"""What a user can ask for when pruning and recovering, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from calmix.errors import InputError, nearest
from calmix.options import (
    CALIBRATED,
    DRAW,
    METHOD,
    PRUNE,
    DrawOptions,
    checked,
    named_options,
    parse_share,
)

if TYPE_CHECKING:
    from calmix.pruning.patterns import Pattern

Propagation = Literal["sequential", "block"]

ROWS, LENGTH, SEED = 64, 512, 0
NONE = "none"  # the method of a request that drops experts and prunes nothing

SCORED = {"calibration", "drop_experts", *DRAW}  # all that a drop of experts takes
UNSCORED = "--drop-experts needs --calibration: text to score the experts on"


@dataclass(frozen=True)
class PruneRequest:
    """A checked request to prune one model. What a method has no use for is None or empty.

    Attributes:
        method: its name; `options` are its own, all of them. `none` where only experts are dropped.
        calibration: what to calibrate on, as `calmix.calibration.resolve` takes it.
        draw: the options of the draw that were given.
        allocation: `owl`, `error` or sparsities by layer; None for the same everywhere.
        only, skip: patterns of layers' names, as `DecoderBlocks.select` takes them.
        drop_experts: share of every mixture's experts that go whole, before weights do.
    """

    method: str
    sparsity: float | None
    pattern: str | None
    options: dict[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    draw: dict[str, Any] = field(default_factory=dict)
    propagation: Propagation | None = None
    allocation: str | dict[str, float] | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    drop_experts: float | None = None


def prune_request(
    *,
    method: str | None = None,
    sparsity: float | None = None,
    pattern: Pattern | str | float | None = None,
    **options: Any,
) -> PruneRequest:
    """Check the options of a prune and fill in the method's defaults."""
    from calmix.pruning.allocation import read_allocation
    from calmix.pruning.methods import get_method
    from calmix.pruning.patterns import Unstructured, as_pattern

    given = {name: value for name, value in options.items() if value is not None}
    drop = given.get("drop_experts")
    if drop is not None and not 0 < drop < 1:
        raise InputError(f"--drop-experts {drop} is not between 0 and 1 (exclusive)")
    if drop is not None and sparsity is None and pattern is None:
        return _drop_alone(method, given)
    own = {name: given.pop(name) for name in list(given) if name not in PRUNE}
    method = METHOD if method is None else method
    bare = get_method(method)
    if idle := set(own) - set(bare.options):
        raise _no_effect(min(idle), bare.name)
    chosen = get_method(method, **own)
    if (sparsity is None) == (pattern is None):
        raise InputError("give either --sparsity (such as 0.5) or --pattern (such as 2:4)")
    wanted = pattern if sparsity is None else sparsity
    assert wanted is not None
    asked = as_pattern(wanted)
    if isinstance(asked, Unstructured):
        sparsity, pattern = asked.sparsity, None
    else:
        pattern = str(asked)
    allocation = read_allocation(given.pop("allocation", None), sparsity)
    only, skip = (tuple(given.pop(key, ())) for key in ("only", "skip"))
    if chosen.needs is None:
        if idle := set(given) - (SCORED if drop is not None else set()):
            raise _no_effect(min(idle), chosen.name)
        if drop is not None and "calibration" not in given:
            raise InputError(UNSCORED)
        if isinstance(allocation, str):
            raise InputError(
                f"--allocation {allocation} looks at calibration data, which method {chosen.name} "
                "has none of: name a file of sparsities, or choose another method"
            )
        return PruneRequest(
            chosen.name,
            sparsity,
            pattern,
            chosen.options,
            calibration=given.get("calibration"),
            draw=_draw(given),
            allocation=allocation,
            only=only,
            skip=skip,
            drop_experts=drop,
        )
    if "calibration" not in given:
        raise InputError(
            f"method {chosen.name} needs --calibration, such as "
            "uniform:python-stdlib,encyclopedia (calmix calibrate sources), or a .txt, "
            ".jsonl or .parquet file"
        )
    draw = _draw(given)
    if drop is not None and isinstance(allocation, dict):
        raise InputError("--drop-experts needs an --allocation that names no layers: owl or error")
    propagation = given.get("propagation", "sequential")
    if propagation not in get_args(Propagation):
        known = get_args(Propagation)
        raise InputError(f"unknown propagation '{propagation}': {nearest(propagation, known)}")
    return PruneRequest(
        chosen.name, sparsity, pattern, chosen.options, given["calibration"], draw, propagation,
        allocation, only, skip, drop,
    )  # fmt: skip


def _drop_alone(method: str | None, given: Mapping[str, Any]) -> PruneRequest:
    """Return the request to drop experts and prune nothing."""
    idle = sorted(
        name for name, value in given.items() if name not in SCORED and value not in ((), [])
    )
    if method not in (None, NONE):
        idle.insert(0, "method")
    if idle:
        option = idle[0].replace("_", "-")
        raise InputError(
            f"--{option} has no effect where only experts are dropped: give --sparsity or "
            "--pattern too, or leave it out"
        )
    if "calibration" not in given:
        raise InputError(UNSCORED)
    drop, draw = given["drop_experts"], _draw(given)
    return PruneRequest(
        NONE, None, None, calibration=given["calibration"], draw=draw, drop_experts=drop
    )


def _no_effect(name: str, method: str) -> InputError:
    option = name.replace("_", "-")
    return InputError(
        f"--{option} has no effect with method {method}: leave it out, or choose another method"
    )


def prune_requests(
    *,
    method: str | None = None,
    sparsity: str | None = None,
    pattern: str | None = None,
    **options: Any,
) -> list[PruneRequest]:
    """Check a prune to one or several targets: every method with every sparsity or pattern."""
    from calmix.pruning.methods import get_method

    if (sparsity is None) == (pattern is None):  # only experts are dropped, or it tells what is
        return [prune_request(method=method and _methods(method)[0], **options)]  # wrong
    methods = _methods(METHOD if method is None else method)
    wanted: list[dict[str, Any]] = [
        {"sparsity": _share(text)} for text in _listed("sparsity", sparsity)
    ] + [{"pattern": text} for text in _listed("pattern", pattern)]
    if len(methods) == 1:
        return [prune_request(method=methods[0], **target, **options) for target in wanted]
    given = {name: value for name, value in options.items() if value is not None}
    useful: dict[str, dict[str, Any]] = {}
    for text in methods:
        own = _own(text, given)
        common = set(PRUNE)
        if get_method(text, **own).needs is None:
            common -= set(CALIBRATED) - (SCORED if "drop_experts" in given else set())
        useful[text] = own | {k: v for k, v in given.items() if k in common}
    idle = set(given) - {key for part in useful.values() for key in part}
    if idle:
        option = min(idle).replace("_", "-")
        raise InputError(f"--{option} has no effect with methods {method}: leave it out")
    requests = [
        prune_request(method=text, **target, **useful[text])
        for text in methods
        for target in wanted
    ]
    names = [target_name(request) for request in requests]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two targets are the same, {name}: leave one out")
    return requests


def _own(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that are a method's own and that its text does not name."""
    from calmix.pruning.methods import get_method

    known = get_method(method).options
    given = {k: v for k, v in options.items() if v is not None}
    return {k: v for k, v in given.items() if k in known and f",{k}=" not in method}


def target_name(request: PruneRequest) -> str:
    """Return a folder name for a target, such as `sparsegpt-0.6` or `wanda-2of4`.

    Options that differ from their defaults stand in it: `sparsegpt-damping=0.1-0.6`.
    """
    from calmix.pruning.methods import get_method

    if request.method == NONE:
        return f"drop-{request.drop_experts:g}"
    method = get_method(request.method, **request.options).text.replace(",", "-").replace("/", "_")
    if request.pattern is not None:
        return f"{method}-{'of'.join(p.strip() for p in request.pattern.split(':'))}"
    return f"{method}-{request.sparsity:g}"


def _methods(text: str) -> list[str]:
    """Return the methods of a list such as `sparsegpt,damping=0.1,wanda`, with their options."""
    methods: list[str] = []
    for part in _parts("method", text):
        if "=" in part and methods:
            methods[-1] += f",{part}"
        else:
            methods.append(part)
    return _once("method", methods)


RECOVERIES = {"distill": (2, 1e-3), "blocks": (2, 3e-3)}  # epochs and learning rate
EPOCHS = 1000  # at most
BATCH = 4
RECOVERY_OPTIONS: dict[str, type] = {"epochs": int, "lr": float, "batch": int}


@dataclass(frozen=True)
class RecoverRequest:
    """A checked request to recover one pruned model.

    Attributes:
        method: `distill` or `blocks`.
        calibration, draw: as for a `PruneRequest`.
        epochs: passes over the training rows, for `blocks` in every block.
        lr: the learning rate at its peak, times the size of each tensor's kept weights.
        batch: rows a step.
    """

    method: str
    calibration: str
    draw: dict[str, Any]
    epochs: int
    lr: float
    batch: int


def recover_request(
    *,
    calibration: str,
    method: str = "distill",
    epochs: int | None = None,
    lr: float | None = None,
    batch: int = BATCH,
    **draw: Any,
) -> RecoverRequest:
    """Check the options of a recovery and fill in the method's defaults.

    Args:
        calibration: what to train on, as `calmix.calibration.resolve` takes it.
        method: `distill` or `blocks`.
        epochs, lr, batch: as in a `RecoverRequest`; None for the method's own.
        **draw: those in `DRAW`; None means not given.

    Raises:
        InputError: an unknown name, or a value out of range.
    """
    if method not in RECOVERIES:
        raise InputError(f"unknown recovery '{method}': {nearest(method, RECOVERIES)}")
    own = RECOVERIES[method]
    epochs = own[0] if epochs is None else epochs
    lr = own[1] if lr is None else lr
    for name, value in (("epochs", epochs), ("batch", batch)):
        if value < 1:
            raise InputError(f"--{name} {value} is not positive")
    if epochs > EPOCHS:
        raise InputError(f"--epochs {epochs} is more than {EPOCHS}")
    if not (math.isfinite(lr) and 0 < lr < 1):
        raise InputError(f"--lr {lr} is not between 0 and 1 (exclusive)")
    return RecoverRequest(method, calibration, _draw(draw), epochs, lr, batch)


def recovery_options(text: str) -> dict[str, Any]:
    """Return what `METHOD` or `METHOD,option=value,...` says, as `recover_request` takes it."""
    method, given = named_options("recovery", text)
    if method not in RECOVERIES:
        raise InputError(f"unknown recovery '{method}': {nearest(method, RECOVERIES)}")
    options: dict[str, Any] = {"method": method}
    for key, value in given.items():
        if key not in RECOVERY_OPTIONS:
            hint = nearest(key, RECOVERY_OPTIONS)
            raise InputError(f"{key} has no effect with recovery {method}: {hint}")
        try:
            options[key] = RECOVERY_OPTIONS[key](value)
        except ValueError:
            kind = "whole number" if RECOVERY_OPTIONS[key] is int else "number"
            raise InputError(f"recovery {method}: {key} {value} is no {kind}") from None
    return options


def recovery_of(text: str, calibration: str = "") -> RecoverRequest:
    """Return the recovery that a text asks for, as `recovery_options` takes it."""
    return recover_request(calibration=calibration, **recovery_options(text))


def recovery_text(request: RecoverRequest) -> str:
    """Return a recovery as a user writes it, with the options that differ from their defaults."""
    epochs, lr = RECOVERIES[request.method]
    defaults = {"epochs": epochs, "lr": lr, "batch": BATCH}
    changed = {key: getattr(request, key) for key in defaults}
    told = (f"{key}={value!r}" for key, value in changed.items() if value != defaults[key])
    return ",".join([request.method, *told])


def prune_and_recover_requests(
    recover: str, *, method: str | None = None, **options: Any
) -> tuple[list[PruneRequest], RecoverRequest]:
    """Check a prune to one or several targets, and the recovery behind each."""
    from calmix.pruning.methods import get_method

    chosen = recovery_options(recover)
    if options.get("calibration") is None:
        raise InputError("--recover needs --calibration: the text that a recovery trains on")
    chosen |= {name: options.get(name) for name in ("calibration", *DRAW)}
    recovery = recover_request(**chosen)
    named = _methods(METHOD if method is None else method)
    unread = all(get_method(text, **_own(text, options)).needs is None for text in named)
    if unread and options.get("drop_experts") is None:
        options = {k: v for k, v in options.items() if k not in ("calibration", *DRAW)}
    return prune_requests(method=method, **options), recovery


def _draw(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a draw that were given, checked."""
    return checked(DrawOptions, {name: options.get(name) for name in DRAW}).drawn()


def _listed(option: str, text: str | None) -> list[str]:
    return [] if text is None else _once(option, _parts(option, text))


def _parts(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise InputError(f"--{option} '{text}' has nothing between its commas")
    return parts


def _once(option: str, parts: list[str]) -> list[str]:
    for part in parts:
        if parts.count(part) > 1:
            raise InputError(f"--{option} names {part} twice")
    return parts


def _share(text: str) -> float:
    try:
        return float(parse_share(text))
    except ValueError as error:
        raise InputError(f"--sparsity: {error}") from None
