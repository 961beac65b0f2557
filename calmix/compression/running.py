"""Run a compression stage by stage: results in OUT are kept, missing ones are made."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calmix.compression.plan import MANIFEST, PACK, Request, Stage, parse_size, stages
from calmix.compression.results import Results
from calmix.errors import CalmixError, InputError
from calmix.files import alone, read_object, size_text, write_json
from calmix.manifest import Input, read_sealed, run_record, sealed, versions
from calmix.models import resolve_model
from calmix.models.shards import weight_bytes

Run = Callable[[Sequence[str]], None]  # runs a command line
Say = Callable[[Stage, bool], None]  # receives a stage, and whether its result existed
KIND, RUN = "compressed model", "compress-run.json"
LADDER = "ladder.json"  # state of a walk for --keep-at-least


def read_record(out: Path) -> dict[str, Any]:
    """Return the record in OUT: the `request`, the `commands` of all stages by name, the `stages`
    (`recorded`), `dense_bytes` of the dense weights; InputError if there is none or it is damaged.
    """
    missing = f"{out} was not made by calmix compress: it has no {MANIFEST}"
    if (out / LADDER).exists():
        missing = f"{out} has no model yet: run its calmix compress again to resume or see why"
    record = read_sealed(out / MANIFEST, missing)
    if "stages" not in record:
        raise InputError(
            f"{out} was made by an older calmix, which did not record what its "
            "results were made from: make it again in another folder"
        )
    return record


def recorded(out: Path, record: Mapping[str, Any]) -> list[Stage]:
    """Return the stages in a record that leave a result, wherever OUT is now."""
    return [
        Stage(
            one["name"],
            (),
            one["leaves"],
            {
                role: Input(name if sha256 else str(out / name), sha256)
                for role, (name, sha256) in one["reads"].items()
            },
            one["request"],
        )
        for one in record["stages"]
    ]


def verified(out: Path, *needed: str) -> tuple[dict[str, Any], Results]:
    """Return the record in OUT and the hashes of its models, once it has the results `needed` and
    none of another run."""
    record, results = read_record(out), Results()
    for name in needed:
        result_in(out, name)
    results.check_all(recorded(out, record), out)
    return record, results


def _entry(stage: Stage, out: Path) -> dict[str, Any]:
    """Return a stage as it is recorded: results of other stages are relative to OUT."""
    reads = {
        role: (name if sha256 else str(Path(name).relative_to(out)), sha256)
        for role, (name, sha256) in stage.reads.items()
    }
    return {"name": stage.name, "leaves": stage.leaves, "reads": reads, "request": stage.request}


def result_in(out: Path, name: str) -> Path:
    """Return the path of a result in OUT; InputError if it is missing."""
    if not (path := out / name).exists():
        raise InputError(
            f"{out} is not finished: it lacks {name}; run its calmix compress again to resume"
        )
    return path


def compress(request: Request, out: Path, run: Run, say: Say) -> dict[str, float]:
    """Run the missing stages of OUT and return their seconds."""
    with alone(out, wait=False):
        listed, seconds = stages(request, out), dict[str, float]()
        before = read_object(out / RUN, "")["seconds"] if (out / RUN).exists() else {}
        if not (out / MANIFEST).exists():
            record = {
                "kind": KIND,
                "request": request.model_dump(mode="json"),
                "commands": {stage.name: stage.command for stage in listed},
                "stages": [_entry(stage, out) for stage in listed if stage.leaves],
                "dense_bytes": weight_bytes(resolve_model(request.model)),
            }
            write_json(out / MANIFEST, sealed(record | {"versions": versions()}))
        for stage, taken in do(listed, out, run, say):
            if stage.leaves == PACK:
                _check_pack(request, out)
            seconds[stage.name] = taken
            write_json(out / RUN, run_record(before | seconds))
    return seconds


def _check_pack(request: Request, out: Path) -> None:
    """Remove a pack that is larger than requested, and refuse it."""
    if request.size is None:
        return
    most = parse_size(request.size, weight_bytes(resolve_model(request.model)))
    size = sum(path.stat().st_size for path in (out / PACK).rglob("*.safetensors"))
    if size > most:
        shutil.rmtree(out / PACK)
        raise InputError(
            f"the pack of {out / 'model'} has {size_text(size)}, more than --size {request.size}: "
            f"repeat with --size {size_text(0.98 * most * most / size).replace(' ', '')} and "
            "another -o"
        )


def do(listed: Iterable[Stage], out: Path, run: Run, say: Say) -> Iterator[tuple[Stage, float]]:
    """Run the stages without a result and yield each with its seconds; before that, refuse a result
    that was not made by its stage from what lies there."""
    results, listed, ran = Results(), list(listed), False
    results.check_all(listed, out)
    for stage in listed:
        done = stage.done(out)
        if done and ran:  # its input may have been missing before
            results.check(stage, out)
        say(stage, done)
        if not done:
            began, ran = time.perf_counter(), True
            try:
                run(stage.arguments)
            except CalmixError:  # a record without any result is useless
                if {path.name for path in out.iterdir()} in ({MANIFEST}, {LADDER}):
                    shutil.rmtree(out, ignore_errors=True)
                raise
            yield stage, time.perf_counter() - began
