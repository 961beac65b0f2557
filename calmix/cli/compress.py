"""`compress`, `report` and `check`: a smaller model, its card, and whether it keeps enough."""

from __future__ import annotations

import contextlib
import io
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from calmix.cli.common import line, note, print_json, print_table, print_taken
from calmix.cli.root import app
from calmix.cli.verbs import verb
from calmix.errors import CalmixError, InputError
from calmix.files import check_output_file, write_json, write_text
from calmix.options import Compression, Share, option, path_option
from calmix.progress import Stages, duration

if TYPE_CHECKING:
    from calmix.compression.ladder import Ladder
    from calmix.compression.plan import Request, Stage


@verb("compress")
def compress(
    asked: Compression,
    output: Path = path_option("Folder to write, or to resume in."),
    dry_run: bool = option(False, "Print commands, time, memory, disk; write nothing."),
    resume: bool = option(
        False, "Resume an interrupted run, as compress always does.", advanced=True
    ),
    open: bool = option(False, "Show the card in the browser at the end."),
) -> None:
    """Quantise a model (or prune it and distil into it), evaluate it, and write its report card.

    Every stage keeps its result in the output folder. Run the same command again to resume. calmix
    check OUT tests the result against floors of your own.
    """
    from calmix.compression import ladder
    from calmix.report import words
    from calmix.report.card import read_card

    if dry_run:
        _print_dry(asked, output)
        return
    found, seconds = make(asked, output)
    told: dict[str, Any] = {"output": str(output), "model": None}
    if found is not None:
        told |= {"ladder": asdict(found)}
        print_table(found.rows(), title="candidates: kept % (proven %)")
        for said in (found.why(), *found.promise):
            line(words.wrapped(said))
        if found.bits is None:
            said = f"refused: no candidate keeps what is asked. {ladder.HELPS}"
            if found.left:
                said = "stopped: no candidate keeps what is asked yet."
            print_json(told)
            line(words.wrapped(said))
            raise typer.Exit(1)
    page, card = output / "card.html", read_card(output)
    told |= {"model": str(output / "model"), "card": str(page), "seconds": seconds,
             "behaviour": asdict(card.behaved)}  # fmt: skip
    print_json(told)
    for said in (
        card.shortly, f"size: {card.sizes}", f"speed: {card.SPEED}",
        f"card: {page}, after {duration(sum(seconds.values()))}", f"next: {card.next}",
    ):  # fmt: skip
        line(said)
    if card.instead:
        line(f"at this size: {card.instead}")
    if open:
        webbrowser.open(page.resolve().as_uri())


def _print_dry(options: Compression, output: Path) -> None:
    """Print what a compression would take."""
    from calmix.compression import ladder
    from calmix.compression.estimate import estimate
    from calmix.compression.plan import stages
    from calmix.report import words

    asked = _asked(options, output)
    if asked.keep_at_least is None:
        taken, more = estimate(asked, stages(asked, output)), ""
        title = f"{asked.model} at {asked.target}, effort {asked.effort}, on this machine"
    else:
        taken = estimate(ladder.at(asked, ladder.RUNGS[0]), ladder.whole(asked, output))
        title = f"{asked.model} to keep {asked.keep_at_least}, with all candidates"
        more = words.wrapped(ladder.provable(asked))
    print_json([asdict(one) | {"command": one.stage.command} for one in taken])
    print_taken(taken, title)
    if more:
        line(more)


def _asked(options: Compression, output: Path) -> Request:
    """Return the request, checked; an output that is an input, or holds something else, is
    refused."""
    from calmix.calibration import saved_set
    from calmix.compression import ladder, plan, running
    from calmix.evaluation.suites import suite_file

    inputs = [options.model, saved_set(options.calibration), options.prompts,
              suite_file(options.suite)]  # fmt: skip
    running.check_place(output, inputs)
    asked = plan.request(options)
    if asked.keep_at_least is None:
        running.check(asked, output)
    else:
        ladder.read_ladder(asked, output)
    return asked


def make(
    options: Compression, output: Path, *, shown: bool = True
) -> tuple[Ladder | None, dict[str, float]]:
    """Compress a model; stages are named as they begin, and what they print is in their files.

    Returns:
        What looking for the smallest model found, if that is asked for; and the seconds of every
        stage that was done now, none if no candidate keeps enough.
    """
    from calmix.compression import ladder, running
    from calmix.compression.estimate import check_room
    from calmix.compression.plan import stages

    asked, found = _asked(options, output), None
    if asked.keep_at_least is not None:
        top, listed = ladder.at(asked, ladder.RUNGS[0]), ladder.whole(asked, output)
        with _staged(top, output, listed, shown) as (say, seconds):
            found = ladder.walk(asked, output, _run, say, options.within, seconds)
        if found.bits is None:
            return found, {}
        asked = ladder.at(asked, found.bits)
    check_room(asked, output)
    with _staged(asked, output, stages(asked, output), shown) as (say, _):
        return found, running.compress(asked, output, _run, say)


@contextlib.contextmanager
def _staged(
    asked: Request, out: Path, listed: Sequence[Stage], shown: bool
) -> Iterator[tuple[Callable[[Stage, bool], None], dict[str, float]]]:
    """Yield what tells a line of progress of each stage, and the seconds that each of those missing
    in OUT will take, as far as that is known; nothing else is printed."""
    from calmix.compression.estimate import estimate

    def say(stage: Stage, kept: bool) -> None:
        if shown:
            note(f"{stage.name}: done before" if kept else f"$ {stage.command}")
        bar.begin(stage.name)

    seconds: dict[str, float] = {}
    names, left = [one.name for one in listed], [one for one in listed if not one.stands(out)]
    with Stages(names, shown=shown) as bar, contextlib.redirect_stdout(io.StringIO()):
        bar.show("estimating", None)
        with contextlib.suppress(CalmixError):  # it is for the line of progress and --within alone
            seconds = {one.stage.name: one.seconds for one in estimate(asked, left)}
        bar.expect(seconds)
        yield say, seconds


def _run(arguments: Sequence[str]) -> None:
    """Run a command line in this process; what it refuses, it raises."""
    code = app(list(arguments), prog_name="calmix", standalone_mode=False)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(f"calmix {arguments[0]} ended with {code}")


@verb("report", json=False)
def report(
    folders: tuple[Path, ...] = option(..., "Folders of calmix compress.", argument=True),
    output: Path | None = path_option(
        "Page to write; needed for several.", default=None, shown="OUT/card.html"
    ),
) -> None:
    """Write the report card of a compressed model, or one page of several."""
    from calmix.report.card import card_page, model_card, read_card, several_page

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


@verb("check")
def check(
    results: tuple[Path, ...] = option(
        ..., "Folder of calmix compress, or files of calmix evaluate -o.", argument=True
    ),
    keep_at_least: str | None = option(
        None,
        "Shares to keep, e.g. 0.9 or code=0.9,general=80%.",
        metavar="FLOORS",
        shown="those the folder was made for",
    ),
    confidence: Share | None = option(
        None, "Confidence of the test, e.g. 0.99.", ge=0.8, le=0.999, shown="0.95"
    ),
    output: Path | None = path_option("JSON file to write.", default=None, shown="OUT/check.json"),
    overwrite: bool = option(False, "Replace the output file."),
) -> None:
    """Test whether a model keeps what it must; the exit code is 1 if it does not.

    No model is opened: the scores that compress, or evaluate --against, has written are read.
    """
    from calmix.compression.running import read_record
    from calmix.evaluation.floors import CONFIDENCE, FILE, judge, parse_floors, proven, record
    from calmix.evaluation.scores import load_pairs
    from calmix.report import words

    folders, files, asked = [path for path in results if path.is_dir()], results, {}
    if folders:
        if len(results) > 1:
            raise InputError("a folder is checked by itself: name one folder, or files alone")
        asked = read_record(folders[0])["request"]
        files = _measured(folders[0])
    told = keep_at_least or asked.get("keep_at_least")
    if told is None:
        raise InputError("--keep-at-least is missing: name the floors, e.g. code=0.9,general=80%")
    floors, carded = parse_floors(told), output is None and bool(folders)
    place = folders[0] / FILE if carded else output
    if place is not None:
        check_output_file(place, inputs=files, overwrite=overwrite or carded)
    pairs = load_pairs(files)
    verdict = judge(floors, pairs, confidence or asked.get("confidence") or CONFIDENCE)
    made = record(verdict, floors, pairs)
    if place is not None:
        write_json(place, made)
    print_json(made)
    rows = [
        {"ability": one.ability, "measure": one.measure, "items": one.items,
         "kept %": words.percent(one.kept), "proven %": proven(one.bound),
         "asked %": words.percent(one.floor), "": "kept" if one.passed else "not kept"}
        for one in verdict.tested
    ]  # fmt: skip
    dense, pruned = pairs[0]
    print_table(rows, title=f"{pruned.model} against {dense.model}", least=["measure", "items"])
    for said in verdict.lines():
        line(words.wrapped(said))
    if place is not None:
        note(f"wrote {place}")
    if carded:
        note(f"next: calmix report {folders[0]} puts it on the card")
    if not verdict.passed:
        raise typer.Exit(1)


def _measured(folder: Path) -> tuple[Path, ...]:
    """Return the files of scores in a folder of `calmix compress`."""
    from calmix.compression.plan import BEHAVIOUR, SCORES
    from calmix.evaluation.behaviour import answered
    from calmix.evaluation.scores import load_scores

    scores, answers = folder / SCORES, folder / BEHAVIOUR
    if not scores.exists():
        raise InputError(f"{folder} is not finished: it lacks {scores.name}; run its calmix "
                         "compress again")  # fmt: skip
    if answers.exists():
        return (answers,)
    if not any(map(answered, load_scores(scores).tasks)):
        note(f"what the model writes was not measured: {answers} is missing (calmix report shows "
             "how)")  # fmt: skip
    return (scores,)
