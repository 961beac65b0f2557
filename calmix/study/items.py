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
from pathlib import Path
from typing import Any

import numpy as np

from calmix.errors import InputError, first_line
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
    OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError, EOFError,
    ArithmeticError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def write_items(results: StudyResults, path: Path) -> None:
    """Write the scores of all trials and dense models; the same scores give the same bytes."""
    arrays: dict[str, np.ndarray] = {}
    held = {f"dense/{model}": tasks for model, tasks in results.dense.items()}
    held |= {f"trial/{one.id}": results.scores.get(one.id, ()) for one in results.trials}
    for head, tasks in held.items():
        for task in tasks:
            for name in ("loglikelihoods", *(("floors",) if head.startswith("dense/") else ())):
                if flat := [value for row in getattr(task, name) for value in row]:
                    values = np.rint(np.array(flat) / UNIT).astype(np.int32)
                    arrays[f"{head}/{task.name}/{name}"] = values
            if task.values:
                arrays[f"{head}/{task.name}/values"] = np.array(task.values)
    shared = {
        "models": {
            model: [{key: getattr(task, key) for key in OF_TASK} for task in tasks]
            for model, tasks in results.dense.items()
        },
        "trials": {trial.id: trial.model for trial in results.trials},
    }
    made = io.BytesIO()
    np.savez_compressed(made, **arrays)  # type: ignore[arg-type]
    with zipfile.ZipFile(made, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(SHARED), json.dumps(shared), zipfile.ZIP_DEFLATED)
    write_bytes(path, made.getvalue())


def read_items(path: Path) -> tuple[dict[str, Scores], dict[str, Scores]]:
    """Return scores by trial and by dense model, as `write_items` wrote them."""
    try:
        with np.load(path, allow_pickle=False) as held:
            size = sum(info.file_size for info in held.zip.infolist())
            if size > LARGEST:
                raise ValueError(f"it unpacks to {size:,} bytes")
            shared = parse_json(held.zip.read(SHARED))
            models = shared["models"]
            dense = {model: _tasks(tasks, f"dense/{model}", held)
                     for model, tasks in models.items()}  # fmt: skip
            bare = {m: [task | {"unigram": ()} for task in tasks] for m, tasks in models.items()}
            trials = {trial: _tasks(bare[model], f"trial/{trial}", held)
                      for trial, model in shared["trials"].items()}  # fmt: skip
    except FileNotFoundError:
        raise InputError(f"there is no {path}: export the study again") from None
    except _DAMAGED as error:
        line = f"{path} does not hold the scores of a study: {first_line(error)}"
        raise InputError(line) from error
    return trials, dense


def _tasks(shared: list[dict[str, Any]], head: str, held: Mapping[str, np.ndarray]) -> Scores:
    made = []
    for task in shared:
        where = f"{head}/{task['name']}"
        sizes = tuple(map(tuple, task["bytes"]))
        ends = np.cumsum([len(row) for row in sizes])[:-1]
        parts: dict[str, Any] = {}
        for name in ("loglikelihoods", "floors"):
            if (file := f"{where}/{name}") in held:
                values = held[file] / 10**DIGITS
                if len(values) != sum(map(len, sizes)):
                    raise ValueError(f"{where} has {len(values)} {name}")
                parts[name] = tuple(tuple(row.tolist()) for row in np.split(values, ends))
        file = f"{where}/values"
        known = {key: task[key] for key in OF_TASK} | {"bytes": sizes}
        known |= {key: tuple(task[key]) for key in ("items", "gold", "unigram")}
        values = tuple(held[file].tolist()) if file in held else ()
        made.append(TaskScores(**known, values=values, **parts))
    return tuple(made)
