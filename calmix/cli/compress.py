"""`compress` and `report`: from a model to a smaller one and its report card."""

from __future__ import annotations

import contextlib
import io
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from calmix.cli.common import line, note, parse_weights, print_json, result
from calmix.cli.root import app
from calmix.cli.tables import print_table, print_taken
from calmix.cli.verbs import verb
from calmix.errors import CalmixError, InputError
from calmix.files import check_output_file
from calmix.options import Compression, Json, Options, TextField, option, path_option
from calmix.progress import Stages, duration

if TYPE_CHECKING:
    from calmix.compression.ladder import Ladder
    from calmix.compression.plan import Request, Stage


class CompressOptions(TextField, Compression, Json):
    output: Path = path_option("Folder to write, or to resume in.")
    no_corpus: bool = option(False, "Calibrate on text the model writes itself.")
    keep: str | None = option(
        None, "Dimensions' shares beside chats, e.g. code=2,general=1.", metavar="NAME=WEIGHT,..."
    )
    within: str | None = option(
        None, "With --keep-at-least: time to look for it, e.g. 2h.", advanced=True
    )
    dry_run: bool = option(False, "Print commands, time, memory, disk; write nothing.")
    resume: bool = option(
        False, "Resume an interrupted run, as compress always does.", advanced=True
    )
    open: bool = option(False, "Show the card in the browser at the end.")


class ReportOptions(Options):
    folders: tuple[Path, ...] = option(..., "Folders of calmix compress.", argument=True)
    output: Path | None = path_option("Page to write; needed for several.", default=None,
                                      shown="OUT/card.html")  # fmt: skip


@verb("compress")
def compress(options: CompressOptions) -> None:
    """Quantise a model (or prune it and distil into it), evaluate it, and write its report card.

    Every stage keeps its result in the output folder. Run the same command again to resume. calmix
    check OUT tests the result against floors of your own.
    """
    from calmix.compression import ladder, plan, running
    from calmix.compression.estimate import estimate
    from calmix.report import words
    from calmix.report.card import read_card

    output, as_json = options.output, options.as_json
    check_inputs(options, output)
    asked = plan.request(options, parse_weights(options.keep), no_corpus=options.no_corpus)
    within = check_within(options.within, asked)
    if options.dry_run:
        if asked.keep_at_least is None:
            running.check(asked, output)
            taken = estimate(asked, plan.stages(asked, output))
            title = f"{asked.model} at {asked.target}, effort {asked.effort}, on this machine"
        else:
            ladder.read_ladder(asked, output)
            taken = estimate(ladder.at(asked, ladder.RUNGS[0]), ladder.whole(asked, output))
            title = f"{asked.model} to keep {asked.keep_at_least}, if no candidate fails"
        if as_json:
            print_json([asdict(one) | {"command": one.stage.command} for one in taken])
        else:
            print_taken(taken, title)
            if asked.keep_at_least is not None:
                line(words.wrapped(ladder.provable(asked)))
        return

    told: dict[str, Any] = {}
    if asked.keep_at_least is not None:
        found = walk_ladder(asked, output, within)
        told = {"ladder": asdict(found)}
        if not as_json:
            print_table(found.rows(), title="candidates: kept % (proven %)")
            line(words.wrapped(found.why()))
        if found.bits is None:
            if as_json:
                print_json({"output": str(output), "model": None} | told)
            else:
                line(words.wrapped(f"refused: no candidate keeps what is asked. {ladder.HELPS}"))
            raise typer.Exit(1)
        asked = ladder.at(asked, found.bits)
    seconds = run_stages(asked, output)
    page, card = output / "card.html", read_card(output)
    told |= {"output": str(output), "model": str(output / "model"), "card": str(page),
             "seconds": seconds, "behaviour": asdict(card.behaved)}  # fmt: skip
    result(
        options, told, card.shortly, f"size: {card.sizes}", f"speed: {card.SPEED}",
        f"card: {page}, after {duration(sum(seconds.values()))}", f"next: {card.next}",
        *([f"at this size: {card.instead}"] if card.instead else []),
    )  # fmt: skip
    if options.open:
        webbrowser.open(page.resolve().as_uri())


def check_inputs(options: Compression, output: Path) -> None:
    """Refuse an output that is an input, or that holds something else."""
    from calmix.calibration import saved_set
    from calmix.compression import running
    from calmix.evaluation.suites import suite_file

    inputs = [options.model, saved_set(options.calibration), options.prompts,
              suite_file(options.suite)]  # fmt: skip
    running.check_place(output, inputs)


def check_within(text: str | None, asked: Request) -> float | None:
    """Return the seconds of `--within`."""
    from calmix.compression.ladder import parse_duration

    if text is not None and asked.keep_at_least is None:
        raise InputError("--within has no effect without --keep-at-least: leave it out")
    return None if text is None else parse_duration(text)


def run_stages(asked: Request, output: Path, *, shown: bool = True) -> dict[str, float]:
    """Run what is left of a compression, its commands named; what they print is in their files."""
    from calmix.compression import plan, running
    from calmix.compression.estimate import estimate

    left = running.left_to_do(asked, output)
    with _staged(plan.stages(asked, output), shown) as (bar, say):
        with contextlib.suppress(CalmixError):  # it is for the line of progress alone
            bar.expect({one.stage.name: one.seconds for one in estimate(asked, left)})
        return running.compress(asked, output, _run, say)


def walk_ladder(
    asked: Request, output: Path, within: float | None = None, *, shown: bool = True
) -> Ladder:
    """Look for the smallest model that keeps what is asked for."""
    from calmix.compression import ladder
    from calmix.compression.estimate import estimate

    listed, before = ladder.whole(asked, output), len(ladder.opening(asked, output))
    begun = ladder.read_ladder(asked, output)
    with _staged(listed, shown) as (bar, say):
        taken = []
        with contextlib.suppress(CalmixError):  # it is for the line of progress and --within alone
            taken = estimate(ladder.at(asked, ladder.RUNGS[0]), listed)
            bar.expect({one.stage.name: one.seconds for one in taken})
        first = sum(one.seconds for one in taken[:before]
                    if not Path(one.stage.arguments[-1]).exists())  # fmt: skip
        each = sum(one.seconds for one in taken[before:]) / len(ladder.RUNGS)
        if within is not None and not begun.rungs and first + each > within:
            raise InputError(
                f"--within {duration(within)} is too short: the first candidate takes about "
                f"{duration(first + each)} here"
            )
        return ladder.walk(asked, output, _run, say, within=within, first=each)


@contextlib.contextmanager
def _staged(
    listed: Sequence[Stage], shown: bool
) -> Iterator[tuple[Stages, Callable[[Stage, bool], None]]]:
    """Yield a line of progress over stages, and what tells it of each; nothing else is printed."""

    def say(stage: Stage, kept: bool) -> None:
        if shown:
            note(f"{stage.name}: done before" if kept else f"$ {stage.command}")
        bar.begin(stage.name)

    names = [stage.name for stage in listed]
    with Stages(names, shown=shown) as bar, contextlib.redirect_stdout(io.StringIO()):
        bar.show("estimating", None)
        yield bar, say


def _run(arguments: Sequence[str]) -> None:
    """Run a command line in this process; what it refuses, it raises."""
    code = app(list(arguments), prog_name="calmix", standalone_mode=False)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(f"calmix {arguments[0]} ended with {code}")


@verb("report")
def report(options: ReportOptions) -> None:
    """Write the report card of a compressed model, or one page of several."""
    from calmix.files import write_text
    from calmix.report.card import card_page, model_card, read_card, several_page

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
