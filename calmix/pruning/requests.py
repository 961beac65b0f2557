"""Requests to prune and to recover, checked before any work starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import Field

from calmix.errors import InputError, nearest
from calmix.options import (
    BITS_METHOD,
    METHOD,
    NONE,
    PRUNE,
    RECOVERY_OPTIONS,
    DrawOptions,
    Pruning,
    Recovering,
    checked,
    named_options,
    parse_share,
)
from calmix.sources.registry import own_sources

if TYPE_CHECKING:
    from calmix.calibration.request import CalibrationRequest
    from calmix.pruning.methods import Method
    from calmix.pruning.patterns import Pattern

LENGTH, SEED = 512, 0
BOTH = "give either --sparsity (such as 0.5) or --pattern (such as 2:4)"
SCORED = {"calibration", "drop_experts", *DrawOptions.model_fields}  # read to drop experts
CALIBRATED = {"propagation", "statistics", *SCORED}  # read by methods that use data


class Calibrated(DrawOptions):
    """A checked request of a run on a calibration set."""

    if TYPE_CHECKING:
        calibration: Any

    @cached_property
    def drawing(self) -> CalibrationRequest:
        """The checked request for the set."""
        from calmix.calibration.request import parse_calibration

        return parse_calibration(self.calibration, **self.drawn())


class RecoverRequest(Calibrated, Recovering):
    """A checked request to recover one model."""


class PruneRequest(Calibrated, Pruning):
    """A checked request to prune one model: `sparsity` or `pattern`, the method's name and all its
    options. Options the method does not use are None or empty."""

    method: str
    sparsity: float | None = None
    pattern: str | None = None
    options: dict[str, Any] = Field(default={})

    @property
    def target(self) -> Pattern:
        """The sparsity or pattern; an unused 0.5 if only experts are dropped."""
        from calmix.pruning.patterns import as_pattern

        return as_pattern(self.pattern or self.sparsity or 0.5)

    @property
    def mixed(self) -> bool:
        """Whether the target is a size of a whole file, for which types are chosen."""
        from calmix.pruning.patterns import Mixed

        return isinstance(self.target, Mixed)

    @property
    def chosen(self) -> Method:
        """The pruning method; `Look`, which changes nothing, if only experts are dropped."""
        from calmix.pruning.methods import Look, get_method

        return Look() if self.method == NONE else get_method(self.method, **self.options)


@dataclass(frozen=True)
class How:
    """How a pruning or recovery run is executed.

    Attributes:
        dtype, device, trust_remote_code: as for `calmix.open_model`.
        overwrite: replace an existing output or the work of an interrupted run.
        resume: resume an interrupted run of the same request, if there is one.
        max_memory: bytes the process may hold; None for all free memory.
        started: called with the calibration set once it is ready.
        progress: called with blocks or steps done and their total; recovery adds the latest loss.
        writing, note: as for `calmix.calibration_set`.
    """

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    overwrite: bool = False
    resume: bool = False
    max_memory: int | None = None
    started: Callable[..., None] = lambda *_: None
    progress: Callable[..., None] = lambda *_: None
    writing: Callable[[str, int, int], None] = lambda *_: None
    note: Callable[[str], None] = lambda _: None

    @classmethod
    def of(cls, **options: Any) -> How:
        """Return the settings given; None means the default."""
        return cls(**{name: value for name, value in options.items() if value is not None})

    @property
    def opening(self) -> dict[str, Any]:
        """The arguments of `open_model`."""
        return {name: getattr(self, name) for name in ("dtype", "device", "trust_remote_code")}


def target_of(value: Any, *, share: bool = False) -> Pattern:
    """Parse `0.6`, `60%` or, unless it must be a `share`, a pattern such as `2:4`."""
    from calmix.pruning.patterns import Unstructured, as_pattern

    if not share and not re.fullmatch(r"\s*[\d.eE+-]+\s*%?\s*", str(value)):
        return as_pattern(value)
    try:
        return Unstructured(parse_share(value))
    except ValueError as error:
        raise InputError(f"sparsity {error}") from None


def printed(target: Pattern) -> str:
    """Return a target as shown in tables: `60%` or `2:4`."""
    from calmix.pruning.patterns import Unstructured

    unstructured = isinstance(target, Unstructured)
    return f"{100 * target.sparsity:g}%" if unstructured else str(target)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are set; a file of the user's own sources is read."""
    present = {name: value for name, value in options.items() if value not in (None, (), [])}
    if "sources" in present:
        present["sources"] = own_sources(present["sources"])
    return present


def prune_request(
    *,
    method: str | None = None,
    sparsity: float | str | None = None,
    pattern: Pattern | str | float | None = None,
    **options: Any,
) -> PruneRequest:
    """Check the options of `calmix.options.Pruning` and of the method, and fill in the method's
    defaults."""
    from calmix.pruning.methods import get_method
    from calmix.pruning.patterns import Unstructured, as_pattern, check_embeddings

    present = _given(options)
    own = {name: present.pop(name) for name in list(present) if name not in PRUNE}
    request = checked(Pruning, present)
    drops, bare = request.drop_experts is not None, sparsity is None and pattern is None
    chosen: dict[str, Any]
    if drops and bare and "bits" not in own:
        named = {} if method in (None, NONE) else {"method": method}
        where = "if only experts are dropped: leave it out, or add --sparsity or --pattern"
        _check_unused({**own, **present, **named}.keys() - SCORED, where)
        chosen = {"method": NONE}
    else:
        if sparsity is not None and pattern is not None:
            raise InputError(BOTH)
        wanted = as_pattern(pattern) if pattern is not None else None
        wanted = target_of(sparsity, share=True) if sparsity is not None else wanted
        default = BITS_METHOD if bare and "bits" in own else METHOD
        solver, target = get_method(default if method is None else method, **own).aim(wanted)
        where = f"with method {solver.name}: leave it out, or choose another method"
        unread = CALIBRATED - SCORED if drops else CALIBRATED  # by methods without data
        _check_unused(set() if solver.needs else present.keys() & unread, where)
        check_embeddings(request.embeddings, target)
        share = target.sparsity if isinstance(target, Unstructured) else None
        chosen = {
            "method": solver.name,
            "options": solver.options,
            "sparsity": share,
            "pattern": None if share is not None else str(target),
            "propagation": (request.propagation or "sequential") if solver.needs else None,
            "statistics": (request.statistics or "robust") if solver.needs else None,
        }
        if solver.needs is not None and request.calibration is None:
            raise InputError(
                f"method {solver.name} needs --calibration, such as "
                "uniform:python-stdlib,encyclopedia (calmix calibrate sources), or a .txt, "
                ".jsonl or .parquet file"
            )
    if drops and request.calibration is None:
        raise InputError("--drop-experts needs --calibration: text to score the experts on")
    return PruneRequest(**present | chosen)


def _check_unused(unused: Collection[str], where: str) -> None:
    if unused:
        raise InputError(f"--{min(unused).replace('_', '-')} has no effect {where}")


def recover_request(**options: Any) -> RecoverRequest:
    """Check the options of a recovery, `calmix.options.Recovering`, and fill in the method's
    defaults; an InputError for an unknown option or a value out of range."""
    return checked(RecoverRequest, _given(options))


def recovery_of(text: str) -> RecoverRequest:
    """Parse a recovery from `METHOD` or `METHOD,option=value,...`."""
    method, settings = named_options("recovery", text)
    if unknown := settings.keys() - set(RECOVERY_OPTIONS):
        hint = nearest(min(unknown), RECOVERY_OPTIONS)
        raise InputError(f"{min(unknown)} has no effect with recovery {method}: {hint}")
    return recover_request(method=method, calibration="", **settings)
