"""Run a compression stage by stage: results in OUT are kept, missing ones are made."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from calmix.calibration.dataset import CalibrationSet
from calmix.compression.card import Report
from calmix.compression.folder import (
    CALIBRATION,
    COMPRESSED,
    COMPRESSED_RUN,
    PACK_FOLDER,
    PROMPTS,
    QUANTISED,
    SCORES,
    SEARCH,
)
from calmix.compression.plan import (
    EFFORTS,
    CompressRequest,
    aim,
    parse_size,
    recoveries,
    slices,
    splits,
)
from calmix.compression.results import Results, ready
from calmix.compression.stages import Draw, Export, Pack, Prune, Recover, Score, Stage
from calmix.errors import CalmixError, InputError
from calmix.evaluation.suites import choose
from calmix.files import alone, read_object, remove, size_text, user_path, write_json
from calmix.manifest import Input, record, run_record
from calmix.models.opening import forget, resolve_model
from calmix.models.shards import weight_bytes
from calmix.options import COMPRESS_METHOD

RunStage = Callable[[Stage], None]
SayStage = Callable[[Stage, bool], None]  # receives a stage, and whether its result existed


def stages(request: CompressRequest, out: Path, existing: str | None = None) -> list[Stage]:
    """Return the stages in order; `existing` is the folder of an existing calibration set."""
    listed, how = list[Stage](), request.how
    dense = Input(request.model, request.sha256)
    if existing is None and request.saved:
        existing = request.calibration
    elif existing is None and request.imatrix is None:
        existing = str(out / CALIBRATION)
        drawn = Draw(request.calibration, request.model, request.draw, how=how)
        what = f"{'write' if drawn.written else 'draw'} the calibration set"
        listed.append(Stage(what, drawn, out / CALIBRATION))
    target, product = aim(request), out / request.file
    sparse, trained = target["method"] == COMPRESS_METHOD, recoveries(request)
    exported = request.product in ("gguf", "vllm")
    last = out / QUANTISED if exported else product  # of prune and recoveries
    before = out / "pruned" if trained else last
    existing = existing or ""
    text = Input(existing, CalibrationSet.open(user_path(existing)).sha256 if request.saved else "")
    work: dict[str, Any] = {"how": how, "max_memory": request.max_memory}
    reads = {"model": dense} if not existing else {"model": dense, "calibration": text}
    target |= {"licence": request.licence if request.saved else None}
    pruned = Prune(target, reads=reads, **work)
    spent = product if exported else None  # of what is removed once the product is written
    listed.append(Stage("prune" if sparse else "quantise", pruned, before, spent))
    for method in trained:
        ends = method == trained[-1]
        after = last if ends else out / method
        reads = {"model": Input(str(before), ""), "against": dense, "calibration": text}
        recovery = Recover(method, request.epochs if ends else None, reads=reads, **work)
        listed.append(Stage(f"recover by {method}", recovery, after, spent))
        before = after
    model = {"model": Input(str(product), "")}
    if exported:
        file = Export(str(request.product), request.like, reads={"model": Input(str(before), "")})
        what = "GGUF file" if request.product == "gguf" else "checkpoint"
        listed.append(Stage(f"write the {what}", file, product))
    elif request.product == "storage":
        listed.append(Stage("pack", Pack(reads=model), out / PACK_FOLDER))
    return [
        *listed,
        *(scoring(request, file, product, out / file) for file in slices(request)),
        Stage("report card", Report(out), None),
    ]


def scoring(
    request: CompressRequest, file: str, model: Path | None, leaves: Path, dense: Path | None = None
) -> Stage:
    """Return the stage that scores a `model` on the suite of a score file, or without one the dense
    model alone. `dense` is a file of the dense model's scores, if they exist."""
    suite, part = slices(request)[file]
    effort, original = EFFORTS[request.effort], Input(request.model, request.sha256)
    reads = {"model": original}
    if model is not None:
        reads = {"model": Input(str(model), ""), "against": original}
    score = Score(
        suite,
        part,
        file == PROMPTS and splits(request),
        dense,
        repeat=effort.repeat and dense is None and choose(suite).asks,
        allow_code_execution=request.allow_code_execution,
        reads=reads,
        how=request.how,
    )
    names = {SCORES: "evaluate", PROMPTS: "evaluate prompts"}
    return Stage(names.get(file, "evaluate behaviour"), score, leaves)


def run_stages(
    request: CompressRequest, out: Path, run: RunStage, say: SayStage
) -> dict[str, float]:
    """Run the missing stages of OUT and return their seconds."""
    with alone(out, wait=False):
        listed, seconds = stages(request, out), dict[str, float]()
        before = (
            read_object(out / COMPRESSED_RUN, "")["seconds"]
            if (out / COMPRESSED_RUN).exists()
            else {}
        )
        if not (out / COMPRESSED).exists():
            manifest = record(
                "compressed model",
                request=request.model_dump(mode="json"),
                commands={stage.name: stage.command for stage in listed},
                stages=[stage.result.entry(out) for stage in listed if stage.leaves],
                dense_bytes=weight_bytes(resolve_model(request.model)),
            )
            write_json(out / COMPRESSED, manifest)
        for stage, taken in do(listed, out, run, say):
            if isinstance(stage.request, (Export, Pack)):
                _check_size(request, stage.leaves or out)
            seconds[stage.name] = taken
            write_json(out / COMPRESSED_RUN, run_record(before | seconds))
        if request.product in ("gguf", "vllm"):
            forget(out / request.file)
    return seconds


def _check_size(request: CompressRequest, path: Path) -> None:
    """Remove a file or pack that is larger than requested, and refuse it."""
    if request.size is None:
        return
    most = parse_size(request.size, weight_bytes(resolve_model(request.model)))
    files = [path, *path.rglob("*.safetensors")]
    size = sum(file.stat().st_size for file in files if file.is_file())
    if size > most:
        remove(path)
        raise InputError(
            f"{path} would have {size_text(size)}, more than --size {request.size}: repeat with "
            f"--size {size_text(0.98 * most * most / size).replace(' ', '')} and another -o"
        )


def do(
    listed: Iterable[Stage], out: Path, run: RunStage, say: SayStage
) -> Iterator[tuple[Stage, float]]:
    """Run the stages without a result and yield each with its seconds; before that, refuse a result
    that was not made by its stage from what lies there."""
    results, listed, ran = Results(), list(listed), False
    results.check_all(stage.result for stage in listed if stage.leaves)
    for stage in listed:
        done = stage.done
        if done and ran:  # its input may have been missing before
            results.check_all([stage.result])
        for one in listed:
            if one.leaves is not None and ready(one.spent):
                remove(one.leaves)
        say(stage, done)
        if not done:
            began, ran = time.perf_counter(), True
            try:
                run(stage)
            except CalmixError:  # a record without any result is useless
                if {path.name for path in out.iterdir()} in ({COMPRESSED}, {SEARCH}):
                    shutil.rmtree(out, ignore_errors=True)
                raise
            yield stage, time.perf_counter() - began
