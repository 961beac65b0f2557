"""Make verbs of the command line from functions and option models."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from pydantic import create_model
from pydantic.fields import FieldInfo

from calmix.cli.common import out
from calmix.cli.root import VERBS, Command, Group, app
from calmix.errors import InputError
from calmix.files import user_path
from calmix.options import (
    DrawOptions,
    ModelOptions,
    Options,
    check_method,
    checked,
    flags,
    option,
)

Handler = Callable[..., None]
# Shared options, which help lists after a verb's own.
COMMON = {name for model in (DrawOptions, ModelOptions) for name in model.model_fields} | {
    "max_memory",
    "resume",
    "overwrite",
    "as_json",
}
JSON: Any = {"as_json": (bool, option(False, "Print JSON instead of a table.", flag="--json"))}


def group(name: str, default: str = "") -> typer.Typer:
    """Add a group and return it; its `default` command needs no name."""
    text = f"{VERBS[name][1]}."
    if default:
        text += f"\n\ncalmix {name} is short for calmix {name} {default}; see its --help."
    typer_app = typer.Typer(
        cls=type("Default", (Group,), {"default": default}),
        help=text,
        add_completion=False,
        no_args_is_help=not default,
        rich_markup_mode=None,
    )
    app.add_typer(typer_app, name=name)
    return typer_app


def verb(name: str, *, of: typer.Typer = app, json: bool = True) -> Callable[[Handler], Handler]:
    """Register a function as a command, with `--json` if it prints `json`.

    Parameters without a default are option models that verbs share; each receives all values. The
    others are the verb's own options. One model of all of them parses and checks the raw values.
    """

    def register(handler: Handler) -> Handler:
        hints = typing.get_type_hints(handler, include_extras=True)
        declared = inspect.signature(handler).parameters.values()
        shared = [hints[one.name] for one in declared if one.default is one.empty]
        own: Any = {
            one.name: (hints[one.name], one.default)
            for one in declared
            if one.default is not one.empty
        }
        bases = (*shared, Options)
        model = create_model(handler.__name__, __base__=bases, **own, **JSON if json else {})

        def command(**values: Any) -> None:
            request = checked(model, {k: v for k, v in values.items() if v not in ([], False)})
            for name, what in named.items():
                value = getattr(request, name)
                for one in value if isinstance(value, tuple) else (value,):
                    if one is not None:
                        _look_up(what, one, getattr(request, "sources", None))
            before, out.quiet = out.quiet, getattr(request, "as_json", False)
            try:
                handler(*[request] * len(shared), **{key: getattr(request, key) for key in own})
            finally:
                out.quiet = before

        fields: dict[str, Any] = model.model_fields
        named = {key: what for key, one in fields.items() if (what := _extra(one).get("names"))}
        parameters = [_parameter(model, key, field) for key, field in fields.items()]
        parameters.sort(
            key=lambda one: (
                one.default is not one.empty,
                one.name in COMMON and one.name not in own,
            )
        )
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__doc__ = handler.__doc__
        of.command(name, cls=Command)(command)
        return handler

    return register


def _look_up(what: str, name: Any, sources: Any) -> None:
    """Raise a CalmixError if there is no such model, path, method or source, the user's own
    `sources` included."""
    if what == "calibration":
        from calmix.sources.registry import check_names

        return check_names(name, sources)
    if what == "method":
        return check_method(name)
    scores = str(name).lower().endswith(".json")  # those of a model can stand for it
    path = user_path(str(name))
    if (what != "model" or scores) and path.exists():
        return
    if what == "path" or scores:
        raise InputError(f"there is no file or folder {path}")
    from calmix.models.hub import is_served, named_model

    if not is_served(name):
        named_model(name)


def _extra(field: FieldInfo) -> dict[str, Any]:
    return cast(dict[str, Any], field.json_schema_extra or {})


def _parameter(model: type[Options], name: str, field: FieldInfo) -> inspect.Parameter:
    """Return a field as a parameter of typer: a bool is a switch, a list repeats, the rest text."""
    extra = _extra(field)
    required, kind = field.is_required(), cast(Any, field.annotation)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # without `| None`, and bounds
        members = [one for one in typing.get_args(kind) if one is not type(None)]
        kind = members[0] if len(members) == 1 else str
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    default = None if field.default is None or required else field.default
    listed = typing.get_origin(kind) in (list, tuple)
    shown = extra.get("shown") or (str(default) if default or type(default) is int else "")
    text = f"{(field.description or '').rstrip('.')} [{shown}]." if shown else field.description
    word = {int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")
    if typing.get_origin(kind) is Literal:
        word = "|".join(map(str, typing.get_args(kind)))
    how: dict[str, Any] = {"help": text, "show_default": False}
    if extra.get("argument"):
        info: Any = typer.Argument(metavar=flags(model, name)[0], **how)
    else:
        how |= {} if kind is bool else {"metavar": extra.get("metavar") or word}
        info = typer.Option(*flags(model, name), hidden=bool(extra.get("advanced")), **how)
    annotation: Any = bool if kind is bool else list[str] if listed else str
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else False if kind is bool else None,
        annotation=Annotated[annotation if required or kind is bool else annotation | None, info],
    )
