"""The command line: each verb parses, calls the API and prints; nothing is computed here."""

from __future__ import annotations

import functools
import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from calmix.cli.root import app
from calmix.errors import MEANT, CalmixError

# How often a thread looks whether the others are done before it sleeps. libgomp's 300,000 last
# longer than a turn of the scheduler: where another program has a core, each would wait so long.
SPINS = "2000"
# Kernels that PyTorch and oneDNN keep. Each is for one shape and may take a megabyte; experts have
# as many shapes as they have numbers of tokens. Both read it at their first product.
CACHES, KERNELS = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"), "64"


def _version(asked: bool) -> None:
    if asked:
        import calmix

        typer.echo(f"calmix {calmix.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of no verb."""


_parser = functools.cache(typer.main.get_command)  # takes a tenth of a second; verbs stay the same
# What the parser raises for a mistake: click's class or, in later versions, typer's copy of it.
UsageError: Any = typer.BadParameter.__base__


def _refuse(error: Any) -> NoReturn:
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.ctx.get_help())
        sys.exit(2)
    from calmix.cli.common import fail

    verb = error.ctx.command_path if error.ctx else "calmix"
    if verb == "calmix prune" and (name := getattr(error, "option_name", "")):
        from calmix.options import METHOD
        from calmix.pruning.methods import methods

        key = name.lstrip("-").replace("-", "_")
        for method in sorted(methods().values(), key=lambda one: one.name != METHOD):
            if key in method.model_fields:
                fail(f"{name} goes with its method: --method {method.name},{key}=VALUE")
    name = getattr(error, "option_name", "").lstrip("-")
    if (meant := MEANT.get(name)) and any(f"--{meant}" in p.opts for p in error.ctx.command.params):
        fail(f"No such option: --{name}: did you mean --{meant}? (see {verb} --help)")
    fail(f"{error.format_message().rstrip('.')} (see {verb} --help)")


def main() -> None:
    """Run the command line. Exit code 2 and one line for a mistake; 130 for an interrupt."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook sets its own, which may not be installed here
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported, which no verb has yet
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    for cache in CACHES:
        os.environ.setdefault(cache, KERNELS)
    try:
        code = _parser(app)(prog_name="calmix", standalone_mode=False)
    except UsageError as error:
        _refuse(error)
    except CalmixError as error:
        from calmix.cli.common import fail

        fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    if code == 130:
        sys.stderr.write("interrupted\n")
    if code:
        sys.exit(code)
