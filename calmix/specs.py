"""What a user can ask for when pruning and recovering, checked before any work is done."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from calmix.errors import InputError, nearest
from calmix.options import (
    BITS_METHOD,
    CALIBRATED,
    DRAW,
    METHOD,
    PRUNE,
    RECOVERY_OPTIONS,
    Pruning,
    Recovering,
    checked,
    named_options,
    parse_share,
)
from calmix.sources import own_sources

if TYPE_CHECKING:
    from calmix.pruning.methods import Method
    from calmix.pruning.patterns import Pattern

LENGTH, SEED = 512, 0
BOTH = "give either --sparsity (such as 0.5) or --pattern (such as 2:4)"
NONE = "none"  # the method of a request that drops experts and prunes nothing
SCORED = {"calibration", "drop_experts", *DRAW}  # all that a drop of experts takes


class PruneRequest(Pruning):
    """A checked request to prune one model: `sparsity` or `pattern`, the method's name, and all of
    its own options. What a method has no use for is None or empty."""

    method: str
    sparsity: float | None = None
    pattern: str | None = None
    options: dict[str, Any] = Field(default={})

    @property
    def target(self) -> Pattern:
        """The sparsity or pattern; half where only experts are dropped, and nothing looks at it."""
        from calmix.pruning.patterns import as_pattern

        return as_pattern(self.pattern or self.sparsity or 0.5)

    @property
    def chosen(self) -> Method:
        """The pruning method; one that only looks where only experts are dropped."""
        from calmix.pruning.methods import Look, get_method

        return Look() if self.method == NONE else get_method(self.method, **self.options)

    @property
    def name(self) -> str:
        """A folder name for the target, such as `sparsegpt-0.6` or `wanda-2of4`.

        Options that differ from their defaults stand in it: `sparsegpt-damping=0.1-0.6`.
        """
        if self.method == NONE:
            return f"drop-{self.drop_experts:g}"
        method = self.chosen.text.replace(",", "-").replace("/", "_")
        return f"{method}-{str(self.target).replace(':', 'of').replace(' ', '')}"


def _nothing(*_: Any) -> None: ...


@dataclass(frozen=True)
class How:
    """How a prune or a recovery is done.

    Attributes:
        dtype, device, trust_remote_code: as for `calmix.open_model`.
        overwrite: replace what is there, and an interrupted run's work.
        resume: resume an interrupted run of the same request, if there is one.
        max_memory: bytes the process may hold; None for what is free.
        started: called with the calibration set once it is ready.
        progress: called with blocks or steps done and in all; of a recovery with the latest loss.
        writing, note: as for `calmix.resolve`.
    """

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    overwrite: bool = False
    resume: bool = False
    max_memory: int | None = None
    started: Callable[..., None] = _nothing
    progress: Callable[..., None] = _nothing
    writing: Callable[[str, int, int], None] = _nothing
    note: Callable[[str], None] = _nothing

    @classmethod
    def of(cls, **given: Any) -> How:
        """Return what is given; None is the default."""
        return cls(**{name: value for name, value in given.items() if value is not None})

    @property
    def opening(self) -> dict[str, Any]:
        """What `open_model` takes."""
        return {name: getattr(self, name) for name in ("dtype", "device", "trust_remote_code")}


def target_of(value: Any, *, share: bool = False) -> Pattern:
    """Return what `0.6`, `60%`, or unless a `share` is asked for `2:4` or another pattern means."""
    from calmix.pruning.patterns import Unstructured, as_pattern

    if not share and not re.fullmatch(r"\s*[\d.eE+-]+\s*%?\s*", str(value)):
        return as_pattern(value)
    try:
        return Unstructured(parse_share(value))
    except ValueError as error:
        raise InputError(f"sparsity {error}") from None


def printed(target: Pattern) -> str:
    """Return a target as tables have it: `60%` or `2:4`."""
    from calmix.pruning.patterns import Unstructured

    share = isinstance(target, Unstructured)
    return f"{100 * target.sparsity:g}%" if share else str(target)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are set, the user's own sources read."""
    given = {name: value for name, value in options.items() if value not in (None, (), [])}
    own = {"sources": own_sources(given["sources"])} if "sources" in given else {}
    return given | own


def prune_request(
    *,
    method: str | None = None,
    sparsity: float | str | None = None,
    pattern: Pattern | str | float | None = None,
    **options: Any,
) -> PruneRequest:
    """Check the options of a prune, `calmix.options.Pruning` and the method's own, and fill in the
    method's defaults."""
    from calmix.pruning.allocation import read_allocation
    from calmix.pruning.methods import get_method
    from calmix.pruning.patterns import Unstructured, as_pattern

    given = _given(options)
    own = {name: given.pop(name) for name in list(given) if name not in PRUNE}
    asked = checked(Pruning, given)
    drops, bare = asked.drop_experts is not None, sparsity is None and pattern is None
    chosen: dict[str, Any]
    if drops and bare and "bits" not in own:
        idle = {*own, *(given.keys() - SCORED), *({"method"} if method not in (None, NONE) else ())}
        where = "where only experts are dropped: give --sparsity or --pattern too, or leave it out"
        _check_idle(idle, where)
        chosen = {"method": NONE}
    else:
        if sparsity is not None and pattern is not None:
            raise InputError(BOTH)
        wanted = as_pattern(pattern) if pattern is not None else None
        wanted = target_of(sparsity, share=True) if sparsity is not None else wanted
        default = BITS_METHOD if bare and "bits" in own else METHOD
        found, target = get_method(default if method is None else method, **own).aim(wanted)
        where = f"with method {found.name}: leave it out, or choose another method"
        _check_idle(_unread(found, given), where)
        share = target.sparsity if isinstance(target, Unstructured) else None
        chosen = {
            "method": found.name, "options": found.options, "sparsity": share,
            "pattern": None if share is not None else str(target),
            "propagation": (asked.propagation or "sequential") if found.needs else None,
            "allocation": read_allocation(asked.allocation, target),
        }  # fmt: skip
        if found.needs is None and isinstance(chosen["allocation"], str):
            raise InputError(
                f"--allocation {chosen['allocation']} looks at calibration data, which method "
                f"{found.name} has none of: name a file of sparsities, or choose another method"
            )
        if found.needs is not None and asked.calibration is None:
            raise InputError(
                f"method {found.name} needs --calibration, such as "
                "uniform:python-stdlib,encyclopedia (calmix calibrate sources), or a .txt, "
                ".jsonl or .parquet file"
            )
    if drops and asked.calibration is None:
        raise InputError("--drop-experts needs --calibration: text to score the experts on")
    if drops and isinstance(chosen.get("allocation"), dict):
        raise InputError("--drop-experts needs an --allocation that names no layers: owl or error")
    return PruneRequest(**given | chosen)


def _check_idle(idle: Collection[str], where: str) -> None:
    if idle:
        raise InputError(f"--{min(idle).replace('_', '-')} has no effect {where}")


def _unread(method: Method, given: Collection[str]) -> set[str]:
    """Return the options that a method which looks at no text leaves unread."""
    if method.needs is not None:
        return set()
    return set(given) & set(CALIBRATED) - (SCORED if "drop_experts" in given else set())


def requests(
    *,
    method: str | None = None,
    sparsity: str | None = None,
    pattern: str | None = None,
    bits: str | None = None,
    **options: Any,
) -> list[PruneRequest]:
    """Check a prune to one or several targets, every method with every sparsity or pattern and all
    numbers of bits."""
    from calmix.pruning.methods import get_method

    given = _given(options)
    shares, patterns = _listed("sparsity", sparsity), _listed("pattern", pattern)
    rates = [{} if each is None else {"bits": each} for each in _listed("bits", bits)]
    made, idle = [], set(given)
    # Behind a comma stands another method, unless it is an option of the one before.
    for name in _listed("method", method, r",(?![^,]*=)"):
        unread = set[str]()
        if name is not None:
            joint = rates[0] if "bits" in get_method(name).options else {}
            unread = _unread(get_method(name, **joint), given)
        idle &= unread
        own = {key: value for key, value in given.items() if key not in unread}
        made += [prune_request(method=name, sparsity=share, pattern=shape, **rate, **own)
                 for share in shares for shape in patterns for rate in rates]  # fmt: skip
    _check_idle(idle, f"with method {method}: leave it out")
    names = [one.name for one in made]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two targets are the same, {twice}: leave one out")
    return made


def recover_request(**options: Any) -> Recovering:
    """Check the options of a recovery, `calmix.options.Recovering`, and fill in the method's
    defaults; an InputError for an unknown name, or a value out of range."""
    return checked(Recovering, _given(options))


def recovery_of(text: str) -> Recovering:
    """Return the recovery that `METHOD` or `METHOD,option=value,...` asks for."""
    method, given = named_options("recovery", text)
    if idle := given.keys() - set(RECOVERY_OPTIONS):
        hint = nearest(min(idle), RECOVERY_OPTIONS)
        raise InputError(f"{min(idle)} has no effect with recovery {method}: {hint}")
    return recover_request(method=method, calibration="", **given)


def _listed(option: str, text: str | None, between: str = ",") -> list[str] | list[None]:
    """Return what stands between commas, none of it twice; of an option not given, None."""
    if text is None:
        return [None]
    parts = [part.strip() for part in re.split(between, text)]
    if "" in parts:
        raise InputError(f"--{option} '{text}' has nothing between its commas")
    if twice := next((part for part in parts if parts.count(part) > 1), None):
        raise InputError(f"--{option} names {twice} twice")
    return parts
