"""Make an artefact again from its manifest, and say what is the same and what differs.

What must be the same before the work is worth its time (the model, the calibration set) is
checked first. What may change the last bits (versions, processor, threads) is reported afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from calmix.calibration import CalibrationSet, Mix, make_mix, open_tokenizer
from calmix.calibration.dataset import MANIFEST as SET_MANIFEST
from calmix.calibration.dataset import TENSORS
from calmix.calibration.leakage import guard_of
from calmix.calibration.resolving import make
from calmix.calibration.selfgen.generators import generate
from calmix.calibration.spec import Spec, read_generator
from calmix.diagnostics.inspecting import read_manifest
from calmix.errors import InputError, disk_errors
from calmix.files import check_output_folder, hidden, holds_result, read_object, real_place
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
from calmix.study.trials import differences
from calmix.yaml_files import first_problem

Some = TypeVar("Some")


class _Kept(BaseModel):
    """What of a manifest it takes to make its artefact again; another may have written it."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Model(_Kept):
    name: str
    sha256: str = ""
    fingerprint: str | None = None
    dtype: str = "auto"
    device: str = "auto"


class _Drawn(_Kept):
    sha256: str
    sources: dict[str, Any] = {}


class _Pruned(_Kept):
    model: _Model
    request: dict[str, Any]
    calibration: _Drawn | None
    files: dict[str, str]
    dtype: str
    device: str


class _Recovered(_Pruned):
    against: _Model
    calibration: _Drawn
    pruned: dict[str, Any] | None
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


SHAPES: dict[str, type[_Kept]] = {
    "pruned checkpoint": _Pruned, "recovered checkpoint": _Recovered, "calibration set": _Set,
}  # fmt: skip
# Of the manifest and of the run record: what may differ beside the files.
TOLD = ("versions", "calibration", "request", "pruned", "dtype", "device")
WHERE = ("machine", "system", "instructions", "threads", "batch", "processes")


@dataclass
class Rerun:
    """How a second run compares: the new folder, whether every file has the hash of the manifest,
    files whose hashes differ, and inputs that differ, as `what: then, now`.
    """

    output: str
    same: bool
    differing: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)


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
    """
    path = _found(manifest) if manifest.is_dir() else manifest
    kept = read_manifest(path)
    kind = kept["kind"]
    if kind not in SHAPES:
        raise InputError(f"{path} is of kind '{kind}', which cannot be made again")
    if not seal_holds(kept):
        raise InputError(f"{path} is damaged or changed: its hash is another")
    if kept.get("trust_remote_code") and not trust_remote_code:
        raise InputError(
            f"the model of {path} ran code of its own: --trust-remote-code to run it again"
        )
    if kind != "calibration set" and kept.get("request") is None:
        raise InputError(f"{path} holds no request: a study made it, so run the study again")
    told = _taken(SHAPES[kind], kept, path)
    inputs = [path, path.parent if holds_result(path.parent) else None]
    check_output_folder(output, inputs=inputs)
    how: dict[str, Any] = {"trust_remote_code": trust_remote_code, "writing": writing, "note": note}
    if isinstance(told, _Set):
        return _calibrate(path, kept, told, output, **how)
    if isinstance(told, _Recovered):
        _recover(path, told, output, progress, **how)
    elif isinstance(told, _Pruned):
        _prune(path, told, output, progress, **how)
    return _compared(path, kept, output)


def _found(folder: Path) -> Path:
    """Return the manifest in a folder."""
    for name in (MANIFEST, SET_MANIFEST):
        if (folder / name).is_file():
            return folder / name
    parts = sorted(path.parent for path in folder.glob(f"[!.]*/{MANIFEST}"))
    raise InputError(
        f"{folder} holds neither {MANIFEST} nor {SET_MANIFEST}: name a pruned or recovered "
        "checkpoint or a calibration set" + (f", such as {parts[0]}" if parts else "")
    )


def _taken(shape: type[Some], record: Any, path: Path) -> Some:
    """Return a part of a manifest in the form it takes to make the artefact again."""
    try:
        return TypeAdapter(shape).validate_python(record)
    except ValidationError as error:
        line = f"{path} lacks what it takes to make it again: {first_problem(error)}"
        raise InputError(line) from error


def _prune(
    path: Path,
    kept: _Pruned,
    output: Path,
    progress: Callable[[int, int], None] | None,
    **how: Any,
) -> CalibrationSet | None:
    """Prune again, and return the calibration set."""
    request = _pruning(kept, path)
    _check_model(kept.model.name, kept.model.sha256)
    drawn: list[CalibrationSet | None] = []

    def started(made: CalibrationSet | None) -> None:
        drawn.append(made)
        if made is not None and kept.calibration is not None:
            _check_set(kept.calibration, made)

    prune_checkpoints(
        kept.model.name, {output: request}, started=started, progress=progress,
        dtype=kept.dtype, device=kept.device, **how,
    )  # fmt: skip
    return drawn[0]


def _recover(
    path: Path,
    kept: _Recovered,
    output: Path,
    progress: Callable[[int, int], None] | None,
    **how: Any,
) -> None:
    """Recover again; where one run pruned and recovered, prune again first."""
    if kept.processes > 1:
        raise InputError(
            f"{path} was recovered by {kept.processes} processes, which decides how sums round: "
            "recover again under the same launcher, and compare the hashes in calmix.json"
        )
    _taken(RecoverRequest, kept.request, path)
    request = recover_request(**_options(kept.request, path))
    _check_model(kept.against.name, kept.against.sha256)

    def again(name: str, drawn: CalibrationSet | None) -> None:
        recover(
            name, kept.against.name, request, output, drawn=drawn, called=kept.model.name,
            started=lambda made: _check_set(kept.calibration, made),
            progress=lambda done, total, loss: progress(done, total) if progress else None,
            dtype=kept.dtype, device=kept.device, **how,
        )  # fmt: skip

    pruned = kept.pruned or {}
    if pruned.get("kind") == "pruned checkpoint" and pruned.get("request"):
        stage = _taken(_Pruned, pruned, path)
        if kept.model.name == stage_name(stage.model.name, _pruning(stage, path)):
            with disk_errors(output):
                output.parent.mkdir(parents=True, exist_ok=True)
            with hidden(real_place(output)) as folder:
                drawn = _prune(path, stage, folder / "pruned", progress, **how)
                again(str(folder / "pruned"), drawn)
            return
    _check_model(kept.model.name, kept.model.sha256)
    again(kept.model.name, None)


def _pruning(kept: _Pruned, path: Path) -> PruneRequest:
    _taken(PruneRequest, kept.request, path)
    options = _options(kept.request, path)
    return prune_request(**options.pop("options"), **options)


def _options(request: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a request's options by name, those of the calibration set among the others."""
    options = {name: value for name, value in request.items() if name != "draw"} | request["draw"]
    if "sources" in options:
        options["sources"] = _own(options["sources"], path)
    return options


def _own(record: dict[str, Any], path: Path) -> dict[str, Source]:
    """Return the user's own sources; relative paths start from the current folder."""
    entries = {n: {k: v for k, v in e.items() if k != "name"} for n, e in record.items()}
    return parse_sources(entries, Path.cwd() / path.name)


def _compared(path: Path, kept: dict[str, Any], output: Path) -> Rerun:
    """Compare a new checkpoint with the manifest of an old one."""
    new, files = read_manifest(output / MANIFEST), kept["files"]
    differing = sorted(n for n in {*files, *new["files"]} if files.get(n) != new["files"].get(n))
    inputs = [line for key in TOLD for line in differences(kept.get(key), new.get(key), key)]
    if (path.parent / RUN).is_file():
        then, now = (read_object(one / RUN, "") for one in (path.parent, output))
        inputs += [line for key in WHERE for line in differences(then.get(key), now.get(key), key)]
    return Rerun(str(output), not differing, differing, inputs)


def _calibrate(
    path: Path,
    kept: dict[str, Any],
    told: _Set,
    output: Path,
    trust_remote_code: bool,
    **how: Any,
) -> Rerun:
    model = told.model
    asked = checked(DrawOptions, {k: kept.get(k) for k in ("rows", "length", "seed", "packing")})
    guard = told.leakage if isinstance(told.leakage, _Guard) else _Guard(suite="off", tokens=0)
    opened: Any
    if model.fingerprint is None:
        opened = open_tokenizer(model.name, trust_remote_code=trust_remote_code)
    else:
        _check_model(model.name, model.fingerprint)
        opened = open_model(
            model.name, dtype=model.dtype, device=model.device, trust_remote_code=trust_remote_code
        )
    if opened.tokenizer_fingerprint != told.tokenizer:
        raise InputError(f"the tokenizer of {model.name} has changed since {path} was written")
    draw: dict[str, Any] = {
        "rows": asked.rows, "length": asked.length, "seed": asked.seed,
        "guard": guard_of(guard.suite, guard.tokens, opened), "own": _own(told.own, path),
    }  # fmt: skip
    if told.generated is None:
        make_mix(told.mix, str(path))  # as it is kept: it would round the weights
        if not math.isclose(sum(told.mix.values()), 1):
            raise InputError(f"{path} has weights that do not sum to 1")
        spec = Spec(Mix(told.mix), own=draw.pop("own") or {})
        made = make(spec, opened, packing=asked.packing, **draw, **how)
    else:
        settings = {k: v for k, v in told.settings.items() if not k.endswith("_sha256")}
        generator = read_generator(told.generated, settings, str(path))
        made = generate(generator, opened, **draw, **how)
    made.save(output)
    new = read_manifest(output / SET_MANIFEST)
    differing = [SET_MANIFEST] if new[SEAL] != kept[SEAL] else []
    if made.sha256 != told.sha256:
        differing.insert(0, TENSORS)
    inputs = [line for line in differences(kept, new) if not line.startswith((SEAL, "sha256"))]
    return Rerun(str(output), not differing, differing, inputs)


def _check_model(name: str, sha256: str) -> None:
    if fingerprint(resolve_model(name)) != sha256:
        raise InputError(f"the model {name} has changed: its files have another hash than then")


def _check_set(told: _Drawn, made: CalibrationSet) -> None:
    if made.sha256 == told.sha256:  # a saved set's manifest says more than a drawn one's
        return
    found = (d for d in differences(told.model_dump(), made.manifest) if d[:6] != "sha256")
    what = next(found, "its ids")
    raise InputError(f"the calibration set changed ({what}), so hashes cannot match")
