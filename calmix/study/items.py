"""Per-item scores of a whole study as one file of plain arrays, beside the exported results.

What all trials share of a task (items, right choices, bytes) is kept once, with the dense model;
of a trial only its log-likelihoods and accuracies are. Nothing in the file is executable.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from calmix.errors import InputError
from calmix.evaluation.records import DIGITS, TaskScores
from calmix.files import parse_json, write_bytes
from calmix.study.results import Scores, StudyResults

LARGEST = 1 << 30  # bytes unpacked
UNIT = 10.0**-DIGITS  # nats
SHARED = "shared.json"
OF_TASK = (
    "name", "dimension", "metric", "primary", "chance", "floor", "items", "gold", "bytes",
    "unigram",
)  # fmt: skip
_DAMAGED = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, MemoryError, EOFError,
    OverflowError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def write_items(results: StudyResults, path: Path) -> None:
    """Write the scores of all trials and dense models; the same scores give the same bytes."""
    arrays: dict[str, np.ndarray] = {}

    def put(head: str, tasks: Scores) -> None:
        for task in tasks:
            for name in ("loglikelihoods", "floors"):
                if flat := [value for row in getattr(task, name) for value in row]:
                    arrays[f"{head}/{task.name}/{name}"] = np.rint(np.array(flat) / UNIT).astype(
                        np.int32
                    )
            if task.values:
                arrays[f"{head}/{task.name}/values"] = np.array(task.values)

    models = {
        model: [{key: getattr(task, key) for key in OF_TASK} for task in tasks]
        for model, tasks in results.dense.items()
    }
    for model, tasks in results.dense.items():
        put(f"dense/{model}", tasks)
    for trial in results.trials:
        own = results.scores.get(trial.id, ())
        put(f"trial/{trial.id}", tuple(replace(task, floors=()) for task in own))
    shared = {"models": models, "trials": {trial.id: trial.model for trial in results.trials}}
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        files = {SHARED: json.dumps(shared).encode(), **dict(map(_array, arrays.items()))}
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)  # dated 1980: the same scores, the same bytes
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    write_bytes(path, made.getvalue())


def _array(named: tuple[str, np.ndarray]) -> tuple[str, bytes]:
    content = io.BytesIO()
    np.save(content, named[1], allow_pickle=False)
    return f"{named[0]}.npy", content.getvalue()


def read_items(path: Path) -> tuple[dict[str, Scores], dict[str, Scores]]:
    """Return scores by trial and by dense model, as `write_items` wrote them."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
            if size > LARGEST:
                raise ValueError(f"it unpacks to {size:,} bytes")
            shared = parse_json(archive.read(SHARED))
            models = shared["models"]
            dense = {
                model: tuple(_task(task, f"dense/{model}", archive) for task in tasks)
                for model, tasks in models.items()
            }
            trials = {
                trial: tuple(
                    _task(task | {"unigram": ()}, f"trial/{trial}", archive)
                    for task in models[model]
                )
                for trial, model in shared["trials"].items()
            }
    except FileNotFoundError:
        raise InputError(f"there is no {path}: export the study again") from None
    except _DAMAGED as error:
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(f"{path} does not hold the scores of a study: {reason}") from error
    return trials, dense


def _task(shared: Mapping[str, Any], head: str, archive: zipfile.ZipFile) -> TaskScores:
    sizes = tuple(map(tuple, shared["bytes"]))
    ends = np.cumsum([len(row) for row in sizes])

    def load(name: str) -> list[float]:
        file = f"{head}/{shared['name']}/{name}.npy"
        if file not in archive.NameToInfo:
            return []
        return np.load(io.BytesIO(archive.read(file)), allow_pickle=False).tolist()

    def rows(name: str) -> tuple[tuple[float, ...], ...]:
        values = [round(value * UNIT, DIGITS) for value in load(name)]
        if values and (not len(ends) or ends[-1] != len(values)):
            raise ValueError(f"{head}/{shared['name']} has {len(values)} {name}")
        cut = zip(ends, sizes, strict=True) if values else ()
        return tuple(tuple(values[end - len(row) : end]) for end, row in cut)

    known = {key: shared[key] for key in OF_TASK}
    known |= {key: tuple(shared[key]) for key in ("items", "gold", "unigram")} | {"bytes": sizes}
    return TaskScores(
        **known, values=tuple(load("values")), loglikelihoods=rows("loglikelihoods"),
        floors=rows("floors"),
    )  # fmt: skip
