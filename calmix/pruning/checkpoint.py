"""From a request to a pruned checkpoint on disk: plain dense safetensors that load anywhere.

Nothing about sparsity goes into config.json (inference engines refuse models that carry such
keys). What was done stands beside the weights: `calmix.json`, the same for the same inputs, and
`calmix-run.json`, which holds date and seconds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calmix.calibration import CalibrationSet, resolve
from calmix.errors import InputError
from calmix.files import atomic_folder, check_output_folder, write_json
from calmix.manifest import run_record, versions
from calmix.models import OpenModel, open_model
from calmix.models.opening import quiet_transformers
from calmix.pruning.engine import PruneReport, prune
from calmix.pruning.patterns import Pattern, Unstructured, parse_pattern
from calmix.specs import DAMPING, PruneRequest

MANIFEST, RUN = "calmix.json", "calmix-run.json"


def prune_checkpoint(
    name: str,
    output: Path,
    request: PruneRequest,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    started: Callable[[OpenModel, CalibrationSet | None], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    writing: Callable[[str, int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> PruneReport:
    """Open a model, draw its calibration set, prune it and write the checkpoint.

    Args:
        name: the model, as `open_model` takes it.
        output: folder to write; it appears whole or not at all.
        request: what to do, from `prune_request`.
        started: called once the model and its calibration set are ready.
        progress: called with (blocks done, blocks).
        writing, note: as for `calmix.calibration.resolve`.

    Raises:
        CalmixError: anything a user can mend, before `output` is touched.
    """
    check_output_folder(output, overwrite=overwrite)
    pattern: Pattern
    if request.pattern is not None:
        pattern = parse_pattern(request.pattern)
    else:
        assert request.sparsity is not None
        pattern = Unstructured(request.sparsity)
    opened = open_model(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    check_space(opened, output)
    calibration = None
    if request.calibration is not None:
        calibration = resolve(
            request.calibration, opened, writing=writing, note=note, **request.draw
        )
    if started is not None:
        started(opened, calibration)
    report = prune(
        opened.model,
        None if calibration is None else calibration.ids,
        method=request.method,
        pattern=pattern,
        propagation=request.propagation or "sequential",
        damping=request.damping or DAMPING,
        progress=progress,
    )
    write_checkpoint(opened, output, report, calibration)
    return report


def write_checkpoint(
    opened: OpenModel, output: Path, report: PruneReport, calibration: CalibrationSet | None
) -> None:
    """Write model, tokenizer, manifest and run record to a folder, whole or not at all."""
    done = report.to_json()
    seconds = done.pop("seconds")
    manifest: dict[str, Any] = {
        "kind": "pruned checkpoint",
        "model": {"name": opened.name, "sha256": opened.fingerprint},
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        "device": opened.model.device.type,
        "calibration": None if calibration is None else calibration.manifest,
        "pruning": done,
        "versions": versions(),
    }
    with atomic_folder(output) as folder, quiet_transformers():
        opened.model.save_pretrained(folder)
        opened.tokenizer.save_pretrained(folder)
        if opened.trust_remote_code:
            for code in opened.folder.glob("*.py"):
                shutil.copy(code, folder / code.name)
        write_json(folder / MANIFEST, manifest)
        write_json(folder / RUN, run_record(seconds))


def check_space(opened: OpenModel, output: Path) -> None:
    """Refuse before the work starts if the checkpoint will not fit on the disk.

    Raises:
        InputError: less is free than the weights take.
    """
    needed = sum(p.numel() * p.element_size() for p in opened.model.parameters())
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise InputError(
            f"no space left for {output}: the checkpoint takes {needed / 1e6:.0f} MB and "
            f"{free / 1e6:.0f} MB are free"
        )
