"""`check`: whether a compressed model keeps what it must, as a gate."""

from __future__ import annotations

from pathlib import Path

import typer

from calmix.cli.common import line, note, print_json
from calmix.cli.tables import print_table
from calmix.cli.verbs import verb
from calmix.errors import InputError
from calmix.files import check_output_file, write_json
from calmix.options import Share, option, path_option


@verb("check", json=True)
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
    floors = parse_floors(told)
    confidence = confidence or asked.get("confidence") or CONFIDENCE
    carded = output is None and bool(folders)
    place = folders[0] / FILE if carded else output
    if place is not None:
        check_output_file(place, inputs=files, overwrite=overwrite or carded)
    pairs = load_pairs(files)
    verdict = judge(floors, pairs, confidence)
    dense, pruned = pairs[0]
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
