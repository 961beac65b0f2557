"""Pruning methods by name: those of calmix and those of other packages.

To add one here, write a subclass of `Method` in its own module. Another package declares its class
as an entry point in the group `calmix.methods`; your own program calls `register`.
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

from calmix.errors import InputError, nearest, plain_problem
from calmix.options import PRUNE, named_options
from calmix.pruning.methods.base import Look, Method, Solution

__all__ = ["METHODS", "Look", "Method", "Solution", "get_method", "methods", "register"]

METHODS: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Register a method by its name in this process; usable as a class decorator.

    Raises:
        InputError: the class is not a usable method, or its name is taken.
    """
    if not (inspect.isclass(method) and issubclass(method, Method)):
        raise InputError(f"{method!r} is not a subclass of calmix.pruning.Method")
    where = f"the method {method.__qualname__}"
    missing = [name for name in ("name", "statistic") if not hasattr(method, name)]
    for name in (*missing, *sorted(method.__abstractmethods__)):
        raise InputError(f"{where} has no {name}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", str(method.name)):
        raise InputError(
            f"a method name takes lowercase letters, digits and -_. only, not '{method.name}'"
        )
    for key in method.model_fields.keys() & PRUNE:
        raise InputError(f"{where} has an option {key}, which is reserved: rename it")
    known = METHODS.setdefault(method.name, method)
    if known is not method:
        where = f"{known.__module__}.{known.__qualname__}"
        raise InputError(f"the method name '{method.name}' is taken by {where}")
    return method


def methods() -> dict[str, type[Method]]:
    """Return all methods by name, without those of other packages that fail to load."""
    for name in _others(tuple(sys.path)):
        with suppress(InputError):  # raised again when it is requested
            _load(name)
    return dict(METHODS)


def get_method(method: str | Method, **options: Any) -> Method:
    """Return a method with its options.

    Args:
        method: `NAME`, `NAME,option=value,...`, or a method.
        **options: further options of the method.

    Raises:
        InputError: no such method or option, an invalid value, or an option given twice.
    """
    if isinstance(method, Method):
        if not options:
            return method
        kind, values = type(method), method.options | options
    else:
        name, own = named_options("method", method)
        for key in options.keys() & own.keys():
            raise InputError(f"{key} is given twice, once in the method '{method}'")
        kind, values = _load(name), own | options
    for key in values:
        if key not in kind.model_fields:
            hint = nearest(key, kind.model_fields) if kind.model_fields else "it has no options"
            raise InputError(f"{key} has no effect with method {kind.name}: {hint}")
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "options"
        says = plain_problem(first["msg"])
        raise InputError(f"method {kind.name}: {where} {first['input']}: {says}") from None


@cache
def _others(path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Return the methods declared by packages installed on a path."""
    return {point.name: point for point in entry_points(group="calmix.methods")}


def _load(name: str) -> type[Method]:
    """Return a registered method, or import it from its entry point."""
    if name in METHODS:
        return METHODS[name]
    others = _others(tuple(sys.path))
    if name not in others:
        raise InputError(f"unknown method '{name}': {nearest(name, [*METHODS, *others])}")
    point = others[name]
    try:
        method = point.load()
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"the method '{name}' ({point.value}) cannot be loaded: {type(error).__name__}: {line}"
        ) from error
    if getattr(method, "name", None) != name:
        raise InputError(f"{point.value} is not a method named '{name}'")
    return register(method)


for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    for _value in vars(import_module(_module.name)).values():
        own = inspect.isclass(_value) and _value.__module__ == _module.name != Method.__module__
        if own and issubclass(_value, Method) and not inspect.isabstract(_value):
            register(_value)
