"""The command line: each verb parses, calls the API and prints; nothing is computed here."""

from __future__ import annotations

import functools
import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from calmix.cli.root import app
from calmix.errors import MEANT, CalmixError

# Spins of an idle OpenMP thread before it sleeps. libgomp's default of 300,000 outlasts a slice
# of the scheduler: where another program holds a core, every barrier would wait that long.
SPINS = "2000"
# Kernels that PyTorch and oneDNN cache. Each is for one shape and may take a megabyte, and experts
# see a new shape for every token count. Both read the limit at their first matrix product.
CACHES, KERNEL_COUNT = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"), "64"


def _version(wanted: bool) -> None:
    if wanted:
        import calmix

        typer.echo(f"calmix {calmix.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb."""


_parser = functools.cache(typer.main.get_command)  # building it takes a tenth of a second
# The parser's usage error: click's class or, in later versions of typer, its own copy.
UsageError: Any = typer.BadParameter.__base__


def _refuse(error: Any) -> NoReturn:
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.ctx.get_help())
        sys.exit(2)
    from calmix.cli.common import fail

    verb = error.ctx.command_path if error.ctx else "calmix"
    unknown = type(error).__name__ == "NoSuchOption"
    name = error.option_name.lstrip("-") if unknown else ""
    if verb == "calmix prune" and name:
        from calmix.options import METHOD
        from calmix.pruning.methods import methods

        key = name.replace("-", "_")
        for method in sorted(methods().values(), key=lambda one: one.name != METHOD):
            if key in method.model_fields:
                fail(f"--{name} is an option of a method: --method {method.name},{key}=VALUE")
    if (meant := MEANT.get(name)) and any(f"--{meant}" in p.opts for p in error.ctx.command.params):
        fail(f"No such option '--{name}': did you mean --{meant}? (see {verb} --help)")
    fail(f"{error.format_message().rstrip('.')} (see {verb} --help)")


def main() -> None:
    """Run the command line: an error is one line with exit code 2, an interrupt exit code 130."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own backend may not be installed here
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported, which is later
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    for cache in CACHES:
        os.environ.setdefault(cache, KERNEL_COUNT)
    try:
        try:
            code = _parser(app)(prog_name="calmix", standalone_mode=False)
            sys.stdout.flush()  # what --json prints
        except UsageError as error:
            _refuse(error)
    except BrokenPipeError:  # outside of typer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except CalmixError as error:
        from calmix.cli.common import fail

        fail(str(error))
    except PermissionError as error:
        from calmix.cli.common import fail

        fail(f"cannot open {error.filename}: {error.strerror}")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except SystemExit as stop:  # 1 from typer or rich: the reader of our output (head) has exited
        code = 141 if stop.code == 1 else stop.code
    if code == 130:
        sys.stderr.write("interrupted\n")
    if code:
        sys.exit(code)
