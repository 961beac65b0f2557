"""Recreate a result from its manifest, and report what is the same and what differs.

Inputs that must be the same (model, calibration set) are checked first. What may change the last
bits (versions, processor, threads) is reported afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calmix.calibration import CalibrationSet, dataset, open_tokenizer
from calmix.calibration.leakage import guard_of
from calmix.calibration.resolving import Asked, make, read_generator
from calmix.errors import InputError
from calmix.files import check_output_folder, holds_result, read_object
from calmix.manifest import SEAL, differences, read_sealed
from calmix.models import open_model, resolve_model
from calmix.models.opening import fingerprint
from calmix.options import DrawOptions, checked
from calmix.pruning.checkpoint import MANIFEST, RUN, prune_checkpoints
from calmix.recovery import recover
from calmix.sources import Source, own_sources
from calmix.specs import prune_request, recover_request

# Fields of the manifest that a run makes, and of the run record that describe the machine.
MADE = ("files", "pruning", "recovery", "request_sha256", "sha256", SEAL)
WHERE = ("machine", "system", "instructions", "threads", "batch", "processes")

KINDS = "pruned checkpoint", "recovered checkpoint", "calibration set"


def rerun(
    manifest: Path,
    output: Path,
    *,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None],
    writing: Callable[[str, int, int], None],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Recreate a pruned or recovered checkpoint, or a calibration set; a recovery starts from the
    pruned model.

    Returns whether all files have the `same` hashes as in the manifest, the files `differing`, and
    the `inputs` that differ, as `what: then, now`.
    """
    path = _found(manifest) if manifest.is_dir() else manifest
    missing = f"there is no manifest {path}"
    if (kind := str(read_object(path, missing).get("kind"))) not in KINDS:
        raise InputError(f"{path} cannot be rerun: its kind is '{kind}'")
    kept = read_sealed(path, missing)
    if kept.get("trust_remote_code") and not trust_remote_code:
        raise InputError(
            f"the model of {path} ran its own code: pass --trust-remote-code to run it again"
        )
    if kind != KINDS[-1] and kept.get("request") is None:
        raise InputError(f"{path} holds no request: a study made it, so run the study again")
    inputs = [path, path.parent if holds_result(path.parent) else None]
    check_output_folder(output, inputs=inputs, overwrite=None)
    how = {"trust_remote_code": trust_remote_code, "progress": progress, "writing": writing,
           "note": note}  # fmt: skip
    try:
        for model in (kept[part] for part in ("against", "model") if part in kept):
            sha256 = model.get("sha256", model.get("fingerprint"))
            if sha256 is not None and fingerprint(resolve_model(model["name"])) != sha256:
                raise InputError(
                    f"the model {model['name']} has changed: its files have another hash"
                )
        then = _hashes(kept)
        (_calibrate if kind == KINDS[-1] else _checkpoint)(path, kept, output, how)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} lacks data to rerun it: {error!r}") from error
    return _compared(path, kept, then, output)


def _found(folder: Path) -> Path:
    """Return the manifest in a folder."""
    for name in (MANIFEST, dataset.MANIFEST):
        if (folder / name).is_file():
            return folder / name
    parts = sorted(path.parent for path in folder.glob(f"[!.]*/{MANIFEST}"))
    raise InputError(
        f"{folder} holds neither {MANIFEST} nor {dataset.MANIFEST}: name a pruned or recovered "
        "checkpoint or a calibration set" + (f", such as {parts[0]}" if parts else "")
    )


def _checkpoint(path: Path, kept: dict[str, Any], output: Path, how: dict[str, Any]) -> None:
    before, options = kept["calibration"] or {}, dict(kept["request"])
    options |= options.pop("draw")
    if "sources" in options:
        options["sources"] = _own(options["sources"], path)

    def started(made: CalibrationSet | None) -> None:
        # Only the hash decides: a saved set's manifest has more fields than that of a drawn one.
        if made is not None and made.sha256 != before.get("sha256"):
            found = (d for d in differences(before, made.manifest) if d[:6] != "sha256")
            what = next(found, "its ids")
            raise InputError(f"the calibration set changed ({what}), so hashes cannot match")

    name = kept["model"]["name"]
    how |= {"dtype": kept["dtype"], "device": kept["device"], "started": started}
    if kept["kind"] == "pruned checkpoint":
        request = prune_request(**options.pop("options"), **options)
        prune_checkpoints(name, {output: request}, **how)
        return
    if kept["processes"] > 1:
        raise InputError(
            f"{path} was recovered by {kept['processes']} processes, and their number affects "
            "rounding: recover again under the same launcher and compare the hashes in calmix.json"
        )
    progress = how["progress"]
    how["progress"] = lambda done, total, loss: progress(done, total)
    recover(name, kept["against"]["name"], recover_request(**options), output, **how)


def _own(record: dict[str, Any], path: Path) -> dict[str, Source]:
    """Return the user's own sources; relative paths start from the current folder."""
    entries = {n: {k: v for k, v in e.items() if k != "name"} for n, e in record.items()}
    return own_sources(entries, Path(path.name))


def _calibrate(path: Path, kept: dict[str, Any], output: Path, how: dict[str, Any]) -> None:
    trust, model, own = how["trust_remote_code"], kept["model"], _own(kept["own"], path)
    draw = checked(DrawOptions, {key: kept.get(key) for key in ("rows", "length", "seed",
                                                                "packing")})  # fmt: skip
    if kept.get("generated") is None:
        asked = Asked(kept["mix"], own=own, draw=draw)
    else:
        settings = {k: v for k, v in kept["settings"].items() if not k.endswith("_sha256")}
        generator = read_generator(kept["generated"], settings, str(path))
        asked = Asked({}, generator, own=own, draw=draw)
    guard: Any = kept["leakage"] if kept["leakage"] != "off" else {"suite": "off", "tokens": 0}
    suite, tokens, name = guard["suite"], guard["tokens"], str(model["name"])
    opening = {key: model.get(key, "auto") for key in ("dtype", "device")}
    opened: Any = (
        open_tokenizer(name, trust_remote_code=trust) if "fingerprint" not in model
        else open_model(name, trust_remote_code=trust, **opening)
    )  # fmt: skip
    if opened.tokenizer_fingerprint != kept["tokenizer"]:
        raise InputError(f"the tokenizer of {name} has changed since {path} was written")
    guard = guard_of(suite, tokens, opened)
    make(asked, opened, guard, writing=how["writing"], note=how["note"]).save(output)


def _hashes(manifest: dict[str, Any]) -> dict[str, str]:
    """Return the hashes of the files that a manifest lists, by name."""
    made: dict[str, str] | None = manifest.get("files")
    return made or {dataset.TENSORS: manifest["sha256"], dataset.MANIFEST: manifest[SEAL]}


def _compared(
    path: Path, kept: dict[str, Any], then: dict[str, str], output: Path
) -> dict[str, Any]:
    """Compare a new result with the manifest of the old one, and the files' hashes in that."""
    name = next(name for name in (MANIFEST, dataset.MANIFEST) if (output / name).is_file())
    new = read_sealed(output / name, "")
    now = _hashes(new)
    differing = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    inputs = [d for d in differences(kept, new) if re.split(r"[.:]", d)[0] not in MADE]
    if (path.parent / RUN).is_file():
        old, run = (read_object(one / RUN, "") for one in (path.parent, output))
        inputs += [line for key in WHERE for line in differences(old.get(key), run.get(key), key)]
    return {"same": not differing, "differing": differing, "inputs": inputs}
