"""Run a compression stage by stage: what stands in OUT is kept, what is missing is made."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calmix.compression.plan import MANIFEST, Request, Stage, stages
from calmix.errors import CalmixError, InputError
from calmix.files import (
    alone,
    check_apart,
    check_output_folder,
    read_object,
    write_json,
)
from calmix.manifest import read_sealed, run_record, sealed, versions
from calmix.models import resolve_model
from calmix.models.shards import weight_bytes

Run = Callable[[Sequence[str]], None]  # runs a command line
Say = Callable[[Stage, bool], None]  # is told of a stage, and whether its result was there
KIND, RUN = "compressed model", "compress-run.json"
LADDER = "ladder.json"  # of a model that keeps what is asked for


def read_record(out: Path) -> dict[str, Any]:
    """Return what OUT says of itself: the `request`, the `commands` of all stages by their names,
    `dense_bytes` of the dense model's weights; InputError if it is another folder or damaged."""
    missing = f"{out} is no folder that calmix compress made: no {MANIFEST}"
    if (out / LADDER).exists():
        missing = f"{out} has no model yet: run its calmix compress again, or see why it refused"
    return read_sealed(out / MANIFEST, missing)


def compress(asked: Request, out: Path, run: Run, say: Say) -> dict[str, float]:
    """Do what is missing in OUT, and return the seconds of every stage done now."""
    with alone(out, wait=False):
        listed, seconds = stages(asked, out), dict[str, float]()
        before = read_object(out / RUN, "")["seconds"] if (out / RUN).exists() else {}
        if not (out / MANIFEST).exists():
            commands = {stage.name: stage.command for stage in listed}
            record = {"kind": KIND, "request": asked.model_dump(mode="json"), "commands": commands,
                      "dense_bytes": weight_bytes(resolve_model(asked.model))}  # fmt: skip
            write_json(out / MANIFEST, sealed(record | {"versions": versions()}))
        for stage, taken in do(listed, out, run, say):
            seconds[stage.name] = taken
            write_json(out / RUN, run_record(before | seconds))
    return seconds


def do(listed: Iterable[Stage], out: Path, run: Run, say: Say) -> Iterator[tuple[Stage, float]]:
    """Run the stages that have left no result, and yield each with its seconds."""
    for stage in listed:
        there = stage.stands(out)
        say(stage, there)
        if not there:
            began = time.perf_counter()
            try:
                run(stage.arguments)
            except CalmixError:  # a record that stands alone describes nothing
                if {path.name for path in out.iterdir()} in ({MANIFEST}, {LADDER}):
                    shutil.rmtree(out, ignore_errors=True)
                raise
            yield stage, time.perf_counter() - began


def check_place(out: Path, inputs: Iterable[object] = ()) -> None:
    """Refuse an output folder that is or holds anything but the work of a compression."""
    check_apart(out, inputs)
    if (out / MANIFEST).exists() or (out / LADDER).exists():
        return
    if out.is_dir() and any(out.iterdir()):
        raise InputError(
            f"{out} is not empty and was not made by calmix compress: name another folder"
        )
    check_output_folder(out)


def check(asked: Request, out: Path) -> None:
    """Refuse an output folder that holds another request's work."""
    if (out / MANIFEST).exists():
        check_same(asked, read_record(out)["request"], out)
    elif (out / LADDER).exists():
        check_same(asked, read_ladder_file(out)["request"], out, but=("bits",))


def read_ladder_file(out: Path) -> dict[str, Any]:
    """Return what a walk has left in OUT so far."""
    return read_sealed(out / LADDER, f"there is no file {out / LADDER}")


def check_same(
    asked: Request, held: Mapping[str, Any], out: Path, but: Collection[str] = ()
) -> None:
    """Refuse a request that is not the one OUT was made by, except in what `but` names."""
    now = asked.model_dump(mode="json")
    if differs := [key for key in now if held.get(key) != now[key] and key not in but]:
        raise InputError(
            f"{out} is of another request ({differs[0]}: {held.get(differs[0])}, now "
            f"{now[differs[0]]}): ask for the same, or name another folder"
        )
