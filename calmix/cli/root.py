"""The root of the command line: the list of verbs, and how they parse and print help."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from calmix.errors import nearest

# What `calmix --help` shows, in this order; a verb's module is imported when it is called.
VERBS = {
    "compress": ("compress", "Make a model smaller and write its report card"),
    "prune": ("prune", "Prune or quantise by SparseGPT, ADMM, Wanda, GPTQ, ..."),
    "recover": ("prune", "Distil the dense model into the remaining weights"),
    "evaluate": ("evaluate", "Score a model and its retention of a dense one"),
    "compare": ("evaluate", "Compare the retention of several models"),
    "check": ("compress", "Test whether a model meets its floors"),
    "report": ("compress", "Write the report card of a compressed model"),
    "calibrate": ("calibrate", "Draw a calibration set, or let the model write it"),
    "export": ("export", "Export a pack, GGUF, a set or an imatrix"),
    "study": ("study", "Run many sets, methods and sparsities from one file"),
    "doctor": ("doctor", "Check the installation, inspect a result"),
}


class Plain:
    """Help in plain text: usage, then lists; nothing is truncated at any width."""

    def collect_usage_pieces(self: Any, ctx: Any) -> list[str]:
        """Return arguments, required options, and the rest."""
        pieces = [_word(one) for one in self.params if isinstance(one, TyperArgument)]
        pieces += [
            f"{min(one.opts, key=len)} {one.metavar}"
            for one in self.params
            if one.required and isinstance(one, TyperOption)
        ]
        return [*pieces, *(["COMMAND"] if hasattr(self, "commands") else []), "[OPTIONS]"]

    def format_options(self: Any, ctx: Any, formatter: Any) -> None:
        """Write commands, then arguments, then options."""
        params = [one for one in self.get_params(ctx) if not one.hidden]
        lists = {
            "Commands": self.lines() if hasattr(self, "commands") else [],
            "Arguments": [
                (_word(one), one.help) for one in params if isinstance(one, TyperArgument)
            ],
            "Options": [
                (
                    ", ".join(sorted(one.opts, key=len))
                    + ("" if one.is_flag else f" {one.metavar}"),
                    one.help,
                )
                for one in params
                if not isinstance(one, TyperArgument)
            ],
        }
        if any(one.hidden for one in self.params):
            lists["Options"].append(("--help-all", "Show advanced options too, and exit."))
        for title, rows in lists.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=26)


def _word(param: Any) -> str:
    name = param.metavar if param.required else f"[{param.metavar}]"
    return name if param.nargs == 1 else f"{name}..."


class Command(Plain, TyperCommand):
    """A verb."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Read `--help-all` as `--help` that shows advanced options too."""
        if "--help-all" in args:
            for one in self.params:
                one.hidden = False  # type: ignore[attr-defined]
            args = ["--help"]
        return super().parse_args(ctx, args)


class Group(Plain, TyperGroup):
    """A group that passes words to its `default` command unless they name another one."""

    default = ""

    def lines(self) -> list[tuple[str, str]]:
        """Return each command with a line of help."""
        return [(name, one.get_short_help_str(100)) for name, one in self.commands.items()]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command named by the first word."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            ctx.fail(f"No such command '{name}': {nearest(name, self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Read `help VERB` as `VERB --help`, and insert the default command unless one is named or
        the group's help is asked for."""
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        if args[:1] == ["--help-all"] and not self.default:
            args = ["--help"]
        named = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        if self.default and not named and (args or not ctx.resilient_parsing):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


class Root(Group):
    """All verbs, each imported on first use."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all verbs."""
        return [*VERBS]

    def lines(self) -> list[tuple[str, str]]:
        """Return the listed verbs without importing them."""
        return [(name, line) for name, (_, line) in VERBS.items()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a verb, or None if it is unknown."""
        if cmd_name in VERBS and cmd_name not in self.commands:
            importlib.import_module(f"calmix.cli.{VERBS[cmd_name][0]}")
            self.commands = typer.main.get_group(app).commands
        return self.commands.get(cmd_name)


app = typer.Typer(
    name="calmix",
    cls=Root,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make language models smaller on text you choose, and measure what survives.",
    epilog="\b\ncalmix COMMAND --help shows more. Start with:\n"
    "  calmix compress builtin:smollm2-135m -o out --effort quick",
)
