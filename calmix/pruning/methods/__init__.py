"""Pruning methods, by name: those that come with calmix and those of other packages.

To add one, write a subclass of `Method` in a module of its own here. Another package names its
class as an entry point of the group `calmix.methods`; a program of your own calls `register`.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError

from calmix.errors import InputError, nearest
from calmix.options import PRUNE, named_options
from calmix.pruning.methods.base import Look, Method, Solution

__all__ = ["METHODS", "Look", "Method", "Solution", "get_method", "methods", "register"]

METHODS: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Make a method known by its name in this process; may stand over its class.

    Raises:
        InputError: it cannot be used as a method, or its name is taken.
    """
    if not (inspect.isclass(method) and issubclass(method, Method)):
        raise InputError(f"{method!r} is not a subclass of calmix.pruning.Method")
    where = f"the method {method.__qualname__}"
    lacking = [name for name in ("name", "statistic") if not hasattr(method, name)]
    for name in (*lacking, *sorted(method.__abstractmethods__)):
        raise InputError(f"{where} has no {name}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", str(method.name)):
        raise InputError(
            f"a method's name has small letters, digits and -_. only, not '{method.name}'"
        )
    for key in method.model_fields.keys() & PRUNE:
        raise InputError(f"{where} has an option {key}, which every prune has")
    held = METHODS.setdefault(method.name, method)
    if held is not method:
        raise InputError(f"the method '{method.name}' is {held.__module__}.{held.__qualname__}'s")
    return method


def methods() -> dict[str, type[Method]]:
    """Return all methods by name; those of other packages that cannot be loaded are left out."""
    for name in _others(tuple(sys.path)):
        with suppress(InputError):  # raised when it is asked for
            _load(name)
    return dict(METHODS)


def get_method(method: str | Method, **options: Any) -> Method:
    """Return a method with its options.

    Args:
        method: `NAME` or `NAME,option=value,...`; or a method.
        **options: more of its options.

    Raises:
        InputError: no such method or option, a value it does not take, or an option given twice.
    """
    if isinstance(method, Method):
        if not options:
            return method
        found, values = type(method), method.options | options
    else:
        name, own = named_options("method", method)
        for key in options.keys() & own.keys():
            raise InputError(f"{key} is given twice, once in the method '{method}'")
        found, values = _load(name), own | options
    for key in values:
        if key not in found.model_fields:
            hint = nearest(key, found.model_fields) if found.model_fields else "it has none"
            raise InputError(f"{key} has no effect with method {found.name}: {hint}")
    try:
        return found(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "options"
        says = first["msg"].removeprefix("Value error, ")
        raise InputError(f"method {found.name}: {where} {first['input']}: {says}") from None


@cache
def _others(path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Return the methods that packages installed on a path name."""
    return {point.name: point for point in entry_points(group="calmix.methods")}


def _load(name: str) -> type[Method]:
    """Return a method that is known, or import what an entry point names."""
    if name in METHODS:
        return METHODS[name]
    others = _others(tuple(sys.path))
    if name not in others:
        raise InputError(f"unknown method '{name}': {nearest(name, [*METHODS, *others])}")
    point = others[name]
    try:
        found = point.load()
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"the method '{name}' ({point.value}) cannot be loaded: {type(error).__name__}: {line}"
        ) from error
    if getattr(found, "name", None) != name:
        raise InputError(f"{point.value} is not a method of the name '{name}'")
    return register(found)


for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    for _found in vars(import_module(_module.name)).values():
        own = inspect.isclass(_found) and _found.__module__ == _module.name != Method.__module__
        if own and issubclass(_found, Method) and not inspect.isabstract(_found):
            register(_found)
