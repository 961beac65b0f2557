"""`compress` and `report`: from a model to a smaller one and its report card."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calmix.cli.common import duration, line, note, parse_weights, print_json
from calmix.cli.tables import print_taken
from calmix.cli.verbs import app, verb
from calmix.errors import InputError
from calmix.files import check_output_file
from calmix.options import MODEL, Json, Options, Share, option, path_option

if TYPE_CHECKING:
    from calmix.compress.plan import Stage


class CompressOptions(Json):
    """What `compress` can be asked for."""

    model: str = option(..., MODEL, argument=True)
    output: Path = path_option("Folder to write, or to resume in.")
    sparsity: Share | None = option(None, "Fraction to prune, e.g. 0.6 or 60%.", shown="0.6")
    pattern: str | None = option(None, "N:M in place of a sparsity: 2:4.")
    effort: Literal["quick", "standard", "best"] = option(
        "standard", "Time for quality: rows, recovery, evaluation."
    )
    calibration: str | None = option(
        None, "Calibration text, as for calmix calibrate.", shown="a built-in mix"
    )
    no_corpus: bool = option(False, "Calibrate on text the model writes itself.")
    keep: str | None = option(
        None, "Shares of dimensions, e.g. code=2,general=1.", metavar="NAME=WEIGHT,..."
    )
    suite: str = option("offline", "Suite by name, or a YAML file.")
    dry_run: bool = option(False, "Print commands, time, memory, disk; write nothing.")
    seed: int | None = option(None, "Seed of the calibration draw.", shown="0", ge=0)
    licence: Literal["permissive"] | None = option(
        None, "Only sources with such a licence.", flag="--licence --license"
    )
    prompts: Path | None = option(None, "Prompts for the card: .txt, .jsonl or .parquet.",
                                  shown="a dozen of the suite's", advanced=True)  # fmt: skip
    device: str = option("auto", "Torch device, e.g. cpu or cuda:1.")
    trust_remote_code: bool = option(
        False, "Run modelling code shipped with the model.", advanced=True
    )
    max_memory: str | None = option(
        None, "Memory it may take, e.g. 6GiB.", shown="what is free", advanced=True
    )


class ReportOptions(Options):
    """What `report` can be asked for."""

    folders: tuple[Path, ...] = option(..., "Folders of calmix compress.", argument=True)
    output: Path | None = path_option("Page to write; needed for several.", default=None,
                                      shown="OUT/card.html")  # fmt: skip


def register(panel: str, left: str) -> None:
    """Add the verbs to the command line."""
    verb(app, "compress", panel)(compress)
    verb(app, "report", left)(report)


def compress(options: CompressOptions) -> None:
    """Prune a model, distil into it, evaluate what is left, and write its report card.

    Every stage keeps its result in OUT; if interrupted, run the same command again to resume.
    """
    from calmix.calibration import saved_set
    from calmix.compress import plan, running
    from calmix.evaluation.suites import suite_file

    model, output = options.model, options.output
    drawn = saved_set(options.calibration)
    inputs = [model, drawn, options.prompts, suite_file(options.suite)]
    running.check_place(output, inputs)
    names = ("effort", "pattern", "calibration", "no_corpus", "seed", "suite", "prompts", "licence",
             "device", "trust_remote_code", "max_memory")  # fmt: skip
    sparsity = 0.6 if (options.sparsity, options.pattern) == (None, None) else options.sparsity
    asked = plan.request(model, sparsity=sparsity, keep=parse_weights(options.keep),
                         **{name: getattr(options, name) for name in names})  # fmt: skip
    if options.dry_run:
        running.check(asked, output)
        _print_plan(asked, output, options.as_json)
        return

    def say(stage: Stage, kept: bool) -> None:
        note(f"{stage.name}: done before" if kept else f"\n$ {stage.command}")

    muted = contextlib.redirect_stdout(io.StringIO()) if options.as_json else None
    with muted or contextlib.nullcontext():
        seconds = running.compress(asked, output, _run, say)
    card, made = output / "card.html", output / "model"
    if options.as_json:
        print_json({"output": str(output), "model": str(made), "card": str(card),
                    "seconds": seconds})  # fmt: skip
    else:
        line(f"\n{made} and its card {card}, {duration(sum(seconds.values()))}")


def _run(arguments: Sequence[str]) -> None:
    """Run a command line in this process; what it refuses, it raises."""
    code = app(list(arguments), prog_name="calmix", standalone_mode=False)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(f"calmix {arguments[0]} ended with {code}")


def _print_plan(asked: Any, output: Path, as_json: bool) -> None:
    from calmix.compress.estimate import estimate
    from calmix.compress.plan import stages

    taken = estimate(asked, stages(asked, output))
    if as_json:
        print_json([asdict(one) | {"command": one.stage.command} for one in taken])
    else:
        title = f"{asked.model} at {asked.target}, effort {asked.effort}, on this machine"
        print_taken(taken, title)


def report(options: ReportOptions) -> None:
    """Write the report card of a compressed model, or one page of several."""
    from calmix.files import write_text
    from calmix.report.card import read_card
    from calmix.report.card_page import card_page, model_card, several_page

    folders, output = options.folders, options.output
    if output is not None:  # beside the default page another may stand
        held = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
        inputs = [path for path in held if path.suffix != ".html"]
        check_output_file(output, inputs=inputs, overwrite=True)
    if len(folders) == 1:
        card = read_card(folders[0])
        output = output or folders[0] / "card.html"
        write_text(output, card_page(card))
        write_text(folders[0] / "model" / "README.md", model_card(card))
    elif output is None:
        raise InputError("several models need a page to stand on: name it with -o")
    else:
        write_text(output, several_page([read_card(folder) for folder in folders]))
    line(f"report: {output}")
