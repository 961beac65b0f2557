"""Verbs of the command line, made from their models of options."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperGroup

from calmix.errors import InputError
from calmix.options import Options, checked, flags

Handler = Callable[[Any], None]
MAKE, LEFT, MANY = "From a model to a smaller one", "What is left", "Studies and checks"
# Where a verb of version 0.2 is now; each is refused with this line for one release.
MOVED = {
    "generate": "calibrate SPEC, such as calmix calibrate self-written",
    "measure": "calibrate measure", "predict": "calibrate predict",
    "sources": "calibrate sources, and calibrate show NAME",
    "rescore": "evaluate rescore", "answer": "evaluate answers",
    "perplexity": "evaluate perplexity", "suites": "evaluate suites, and evaluate suite NAME",
    "pack": "export --to pack", "unpack": "export --to model", "hub": "export --to hub",
    "recommend": "study recommend", "inspect": "doctor inspect", "rerun": "doctor rerun",
    "models": "doctor models", "methods": "doctor methods", "assets": "doctor assets",
}  # fmt: skip


class Verbs(TyperGroup):
    """A group that takes anything but the name of one of its commands as its `default`'s words."""

    default = ""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first word names, or the default one."""
        if self.default and (not args or args[0] not in self.commands):
            return self.default, self.commands[self.default], args
        if not self.default and args and args[0] in MOVED:
            raise InputError(f"calmix {args[0]} is now calmix {MOVED[args[0]]}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Leave flags to the default command, unless they ask for the group's own help."""
        if self.default and not (args and (args[0] in self.commands or args[0] == "--help")):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="calmix",
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Prune language models on calibration text you choose, and measure what survives.",
)


def group(name: str, panel: str, text: str, default: str = "") -> typer.Typer:
    """Add a group and return it; its `default` command needs no name."""
    kind, more = type("Group", (Verbs,), {"default": default}) if default else TyperGroup, ""
    if default:
        more = f"\n\ncalmix {name} is short for calmix {name} {default}; see its --help."
    made = typer.Typer(
        cls=kind, help=text + more, short_help=text, add_completion=False,
        no_args_is_help=not default,
    )  # fmt: skip
    app.add_typer(made, name=name, rich_help_panel=panel)
    return made


def verb(name: str, panel: str | None = None, *, of: typer.Typer = app) -> Callable[..., Handler]:
    """Register a function of one options model as a command: fields are flags or arguments.

    Values reach the model as they were written: it alone parses and checks them.
    """

    def register(handler: Handler) -> Handler:
        model = typing.get_type_hints(handler)["options"]
        fields: dict[str, Any] = model.model_fields
        own = model.__annotations__  # before what is inherited

        def command(**values: Any) -> None:
            values.pop("help_all", None)
            handler(checked(model, {k: v for k, v in values.items() if v not in ([], False)}))

        parameters = [_parameter(model, key, field) for key, field in fields.items()]
        parameters.sort(
            key=lambda one: (one.default is not inspect.Parameter.empty, one.name not in own)
        )
        if any((field.json_schema_extra or {}).get("advanced") for field in fields.values()):
            parameters.append(HELP_ALL)
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__doc__ = handler.__doc__
        of.command(name, rich_help_panel=panel)(command)
        return handler

    return register


def _show_all(ctx: typer.Context, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        for one in ctx.command.params:
            one.hidden = False  # type: ignore[attr-defined]
        typer.echo(ctx.get_help())
        raise typer.Exit


HELP_ALL = inspect.Parameter(
    "help_all", inspect.Parameter.KEYWORD_ONLY, default=False,
    annotation=Annotated[bool, typer.Option("--help-all", callback=_show_all, is_eager=True,
                                            help="Show advanced options too, and exit.")],
)  # fmt: skip


def _parameter(model: type[Options], name: str, field: FieldInfo) -> inspect.Parameter:
    """Return a field as typer takes it: a bool is a switch, a list repeats, all else is text."""
    extra: Any = field.json_schema_extra or {}
    required, kind = field.is_required(), _bare(field.annotation)
    default = None if field.default is None or required else field.default
    listed = typing.get_origin(kind) in (list, tuple)
    shown = extra.get("shown") or (str(default) if default not in (None, False, ()) else False)
    how: dict[str, Any] = {"help": field.description, "show_default": shown}
    held: Any = list[str] if listed else str
    if kind is bool:
        held, how["show_default"] = bool, False
    else:
        how["metavar"] = extra.get("metavar") or _metavar(kind)
    if extra.get("argument"):
        how["metavar"] = extra.get("metavar") or name.upper()
        info: Any = typer.Argument(**how)
    else:
        names = flags(model, name)
        info = typer.Option(*names, hidden=bool(extra.get("advanced")), **how)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else False if kind is bool else None,
        annotation=Annotated[held if required or kind is bool else held | None, info],
    )  # fmt: skip


def _bare(kind: Any) -> Any:
    """Return a field's type without `| None` and without bounds."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = [one for one in typing.get_args(kind) if one is not type(None)]
        kind = members[0] if len(members) == 1 else str
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, typing.get_args(kind)))
    return {int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")
