"""Pruning methods, by name: those that come with calmix and those of other packages.

To add one, write a subclass of `Method` in a module of its own and name it in `BUILTIN`. Another
package names its class as an entry point of the group `calmix.methods`; a program of one's own
calls `register`.
"""

from __future__ import annotations

import inspect
import re
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError

from calmix.errors import InputError, nearest
from calmix.options import PRUNE, named_options
from calmix.pruning.methods.admm import Admm
from calmix.pruning.methods.base import DTYPES, Method, Solution
from calmix.pruning.methods.magnitude import Magnitude
from calmix.pruning.methods.ria import Ria
from calmix.pruning.methods.sparsegpt import SparseGPT
from calmix.pruning.methods.wanda import Wanda

__all__ = ["DTYPES", "METHODS", "Method", "Solution", "get_method", "methods", "register"]

GROUP = "calmix.methods"
BUILTIN: tuple[type[Method], ...] = (SparseGPT, Admm, Wanda, Ria, Magnitude)
METHODS: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Make a method known by its name in this process; may stand over its class.

    Raises:
        InputError: it is no method that can be used, or its name is another one's.
    """
    if problem := _problem(method):
        raise InputError(problem)
    held = METHODS.setdefault(method.name, method)
    if held is not method:
        raise InputError(f"the method '{method.name}' is {held.__module__}.{held.__qualname__}'s")
    return method


def methods() -> dict[str, type[Method]]:
    """Return all methods by name; those of other packages that cannot be loaded are left out."""
    for name, point in _others().items():
        if name not in METHODS:
            try:
                _load(point)
            except InputError:  # told when it is asked for
                continue
    return dict(METHODS)


def get_method(method: str | Method, **options: Any) -> Method:
    """Return a method with its options.

    Args:
        method: `NAME` or `NAME,option=value,...`; or a method, which takes no further options.
        **options: more of its options.

    Raises:
        InputError: no such method or option, a value it does not take, or an option given twice.
    """
    if isinstance(method, Method):
        return _made(type(method), method.options | options) if options else method
    name, values = named_options("method", method)
    found = METHODS.get(name)
    if found is None:
        point = _others().get(name)
        if point is None:
            known = [*METHODS, *_others()]
            raise InputError(f"unknown method '{name}': {nearest(name, known)}")
        found = _load(point)
    for key in options:
        if key in values:
            raise InputError(f"{key} is given twice, once in the method '{method}'")
    return _made(found, values | options)


def _made(found: type[Method], values: dict[str, Any]) -> Method:
    """Return a method with options.

    Raises:
        InputError: it has no such option, or does not take a value.
    """
    name = found.name
    for key in values:
        if key not in found.model_fields:
            hint = nearest(key, found.model_fields) if found.model_fields else "it has none"
            raise InputError(f"{key} has no effect with method {name}: {hint}")
    try:
        return found(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "options"
        says = first["msg"].removeprefix("Value error, ")
        raise InputError(f"method {name}: {where} {first['input']}: {says}") from None


def _others() -> dict[str, EntryPoint]:
    """Return the methods that installed packages name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(point: EntryPoint) -> type[Method]:
    """Import and register what an entry point names.

    Raises:
        InputError: it cannot be imported, or is no method of the entry point's name.
    """
    try:
        found = point.load()
    except Exception as error:
        told = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"the method '{point.name}' ({point.value}) cannot be loaded: "
            f"{type(error).__name__}: {told}"
        ) from error
    if getattr(found, "name", None) != point.name:
        raise InputError(f"{point.value} is no method of the name '{point.name}'")
    return register(found)


def _problem(method: Any) -> str | None:
    """Say why a class cannot be used as a method."""
    if not (inspect.isclass(method) and issubclass(method, Method)):
        return f"{method!r} is no subclass of calmix.pruning.methods.Method"
    if inspect.isabstract(method):
        return f"the method {method.__qualname__} has no solve"
    for attribute in ("name", "statistic"):
        if not hasattr(method, attribute):
            return f"the method {method.__qualname__} has no {attribute}"
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", str(method.name)):
        return f"a method's name is of small letters, digits and -_. only, not '{method.name}'"
    for key, field in method.model_fields.items():
        if key in PRUNE:
            return f"the method {method.name} has an option {key}, which is every prune's"
        if field.is_required():
            return f"the option {key} of the method {method.name} has no default"
    return None


for _builtin in BUILTIN:
    register(_builtin)
