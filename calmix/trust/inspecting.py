"""Check what calmix has written against its manifest, and tell how well it is.

A file that is missing, changed or damaged is a problem; what is whole but unusual is a warning.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from calmix.calibration import CalibrationSet
from calmix.calibration.set import is_saved_set
from calmix.capability.scores import load_scores
from calmix.errors import CalmixError, InputError
from calmix.exported import MANIFEST as EXPORT
from calmix.files import read_object, sha256_json
from calmix.manifest import file_hashes, seal_holds
from calmix.models.shards import Shards, read_tensor
from calmix.pruning.checkpoint import MANIFEST, RUN
from calmix.pruning.experts import starved
from calmix.study.export import RECORD, read_results
from calmix.study.store import Store, is_store, open_store

CARD = "README.md"  # written beside a model later, by whoever describes it
# Beyond these a layer is worth a look: ours, some three times what is seen at 60 % SparseGPT.
ERROR, DEAD = 0.3, 0.1


@dataclass(frozen=True)
class LayerHealth:
    """One pruned layer: zeros as they lie in the file, the rest as the manifest has it.

    Attributes:
        sparsity: share of zeros.
        error: share of the output's energy that was lost; None where none was measured.
        damping: what the solver used; None for a method without.
        dead: inputs that were always zero.
        tokens: that were routed to it, if it is an expert's.
    """

    name: str
    rows: int
    columns: int
    sparsity: float
    error: float | None
    damping: float | None
    dead: int
    tokens: int | None = None


@dataclass
class Health:
    """What was found.

    Attributes:
        kind: what the place holds.
        facts: what is told of it, in order.
        problems: what is missing, changed or damaged; empty if all is whole.
        warnings: what is whole but unusual.
        layers: of a pruned checkpoint.
    """

    path: str
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: list[LayerHealth] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        return asdict(self)


def inspect(path: Path, *, tick: Callable[[str], None] | None = None) -> Health:
    """Check a pruned or recovered checkpoint, export, calibration set, study or file of scores.

    Args:
        path: the folder, or its manifest.
        tick: called with what has been checked.

    Raises:
        InputError: there is nothing of calmix at `path`.
    """
    say = tick or (lambda name: None)
    folder = path.parent if path.name in (MANIFEST, "manifest.json") else path
    if not path.exists():
        raise InputError(f"there is nothing at {path}")
    if path.is_file() and folder == path:
        return _scores(path)
    if is_store(folder):
        return _store(folder, say)
    if (folder / MANIFEST).is_file():
        return _checkpoint(folder, say)
    if (folder / EXPORT).is_file():
        return _export(folder, say)
    if is_saved_set(folder):
        return _calibration(folder)
    if (folder / RECORD).is_file():
        return _results(folder)
    raise InputError(
        f"{path} holds nothing calmix has written: no {MANIFEST}, manifest.json, store.json or "
        f"{RECORD}"
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a pruned checkpoint or calibration set.

    Raises:
        InputError: it is missing, no JSON object, or of no kind that is known.
    """
    value = read_object(path, f"there is no manifest {path}")
    if not isinstance(value.get("kind"), str):
        raise InputError(f"{path} is no manifest of calmix")
    return value


def changed_files(folder: Path, kept: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return a line for every file that is missing, or not what the manifest says it is."""
    lines = []
    for name, value in kept.items():
        if name not in found:
            lines.append(f"{folder / name} is missing")
        elif found[name] != value:
            lines.append(f"{folder / name} is damaged or changed: its hash is another")
    return lines


def _checkpoint(folder: Path, say: Callable[[str], None]) -> Health:
    health = Health(str(folder), "pruned checkpoint")
    path = folder / MANIFEST
    try:
        manifest = pruned = read_manifest(path)
        recovered: list[dict[str, Any]] = []
        while pruned["kind"] == "recovered checkpoint":
            recovered.insert(0, pruned["recovery"])
            pruned = pruned["pruned"] or {"kind": None}
        if pruned["kind"] is None:
            raise InputError("it was recovered from a model without a manifest")
        done = pruned["pruning"]
        layers = [_reported(layer) for layer in done["layers"]]
        kept = manifest.get("files")
        health.facts = {
            "model": pruned["model"]["name"],
            "method": f"{done['method']} {done['pattern']}",
            **{
                f"recovery by {one['method']}": f"held-out rows {one['before']:.4f} before, "
                f"{one['after']:.4f} after"
                for one in recovered
            },
            "calibration": _told(pruned["calibration"]),
            "weights": done["weights"],
            "pruned": done["pruned"],
            "versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
        }
        asked = _number(done["options"].get("damping"))
        widest = max((layer.columns for layer, _ in layers), default=0)
        tokens = int(done["tokens"])
    except (InputError, KeyError, TypeError, AttributeError, ValueError) as error:
        health.problems = [f"{path} cannot be checked: {_first(error)}"]
        return health
    if kept is None:
        health.warnings.append("made before hashes of files were kept: files cannot be checked")
    elif not isinstance(kept, dict) or not seal_holds(manifest):
        health.problems.append(f"{path} is damaged or changed: its hash is another")
    else:
        found = file_hashes(folder, without=(MANIFEST, RUN, CARD), tick=say)
        health.problems += changed_files(folder, kept, found)
        for name in sorted(set(found) - set(kept)):
            health.warnings.append(f"{folder / name} is not in the manifest")
    _layers(folder, layers, asked, health, say)
    if told := starved((layer for layer, _ in layers), int(done.get("rows") or 0)):
        health.warnings.append(told)
    if pruned["calibration"] is not None and tokens < widest:
        health.warnings.append(
            f"{tokens} calibration tokens are fewer than the {widest} inputs of a layer: more "
            "rows would tell the solver more"
        )
    return health


def _export(folder: Path, say: Callable[[str], None]) -> Health:
    health = Health(str(folder), "export")
    path = folder / EXPORT
    try:
        manifest = read_manifest(path)
        health.facts = {
            "model": manifest["model"]["name"],
            "engine": f"{manifest['engine']}, {manifest['weights']} weights",
            "versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
        }
        kept = dict(manifest["files"])
    except (InputError, KeyError, TypeError, AttributeError, ValueError) as error:
        health.problems = [f"{path} cannot be checked: {_first(error)}"]
        return health
    if not seal_holds(manifest):
        health.problems.append(f"{path} is damaged or changed: its hash is another")
    found = file_hashes(folder, without=(EXPORT, RUN, CARD), tick=say)
    health.problems += changed_files(folder, kept, found)
    return health


def _reported(layer: dict[str, Any]) -> tuple[LayerHealth, int]:
    """Return what a manifest tells of a layer, and how many of its weights were pruned."""
    rows, columns, pruned = int(layer["rows"]), int(layer["columns"]), int(layer["pruned"])
    told = LayerHealth(
        str(layer["name"]), rows, columns, pruned / max(1, rows * columns),
        _number(layer.get("error")), _number(layer.get("damping")),
        int(layer.get("dead_inputs") or 0), layer.get("tokens"),
    )  # fmt: skip
    return told, pruned


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _layers(
    folder: Path,
    told: list[tuple[LayerHealth, int]],
    damping: float | None,
    health: Health,
    say: Callable[[str], None],
) -> None:
    """Count every layer's zeros in the files, and hold them against the manifest."""
    try:
        shards = Shards(folder)
    except (CalmixError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        health.problems.append(_first(error))
        return
    left = dict(shards.places)
    experts: dict[str, list[tuple[LayerHealth, int]]] = {}
    for layer, pruned in told:
        name = f"{layer.name}.weight"
        close = (p for n, p in shards.places.items()
                 if name.endswith(f".{n}") or n.endswith(f".{name}"))  # fmt: skip
        place = shards.places.get(name) or next(close, None)
        if place is None and (block := re.match(r".*?\.\d+\.", layer.name)):
            experts.setdefault(block[0], []).append((layer, pruned))
            continue
        if place is None:
            health.problems.append(f"{folder} lacks the weights of {layer.name}")
            continue
        try:
            weight = read_tensor(folder, place)
        except (CalmixError, OSError, RuntimeError, ValueError) as error:
            health.problems.append(_first(error))
            continue
        left = {name: one for name, one in left.items() if one is not place}
        zeros = int((weight == 0).sum())
        if not torch.isfinite(weight).all():
            health.problems.append(f"{layer.name} holds weights that are not finite")
        if zeros < pruned:
            health.problems.append(
                f"{layer.name} has {zeros} zeros, and the manifest tells of {pruned}"
            )
        _unusual(layer, damping, health)
        health.layers.append(replace(layer, sparsity=zeros / max(1, weight.numel())))
        say(layer.name)
    for where, inside in experts.items():
        _fused(folder, where, inside, left, health)
        for layer, _ in inside:
            _unusual(layer, damping, health)
        health.layers += [layer for layer, _ in inside]
        say(where)


def _unusual(layer: LayerHealth, damping: float | None, health: Health) -> None:
    """Warn of what is unusual about a layer."""
    if layer.error is not None and layer.error > ERROR:
        health.warnings.append(f"{layer.name} lost {layer.error:.1%} of its output")
    if layer.dead > DEAD * layer.columns and layer.tokens is None:
        health.warnings.append(f"{layer.name}: {layer.dead} of {layer.columns} inputs are dead")
    if damping is not None and (layer.damping or 0) > damping:
        health.warnings.append(
            f"{layer.name}: damping was raised from {damping:g} to {layer.damping:g}"
        )


def _fused(
    folder: Path,
    block: str,
    layers: list[tuple[LayerHealth, int]],
    left: dict[str, Any],
    health: Health,
) -> None:
    """Count the zeros of a block's layers that have other names in the files, all together."""
    end = block.split(".", 1)[-1]
    places = [place for name, place in left.items() if f".{end}" in f".{name}"]
    weights = [read_tensor(folder, place) for place in places if len(place.shape) > 1]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    pruned = sum(count for _, count in layers)
    if zeros < pruned:
        health.problems.append(
            f"the experts in {block.rstrip('.')} have {zeros} zeros, and the manifest tells of "
            f"{pruned}"
        )
    if not all(torch.isfinite(weight).all() for weight in weights):
        health.problems.append(f"{block.rstrip('.')} holds weights that are not finite")


def _calibration(folder: Path) -> Health:
    health = Health(str(folder), "calibration set")
    try:
        held = CalibrationSet.open(folder)
        manifest = held.manifest
        repeated = sum(n - 1 for n in Counter(map(tuple, held.ids.tolist())).values())
        health.facts = {
            "model": manifest.get("model", {}).get("name"),
            "made by": manifest.get("generated") or "drawing",
            "rows": f"{held.rows} of {held.length} tokens",
            "from": ", ".join(f"{name} {count}" for name, count in held.counts.items()),
            "distinct tokens": int(held.ids.unique().numel()),
            "leakage": _leakage(manifest.get("leakage")),
        }
    except (InputError, AttributeError, TypeError, KeyError) as error:
        health.problems = [_first(error)]
        return health
    if repeated:
        health.warnings.append(f"{repeated} of {held.rows} rows are the same as another")
    return health


def _store(folder: Path, say: Callable[[str], None]) -> Health:
    health = Health(str(folder), "study store")
    try:
        store = open_store(folder)
        entries = list(store.entries)
        states = Counter(store.state(entry["id"]) for entry in entries)
        health.facts = {"study": store.index["name"], "trials": len(entries)} | dict(states)
    except (CalmixError, KeyError, TypeError, AttributeError) as error:
        health.problems = [_first(error)]
        return health
    for entry in entries:
        try:
            _trial(store, entry["id"], health, say)
        except (CalmixError, KeyError, TypeError, ValueError) as error:
            health.problems.append(f"trial {entry['id']}: {_first(error)}")
        say(str(entry["id"]))
    for place in sorted((folder / "calibration").glob("[!.]*")):
        health.problems += _calibration(place).problems
    for place in sorted((folder / "dense").glob("[!.]*.json")):
        health.problems += _scores(place).problems
    return health


def _trial(store: Store, trial: str, health: Health, say: Callable[[str], None]) -> None:
    if store.state(trial) == "failed":
        health.warnings.append(f"{store.read_failure(trial).label} failed")
    if store.state(trial) != "finished":
        return
    store.read_trial(trial)
    store.scores(trial)
    checkpoint = store.trial(trial) / "checkpoint"
    if checkpoint.is_dir():
        health.problems += _checkpoint(checkpoint, say).problems


def _results(folder: Path) -> Health:
    health = Health(str(folder), "study results")
    try:
        found = read_results(folder)
        health.facts = {"study": found.name, "trials": len(found.trials), "planned": found.planned}
    except CalmixError as error:
        health.problems = [_first(error)]
    return health


def _scores(path: Path) -> Health:
    health = Health(str(path), "capability scores")
    try:
        found = load_scores(path)
        items = sum(len(task.items) for task in found.tasks)
        health.facts = {
            "model": found.model,
            "suite": f"{found.suite['name']} version {found.suite['version']}",
            "tasks": len(found.tasks),
            "items": items,
            "sha256": sha256_json([asdict(task) for task in found.tasks])[:16],
        }
        cut = sum(found.truncated.values())
    except (CalmixError, KeyError, TypeError, ValueError, AttributeError) as error:
        health.problems = [_first(error)]
        return health
    if cut:
        health.warnings.append(f"{cut} requests were cut to fit the model's context")
    return health


def _told(calibration: dict[str, Any] | None) -> str:
    if calibration is None:
        return "none"
    what = calibration.get("generated") or ", ".join(calibration.get("sources", {}))
    return f"{what} ({calibration['rows']} x {calibration['length']} tokens)"


def _leakage(report: Any) -> str:
    if not isinstance(report, dict):
        return "not checked"
    dropped = sum(len(entries) for entries in report["dropped"].values())
    return f"checked against {report['suite']}, {dropped} documents dropped"


def _first(error: Exception) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return text if isinstance(error, CalmixError) else f"{type(error).__name__} {text}".strip()
