"""`compress`, `answer` and `report`: from a model to a smaller one and its report card."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calmix.cli.common import (
    LEFT,
    MAKE,
    AsJson,
    Device,
    Licence,
    ModelName,
    TrustRemoteCode,
    duration,
    note,
    out,
    print_json,
    progress_bar,
    size,
)
from calmix.cli.evaluate import SuiteName
from calmix.cli.study_report import parse_weights
from calmix.cli.tables import print_rows
from calmix.errors import InputError
from calmix.files import check_output_file

if TYPE_CHECKING:
    from calmix.compress.estimate import Taken
    from calmix.compress.plan import Stage

Prompts = Annotated[
    Path | None,
    typer.Option(
        show_default="a dozen of the suite's",
        help="A .txt file with a prompt a line, a .jsonl or a .parquet file.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("compress", rich_help_panel=MAKE)(compress_command)
    app.command("report", rich_help_panel=LEFT)(report_command)
    app.command("answer", rich_help_panel=LEFT)(answer_command)


def compress_command(
    model: ModelName,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", show_default=False, help="Folder to write, or to go on in."),
    ],
    sparsity: Annotated[
        float | None, typer.Option(show_default="0.6", help="Share of weights to prune.")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(show_default=False, help="N:M in place of a sparsity, such as 2:4."),
    ] = None,
    effort: Annotated[
        str,
        typer.Option(
            help="quick (half the rows, a quick slice of the suite), standard, or best (three "
            "times the rows, recovery block by block before that of the whole)."
        ),
    ] = "standard",
    calibration: Annotated[
        str | None,
        typer.Option(
            show_default="a built-in mix", help="Calibration text, as for calmix calibrate."
        ),
    ] = None,
    no_corpus: Annotated[
        bool, typer.Option("--no-corpus", help="Calibrate on text the model writes itself (IGSP).")
    ] = False,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=WEIGHT,...",
            show_default="all that the mix has",
            help="What matters: the share of each dimension in the calibration set and in what "
            "decides when recovery stops. code=2,general=1; those not named get none.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(show_default="0", help="Seed of the calibration draw.")
    ] = None,
    licence: Licence = None,
    suite: SuiteName = "offline",
    prompts: Prompts = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print commands, time, memory and disk; write nothing."),
    ] = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    max_memory: Annotated[
        str | None,
        typer.Option(
            show_default="what is free", help="Memory prune and recovery may take, such as 6GiB."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prune a model, recover it, measure what is left, and write its report card.

    The other verbs in a row, each with its result in OUT; interrupted, the same command goes on.
    """
    from calmix.capability.suites import suite_file
    from calmix.compress import plan, running
    from calmix.models import check_models

    check_models(model, device=device, trust_remote_code=trust_remote_code)
    running.check_place(output, [model, calibration, prompts, suite_file(suite)])
    if sparsity is None and pattern is None:
        sparsity = 0.6
    asked = plan.request(
        model, effort=effort, sparsity=sparsity, pattern=pattern, calibration=calibration,
        no_corpus=no_corpus, keep=parse_weights(keep), seed=seed, suite=suite, prompts=prompts,
        licence=licence, device=device, trust_remote_code=trust_remote_code, max_memory=max_memory,
    )  # fmt: skip
    if dry_run:
        running.check(asked, output)
        _print_plan(asked, output, as_json)
        return

    def say(stage: Stage, kept: bool) -> None:
        note(f"{stage.name}: done before" if kept else f"\n$ {stage.command}")

    muted = contextlib.redirect_stdout(io.StringIO()) if as_json else contextlib.nullcontext()
    with muted:
        seconds = running.compress(asked, output, _run, say)
    card, model_folder = output / "card.html", output / "model"
    if as_json:
        print_json(
            {"output": str(output), "model": str(model_folder), "card": str(card),
             "seconds": seconds}
        )  # fmt: skip
        return
    out.print(
        f"\n{model_folder} and its card {card}, {duration(sum(seconds.values()))}",
        soft_wrap=True,
        highlight=False,
    )


def _run(arguments: Sequence[str]) -> None:
    """Run a command line in this process; what it refuses, it raises."""
    from calmix.cli import app

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
        return
    title = f"{asked.model} at {asked.target}, effort {asked.effort}, on this machine"
    print_taken(taken, title)


def print_taken(taken: Sequence[Taken], title: str) -> None:
    """Print what stages will take, the commands of those that have one, and the whole."""
    print_rows(
        [
            {"stage": one.stage.name, "time": duration(one.seconds), "memory": size(one.memory),
             "disk": size(one.disk) if one.disk else "-"}
            for one in taken
        ],
        as_json=False,
        title=title,
    )  # fmt: skip
    for one in taken:
        if one.stage.arguments:
            out.print(one.stage.command, soft_wrap=True, highlight=False)
    out.print(
        f"\nabout {duration(sum(one.seconds for one in taken))}, "
        f"{size(max(one.memory for one in taken))} of memory at the peak, "
        f"{size(sum(one.disk for one in taken))} on disk; nothing was written",
        soft_wrap=True,
        highlight=False,
    )


def answer_command(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", show_default=False, help="The dense model first."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", show_default=False, help="JSON file to write.")
    ],
    suite: SuiteName = "offline",
    prompts: Prompts = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file if it exists.")
    ] = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """What several models write after the same prompts, greedily, side by side."""
    from calmix.capability.answers import Answered, answer, read_prompts, suite_prompts
    from calmix.capability.suites import load_suite, suite_file
    from calmix.models import check_models, open_model

    chosen = load_suite(suite)
    check_models(*models, device=device, trust_remote_code=trust_remote_code)
    inputs = [*models, prompts, suite_file(suite)]
    check_output_file(output, inputs=inputs, overwrite=overwrite)
    asked = read_prompts(prompts) if prompts is not None else suite_prompts(chosen)
    if not asked:
        raise InputError(f"suite {suite} has no items in the archive to ask: give --prompts FILE")
    told, written = [], []
    for name in models:
        opened = open_model(name, device=device, trust_remote_code=trust_remote_code)
        with progress_bar() as bar:
            job = bar.add_task(f"{name} answers", total=len(asked))
            written.append(
                answer(opened, asked, progress=lambda d, n: bar.update(job, completed=d, total=n))  # noqa: B023
            )
        told.append((name, opened.fingerprint))
    Answered(tuple(asked), tuple(told), tuple(written)).save(output)
    same = sum(len(set(texts)) == 1 for texts in zip(*written, strict=True))
    out.print(
        f"{output}: {len(asked)} prompts, {same} with the same answer of all models",
        soft_wrap=True,
        highlight=False,
    )


def report_command(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="OUT...", show_default=False, help="Folders of calmix compress."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            show_default="OUT/card.html",
            help="Page to write; needed for several.",
        ),
    ] = None,
) -> None:
    """Write the report card of a compressed model, or put several side by side."""
    from calmix.files import write_text
    from calmix.report.card import read_card
    from calmix.report.card_page import card_page, model_card, several_page

    if output is not None:  # beside the default page another may stand
        held = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
        inputs = [path for path in held if path.suffix != ".html"]
        check_output_file(output, inputs=inputs, overwrite=True)
    if len(folders) == 1:
        card = read_card(folders[0])
        page = output or folders[0] / "card.html"
        write_text(page, card_page(card))
        write_text(folders[0] / "model" / "README.md", model_card(card))
    else:
        if output is None:
            raise InputError("several models need a page to stand on: name it with -o")
        page = output
        write_text(page, several_page([read_card(folder) for folder in folders]))
    out.print(f"report: {page}", soft_wrap=True, highlight=False)
