"""Check what calmix has written, each kind against its own manifest, and summarise it.

A file that is missing, changed or damaged is a problem; what is whole but unusual is a warning.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calmix.calibration import CalibrationSet, is_saved_set
from calmix.calibration.dataset import MANIFEST as SET_MANIFEST
from calmix.calibration.dataset import TENSORS
from calmix.compress.plan import MANIFEST as COMPRESSED
from calmix.compress.plan import Request, stages
from calmix.compress.running import read_record
from calmix.deploy.openvino import MANIFEST as EXPORT
from calmix.errors import CalmixError, InputError
from calmix.evaluation.generations import KIND as ANSWERS
from calmix.evaluation.generations import load_answers
from calmix.evaluation.scores import KIND as SCORES
from calmix.evaluation.scores import load_scores
from calmix.files import read_object, sha256_json
from calmix.manifest import file_hashes, seal_holds
from calmix.models.shards import PACK, Shards, read_tensor
from calmix.pruning.checkpoint import MANIFEST, RUN
from calmix.pruning.experts import starved
from calmix.pruning.old_work import PROGRESS, REQUEST, SET, SUFFIX, read_sealed
from calmix.recovery.chain import PRUNED, STAGES
from calmix.study.export import RECORD, read_results
from calmix.study.store import INDEX, Store, open_store

ANALYSIS, PAGES = "analysis.json", ("report.html", "brief.html", "summary.txt")
MEASUREMENT = "measurement"
CARD = "README.md"  # written beside a model later, by whoever describes it
Say = Callable[[str], None]
# Beyond these a layer is worth a look: ours, some three times what is seen at 60 % SparseGPT.
ERROR, DEAD = 0.3, 0.1


@dataclass(frozen=True)
class LayerHealth:
    """One pruned layer, as the manifest has it; that the file has its zeros has been checked.

    Attributes:
        sparsity: share that was pruned; a dense weight may be zero too.
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
        hashed: whether every file was held against a hash.
    """

    path: str
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: list[LayerHealth] = field(default_factory=list)
    hashed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        return asdict(self)


Check = Callable[[Path, Health, Say], None]


def inspect(path: Path, *, tick: Callable[[str], None] | None = None) -> Health:
    """Check anything calmix has written (`CHECKS`), finished or not.

    Args:
        path: the folder, its manifest, or a file of results.
        tick: called with what has been checked.

    Raises:
        InputError: there is nothing of calmix at `path`.
    """
    say = tick or (lambda name: None)
    if not path.exists():
        unfinished = (path.with_name(path.name + end) for end in (SUFFIX, STAGES))
        found = next((folder for folder in unfinished if folder.is_dir()), None)
        if found is None:
            raise InputError(f"there is nothing at {path}")
        path = found
    if path.is_file() and path.name not in CHECKS:
        return _file(path, say)
    folder = path.parent if path.is_file() else path
    for mark, (kind, check) in CHECKS.items():
        if (folder / mark).exists():
            return _checked(folder, folder / mark, kind, check, say)
    inside = sorted({one.parent.name for mark in CHECKS for one in folder.glob(f"[!.]*/{mark}")})
    if not inside:
        raise InputError(f"{path} holds nothing calmix has written: none of {', '.join(CHECKS)}")
    health = Health(str(path), "folder of results")
    _parts(folder, inside, health, say)
    return health


def _checked(path: Path, manifest: Path, kind: str, check: Check, say: Say) -> Health:
    """Return what a check finds; what it cannot read is a problem of `manifest`."""
    health = Health(str(path), kind)
    try:
        check(path, health, say)
    except CalmixError as error:
        health.problems.append(str(error))
    except (
        OSError, LookupError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError,
    ) as error:  # fmt: skip
        text = next(iter(str(error).strip().splitlines()), "")
        health.problems.append(f"{manifest} cannot be checked: {type(error).__name__} {text}")
    return health


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


def _checkpoint(folder: Path, health: Health, say: Say) -> None:
    kept, pruned = _described(folder, health)
    _files(folder, kept, (MANIFEST, RUN, CARD), health, say)
    done = pruned["pruning"]
    layers = [_reported(layer) for layer in done["layers"]]
    _layers(folder, layers, _number(done["options"].get("damping")), health, say)
    if line := starved((layer for layer, _ in layers), int(done.get("rows") or 0)):
        health.warnings.append(line)
    widest, tokens = max((layer.columns for layer, _ in layers), default=0), int(done["tokens"])
    if pruned["calibration"] is not None and tokens < widest:
        health.warnings.append(
            f"{tokens} calibration tokens are fewer than the {widest} inputs of a layer: more "
            "rows would tell the solver more"
        )


def _described(folder: Path, health: Health) -> tuple[dict[str, str], dict[str, Any]]:
    """Put the facts of a checkpoint's manifest into `health`.

    Returns:
        The files' hashes, and the manifest of the prune.
    """
    manifest = pruned = read_manifest(folder / MANIFEST)
    _check_seal(folder / MANIFEST, manifest)
    recovered: list[dict[str, Any]] = []
    while pruned["kind"] == "recovered checkpoint":
        recovered.insert(0, pruned["recovery"])
        pruned = pruned["pruned"] or {"kind": None}
    if pruned["kind"] is None:
        raise InputError(
            f"{folder / MANIFEST} cannot be checked: it was recovered from a model without one"
        )
    done = pruned["pruning"]
    gone = sum(len(one["scores"]) - len(one["kept"]) for one in done["dropped"])
    health.kind += "recovered checkpoint" if recovered else "pruned checkpoint"
    health.facts |= {
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
        **({"experts dropped": gone} if gone else {}),
        "versions": _versions(manifest),
    }
    return dict(manifest["files"]), pruned


def _versions(manifest: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())


def _check_seal(path: Path, manifest: dict[str, Any]) -> None:
    if not seal_holds(manifest):
        raise InputError(f"{path} is damaged or changed: its hash is another")


def _files(
    folder: Path, kept: dict[str, str], without: tuple[str, ...], health: Health, say: Say
) -> None:
    """Hold a folder's files against their hashes, and name those that are not listed."""
    found = file_hashes(folder, without=without, tick=say)
    health.hashed = True
    health.problems += changed_files(folder, kept, found)
    for name in sorted(set(found) - set(kept)):
        health.warnings.append(f"{folder / name} is not in the manifest")


def _pack(folder: Path, health: Health, say: Say) -> None:
    held = read_object(folder / PACK, f"there is no {folder / PACK}")
    weights, others = dict(held["weights"]), dict(held["files"])
    packed = others | {name: one["packed"] for name, one in weights.items()}
    if MANIFEST in others:
        health.kind += " of a "
        unpacked = others | {name: one["sha256"] for name, one in weights.items()}
        health.problems += changed_files(folder, _described(folder, health)[0], unpacked)
    _files(folder, packed, (PACK, CARD), health, say)
    sizes = [(folder / name).stat().st_size for name in packed if (folder / name).is_file()]
    health.facts["packed bytes"] = sum(sizes)


def _export(folder: Path, health: Health, say: Say) -> None:
    manifest = read_manifest(folder / EXPORT)
    _check_seal(folder / EXPORT, manifest)
    health.facts = {
        "model": manifest["model"]["name"],
        "engine": f"{manifest['engine']}, {manifest['weights']} weights",
        "versions": _versions(manifest),
    }
    _files(folder, dict(manifest["files"]), (EXPORT, RUN, CARD), health, say)


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
    say: Say,
) -> None:
    """Count every layer's zeros in the files, and hold them against the manifest."""
    shards = Shards(folder)
    left = dict(shards.places)
    fused: dict[str, list[tuple[LayerHealth, int]]] = {}
    for layer, pruned in told:
        name = f"{layer.name}.weight"
        close = (p for n, p in shards.places.items()
                 if name.endswith(f".{n}") or n.endswith(f".{name}"))  # fmt: skip
        place = shards.places.get(name) or next(close, None)
        if place is None and (block := re.match(r".*?\.\d+\.", layer.name)):
            fused.setdefault(block[0], []).append((layer, pruned))
            continue
        if place is None:
            health.problems.append(f"{folder} lacks the weights of {layer.name}")
            continue
        try:
            weight = read_tensor(folder, place)
        except (CalmixError, OSError, RuntimeError, ValueError) as error:
            health.problems.append(f"{layer.name} cannot be read: {error}")
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
        health.layers.append(layer)
        say(layer.name)
    for where, inside in fused.items():
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
    places = [place for place in places if len(place.shape) > 1]
    if not places:
        health.problems += [f"{folder} lacks the weights of {layer.name}" for layer, _ in layers]
        return
    weights = [read_tensor(folder, place) for place in places]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    pruned = sum(count for _, count in layers)
    if zeros < pruned:
        health.problems.append(
            f"the weights of {block.rstrip('.')} that are stored together have {zeros} zeros, "
            f"and the manifest tells of {pruned}"
        )
    if not all(torch.isfinite(weight).all() for weight in weights):
        health.problems.append(f"{block.rstrip('.')} holds weights that are not finite")


def _calibration(folder: Path, health: Health, say: Say) -> None:
    held = CalibrationSet.open(folder)
    manifest, health.hashed = held.manifest, True
    repeated = sum(n - 1 for n in Counter(map(tuple, held.ids.tolist())).values())
    health.facts = {
        "model": manifest.get("model", {}).get("name"),
        "made by": manifest.get("generated") or "drawing",
        "rows": f"{held.rows} of {held.length} tokens",
        "from": ", ".join(f"{name} {count}" for name, count in held.counts.items()),
        "distinct tokens": int(held.ids.unique().numel()),
        "leakage": _leakage(manifest.get("leakage")),
    }
    if repeated:
        health.warnings.append(f"{repeated} of {held.rows} rows are the same as another")


def _store(folder: Path, health: Health, say: Say) -> None:
    store = open_store(folder)
    trials = [entry.id for entry in store.entries]
    states = {trial: store.state(trial) for trial in trials}
    counts = dict(Counter(states.values()))
    health.facts = {"study": store.index.name, "trials": len(trials)} | counts
    for trial, state in states.items():
        if state == "failed":
            health.warnings.append(f"{store.read_failure(trial).label} failed")
        if state == "finished":
            place = store.trial(trial)
            health.problems += _checked(place, place, "", partial(_trial, store), say).problems
        say(trial)
    for place in (
        *sorted(folder.glob("trials/*/checkpoint")), *sorted(folder.glob("calibration/[!.]*")),
        *sorted(folder.glob("dense/[!.]*.json")),
    ):  # fmt: skip
        health.problems += inspect(place, tick=say).problems


def _trial(store: Store, folder: Path, health: Health, say: Say) -> None:
    store.result(folder.name)
    store.scores(folder.name)


def _results(folder: Path, health: Health, say: Say) -> None:
    found = read_results(folder)
    health.facts = {"study": found.name, "trials": len(found.trials), "planned": found.planned}


def _analysis(folder: Path, health: Health, say: Say) -> None:
    found = read_object(folder / ANALYSIS, f"there is no {folder / ANALYSIS}")
    health.facts = {
        "study": found["study"],
        "trials": f"{found['finished']} of {found['planned']} finished",
        **{f"best, {one['label']}": ", ".join(one["best"]) for one in found["conditions"]},
    }


def _report(folder: Path, health: Health, say: Say) -> None:
    """A report has no manifest: whether its parts are there is all there is to check."""
    health.facts = {"pages": ", ".join(PAGES), "figures": len(list(folder.glob("figures/*.svg")))}
    lacking = [folder / name for name in PAGES if not (folder / name).is_file()]
    health.problems = [f"{path} is missing" for path in lacking]


def _compressed(folder: Path, health: Health, say: Say) -> None:
    """Check every stage's result, and say what is left to do."""
    asked = Request(**read_record(folder).request)
    listed = [one for one in stages(asked, folder) if one.leaves]
    left = [one.name for one in listed if not (folder / str(one.leaves)).exists()]
    health.facts = {"dense model": asked.model, "target": asked.target, "effort": asked.effort}
    if left:
        health.facts["left to do"] = f"{', '.join(left)} (the same calmix compress goes on)"
    names = [str(one.leaves) for one in listed]
    begun = [one for one in names if any((folder / (one + end)).exists() for end in ("", SUFFIX))]
    parts = _parts(folder, begun, health, say)
    if "model" in parts:
        health.layers = parts["model"].layers
        health.facts["method"] = parts["model"].facts.get("method")


def _parts(folder: Path, names: Sequence[str], health: Health, say: Say) -> dict[str, Health]:
    """Check what lies in a folder, part by part."""
    parts = {name: inspect(folder / name, tick=say) for name in names}
    for name, part in parts.items():
        health.facts[name] = part.kind + (", damaged" if part.problems else "")
        health.problems += part.problems
        health.warnings += part.warnings
    return parts


def _work(folder: Path, health: Health, say: Say) -> None:
    """Say how far an interrupted prune or recovery is."""
    asked = read_object(folder / REQUEST, f"there is no {folder / REQUEST}")
    unit = "steps" if asked["method"] == "distill" else "blocks"
    health.kind += "recovery" if "against" in asked else "prune"
    done = (read_sealed(folder / PROGRESS) or {}).get("done", 0)
    health.facts = {"method": asked["method"], f"{unit} done": done,
                    "to finish it": "the same command with --resume"}  # fmt: skip
    if is_saved_set(folder / SET):
        health.problems += inspect(folder / SET, tick=say).problems


def _stages(folder: Path, health: Health, say: Say) -> None:
    parts = _parts(folder, [PRUNED], health, say)
    health.facts |= parts[PRUNED].facts | {"to finish it": "the same command with --resume"}
    if is_saved_set(folder / SET):
        _parts(folder, [SET], health, say)


def _file(path: Path, say: Say) -> Health:
    """Check a file of results by the kind that it says it is."""
    held: dict[str, Any] = {}
    if path.suffix == ".json":
        with suppress(InputError):
            held = read_object(path, f"there is nothing at {path}")
        check = FILES.get(str(held.get("kind", SCORES)))
        if check is not None:
            return _checked(path, path, str(held.get("kind", SCORES)), check, say)
    raise InputError(
        f"{path} is no file that can be checked: name a folder that calmix wrote, or a file of "
        "scores, answers or a measurement"
    )


def _answers(path: Path, health: Health, say: Say) -> None:
    found = load_answers(path)
    names = ", ".join(name for name, _ in found.models)
    health.facts = {"models": names, "prompts": len(found.prompts)}


def _measurement(path: Path, health: Health, say: Say) -> None:
    held = read_object(path, f"there is nothing at {path}")
    health.facts = {"of": ", ".join(one["name"] for one in held["results"])}


def _scores(path: Path, health: Health, say: Say) -> None:
    found = load_scores(path)
    health.facts = {
        "model": found.model,
        "suite": f"{found.suite['name']} version {found.suite['version']}",
        "tasks": len(found.tasks),
        "items": sum(len(task.items) for task in found.tasks),
        "sha256": sha256_json([asdict(task) for task in found.tasks])[:16],
    }
    if cut := sum(found.truncated.values()):
        health.warnings.append(f"{cut} requests were cut to fit the model's context")


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


# What stands in a folder of each kind, what it is, and what checks it. A pack holds a checkpoint's
# manifest too; what is named later in a check begins with nothing here.
CHECKS: dict[str, tuple[str, Check]] = {
    INDEX: ("study store", _store),
    COMPRESSED: ("compressed model", _compressed),
    PACK: ("pack", _pack),
    MANIFEST: ("", _checkpoint),
    EXPORT: ("export", _export),
    SET_MANIFEST: ("calibration set", _calibration),
    TENSORS: ("calibration set", _calibration),
    RECORD: ("study results", _results),
    ANALYSIS: ("study analysis", _analysis),
    PAGES[0]: ("study report", _report),
    REQUEST: ("unfinished ", _work),
    PRUNED: ("unfinished prune and recovery", _stages),
    PRUNED + SUFFIX: ("unfinished prune and recovery", _stages),
}
FILES = {SCORES: _scores, ANSWERS: _answers, MEASUREMENT: _measurement}
