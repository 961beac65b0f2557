"""Exports: a model in the form of another engine, made by a maintained library and checked here.

The exporter of transformers writes the OpenVINO graph, NNCF its 8-bit weights. calmix reads the
result back from the disk, runs it on token ids in two parts, so that its cache is checked too, and
refuses it where it does not compute what the model does. What an export gains, and which engines
were left out, is in docs/deploy.md.

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

from calmix.deploy.checking import difference, random_ids
from calmix.errors import (
    InputError,
    MissingExtraError,
    ModelError,
    disk_errors,
    first_line,
    nearest,
)
from calmix.files import EXPORT, atomic_folder, check_free, check_output_folder, write_json
from calmix.manifest import file_hashes, run_record, sealed, versions
from calmix.models import OpenModel, check_models, open_model, resolve_model
from calmix.models.opening import load_config, quiet_transformers
from calmix.models.shards import weight_bytes
from calmix.precision import dtype_name

# Weights, and the divergence from the model (nats a token) beyond which an export is refused. A
# right one of the builtin model has 1e-10 with its own weights and 0.01 with those of 8 bits.
WEIGHTS = {"int8": 0.2, "own": 1e-4}
MANIFEST, RUN = EXPORT, "calmix-run.json"
GRAPH = "openvino_model.xml"
STEPS = ("convert", "check", "hash")


@dataclass(frozen=True)
class Exported:
    """Bytes of the model's weight files and of the export's, and how near it is to the model.

    `kl` is the mean KL(model || export) of a token's prediction, in nats, on random ids, computed
    in float32 with activations as they are; `top1` the share of tokens whose likeliest next token
    is the same.
    """

    before: int
    after: int
    kl: float
    top1: float


class Session:
    """An OpenVINO export that runs; each call continues what it was given before.

    Args:
        folder: of `export`.
        **properties: of OpenVINO, such as `INFERENCE_PRECISION_HINT="f32"`; without it OpenVINO
            computes in bfloat16 where the processor can.

    Raises:
        InputError: `folder` is not an export.
        MissingExtraError: OpenVINO is not installed.
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
        """Forget what was given before."""
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
        name: hub id, local folder, `.gguf` file, or `builtin:NAME`. It is held in memory whole.
        output: the new folder; replaced only with `overwrite`, and only when all is done.
        weights: `int8` (symmetric, one scale an output row: zeros stay zeros) or `own`.
        say: called with each of `STEPS` as it begins.

    Raises:
        InputError: an unknown form of weights, or `output` cannot be written.
        MissingExtraError: a library is not installed.
        ModelError: the model cannot be opened, the library cannot convert it, or what it made
            is another model.
    """
    name, output = str(name), Path(output)
    if weights not in WEIGHTS:
        raise InputError(f"unknown weights '{weights}': {nearest(weights, WEIGHTS)}")
    check_output_folder(output, inputs=[name], overwrite=overwrite)
    check_models(name, trust_remote_code=trust_remote_code)
    for library in ("openvino", "nncf", "transformers.exporters.runners"):  # that of 5.23
        _library(library)
    began = time.perf_counter()
    folder = resolve_model(name)
    before = weight_bytes(folder)
    check_free(output, before // 2 if weights == "int8" else before, "the weights take")
    own = dtype_name(getattr(load_config(folder, name, trust_remote_code), "dtype", None) or "auto")
    opened = open_model(name, dtype=own, device="cpu", trust_remote_code=trust_remote_code)
    with atomic_folder(output) as beside, disk_errors(output):
        say("convert")
        with quiet_transformers(), contextlib.redirect_stdout(io.StringIO()):
            _convert(opened, weights, beside)
        converted = time.perf_counter() - began
        opened.tokenizer.save_pretrained(beside)
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

    Both report their use to their makers through `openvino_telemetry`: it is kept from import.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError("an export to OpenVINO", "export") from error


def _convert(opened: OpenModel, weights: str, folder: Path) -> None:
    """Write the graph of a decoding step of any number of tokens, its cache a state inside it."""
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
    mask[0, 0] = 0  # of ones alone, the graph would have no mask
    quantizer = None
    if weights == "int8":
        mode = nncf.CompressWeightsMode.INT8_SYM
        quantizer = NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig(mode=mode))
    try:
        parts = decompose_for_generation(
            opened.model, {"input_ids": ids, "attention_mask": mask}, multi_token_decode=True
        )
        made = OpenVINOExporter().export(
            *parts["decode"], OpenVINOConfig(dynamic=True, quantizer=quantizer)
        )
        made.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # torch, transformers, OpenVINO and NNCF raise anything
        reason = first_line(error.__cause__ or error)
        raise ModelError(f"transformers cannot export {opened.name}: {reason}") from error


def _logits(folder: Path, ids: Tensor) -> Tensor:
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    session = Session(folder, **exact, KV_CACHE_PRECISION="f32")
    return torch.cat([session(part) for part in ids.chunk(2, 1)], 1)
