"""OpenVINO exports, made by maintained libraries and checked here.

The exporter of transformers writes the OpenVINO graph, and NNCF its 8-bit weights. calmix reads the
result back from disk, runs it on token ids in two parts, which checks its cache too, and refuses it
if its predictions differ from the model's. docs/deploy.md gives the gains, and the engines that
were left out.

The export holds the graph (`openvino_model.xml`), its weights (`.bin`), configuration, tokenizer
and a sealed manifest; the same model and versions give the same bytes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmix.deploy.checking import difference, open_as_stored, random_ids
from calmix.errors import (
    InputError,
    ModelError,
    disk_errors,
    first_line,
    missing_extra,
    nearest,
)
from calmix.files import EXPORT, atomic_folder, check_free, check_output_folder, write_json
from calmix.manifest import file_hashes, run_record, sealed, versions
from calmix.models import OpenModel, check_models, resolve_model
from calmix.models.opening import quiet_transformers, save_tokenizer
from calmix.models.shards import weight_bytes

# Weights, and the divergence from the model (nats per token) beyond which an export is refused. A
# correct export of the builtin model has 1e-10 with its own weights and 0.01 with 8-bit weights.
WEIGHTS = {"int8": 0.2, "own": 1e-4}
MANIFEST, RUN = EXPORT, "calmix-run.json"
GRAPH = "openvino_model.xml"
STEPS = ("convert", "check", "hash")


@dataclass(frozen=True)
class Exported:
    """Bytes of the weight files of model and export, and the difference between the two.

    `kl` is the mean KL(model || export) per token, in nats, on random ids, computed in float32
    without quantised activations; `top1` is the share of tokens with the same likeliest next token.
    """

    before: int
    after: int
    kl: float
    top1: float


class Session:
    """An OpenVINO export that runs; each call continues the text of the calls before.

    Args:
        folder: of `export`.
        **properties: of OpenVINO, such as `INFERENCE_PRECISION_HINT="f32"`; without it OpenVINO
            computes in bfloat16 if the processor can.

    Raises:
        InputError: `folder` is not an export.
        CalmixError: OpenVINO is not installed.
    """

    def __init__(self, folder: Path | str, **properties: Any) -> None:
        graph = Path(folder) / GRAPH
        if not graph.is_file():
            raise InputError(f"{folder} is not an OpenVINO export: it has no {GRAPH}")
        compiled = _library("openvino").Core().compile_model(graph, "CPU", properties)
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        self._request = compiled.create_infer_request()
        self._past = 0

    def __call__(self, ids: Tensor | Sequence[Any]) -> Tensor:
        """Return the logits (rows, tokens, vocabulary), float32, of ids (rows, tokens): a tensor,
        an array or lists; of one row also (tokens)."""
        held = torch.atleast_2d(torch.as_tensor(ids))
        rows, tokens = held.shape
        now = self._past + tokens
        feed = {
            "input_ids": held,
            "attention_mask": torch.ones(rows, now, dtype=torch.int64),
            "position_ids": torch.arange(self._past, now).repeat(rows, 1),
            "beam_idx": torch.arange(rows, dtype=torch.int32),
        }
        self._past = now
        given = {name: value.numpy() for name, value in feed.items() if name in self._inputs}
        return torch.from_numpy(self._request.infer(given)["logits"].copy()).float()

    def reset(self) -> None:
        """Start a new text."""
        self._request.reset_state()
        self._past = 0


def export(
    name: str | Path,
    output: Path | str,
    *,
    weights: str = "int8",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda step: None,
) -> Exported:
    """Write a model as an OpenVINO graph, and check it against the model.

    Args:
        name: hub id, local folder, `.gguf` file, or `builtin:NAME`. It is loaded into memory.
        output: the new folder; replaced only with `overwrite`, and only at the end.
        weights: `int8` (symmetric, one scale per output row, so zeros stay zeros) or `own`.
        say: called with each of `STEPS` as it begins.

    Raises:
        InputError: an unknown form of weights, or `output` cannot be written.
        CalmixError: a library is not installed.
        ModelError: the model cannot be opened or converted, or the export differs from it.
    """
    name, output = str(name), Path(output)
    if weights not in WEIGHTS:
        raise InputError(f"unknown weights '{weights}': {nearest(weights, WEIGHTS)}")
    check_output_folder(output, inputs=[name], overwrite=overwrite)
    check_models(name, trust_remote_code=trust_remote_code)
    for library in ("openvino", "nncf", "transformers.exporters.runners"):  # of 5.23
        _library(library)
    began = time.perf_counter()
    folder = resolve_model(name)
    before = weight_bytes(folder)
    check_free(output, before // 2 if weights == "int8" else before, "the weights take")
    opened = open_as_stored(name, folder, trust_remote_code)
    with atomic_folder(output) as beside, disk_errors(output):
        say("convert")
        with quiet_transformers(), contextlib.redirect_stdout(io.StringIO()):
            _convert(opened, weights, beside)
        converted = time.perf_counter() - began
        save_tokenizer(opened.tokenizer, opened.folder, beside)
        say("check")
        kl, top1 = difference(opened, partial(_logits, beside), WEIGHTS[weights], weights)
        say("hash")
        libraries = {one: importlib.metadata.version(one) for one in ("openvino", "nncf")}
        manifest = {
            "kind": "export",
            "engine": "openvino",
            "weights": weights,
            "model": {"name": name, "sha256": opened.fingerprint},
            "versions": versions() | libraries,
            "files": file_hashes(beside),
        }
        write_json(beside / MANIFEST, sealed(manifest))
        seconds = {"convert": converted, "all": time.perf_counter() - began}
        write_json(beside / RUN, run_record(seconds) | {"kl": kl, "top1": top1})
        after = sum(path.stat().st_size for path in beside.glob("*.bin"))
    return Exported(before, after, kl, top1)


def _library(name: str) -> Any:
    """Import a library of the extra `export`.

    Both send usage reports through `openvino_telemetry`, which is kept from being imported.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing_extra("an export to OpenVINO", "export") from error


def _convert(opened: OpenModel, weights: str, folder: Path) -> None:
    """Write the graph of a decoding step of any number of tokens, with its cache as a state."""
    import nncf
    from transformers.exporters import (
        NNCFOpenVINOQuantizer,
        NNCFWeightCompressionConfig,
        OpenVINOConfig,
        OpenVINOExporter,
    )
    from transformers.exporters.utils import decompose_for_generation

    ids = random_ids(opened)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # with only ones, the graph would have no mask
    quantizer = None
    if weights == "int8":
        mode = nncf.CompressWeightsMode.INT8_SYM
        quantizer = NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig(mode=mode))
    try:
        parts = decompose_for_generation(
            opened.model, {"input_ids": ids, "attention_mask": mask}, multi_token_decode=True
        )
        exported = OpenVINOExporter().export(
            *parts["decode"], OpenVINOConfig(dynamic=True, quantizer=quantizer)
        )
        exported.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # torch, transformers, OpenVINO and NNCF can raise anything
        reason = first_line(error.__cause__ or error)
        raise ModelError(f"transformers cannot export {opened.name}: {reason}") from error


def _logits(folder: Path, ids: Tensor) -> Tensor:
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    session = Session(folder, **exact, KV_CACHE_PRECISION="f32")
    return torch.cat([session(part) for part in ids.chunk(2, 1)], 1)
