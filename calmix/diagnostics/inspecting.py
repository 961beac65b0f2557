"""Check results of calmix against their manifests and summarise them.

A missing, changed or damaged file is a problem; something intact but unusual is a warning.
"""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from calmix.calibration import CalibrationSet
from calmix.compression import plan, results
from calmix.compression.card import PAGE
from calmix.compression.stages import FILE_KIND
from calmix.deploy.compressed_tensors import KIND as PACKED
from calmix.deploy.pack import CONFIG, config_of
from calmix.errors import CalmixError, InputError, first_line
from calmix.evaluation import generations, scores
from calmix.files import (
    RESULTS,
    cached_sha256,
    check_links,
    read_object,
    sha256_file,
    sha256_json,
)
from calmix.manifest import SEAL, changed, check_seal, file_hashes, read_sealed, record_file
from calmix.models.shards import PACK
from calmix.options import option_words
from calmix.pruning.checkpoint import MANIFEST, RUN
from calmix.pruning.experts import starved
from calmix.pruning.report import LayerReport
from calmix.pruning.work import RECORD, SET, SUFFIX, read_record
from calmix.specs import NONE
from calmix.study.store import open_store

# Run records and pages, which no hash covers; they and manifests are in no manifest's list.
UNSEALED = (RUN, results.RUN, PAGE, "README.md")
BESIDE = {MANIFEST, PACK, *UNSEALED}
Say = Callable[[str], None]
# Beyond these a layer gets a warning (ours: some three times the values of SparseGPT at 60 %).
ERROR, DEAD = 0.3, 0.1


@dataclass
class Health:
    """The state of a result: `facts` in order, `problems` (empty if it is intact), `warnings`, the
    `layers` of a pruned checkpoint, and the files `unsealed`, in which a change is not noticed."""

    path: str
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    unsealed: list[str] = field(default_factory=list)


Check = Callable[[Path, Health, Say], None]


def inspect(path: Path, tick: Say = lambda name: None) -> Health:
    """Check any result of calmix, finished or not: a folder, its manifest, or a file."""
    if not path.exists():
        unfinished = path.with_name(path.name + SUFFIX)
        if not unfinished.is_dir():
            raise InputError(f"{path} does not exist")
        path = unfinished
    target = path.parent if path.is_file() and path.name in MARKS else path
    name = next((mark for mark in MARKS if (target / mark).exists()), "")
    health = Health(str(target), MARKS.get(name, "folder of results"))
    if target.is_file():
        with suppress(InputError):
            record = read_object(record_file(path) or path, "")
            health.kind = str(record.get("kind", scores.KIND))
        if health.kind not in FILES:
            raise InputError(
                f"{path} cannot be checked: name a folder that calmix wrote or a file of "
                f"{', '.join(FILES)}"
            )
    elif health.kind != "study store":
        unsealed = (path for one in UNSEALED for path in target.rglob(one))
        health.unsealed = sorted(path.relative_to(target).as_posix() for path in unsealed)
    if target.is_dir() and not name:
        inside = {one.parent.name for mark in MARKS for one in target.glob(f"[!.]*/{mark}")}
        if not inside:
            raise InputError(f"{path} holds no result of calmix: none of {', '.join(MARKS)}")
        _parts(target, sorted(inside), health, tick)
        return health
    try:
        check_links(target)
        (CHECKS | FILES)[health.kind](target, health, tick)
    except CalmixError as error:
        health.problems.append(str(error))
    except Exception as error:  # any exception that a damaged file causes is a finding
        reason = f"{type(error).__name__} {first_line(error)}"
        health.problems.append(f"{target / name} cannot be checked: {reason}")
    return health


def _files(folder: Path, recorded: dict[str, str], health: Health, say: Say) -> None:
    """Compare a folder's files with their hashes, and warn of those that are not listed."""
    hashed = partial(cached_sha256, again=True)
    hashes = file_hashes(folder, without=BESIDE - recorded.keys(), tick=say, hashed=hashed)
    health.problems += changed(folder, recorded, hashes)
    more = sorted(hashes.keys() - recorded)
    health.warnings += [f"{folder / name} is not in the manifest" for name in more]


def _checkpoint(folder: Path, health: Health, say: Say) -> None:
    manifest = read_sealed(folder / MANIFEST, "")
    if manifest["kind"] == PACKED:
        _, pruned = _described(manifest["pruned"], health)
        recorded = manifest["files"]
        health.kind = PACKED
        health.facts |= {"bits a weight": f"{manifest['rate']:.3f}", "bytes": manifest["bytes"]}
    else:
        recorded, pruned = _described(manifest, health)
    _files(folder, recorded, health, say)
    if pruned is not None:
        _layers(pruned, health)


def _layers(pruned: dict[str, Any], health: Health) -> None:
    """Warn of what is unusual in the layers of a pruning run."""
    done, warn = pruned["pruning"], health.warnings.append
    health.layers = TypeAdapter(list[LayerReport]).validate_python(done["layers"])
    damping = done["options"].get("damping")
    for layer in health.layers:
        if layer.error is not None and layer.error > ERROR:
            warn(f"{layer.name} has a reconstruction error of {layer.error:.1%}")
        if layer.dead_inputs > DEAD * layer.columns and layer.tokens is None:
            warn(f"{layer.name}: {layer.dead_inputs} of {layer.columns} inputs are dead")
        if damping is not None and (layer.damping or 0) > damping:
            warn(f"{layer.name}: damping was raised from {damping:g} to {layer.damping:g}")
    if line := starved(health.layers, int(done.get("rows") or 0)):
        warn(line)
    widest, tokens = max((one.columns for one in health.layers), default=0), int(done["tokens"])
    if pruned["calibration"] is not None and tokens < widest:
        warn(f"fewer calibration tokens ({tokens}) than layer inputs ({widest}): use more rows")


def _described(
    manifest: dict[str, Any], health: Health
) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Set the facts of a checkpoint; return its files' hashes and the pruning run's manifest, None
    if another program pruned the model."""
    pruned: dict[str, Any] | None = manifest
    command = {"command": _command(manifest)} if manifest.get("request") else {}
    health.kind = health.kind.replace("checkpoint", manifest["kind"])
    recovered: dict[str, str] = {}
    while pruned is not None and pruned["kind"] == "recovered checkpoint":
        one = pruned["recovery"]
        text = f"held-out rows {one['before']:.4f} before, {one['after']:.4f} after"
        recovered, pruned = {f"recovery by {one['method']}": text, **recovered}, pruned["pruned"]
    if pruned is None:
        health.facts = {
            "model": manifest["model"]["name"],
            **recovered,
            **command,
            "versions": _versions(manifest),
        }
        return dict(manifest["files"]), None
    done, drawn, text = pruned["pruning"], pruned["calibration"], "none"
    if drawn is not None:
        parts = [*drawn.get("sources", {}), *drawn.get("written", {})]
        text = drawn.get("generated") or ", ".join(parts)
        text += f" ({drawn['rows']} x {drawn['length']} tokens)"
    health.facts = {
        "model": pruned["model"]["name"],
        "method": f"{done['method']} {done['pattern']}",
        **recovered,
        "calibration": text,
        "weights": done["weights"],
        "pruned": done["pruned"],
    }
    if done.get("bits"):
        outer = [f", {one['name']} {one['bits']:.3f}" for one in done.get("outer", [])]
        health.facts["bits a weight"] = f"{done['bits']:.3f}" + "".join(outer)
    if gone := sum(len(one["scores"]) - len(one["kept"]) for one in done["dropped"]):
        health.facts["experts dropped"] = gone
    health.facts |= {**command, "versions": _versions(manifest)}
    return dict(manifest["files"]), pruned


def _command(manifest: dict[str, Any]) -> str:
    """Return the command that makes a checkpoint again, without its output folder."""
    name, recovered = manifest["model"]["name"], manifest["kind"] == "recovered checkpoint"
    options = dict(manifest["request"])
    options |= options.pop("draw")
    options["sources"] = "FILE" if options.get("sources") else None
    if recovered:
        options = {"against": manifest["against"]["name"], **options}
    else:
        own = [f"{key}={value}" for key, value in options.pop("options").items()]
        method = options.pop("method")
        options |= {} if method == NONE else {"method": ",".join([method, *own])}
        options |= {key: tuple(options[key]) for key in ("only", "skip")}
    options |= {"dtype": manifest["dtype"], "device": manifest["device"]}
    words = ["calmix", "recover" if recovered else "prune", name, *option_words(options)]
    return shlex.join(words)


def _versions(manifest: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())


def _pack(folder: Path, health: Health, say: Say) -> None:
    manifest = read_object(folder / PACK, f"there is no {folder / PACK}")
    if "config" in manifest:  # packs of older formats have no hash of their own
        check_seal(folder / PACK, manifest)
    weights, others = dict(manifest["weights"]), dict(manifest["files"])
    packed = others | {one.get("file", name): one["packed"] for name, one in weights.items()}
    if MANIFEST in others:
        health.kind += " of a checkpoint"
        unpacked = others | {name: one["sha256"] for name, one in weights.items()}
        unpacked[CONFIG] = hashlib.sha256(config_of(folder, manifest)).hexdigest()
        recorded, _ = _described(read_sealed(folder / MANIFEST, ""), health)
        health.problems += changed(folder, recorded, unpacked)
    _files(folder, packed, health, say)
    sizes = [(folder / name).stat().st_size for name in packed if (folder / name).is_file()]
    health.facts["packed bytes"] = sum(sizes)


def _gguf(path: Path, health: Health, say: Say) -> None:
    """Check a GGUF file of calmix compress by the record beside it."""
    record = read_sealed(record_file(path) or path, "")
    _described(record["pruned"], health)
    _layers(record["pruned"], health)
    file = path.with_name(next(iter(record["files"])))
    hashes = {file.name: cached_sha256(file, again=True)} if file.is_file() else {}
    health.problems += changed(file.parent, record["files"], hashes)
    health.facts |= {
        "types": ", ".join(f"{count} {name}" for name, count in record["types"].items()),
        "bits a weight": f"{record['bits']:.3f}",
        "bytes": record["after"],
    }


def _calibration(folder: Path, health: Health, say: Say) -> None:
    dataset = CalibrationSet.open(folder)
    manifest, leakage = dataset.manifest, "not checked"
    guard = manifest.get("leakage")
    if isinstance(guard, dict):
        dropped = sum(map(len, guard["dropped"].values()))
        leakage = f"checked against {guard['suite']}, {dropped} documents dropped"
    health.facts = {
        "model": manifest.get("model", {}).get("name"),
        "made by": manifest.get("generated")
        or " and ".join(["drawing"] * ("sources" in manifest) + [*manifest.get("written", [])]),
        "rows": f"{dataset.rows} of {dataset.length} tokens",
        "from": ", ".join(f"{name} {count}" for name, count in dataset.counts.items()),
        "user's turns": manifest.get("chat_turns", "not counted"),
        "distinct tokens": int(dataset.ids.unique().numel()),
        "leakage": leakage,
    }
    if repeated := dataset.rows - len(set(map(tuple, dataset.ids.tolist()))):
        health.warnings.append(f"{repeated} of {dataset.rows} rows are duplicates")


def _store(folder: Path, health: Health, say: Say) -> None:
    store = open_store(folder)
    states = {entry.id: store.state(entry.id) for entry in store.index.trials}
    counts = dict(Counter(states.values()))
    health.facts = {"study": store.index.name, "trials": len(states)} | counts
    for entry in store.index.trials:
        state = states[entry.id]
        if state == "failed":
            health.warnings.append(f"{entry.label} failed")
        for read in (store.result, store.scores) if state == "finished" else ():
            try:
                read(entry)
            except CalmixError as error:
                health.problems.append(str(error))
        say(entry.id)
    for pattern in ("trials/[!.]*/checkpoint", "calibration/[!.]*", "dense/[!.]*.json"):
        for path in sorted(folder.glob(pattern)):
            health.problems += inspect(path, say).problems


def _compressed(folder: Path, health: Health, say: Say) -> None:
    """Check the result of every stage, and report what is left to do."""
    record, check = results.read_compressed(folder), results.Results()
    request, listed = record["request"], results.recorded(folder, record)
    leaves = {one.stage: one.path.name for one in listed}
    left = [one.stage for one in listed if not one.done]
    health.facts = {
        "dense model": request["model"],
        "target": plan.target(request),
        "effort": request["effort"],
    }
    if left:
        health.facts["left to do"] = f"{', '.join(left)} (run its calmix compress again to resume)"
    begun = [
        one
        for one in leaves.values()
        if any((folder / (one + end)).exists() for end in ("", SUFFIX))
    ]
    parts = _parts(folder, begun, health, say)
    if (file := folder / results.RUN).exists():
        ran = read_object(file, "")["seconds"]
        health.problems += [
            f"{folder / leaves[name]} is missing"
            for name in left
            if name in ran and leaves[name] != "pruned"
        ]
    for name in parts.keys() & {"model", "model.gguf"}:
        health.layers = parts[name].layers
        health.facts["method"] = parts[name].facts.get("method")
    for one in listed:
        if results.ready(one.path) and not parts[one.path.name].problems:
            try:
                check.check(one)
            except CalmixError as error:
                health.problems.append(str(error))


def _ladder(folder: Path, health: Health, say: Say) -> None:
    """Check the candidates of a walk that has chosen none, and report its progress."""
    ladder = read_sealed(folder / results.LADDER, "")
    request, tested = (
        plan.Request(**ladder["request"]),
        [f"{one['bits']:g}" for one in ladder["rungs"]],
    )
    health.facts = {
        "dense model": request.model,
        "to keep": request.keep_at_least,
        "bits tested": ", ".join(tested) or "none",
        "ended": ladder["ended"] or "not yet",
    }
    places = [*folder.glob("calibration"), *sorted(folder.glob("candidates/*/model"))]
    places += sorted(folder.glob("candidates/*/model.gguf"))
    for name in (plan.SCORES, plan.BEHAVIOUR, plan.PROMPTS):
        places += sorted(folder.glob(f"candidates/**/*{name}"))
    _parts(folder, [str(path.relative_to(folder)) for path in places], health, say)


def _parts(folder: Path, names: Iterable[str], health: Health, say: Say) -> dict[str, Health]:
    """Check parts of a folder."""
    parts = {name: inspect(folder / name, say) for name in names}
    for name, part in parts.items():
        health.facts[name] = part.kind + (", damaged" if part.problems else "")
        health.problems += part.problems
        health.warnings += part.warnings
    return parts


def _work(folder: Path, health: Health, say: Say) -> None:
    """Report the progress of an interrupted pruning run or recovery."""
    record = read_record(folder)
    request, done = record["request"], record["kept"].get("done", 0)
    unit = "steps" if request["method"] == "distill" else "blocks"
    health.kind = "unfinished recovery" if "against" in request else "unfinished prune"
    health.facts = {
        "method": request["method"],
        f"{unit} done": done,
        "to finish it": "the same command with --resume",
    }
    recorded = record["kept"].get("files", {})
    hashes = {name: sha256_file(folder / name) for name in recorded if (folder / name).is_file()}
    health.problems += changed(folder, recorded, hashes)
    if (folder / SET).is_dir():
        health.problems += inspect(folder / SET, say).problems


def _answers(path: Path, health: Health, say: Say) -> None:
    answers = generations.load_answers(path)
    names = ", ".join(name for name, _ in answers.models)
    health.facts = {"models": names, "prompts": len(answers.prompts)}


def _scores(path: Path, health: Health, say: Say) -> None:
    loaded = scores.load_scores(path)
    if SEAL not in read_object(path, ""):
        health.warnings.append(f"{path} has no hash of its own: a change is not noticed")
    health.facts = {
        "model": loaded.model,
        "suite": f"{loaded.suite['name']} version {loaded.suite['version']}",
        "tasks": len(loaded.tasks),
        "items": sum(len(task.items) for task in loaded.tasks),
        "sha256": sha256_json([asdict(task) for task in loaded.tasks])[:16],
    }
    if cut := sum(loaded.truncated.values()):
        health.warnings.append(f"{cut} requests were cut to fit the model's context")


CHECKS: dict[str, Check] = {
    "study store": _store,
    "compressed model": _compressed,
    "pack": _pack,
    "checkpoint": _checkpoint,
    "calibration set": _calibration,
    "ladder of candidates": _ladder,
    "unfinished work": _work,
}
MARKS = {names[0]: kind for kind, names in RESULTS.items() if kind in CHECKS}
MARKS |= {results.LADDER: "ladder of candidates", RECORD: "unfinished work"}
FILES: dict[str, Check] = {
    scores.KIND: _scores,
    generations.KIND: _answers,
    FILE_KIND: _gguf,
}
