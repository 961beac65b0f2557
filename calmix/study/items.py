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

from calmix.capability.records import DIGITS, TaskScores
from calmix.errors import InputError
from calmix.files import parse_json, write_bytes
from calmix.study.results import Scores, StudyResults

LARGEST = 1 << 30  # bytes unpacked
_DAMAGED = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, MemoryError, EOFError,
    OverflowError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
UNIT = 10.0**-DIGITS  # nats
SHARED = "shared.json"


def write_items(results: StudyResults, path: Path) -> None:
    """Write the scores of all trials and dense models; the same scores give the same bytes."""
    arrays: dict[str, np.ndarray] = {}
    shared: dict[str, Any] = {"models": {}, "trials": {}}
    for model, tasks in results.dense.items():
        shared["models"][model] = [
            {
                "name": task.name, "dimension": task.dimension, "metric": task.metric,
                "primary": task.primary, "chance": task.chance, "floor": task.floor,
                "items": task.items, "gold": task.gold, "bytes": task.bytes,
                "unigram": task.unigram,
            }
            for task in tasks
        ]  # fmt: skip
        _put(arrays, f"dense/{model}", tasks)
        for task in tasks:
            if task.floors:
                arrays[f"dense/{model}/{task.name}/floors"] = _packed(task.floors)
    for trial in results.trials:
        shared["trials"][trial.id] = trial.model
        _put(arrays, f"trial/{trial.id}", results.scores.get(trial.id, ()))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr(_entry(SHARED), json.dumps(shared))
        for name, values in arrays.items():
            content = io.BytesIO()
            np.save(content, values, allow_pickle=False)
            archive.writestr(_entry(f"{name}.npy"), content.getvalue())
    write_bytes(path, made.getvalue())


def read_items(path: Path) -> tuple[dict[str, Scores], dict[str, Scores]]:
    """Return scores by trial and by dense model, as `write_items` wrote them.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            size = sum(info.file_size for info in archive.infolist())
            if size > LARGEST:
                raise ValueError(f"it unpacks to {size:,} bytes")
            shared = parse_json(archive.read(SHARED))

            def load(name: str) -> np.ndarray | None:
                if f"{name}.npy" not in names:
                    return None
                content = io.BytesIO(archive.read(f"{name}.npy"))
                return np.load(content, allow_pickle=False)

            dense = {
                model: tuple(_task(task, f"dense/{model}/{task['name']}", load) for task in tasks)
                for model, tasks in shared["models"].items()
            }
            trials = {
                trial: tuple(
                    replace(
                        _task(task, f"trial/{trial}/{task['name']}", load), floors=(), unigram=()
                    )
                    for task in shared["models"][model]
                )
                for trial, model in shared["trials"].items()
            }
    except FileNotFoundError:
        raise InputError(f"there is no {path}: export the study again") from None
    except _DAMAGED as error:
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(f"{path} holds no scores of a study: {reason}") from error
    return trials, dense


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)  # dated 1980: the same scores, the same bytes
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


def _packed(rows: tuple[tuple[float, ...], ...]) -> np.ndarray:
    flat = [value for row in rows for value in row]
    return np.rint(np.array(flat) / UNIT).astype(np.int32)


def _put(arrays: dict[str, np.ndarray], head: str, tasks: Scores) -> None:
    for task in tasks:
        if task.loglikelihoods:
            arrays[f"{head}/{task.name}/loglikelihoods"] = _packed(task.loglikelihoods)
        if task.values:
            arrays[f"{head}/{task.name}/values"] = np.array(task.values)


def _task(shared: Mapping[str, Any], head: str, load: Any) -> TaskScores:
    sizes = tuple(map(tuple, shared["bytes"]))

    def rows(name: str) -> tuple[tuple[float, ...], ...]:
        flat = load(f"{head}/{name}")
        if flat is None:
            return ()
        values = [round(value * UNIT, DIGITS) for value in flat.tolist()]
        ends = np.cumsum([len(row) for row in sizes])
        if not len(ends) or ends[-1] != len(values):
            raise ValueError(f"{head} has {len(values)} log-likelihoods")
        return tuple(
            tuple(values[end - len(row) : end]) for end, row in zip(ends, sizes, strict=True)
        )

    accuracies = load(f"{head}/values")
    return TaskScores(
        shared["name"], shared["dimension"], shared["metric"], shared["primary"],
        shared["chance"], tuple(shared["items"]),
        () if accuracies is None else tuple(accuracies.tolist()),
        tuple(shared["gold"]), rows("loglikelihoods"), sizes, shared["floor"], rows("floors"),
        tuple(shared["unigram"]),
    )  # fmt: skip
