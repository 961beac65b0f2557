"""Make an artefact again from its manifest, and say what is the same and what differs.

What must be the same before the work is worth its time (the model, the calibration set) is
checked first. What may change the last bits (versions, processor, threads) is told afterwards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from calmix.calibration import CalibrationSet, Mix, build, make_mix, open_tokenizer
from calmix.calibration.dataset import MANIFEST as SET_MANIFEST
from calmix.calibration.dataset import TENSORS
from calmix.calibration.leakage import guard_of
from calmix.calibration.selfgen.generators import generate
from calmix.calibration.spec import read_generator
from calmix.diagnostics.inspecting import read_manifest
from calmix.errors import InputError, disk_errors
from calmix.files import check_output_folder, hidden, holds_result, parse_json, real_place
from calmix.manifest import SEAL, seal_holds
from calmix.models import open_model, resolve_model
from calmix.models.opening import fingerprint
from calmix.options import DrawOptions, checked
from calmix.pruning.checkpoint import MANIFEST, RUN, prune_checkpoints
from calmix.recovery import recover
from calmix.recovery.chain import stage_name
from calmix.sources import Source
from calmix.sources.registry import parse_sources
from calmix.specs import PruneRequest, RecoverRequest, prune_request, recover_request
from calmix.yaml_files import first_problem

Request = TypeVar("Request", PruneRequest, RecoverRequest)


class _Kept(BaseModel):
    """What of a manifest it takes to make its artefact again; another may have written it."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Model(_Kept):
    name: str
    fingerprint: str | None = None
    dtype: str = "auto"
    device: str = "auto"


class _Weights(_Kept):
    name: str
    sha256: str


class _Draw(_Kept):
    rows: int | None = None
    length: int | None = None
    seed: int | None = None
    packing: str | None = None
    leakage: str | None = None
    leakage_tokens: int | None = None
    licence: str | None = None
    sources: dict[str, dict[str, Any]] = {}


class _Request(_Kept):
    method: str
    sparsity: float | None
    pattern: str | None
    calibration: str | None
    draw: _Draw
    propagation: str | None
    options: dict[str, Any]
    allocation: str | dict[str, float] | None
    experts: str | None = None
    expert_smoothing: float | None = None
    only: list[str] = []
    skip: list[str] = []
    drop_experts: float | None = None


class _Recovery(_Kept):
    method: str
    calibration: str
    draw: _Draw
    epochs: int
    lr: float
    batch: int


class _Drawn(_Kept):
    sha256: str
    sources: dict[str, Any] = {}


class _Pruned(_Kept):
    model: _Weights
    request: _Request
    calibration: _Drawn | None
    files: dict[str, str]
    versions: dict[str, str]
    dtype: str
    device: str


class _Recovered(_Kept):
    model: _Weights
    against: _Weights
    request: _Recovery
    calibration: _Drawn
    pruned: dict[str, Any] | None
    files: dict[str, str]
    versions: dict[str, str]
    dtype: str
    device: str
    processes: int


class _Guard(_Kept):
    suite: str
    tokens: int


class _Set(_Kept):
    model: _Model
    own: dict[str, dict[str, Any]]
    rows: int
    length: int
    seed: int
    leakage: Literal["off"] | _Guard
    tokenizer: str
    sha256: str
    generated: str | None = None
    settings: dict[str, Any] = {}
    mix: dict[str, float] = {}
    packing: str = ""


SHAPES: dict[str, type[_Kept]] = {
    "pruned checkpoint": _Pruned, "recovered checkpoint": _Recovered, "calibration set": _Set,
}  # fmt: skip
CHECKPOINTS = {  # and why one may hold no request
    "pruned checkpoint": "was made by a study: run the study again",
    "recovered checkpoint": "is of an earlier calmix: it holds no request to make again",
}
# Of the manifest and of the run record: what may differ beside the files.
TOLD = ("versions", "calibration", "request", "pruned", "dtype", "device")
WHERE = ("machine", "system", "instructions", "threads", "batch", "processes")


@dataclass
class Rerun:
    """How a second run compares.

    Attributes:
        output: the new folder.
        same: whether every file has the hash of the manifest.
        differing: files whose hashes differ.
        inputs: inputs that differ, as `what: then, now`.
    """

    output: str
    same: bool
    differing: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        return asdict(self)


def rerun(
    manifest: Path,
    output: Path,
    *,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
    writing: Callable[[str, int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Rerun:
    """Make a pruned or recovered checkpoint, or a calibration set, again.

    A recovery of a prune in the same run prunes again first; another needs the pruned model.

    Args:
        manifest: the manifest, or its folder.
        output: where the new one goes; it must not exist.
        trust_remote_code: needed again where the manifest tells of it.
        progress, writing, note: as for `prune_checkpoints`.

    Raises:
        InputError: the manifest is damaged or lacks what it takes, or the model or the calibration
            set is another now: the same hashes cannot come out.
    """
    if manifest.is_dir():
        found = [manifest / name for name in (MANIFEST, SET_MANIFEST)]
        there = next((path for path in found if path.is_file()), None)
        if there is None:
            parts = sorted(path.parent for path in manifest.glob(f"[!.]*/{MANIFEST}"))
            raise InputError(
                f"{manifest} holds neither {MANIFEST} nor {SET_MANIFEST}: name a pruned or "
                "recovered checkpoint or a calibration set"
                + (f", such as {parts[0]}" if parts else "")
            )
        manifest = there
    kept = read_manifest(manifest)
    kind = kept["kind"]
    if kind not in SHAPES:
        raise InputError(f"{manifest} is of kind '{kind}', which cannot be made again")
    if not seal_holds(kept):
        raise InputError(
            f"{manifest} is damaged, changed or of an earlier calmix: it holds no request to "
            "make again"
        )
    if kept.get("trust_remote_code") and not trust_remote_code:
        raise InputError(
            f"{manifest} tells of a model that ran code of its own: --trust-remote-code to run "
            "it again"
        )
    if kind in CHECKPOINTS and kept.get("request") is None:
        raise InputError(f"{manifest} {CHECKPOINTS[kind]}")
    _check_shape(manifest, kept, kind)
    folder = manifest.parent
    check_output_folder(output, inputs=[manifest, folder if holds_result(folder) else None])
    how = {"trust_remote_code": trust_remote_code, "writing": writing, "note": note}
    if kind == "pruned checkpoint":
        _prune(manifest, kept, output, progress, **how)
    elif kind == "recovered checkpoint":
        _recover(manifest, kept, output, progress, **how)
    else:
        return _calibrate(manifest, kept, output, trust_remote_code, writing, note)
    return _compared(manifest, kept, output)


def _check_shape(path: Path, kept: dict[str, Any], kind: str) -> None:
    try:
        SHAPES[kind].model_validate(kept)
    except ValidationError as error:
        line = f"{path} lacks what it takes to make it again: {first_problem(error)}"
        raise InputError(line) from error


def differences(then: Any, now: Any, at: str = "") -> Iterator[str]:
    """Yield what differs between two JSON values, as `path: then, now`, keys in order."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*then, *now]):
            yield from differences(then.get(key), now.get(key), f"{at}.{key}" if at else str(key))
    elif then != now:
        yield f"{at}: {_short(then)}, now {_short(now)}"


def _prune(
    path: Path,
    kept: dict[str, Any],
    output: Path,
    progress: Callable[[int, int], None] | None,
    **how: Any,
) -> CalibrationSet | None:
    """Prune again, and return the calibration set."""
    model = kept["model"]
    request = _request(kept["request"], path)
    _check_model(model["name"], model["sha256"])
    drawn: list[CalibrationSet | None] = []

    def started(made: CalibrationSet | None) -> None:
        drawn.append(made)
        if made is not None:
            _check_set(kept["calibration"], made)

    prune_checkpoints(
        model["name"], {output: request}, started=started, progress=progress,
        dtype=kept["dtype"], device=kept["device"], **how,
    )  # fmt: skip
    return drawn[0]


def _recover(
    path: Path,
    kept: dict[str, Any],
    output: Path,
    progress: Callable[[int, int], None] | None,
    **how: Any,
) -> None:
    """Recover again; of a prune and recovery in one run, prune again first."""
    model, against, pruned = kept["model"], kept["against"], kept["pruned"]
    if kept["processes"] > 1:
        raise InputError(
            f"{path} was recovered by {kept['processes']} processes, whose shares decide how sums "
            "round: recover again under the same launcher, and compare the hashes in calmix.json"
        )
    request = _asked(recover_request, kept["request"], path)
    _check_model(against["name"], against["sha256"])

    def tick(done: int, total: int, loss: str) -> None:
        if progress is not None:
            progress(done, total)

    def again(name: str, drawn: CalibrationSet | None) -> None:
        recover(
            name, against["name"], request, output, drawn=drawn, called=model["name"],
            started=lambda made: _check_set(kept["calibration"], made), progress=tick,
            dtype=kept["dtype"], device=kept["device"], **how,
        )  # fmt: skip

    if not _chained(path, model["name"], pruned):
        _check_model(model["name"], model["sha256"])
        again(model["name"], None)
        return
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with hidden(real_place(output)) as folder:
        stage = folder / "pruned"
        drawn = _prune(path, pruned, stage, progress, **how)
        again(str(stage), drawn)


def _chained(path: Path, name: str, pruned: dict[str, Any] | None) -> bool:
    """Tell whether a pruned model of this name was a stage on the way to a recovered one."""
    if pruned is None or pruned.get("kind") != "pruned checkpoint" or not pruned.get("request"):
        return False
    _check_shape(path, pruned, "pruned checkpoint")
    return name == stage_name(pruned["model"]["name"], _request(pruned["request"], path))


def _compared(path: Path, kept: dict[str, Any], output: Path) -> Rerun:
    """Compare a new checkpoint with what the manifest of an old one tells."""
    new, files = read_manifest(output / MANIFEST), kept["files"]
    differing = sorted(n for n in {*files, *new["files"]} if files.get(n) != new["files"].get(n))
    inputs = [line for key in TOLD for line in differences(kept.get(key), new.get(key), key)]
    then, now = _run(path.parent / RUN), _run(output / RUN)
    if then:
        inputs += [line for key in WHERE for line in differences(then.get(key), now.get(key), key)]
    return Rerun(str(output), not differing, differing, inputs)


def _calibrate(
    path: Path,
    kept: dict[str, Any],
    output: Path,
    trust: bool,
    writing: Callable[[str, int, int], None] | None,
    note: Callable[[str], None] | None,
) -> Rerun:
    generated = kept.get("generated")
    model, own = kept["model"], _own(kept["own"], path)
    asked = {key: kept[key] for key in ("rows", "length", "seed")}
    leakage = kept["leakage"]
    checked(DrawOptions, asked | {"packing": kept.get("packing")})
    suite, run = ("off", 0) if leakage == "off" else (leakage["suite"], leakage["tokens"])
    if model.get("fingerprint") is not None:
        _check_model(model["name"], model["fingerprint"])
        opened: Any = open_model(
            model["name"], dtype=model.get("dtype", "auto"), device=model.get("device", "auto"),
            trust_remote_code=trust,
        )  # fmt: skip
    else:
        opened = open_tokenizer(model["name"], trust_remote_code=trust)
    if opened.tokenizer_fingerprint != kept["tokenizer"]:
        raise InputError(f"the tokenizer of {model['name']} is another now than {path} tells")
    guard = guard_of(suite, run, opened)
    if generated is None:
        make_mix(kept["mix"], str(path))  # it would round the weights
        if not math.isclose(sum(kept["mix"].values()), 1):
            raise InputError(f"{path} has weights that do not sum to 1")
        made = build(
            Mix(kept["mix"]), opened, guard=guard, own=own, packing=kept["packing"], **asked,
        )  # fmt: skip
    else:
        told = {k: v for k, v in kept["settings"].items() if not k.endswith("_sha256")}
        made = generate(
            read_generator(generated, told, str(path)), opened, guard=guard, own=own,
            writing=writing, note=note, **asked,
        )  # fmt: skip
    made.save(output)
    new = read_manifest(output / SET_MANIFEST)
    differing = [SET_MANIFEST] if new[SEAL] != kept[SEAL] else []
    if made.sha256 != kept["sha256"]:
        differing.insert(0, TENSORS)
    inputs = [line for line in differences(kept, new) if not line.startswith((SEAL, "sha256"))]
    return Rerun(str(output), not differing, differing, inputs)


def _request(record: Mapping[str, Any], path: Path) -> PruneRequest:
    rest = {key: value for key, value in record.items() if key != "options"}
    return _asked(prune_request, rest | record["options"], path)


def _asked(make: Callable[..., Request], record: Mapping[str, Any], path: Path) -> Request:
    """Return a request from its record, the draw's options among the others."""
    record = dict(record)
    draw = dict(record.pop("draw"))
    if "sources" in draw:
        draw["sources"] = _own(draw["sources"], path)
    try:
        return make(**record, **draw)
    except TypeError as error:  # an option there is none of
        raise InputError(f"{path} asks for what this calmix does not know: {error}") from error


def _own(record: dict[str, Any], path: Path) -> dict[str, Source]:
    """Return the user's own sources; relative paths are meant from where calmix is run."""
    entries = {n: {k: v for k, v in e.items() if k != "name"} for n, e in record.items()}
    return parse_sources(entries, Path.cwd() / path.name)


def _check_model(name: str, sha256: str) -> None:
    if fingerprint(resolve_model(name)) != sha256:
        raise InputError(
            f"the model {name} is another now: the hash of its files is not that of the manifest"
        )


def _check_set(told: dict[str, Any], made: CalibrationSet) -> None:
    # A saved set's manifest has keys of its saving, so content decides and the rest is told.
    if made.sha256 == told["sha256"]:
        return
    then, now = told, made.manifest
    changed = [
        name for name, source in then.get("sources", {}).items()
        if isinstance(source, dict)
        and now.get("sources", {}).get(name, {}).get("sha256") != source.get("sha256")
    ]  # fmt: skip
    if changed:
        what = f"source {', '.join(changed)} has another text"
    else:
        what = next((d for d in differences(then, now) if not d.startswith("sha256")), "its ids")
    raise InputError(
        f"the calibration set is another now ({what}): the same hashes cannot come out"
    )


def _run(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:24]}...{text[-12:]}"
