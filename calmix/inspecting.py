"""Check a result of calmix against its record, and say what it is.

A missing, changed or damaged file is a problem; one that no record lists is a warning.
"""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from calmix.calibration.dataset import CalibrationSet
from calmix.compression import plan, results
from calmix.compression.card import CARD_PAGE
from calmix.compression.folder import COMPRESSED_RUN, SEARCH
from calmix.compression.stages import FILE_KIND
from calmix.deploy.pack import CONFIG
from calmix.errors import CalmixError, InputError, first_line
from calmix.evaluation import scores
from calmix.files import RESULTS, cached_sha256, check_links, read_object, sha256_file
from calmix.manifest import (
    MANIFEST,
    RUN,
    changed,
    check_seal,
    file_hashes,
    lineage,
    read_record,
    read_sealed,
    record_file,
)
from calmix.models.folder import PACK
from calmix.options import NONE, ModelOptions, option_words
from calmix.pruning.methods import get_method
from calmix.pruning.report import LayerReport
from calmix.pruning.work import RECORD, SET, SUFFIX
from calmix.pruning.work import read_record as read_work
from calmix.study.store import open_store

# Run records and pages, which no hash covers; they and manifests are in no manifest's list.
UNSEALED = (RUN, COMPRESSED_RUN, CARD_PAGE, "README.md")
UNLISTED = {MANIFEST, PACK, *UNSEALED}
Say = Callable[[str], None]


@dataclass
class Health:
    """The state of a result: its `kind`, `facts` about it, `problems` (empty if it is intact),
    `warnings`, the `layers` of a pruned model, and the files `unsealed`, in which a change is not
    noticed."""

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
    place = path.parent if path.is_file() and path.name in MARKED else path
    health = Health(str(place), "folder of results")
    if place.is_dir():
        name = next((mark for mark in MARKED if (place / mark).exists()), "")
        if name:
            health.kind, check = MARKED[name]
        elif inside := {one.parent.name for mark in MARKED for one in place.glob(f"[!.]*/{mark}")}:
            _parts(place, sorted(inside), health, tick)
            return health
        else:
            raise InputError(f"{path} holds no result of calmix: none of {', '.join(MARKED)}")
        if health.kind != "study store":
            files = (file for one in UNSEALED for file in place.rglob(one))
            health.unsealed = sorted(file.relative_to(place).as_posix() for file in files)
    else:
        try:
            health.kind = str(read_object(record_file(path) or path, "").get("kind", scores.KIND))
            check = FILES[health.kind]
        except (InputError, KeyError):
            raise InputError(
                f"{path} cannot be checked: name a folder that calmix wrote or a file of "
                f"{', '.join(FILES)}"
            ) from None
    try:
        check_links(place)
        check(place, health, tick)
    except CalmixError as error:
        health.problems.append(str(error))
    except Exception as error:  # any exception that a damaged file causes is a finding
        reason = f"{type(error).__name__} {first_line(error)}"
        health.problems.append(f"{record_file(path) or path} cannot be checked: {reason}")
    return health


def _compare(folder: Path, recorded: Mapping[str, str], health: Health, say: Say) -> None:
    """Compare a folder's files with their hashes, and warn of those that are not listed."""
    hashed = partial(cached_sha256, again=True)
    hashes = file_hashes(folder, without=UNLISTED - recorded.keys(), tick=say, hashed=hashed)
    health.problems += changed(folder, recorded, hashes)
    more = sorted(hashes.keys() - recorded)
    health.warnings += [f"{folder / name} is not in the manifest" for name in more]


def _model(place: Path, health: Health, say: Say) -> None:
    """Check a checkpoint, or a GGUF file of `calmix compress`."""
    record = read_record(place)
    if place.is_dir():
        _compare(place, record["files"], health, say)
    else:
        files = {name: place.parent / name for name in record["files"]}
        there = (pair for pair in files.items() if pair[1].is_file())
        hashes = {name: cached_sha256(file, again=True) for name, file in there}
        health.problems += changed(place.parent, record["files"], hashes)
    health.kind = record["kind"]
    _describe(record, health)


def _pack(folder: Path, health: Health, say: Say) -> None:
    manifest = read_object(folder / PACK, f"there is no {folder / PACK}")
    check_seal(folder / PACK, manifest)
    weights, others = dict(manifest["weights"]), dict(manifest["files"])
    packed = {one["file"]: one["packed"] for one in weights.values()}
    if MANIFEST in others:
        record = read_sealed(folder / MANIFEST, "")
        unpacked = others | {name: one["sha256"] for name, one in weights.items()}
        unpacked[CONFIG] = hashlib.sha256(manifest["config"].encode()).hexdigest()
        health.problems += changed(folder, record["files"], unpacked)
        health.kind = f"pack of a {record['kind']}"
        _describe(record, health)
    _compare(folder, others | packed, health, say)


def _describe(record: Mapping[str, Any], health: Health) -> None:
    """Set the facts and layers of a model from its record."""
    facts, models = health.facts, [*lineage(record)]
    first = models[-1]
    facts["model"] = first["model"]["name"]
    if done := first.get("pruning"):  # else another program pruned the model
        drawn, text = first["calibration"], "none"
        if drawn is not None:
            text = drawn.get("generated") or ", ".join(
                [*drawn.get("sources", {}), *drawn.get("written", {})]
            )
            text += f" ({drawn['rows']} x {drawn['length']} tokens)"
        facts |= {"method": f"{done['method']} {done['pattern']}", "calibration": text}
        if gone := sum(len(one["scores"]) - len(one["kept"]) for one in done["dropped"]):
            facts["experts dropped"] = gone
        if bits := record.get("rate") or record.get("bits") or done.get("bits"):
            facts["bits a weight"] = f"{bits:.3f}"
        health.layers = TypeAdapter(list[LayerReport]).validate_python(done["layers"])
    for one in (model["recovery"] for model in reversed(models) if "recovery" in model):
        error = f"held-out rows {one['before']:.4f} before, {one['after']:.4f} after"
        facts[f"recovery by {one['method']}"] = error
    if record.get("request"):
        facts["command"] = _command(record)
    versions = record["versions"].items()
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions)


def _command(record: Mapping[str, Any]) -> str:
    """Return the command that makes a checkpoint again, without its output folder."""
    name, recovered = record["model"]["name"], "recovery" in record
    options = dict(record["request"])
    options |= options.pop("draw")
    options["sources"] = "FILE" if options.get("sources") else None
    if recovered:
        options = {"against": record["against"]["name"], **options}
    else:
        own, method = options.pop("options"), options.pop("method")
        options["method"] = None if method == NONE else method
        with suppress(InputError):  # another package's, which is not installed
            options["method"] = options["method"] and get_method(method, **own).text
        options |= {key: tuple(options[key]) for key in ("only", "skip")}
    options |= {key: record.get(key) for key in ModelOptions.model_fields}
    return shlex.join(["calmix", "recover" if recovered else "prune", name, *option_words(options)])


def _set(folder: Path, health: Health, say: Say) -> None:
    saved = CalibrationSet.open(folder)
    written = [*["drawing"] * ("sources" in saved.manifest), *saved.manifest.get("written", [])]
    health.facts = {
        "model": saved.manifest.get("model", {}).get("name"),
        "made by": saved.manifest.get("generated") or " and ".join(written),
        "rows": f"{saved.rows} of {saved.length} tokens",
        "from": ", ".join(f"{name} {count}" for name, count in saved.counts.items()),
    }


def _store(folder: Path, health: Health, say: Say) -> None:
    store = open_store(folder)
    states = {entry.id: store.state(entry.id) for entry in store.index.trials}
    health.facts = {"study": store.index.name, "trials": len(states)} | Counter(states.values())
    for entry in store.index.trials:
        if states[entry.id] == "failed":
            health.warnings.append(f"{entry.label} failed")
        for read in (store.result, store.scores) if states[entry.id] == "finished" else ():
            try:
                read(entry)
            except CalmixError as error:
                health.problems.append(str(error))
        say(entry.id)
    for pattern in ("trials/[!.]*/checkpoint", "calibration/[!.]*", "dense/[!.]*.json"):
        for path in sorted(folder.glob(pattern)):
            health.problems += inspect(path, say).problems


def _compressed(folder: Path, health: Health, say: Say) -> None:
    """Check the result of every stage, and what it was made from."""
    record, check = results.read_compressed(folder), results.Results()
    request, stages = record["request"], results.recorded(folder, record)
    left = {one.stage: one.path for one in stages if not one.done}
    health.facts = {
        "dense model": request["model"],
        "target": plan.target(request),
        "effort": request["effort"],
    }
    if left:
        health.facts["left to do"] = f"{', '.join(left)} (run its calmix compress again to resume)"
    names = [one.path.name for one in stages]
    begun = [one for one in names if any((folder / (one + end)).exists() for end in ("", SUFFIX))]
    parts = _parts(folder, begun, health, say)
    ran = read_object(file, "")["seconds"] if (file := folder / COMPRESSED_RUN).exists() else {}
    health.problems += [
        f"{path} is missing"
        for stage, path in left.items()
        if stage in ran and path.name != "pruned"
    ]
    for name in parts.keys() & {"model", "model.gguf"}:
        health.layers = parts[name].layers
        health.facts["method"] = parts[name].facts.get("method")
    for one in stages:
        if results.ready(one.path) and not parts[one.path.name].problems:
            try:
                check.check(one)
            except CalmixError as error:
                health.problems.append(str(error))


def _search(folder: Path, health: Health, say: Say) -> None:
    """Check the candidates of a search that has chosen none."""
    record = read_sealed(folder / SEARCH, "")
    request = plan.CompressRequest(**record["request"])
    health.facts = {
        "dense model": request.model,
        "to keep": request.keep_at_least,
        "bits tested": ", ".join(f"{one['bits']:g}" for one in record["candidates"]) or "none",
        "ended": record["ended"] or "not yet",
    }
    patterns = ["calibration", "candidates/*/model", "candidates/*/model.gguf"]
    patterns += [f"candidates/**/*{one}" for one in (plan.SCORES, plan.BEHAVIOUR, plan.PROMPTS)]
    paths = [path for one in patterns for path in sorted(folder.glob(one))]
    _parts(folder, [str(path.relative_to(folder)) for path in paths], health, say)


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
    record = read_work(folder)
    request, state = record["request"], record["kept"]
    health.kind = "unfinished recovery" if "against" in request else "unfinished prune"
    unit = "steps" if request["method"] == "distill" else "blocks"
    health.facts = {
        "method": request["method"],
        f"{unit} done": state.get("done", 0),
        "to finish it": "the same command with --resume",
    }
    recorded = state.get("files", {})
    hashes = {name: sha256_file(folder / name) for name in recorded if (folder / name).is_file()}
    health.problems += changed(folder, recorded, hashes)
    if (folder / SET).is_dir():
        health.problems += inspect(folder / SET, say).problems


def _scores(path: Path, health: Health, say: Say) -> None:
    loaded = scores.load_scores(path)
    health.facts = {
        "model": loaded.model,
        "suite": f"{loaded.suite['name']} version {loaded.suite['version']}",
        "items": sum(len(task.items) for task in loaded.tasks),
    }


FOLDERS: dict[str, Check] = {
    "study store": _store,
    "compressed model": _compressed,
    "pack": _pack,
    "checkpoint": _model,
    "calibration set": _set,
}
# Kind and check of each folder, by the file that marks it.
MARKED = {
    **{RESULTS[kind][0]: (kind, check) for kind, check in FOLDERS.items()},
    SEARCH: ("search for a size", _search),
    RECORD: ("unfinished work", _work),
}
FILES: dict[str, Check] = {
    scores.KIND: _scores,
    FILE_KIND: _model,
}
