"""Open a model by hub id, local folder, GGUF file or `builtin:NAME`.

Each form is first resolved to a local folder of safetensors, so the rest of the tool handles one
kind of model. GGUF files and quantised checkpoints are dequantised once into the cache: packed
integers here, everything else with transformers.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from calmix import assets
from calmix.errors import (
    InputError,
    ModelError,
    disk_errors,
    first_line,
    nearest,
)
from calmix.files import (
    alone,
    atomic_folder,
    cache_dir,
    cached_sha256,
    copy_files,
    hidden,
    matching,
    read_object,
    remove,
    sha256_json,
    size_text,
    write_json,
)
from calmix.machine import cores
from calmix.manifest import deciding_versions
from calmix.models.folder import (
    BESIDE_WEIGHTS,
    ModelFiles,
    check_folder,
    content_key,
    fingerprint,
    tokenizer_fingerprint,
)
from calmix.models.gguf import gguf_dtype, gguf_reader, read_gguf, reading_gguf, tensor_bytes
from calmix.models.hub import (
    FETCHED,
    BuiltinModel,
    gguf_file,
    hub_files,
    known_model,
    local_model,
    named_model,
)
from calmix.models.loading import (
    check_quantised,
    context_of,
    load_config,
    load_tokenizer,
    loading,
    quiet_transformers,
)
from calmix.models.packed import QUANTIZATION_CONFIG, is_packed, quantization, unpacked
from calmix.models.shards import stored_tensors, weight_bytes, weight_dtype, write_model
from calmix.precision import dtype_name, narrower, suited

PART = 1e9  # bytes of a file of dequantised weights
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(repr=False)
class OpenModel:
    """A causal language model in memory, with its tokenizer and origin.

    `name` is what the user wrote, `folder` the local folder it resolved to.
    """

    name: str
    folder: Path
    model: Any
    tokenizer: Any
    trust_remote_code: bool = False
    files: ModelFiles | None = None

    def __repr__(self) -> str:
        return f"<OpenModel: {self.name}, {self.model.num_parameters():,} weights>"

    @property
    def context(self) -> int | None:
        """Context length in tokens; None if the configuration does not give it."""
        return context_of(self.model.config)

    @functools.cached_property
    def stored_dtype(self) -> torch.dtype:
        """Type of the weights in a checkpoint of this model."""
        return narrower(weight_dtype(stored_tensors(self.folder)), self.model.dtype)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and bytes of the folder's configuration and weight files."""
        return fingerprint(self.folder) if self.files is None else self.files.sha256

    @functools.cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of the tokenizer: vocabulary, merges, normalisation and special tokens."""
        return tokenizer_fingerprint(self.tokenizer)

    def cached(self, kind: str, *about: Any) -> Path:
        """Return the `cached_result` of the model and its tokenizer."""
        files = [self.fingerprint, self.tokenizer_fingerprint]
        return cached_result(kind, files, self.model.dtype, self.model.device, *about)


def cached_result(
    kind: str, files: Sequence[str], dtype: torch.dtype, device: torch.device, *about: Any
) -> Path:
    """Return the cache path, without a suffix, for a result computed by a model with these hashes.

    Rounding depends on device, threads and versions. With these in the key, a model compared with
    its own cached results retains exactly 100 %.
    """
    rounding = [dtype_name(dtype), device.type, torch.get_num_threads()]
    return cache_dir() / kind / sha256_json([*files, *rounding, deciding_versions(), *about])


def check_models(
    *names: str | None, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> None:
    """Raise the errors of `open_model`, as far as possible without downloading a model.

    Names that are None are ignored.
    """
    device_of(device)
    dtype_of(dtype)
    for name in (name for name in names if name is not None):
        model = named_model(name)
        if isinstance(model, Path) and model.is_dir():
            load_config(model, name, trust_remote_code)


def resolve_model(name: str) -> Path:
    """Return a local folder of safetensors for a model the user named.

    A hub model is fetched; a GGUF file or a quantised checkpoint is dequantised into the cache on
    the first call. Raises ModelError for an unknown name, and where there is no model or only
    pickled weights.
    """
    model = local_model(name)
    if is_dense(model):
        return model
    folder = _unpacked(model)
    if (folder / "config.json").is_file():
        return folder
    with alone(folder), disk_errors(folder), hidden(folder) as beside:
        if (folder / "config.json").is_file():  # another process has written it
            return folder
        with atomic_folder(folder) as new:
            if isinstance(model, Path) and model.is_dir():
                check_quantised(name, settings := quantization(model))
                (_unpack if is_packed(settings) else _dequantise)(model, new)
            else:
                _dequantise(gguf_file(model, beside), new)
    return folder


def is_dense(model: Path | BuiltinModel | None) -> TypeGuard[Path]:
    """Whether a model is a folder whose weights are not quantised."""
    return isinstance(model, Path) and model.is_dir() and not quantization(model)


def _unpacked(model: Path | BuiltinModel) -> Path:
    """Return the cache folder of a dequantised GGUF file or checkpoint."""
    if isinstance(model, Path) and model.is_dir():
        return cache_dir() / "models" / f"packed-{content_key(model)}"
    if isinstance(model, Path):
        key = cached_sha256(model)
    else:
        # Archives are pinned by hash, so their hashes and member names identify the bytes.
        known = ((assets.get_asset(asset).sha256, member) for asset, member in model.parts.items())
        key = sha256_json([value for pair in known for value in pair])
    return cache_dir() / "models" / f"gguf-{key[:16]}"


def size_of(name: str) -> tuple[int | None, float | None]:
    """Return the bytes of a model's file or weight files, and its bits per weight, those of a GGUF
    file without its metadata; None for a builtin model, which lies in an archive."""
    model = local_model(name)
    if not isinstance(model, Path):
        return None, None
    if model.is_dir():
        weights = sum(place.count for place in stored_tensors(resolve_model(name)).values())
        return (size := weight_bytes(model)), 8 * size / weights
    reader = gguf_reader(model)
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return model.stat().st_size, 8 * tensor_bytes(reader) / weights


def forget(model: Path) -> None:
    """Remove the dequantised copy of a GGUF file or checkpoint from the cache."""
    if model.is_file() or quantization(model):
        remove(_unpacked(model))


def to_fetch(name: str) -> str:
    """Return what `resolve_model` would fetch and unpack, as text; empty if the model is here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    model = known_model(name)
    if model is None:
        with contextlib.suppress(Exception):  # of many kinds, if it is not in the hub's cache
            check_folder(Path(snapshot_download(name, local_files_only=True, **FETCHED)))
            return ""
        files = filter_repo_objects(hub_files(name), key=lambda file: file.rfilename, **FETCHED)
        return f"fetches {size_text(sum(file.size or 0 for file in files))} from the hub"
    if is_dense(model) or (_unpacked(model) / "config.json").is_file():
        return ""
    place = cache_dir() / "models"
    if isinstance(model, Path):
        return f"unpacks {model.name} into {place}"
    archives = [one for one in map(assets.get_asset, model.parts) if one.state != "ok"]
    fetched = f"fetches {size_text(sum(one.size for one in archives))} and " if archives else ""
    return f"{fetched}unpacks {model.parameters} weights, 2 bytes each, into {place}"


def open_model(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> OpenModel:
    """Open a causal language model for inference.

    Args:
        name: hub id, local folder, `.gguf` file, or `builtin:NAME`.
        dtype: `auto` (the checkpoint's own, but float32 where this CPU has no fast half
            precision), `float32`, `bfloat16` or `float16`.
        device: `auto` (an accelerator if there is one) or a torch device string.
        trust_remote_code: run modelling code shipped with the checkpoint.

    Raises:
        ModelError: the model cannot be found, is pickled, not a causal LM, or quantised in a form
            that cannot be read.
        InputError: unknown dtype or device.
    """
    name, target, weight_type = str(name), device_of(device), dtype_of(dtype)
    folder = resolve_model(name)
    files = ModelFiles(folder, name)
    load_config(folder, name, trust_remote_code)
    with loading(f"cannot open {name}"):
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=weight_type,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    if missing := sorted(info.get("missing_keys", ())):
        raise ModelError(
            f"{name} lacks {len(missing)} weights its configuration requires, first '{missing[0]}'"
        )
    if dtype == "auto" and (compute_type := suited(model.dtype, target)) != model.dtype:
        model = model.to(compute_type)
    model.requires_grad_(False)
    plain = torch.contiguous_format
    if (head := model.get_output_embeddings()) is not None:
        # Without a contiguous copy of a batch's last positions, torch copies the weights for every
        # row; a single row, which it takes to be contiguous, is several times slower.
        head.register_forward_pre_hook(lambda module, args: args[0].clone(memory_format=plain))
    embeddings = model.get_input_embeddings()
    tokenizer = load_tokenizer(folder, name, trust_remote_code)
    if max(tokenizer.get_vocab().values(), default=0) >= embeddings.weight.shape[0]:
        # Only then: checking ids makes the host wait for the device.
        embeddings.register_forward_pre_hook(lambda module, ids: check_ids(name, module, *ids))
    return OpenModel(name, folder, model.to(target).eval(), tokenizer, trust_remote_code, files)


def check_ids(name: str, embeddings: Any, ids: Tensor) -> None:
    """Raise ModelError for token ids without an embedding; an accelerator would not name them."""
    count = embeddings.weight.shape[0]
    if torch.compiler.is_exporting():  # traced ids have no values
        return
    for token in map(int, ids.aminmax()) if ids.numel() else ():
        if not 0 <= token < count:
            raise ModelError(
                f"{name} has no embedding for token id {token} (the last is {count - 1}): its "
                "tokenizer is damaged, or the ids are those of another model"
            )


def device_of(name: str) -> torch.device:
    """Return the device a user names; `auto` is an accelerator if there is one.

    Raises InputError if it cannot be used.
    """
    # torch counts processors, but ignores a container's share of their time.
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > (most := cores()):
        torch.set_num_threads(most)
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).numpy(force=True)  # refuses `meta`
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device '{name}' cannot be used: {first_line(error)}") from error
    return device


def dtype_of(name: str) -> torch.dtype | str:
    """Return the type a user names, or `auto`; raise InputError for an unknown one."""
    if name != "auto" and name not in DTYPES:
        raise InputError(f"unknown dtype '{name}': {nearest(name, [*DTYPES, 'auto'])}")
    return DTYPES.get(name, name)


def _unpack(source: Path, folder: Path) -> None:
    """Write the model of a checkpoint with packed integers, one tensor at a time."""
    write_model(folder, unpacked(source), PART)
    copy_files(source, folder, matching(source, BESIDE_WEIGHTS))
    config = read_object(source / "config.json", "")
    write_json(
        folder / "config.json", {k: v for k, v in config.items() if k != QUANTIZATION_CONFIG}
    )


def _dequantise(source: Path, folder: Path) -> None:
    """Write the model of a GGUF file, or of a checkpoint that compressed-tensors reads."""
    with loading(f"cannot open {source}"), reading_gguf():
        from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

        file, how = source.resolve(), dict[str, Any]()
        if file.is_dir():
            settings = CompressedTensorsConfig.from_dict(quantization(file), dequantize=True)
            model: Any = AutoModelForCausalLM.from_pretrained(file, quantization_config=settings)
        else:
            model, how = read_gguf(file, gguf_dtype(file)), {"gguf_file": str(file)}
        # In this folder, still empty, no other tokenizer is preferred to the file's.
        tokenizer = AutoTokenizer.from_pretrained(folder if how else file, **how)
    # transformers still marks the model as quantised, and would not save it.
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("quantization_config", None)  # older versions do not set it
    # GGUF does not give the tokenizer's maximum length: it is the context.
    if context := getattr(model.config, "max_position_embeddings", None):
        tokenizer.model_max_length = context
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
