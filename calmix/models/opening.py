"""Open a model by hub id, local folder, GGUF file or `builtin:NAME`.

Each form is first resolved to a local folder of safetensors, so the rest of the tool handles one
kind of model. GGUF files and quantised checkpoints are dequantised once into the cache: packed
integers here, everything else with transformers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from calmix import assets
from calmix.errors import (
    DiskError,
    InputError,
    ModelError,
    PassingError,
    disk_errors,
    first_line,
    nearest,
)
from calmix.files import (
    alone,
    atomic_folder,
    cache_dir,
    cached_sha256,
    check_links,
    copy_files,
    hidden,
    matching,
    read_object,
    remove,
    sha256_json,
    size_text,
    user_path,
    write_json,
)
from calmix.machine import cores
from calmix.manifest import deciding_versions
from calmix.models.blocks import evaluating
from calmix.models.chat_template import templated
from calmix.models.gguf_header import Header, read_header
from calmix.models.packed import CONFIG, METHOD, is_packed, quantization, unpacked
from calmix.models.shards import (
    PACK,
    stored_tensors,
    weight_bytes,
    weight_dtype,
    weight_files,
    write_model,
)
from calmix.precision import dtype_name, narrower, suited
from calmix.progress import quiet
from calmix.yaml_files import packaged

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "tokenizer*"]
TOKENIZER_FILES = (
    "tokenizer*",
    "*token*_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
ASKING_FILES = ("chat_template.*", "generation_config.json")  # how a model is asked and answers
# What a dequantised copy of a checkpoint has besides configuration and weights.
COPIED = (*TOKENIZER_FILES, *ASKING_FILES, "*processor_config.json", "*.py")
PART = 1e9  # bytes of a file of dequantised weights
REPEATED = ["*consolidated*.safetensors"]  # a second copy of the weights, in Mistral's format
# Size keys, checked against the weights: depths by their number, widths by the largest tensor.
DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "num_experts",
    "num_local_experts",
    "block_count",
)
WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "n_embd",
    "n_inner",
    "n_head",
    "ffn_dim",
    "hidden_size_per_layer_input",
    "embedding_length",
    "feed_forward_length",
    "head_count",
    "head_count_kv",
    "key_length",
    "value_length",
    "dimension_count",
)
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eot|>")
TURNS = ("one-turn", "two-turn", "three-turn")  # of a chat that shows a template's parts
# Classes whose text part may be a decoder; the last without its head.
CAUSAL_CLASS = re.compile(r"ForCausalLM|LMHeadModel|ForConditionalGeneration|Model$")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BuiltinModel:
    """A model in data archives: `parts` maps assets to members that form one GGUF file in order."""

    name: str
    parts: dict[str, str]
    licence: str
    origin: str
    parameters: str
    description: str


class ModelFiles:
    """Configuration, weights and tokenizer of a model folder, as they are when it is opened."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._times = self._stat()

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 by file; a PassingError if a file changed since the model was opened."""
        hashes = self._hash()
        if self._stat() != self._times:
            raise self._changed()
        return hashes

    @property
    def sha256(self) -> str:
        """The model's `fingerprint`."""
        return combined({name: self.hashes[name] for name in model_files(self.folder)})

    def check(self) -> None:
        """Raise a PassingError if a file's content changed since the model was opened."""
        if (times := self._stat()) != self._times:
            if "hashes" not in vars(self) or self._hash() != self.hashes:
                raise self._changed()
            self._times = times

    def _stat(self) -> dict[str, tuple[int, ...]]:
        stats = dict[str, tuple[int, ...]]()
        beside = map(str, matching(self.folder, (*TOKENIZER_FILES, *ASKING_FILES)))
        for name in [*model_files(self.folder), *beside]:
            with contextlib.suppress(FileNotFoundError):
                stat = (self.folder / name).stat()
                stats[name] = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        return stats

    def _hash(self) -> dict[str, str]:
        return {name: cached_sha256(self.folder / name) for name in self._stat()}

    def _changed(self) -> PassingError:
        return PassingError(f"the files of {self.name} changed while they were read: run it again")


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
        """Return the cache path, without a suffix, for a result computed by the model.

        Rounding depends on device, threads and versions. With these in the key, a model compared
        with its own cached results retains exactly 100 %.
        """
        rounding = [dtype_name(self.model.dtype), self.model.device.type, torch.get_num_threads()]
        model = [self.fingerprint, self.tokenizer_fingerprint, *rounding, deciding_versions()]
        return cache_dir() / kind / sha256_json([*model, *about])


@functools.cache
def builtin_models() -> dict[str, BuiltinModel]:
    """Return the builtin models by name (without the `builtin:` prefix)."""
    entries = packaged("models/builtin.yaml")
    return {name: BuiltinModel(name=name, **entry) for name, entry in entries.items()}


def known_model(name: str) -> Path | BuiltinModel | None:
    """Return the folder, GGUF file or builtin model of a name; None if it can only be a hub id.

    Raises ModelError if it is none of them, or the folder has no model.
    """
    if name.startswith("builtin:"):
        models = builtin_models()
        short = name.removeprefix("builtin:")
        if short not in models:
            raise ModelError(f"unknown builtin model '{short}': {nearest(short, models)}")
        return models[short]
    path = user_path(name)
    parts = str(path).encode("utf-8", "surrogatepass").split(b"/")
    if max(map(len, parts)) > 255:  # bytes, the limit of file systems
        raise ModelError(f"'{name[:40]}...' is too long for the name of a model")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is a file but not a .gguf: name its folder, or a GGUF file")
        return path
    if path.is_dir():
        check_folder(path)
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no model folder or .gguf file at {path}")
    if name in builtin_models():
        raise ModelError(f"there is no folder '{name}': did you mean builtin:{name}?")
    return None


def check_folder(folder: Path) -> None:
    """Raise ModelError for a folder that transformers could not load.

    It is a pack, its weights are pickled, configuration or weight files are missing, or links lead
    out of it (InputError).
    """
    check_links(folder)
    if (folder / PACK).is_file():
        raise ModelError(
            f"{folder} is a pack: run 'calmix export {folder} --to model -o OUT' first, or load it "
            "with calmix.load in Python"
        )
    if not (folder / "config.json").is_file():
        inside = folder / "model"
        hint = f", but {inside} is" if (inside / "config.json").is_file() else ""
        raise ModelError(f"{folder} has no config.json: it is not a model folder{hint}")
    files = weight_files(folder)
    if lacking := next((name for name in files if not (folder / name).is_file()), None):
        raise ModelError(f"{folder} lacks the weight file {lacking} named in its index")
    if not files:
        raise ModelError(
            f"{folder} has no weights (*.safetensors): convert pickled ones, which can run code "
            "when opened"
        )


def check_models(
    *names: str | None, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> None:
    """Raise the errors of `open_model`, as far as possible without downloading a model.

    Names that are None are ignored.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    device_of(device)
    dtype_of(dtype)
    models = {name: known_model(name) for name in names if name is not None}
    for name, model in models.items():
        if isinstance(model, Path) and model.is_dir():
            load_config(model, name, trust_remote_code)
        elif model is None:
            with _hub_errors(name):
                if not isinstance(try_to_load_from_cache(name, "config.json"), str):
                    about = HfApi().model_info(name)
                    check_causal(name, getattr(about, "config", None) or {})


def resolve_model(name: str) -> Path:
    """Return a local folder of safetensors for a model the user named.

    A hub model is fetched; a GGUF file or a quantised checkpoint is dequantised into the cache on
    the first call. Raises ModelError for an unknown name, and where there is no model or only
    pickled weights.
    """
    model = _here(name)
    if is_dense(model):
        assert isinstance(model, Path)
        return model
    folder = _unpacked(model)
    if (folder / "config.json").is_file():
        return folder
    with alone(folder), disk_errors(folder), hidden(folder) as beside:
        if (folder / "config.json").is_file():
            pass
        elif isinstance(model, Path) and model.is_dir():
            check_quantised(name, settings := quantization(model))
            (_unpack if is_packed(settings) else _dequantise)(model, folder)
        else:
            _dequantise(gguf_file(model, beside), folder)
    return folder


def _here(name: str) -> Path | BuiltinModel:
    """Return the folder, GGUF file or builtin model of a name; a hub model is fetched."""
    if (model := known_model(name)) is not None:
        return model
    from huggingface_hub import constants, snapshot_download

    with _hub_errors(name), disk_errors(Path(constants.HF_HUB_CACHE)):
        fetched = snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=REPEATED)
    check_folder(Path(fetched))
    return Path(fetched)


def is_dense(model: Path | BuiltinModel | None) -> bool:
    """Whether a model is a folder whose weights are not quantised."""
    return isinstance(model, Path) and model.is_dir() and not quantization(model)


def check_quantised(name: str, settings: Mapping[str, Any]) -> None:
    """Raise ModelError for a quantised checkpoint that cannot be dequantised here."""
    method, rotated = settings.get("quant_method"), settings.get("transform_config")
    if method == METHOD:
        if isinstance(rotated, dict) and rotated.get("config_groups"):
            raise ModelError(
                f"{name} has rotated weights (transform_config), which calmix does not read: serve "
                "it, and evaluate the server's address"
            )
        if not is_packed(settings) and not find_spec("compressed_tensors"):
            raise ModelError(
                f"{name} has compressed-tensors weights of the form {settings.get('format')}, "
                "which another library reads: pip install compressed-tensors, then run it again"
            )
    elif settings:
        raise ModelError(
            f"{name} is quantised by {method}, which calmix does not read: name the full-precision "
            "model, or dequantise it (pip install gptqmodel, "
            "gptqmodel.utils.model_dequant.dequantize_model)"
        )


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


def content_key(folder: Path) -> str:
    """Return a key of a model folder's configuration, weights and tokenizer for names of copies."""
    names = [*model_files(folder), *map(str, matching(folder, COPIED))]
    return combined({one: cached_sha256(folder / one) for one in names})[:16]


def size_of(name: str) -> tuple[int | None, int]:
    """Return the bytes of a model's file or weight files, and its number of weights; the bytes of
    a builtin model, which lies in an archive, are None."""
    model, folder, size = _here(name), resolve_model(name), None
    if isinstance(model, Path):
        size = weight_bytes(model) if model.is_dir() else model.stat().st_size
    return size, sum(math.prod(one.shape) for one in stored_tensors(folder).values())


def forget(model: Path) -> None:
    """Remove the dequantised copy of a GGUF file or checkpoint from the cache."""
    if model.is_file() or quantization(model):
        remove(_unpacked(model))


def to_fetch(name: str) -> str:
    """Return what `resolve_model` would fetch and unpack, as text; empty if the model is here."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    model = known_model(name)
    which: dict[str, Any] = {"allow_patterns": HUB_FILES, "ignore_patterns": REPEATED}
    if model is None:
        with contextlib.suppress(Exception):  # of many kinds, if it is not in the hub's cache
            check_folder(Path(snapshot_download(name, local_files_only=True, **which)))
            return ""
        with _hub_errors(name):
            files = HfApi().model_info(name, files_metadata=True).siblings or []
        chosen = filter_repo_objects(files, key=lambda file: file.rfilename, **which)
        return f"fetches {size_text(sum(file.size or 0 for file in chosen))} from the hub"
    if is_dense(model) or (_unpacked(model) / "config.json").is_file():
        return ""
    place = cache_dir() / "models"
    if isinstance(model, Path):
        return f"unpacks {model.name} into {place}"
    archives = [one for one in map(assets.get_asset, model.parts) if one.state != "ok"]
    fetched = f"fetches {size_text(sum(one.size for one in archives))} and " if archives else ""
    return f"{fetched}unpacks {model.parameters} weights, 2 bytes each, into {place}"


def gguf_file(model: Path | BuiltinModel, folder: Path) -> Path:
    """Return a GGUF file; that of a builtin model is assembled in `folder`."""
    if isinstance(model, BuiltinModel):
        assets.extract(model.parts, file := folder / f"{model.name}.gguf")
        return file
    return model


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except (DiskError, ModelError):
        raise
    except errors.HFValidationError as error:
        raise ModelError(
            f"'{name}' is neither a folder, a .gguf file, a builtin model nor a valid hub id"
        ) from error
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise ModelError(
            f"the hub has no accessible model '{name}': check the id, or log in if it is gated"
        ) from error
    except Exception as error:  # the hub client raises many kinds when offline
        raise ModelError(
            f"there is no folder '{name}' and the hub cannot be reached: name a local folder, a "
            ".gguf file or builtin:smollm2-135m, or go online once to fetch it"
        ) from error


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
    name, target, chosen = str(name), device_of(device), dtype_of(dtype)
    folder = resolve_model(name)
    files = ModelFiles(folder, name)
    load_config(folder, name, trust_remote_code)
    with loading(f"cannot open {name}"):
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=chosen,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    if missing := sorted(info.get("missing_keys", ())):
        raise ModelError(
            f"{name} lacks {len(missing)} weights its configuration requires, first '{missing[0]}'"
        )
    if dtype == "auto" and (fits := suited(model.dtype, target)) != model.dtype:
        model = model.to(fits)
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


def load_config(
    folder: Path, name: str, trust_remote_code: bool, weights: Mapping[str, Any] | None = None
) -> Any:
    """Return the configuration of a causal language model; `name` is what the user wrote, `weights`
    are those of the folder unless given.

    Raises ModelError if it is unreadable, or the model is an encoder-decoder or quantised in a form
    that cannot be read.
    """
    with loading(f"cannot open {name}"):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    check_quantised(name, settings := quantization(folder))
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder: only decoder-only models work")
    check_causal(name, config.to_dict())
    if settings and not is_packed(settings):  # its dequantised copy is checked
        return config
    stored = stored_tensors(folder) if weights is None else weights
    counts = [math.prod(one.shape) for one in stored.values()]
    # Some configurations raise on attributes that differ between layers.
    if excess := _too_large(config.get_text_config(decoder=True).to_dict(), counts):
        raise ModelError(f"{folder / 'config.json'} has {excess}, more than its weights allow")
    return config


def check_causal(name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError if a configuration is of a model that does not continue text."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    kind, classes = config.get("model_type"), config.get("architectures") or []
    if kind not in CONFIG_MAPPING_NAMES or "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        return
    causal = {CAUSAL.get(kind), *(one for one in classes if CAUSAL_CLASS.search(one))}
    if kind not in CAUSAL or (classes and causal.isdisjoint(classes)):
        what = ", ".join(classes) or kind
        raise ModelError(f"{name} does not continue text ({what}): name a causal language model")


def _too_large(sizes: Mapping[str, Any], counts: Sequence[int]) -> str | None:
    """Return a size that the weights rule out, if any: modules are built before weights load."""
    limits = dict.fromkeys(WIDTHS, max(counts, default=0)) | dict.fromkeys(DEPTHS, len(counts))
    for key, most in limits.items():
        size = sizes.get(key)
        numbers = size if isinstance(size, list) else [size]
        if any(isinstance(n, int | float) and n > most for n in numbers):
            return f"{key} {size}"
    return None


def context_of(config: Any) -> int | None:
    """Return the context length in a model's configuration, in tokens; None if it has none."""
    text = config.get_text_config(decoder=True)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        if isinstance(value := getattr(text, key, None), int) and value > 0:  # XLNet's is -1
            return value
    return None


def check_length(length: int, context: int | None) -> None:
    """Raise InputError for rows longer than the model's context, if that is known."""
    if context is not None and length > context:
        raise InputError(f"length {length} is beyond the model's context of {context} tokens")


def load_tokenizer(folder: Path, name: str, trust_remote_code: bool) -> Any:
    """Return the tokenizer in a resolved model folder; `name` is what the user wrote.

    Raises ModelError if there is none that works.
    """
    with loading(f"{name} has no usable tokenizer"):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        # A tokenizer that loads can still fail in use, or when it is saved at the end.
        tokenizer.decode(tokenizer("one two")["input_ids"])
        saved = [tokenizer.init_kwargs, tokenizer.chat_template]
        json.dumps(saved, ensure_ascii=False, default=str).encode("utf-8")
        several = tokenizer.chat_template
        for template in several.values() if isinstance(several, dict) else ():
            if not isinstance(template, str):
                raise TypeError(f"a chat template is {type(template).__name__}, not text")
        return tokenizer


def to_continue(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts that an answer follows: with the tokenizer's begin token, if any, but without
    an end token that it appends."""
    plain, full = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True)
    )
    fits = (n for n in range(len(full)) if full[: len(full) - n][-len(plain) :] == plain)
    after = next(fits, 0)
    rows = tokenizer(list(texts), verbose=False)["input_ids"]
    return [row[: len(row) - after] for row in rows]


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
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device '{name}' cannot be used: {first_line(error)}") from error
    return device


def dtype_of(name: str) -> torch.dtype | str:
    """Return the type a user names, or `auto`; raise InputError for an unknown one."""
    if name != "auto" and name not in DTYPES:
        raise InputError(f"unknown dtype '{name}': {nearest(name, [*DTYPES, 'auto'])}")
    return DTYPES.get(name, name)


def gguf_reader(file: Path | str) -> Any:
    """Return gguf's reader of a file, over a plain array: it takes thousands of slices, which are
    slow of numpy's memory maps."""
    import numpy as np
    from gguf.gguf_reader import GGUFReader

    mapped = np.memmap
    with patch.object(np, "memmap", lambda *how, **more: mapped(*how, **more).view(np.ndarray)):
        return GGUFReader(file)


@contextlib.contextmanager
def reading_gguf() -> Iterator[None]:
    """Make transformers read a GGUF file once, not three times, map names once, not per module,
    and show no progress bar beside ours."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    read, names = functools.cache(gguf_reader), functools.cache(gguf.get_tensor_name_map)
    with (
        patch.object(gguf, "GGUFReader", lambda path: read(str(path))),
        patch.object(gguf, "get_tensor_name_map", names),
        patch.object(reading, "tqdm", lambda tensors, **_: tensors, create=True),
    ):
        yield


def gguf_names(model: Any, name: str, architecture: str) -> tuple[Any, dict[str, str]]:
    """Return transformers' processor of GGUF tensors, and the tensors' names in a model, by those
    in GGUF; ModelError, which names the model by `name`, if there are none."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    kind = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config=model.config.to_dict())
    with loading(f"transformers cannot read {name} from GGUF"), reading_gguf():
        return processor, dict(get_gguf_hf_weights_map(model, processor))


def read_gguf(file: Path, dtype: torch.dtype) -> Any:
    """Return the model in a GGUF file; ValueError if it lacks weights, as a part of a split file.

    transformers would prefer a file of the same name in the current folder, and leave weights of
    some architectures packed where it finds a kernel for them.
    """
    import transformers

    how: dict[str, Any] = {"gguf_file": str(file.resolve()), "dtype": dtype}
    if hasattr(transformers, "GgufConfig"):  # not in older versions
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, output_loading_info=True, **how
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"it lacks {len(missing)} weights, first '{missing[0]}': merge the parts of a split "
            "file with llama-gguf-split --merge"
        )
    return model


def _unpack(source: Path, folder: Path) -> None:
    """Write the model of a checkpoint with packed integers, one tensor at a time."""
    with atomic_folder(folder) as beside:
        write_model(beside, unpacked(source), PART)
        copy_files(source, beside, matching(source, COPIED))
        config = read_object(source / "config.json", "")
        write_json(beside / "config.json", {k: v for k, v in config.items() if k != CONFIG})


def _dequantise(source: Path, folder: Path) -> None:
    """Write the model of a GGUF file, or of a checkpoint that compressed-tensors reads."""
    with atomic_folder(folder) as beside:
        with loading(f"cannot open {source}"), reading_gguf():
            from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

            file, how = source.resolve(), dict[str, Any]()
            if file.is_dir():
                settings = CompressedTensorsConfig.from_dict(quantization(file), dequantize=True)
                model: Any = AutoModelForCausalLM.from_pretrained(
                    file, quantization_config=settings
                )
            else:
                model, how = read_gguf(file, _gguf_dtype(file)), {"gguf_file": str(file)}
            # In this folder, still empty, no other tokenizer is preferred to the file's.
            tokenizer = AutoTokenizer.from_pretrained(beside if how else file, **how)
        # transformers still marks the model as quantised, and would not save it.
        model.hf_quantizer, model.is_quantized = None, False
        vars(model.config).pop("quantization_config", None)  # older versions do not set it
        # GGUF does not give the tokenizer's maximum length: it is the context.
        if context := getattr(model.config, "max_position_embeddings", None):
            tokenizer.model_max_length = context
        with quiet_transformers():
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)


def check_gguf(file: Path) -> Header:
    """Return the header of a GGUF file; ValueError if it is damaged, or sizes in it are beyond its
    weights."""
    header = read_header(file)
    widest = [max(shape, default=0) for shape in header.shapes.values()]
    for name, value in header.values.items():
        if excess := _too_large({name.rpartition(".")[2]: value}, widest):
            raise ValueError(f"its header has {excess}, more than its weights allow")
    return header


def _gguf_dtype(file: Path) -> torch.dtype:
    """Return the type of a float32 or float16 file, and bfloat16 for a quantised one; ValueError if
    the file cannot be read as it is meant."""
    header = check_gguf(file)
    if _scales_positions(header):
        raise ValueError(
            "it scales rotary positions, which transformers ignores in GGUF: name the "
            "original checkpoint (and export with --like this file)"
        )
    kinds = {0: torch.float32, 1: torch.float16}
    return kinds.get(header.values.get("general.file_type", -1), torch.bfloat16)


def _scales_positions(header: Header) -> bool:
    """Whether a GGUF file scales rotary positions in a way that transformers ignores."""
    rope = {
        name.partition(".rope.")[2]: value
        for name, value in header.values.items()
        if ".rope." in name
    }
    factor = rope.get("scaling.factor", rope.get("scale_linear", 1))
    return "gpt-oss.rope.scaling.type" not in header.values and (
        (factor != 1 and rope.get("scaling.type") != "none")
        or any(name.startswith(("rope_freqs", "rope_factors")) for name in header.shapes)
    )


def model_files(folder: Path) -> list[str]:
    """Return the names of a model folder's configuration and weight files."""
    return sorted(["config.json", *weight_files(folder)])


def fingerprint(folder: Path) -> str:
    """Return a SHA-256 over the configuration and weight files of a model folder."""
    return combined({name: cached_sha256(folder / name) for name in model_files(folder)})


def combined(hashes: Mapping[str, str]) -> str:
    """Return a `fingerprint` from the SHA-256 of configuration and weight files by name."""
    return sha256_json(sorted(map(list, hashes.items())))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a SHA-256 of a tokenizer's state, without its padding and truncation settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sha256_json(sorted(tokenizer.get_vocab().items()))
    state = json.loads(backend.to_str())
    return sha256_json({k: v for k, v in state.items() if k not in ("padding", "truncation")})


def save_config(config: Any, dtype: torch.dtype, folder: Path) -> None:
    """Write the configuration of a checkpoint with weights of this type; changes the type in it."""
    for part in (config, config.get_text_config(decoder=True)):
        part.dtype = dtype_name(dtype)
    config.save_pretrained(folder)


def save_tokenizer(tokenizer: Any, source: Path, folder: Path) -> None:
    """Write a tokenizer to a folder, the files that its source has unchanged: transformers can
    write others than it has read."""
    tokenizer.save_pretrained(folder)
    copy_files(source, folder, matching(source, TOKENIZER_FILES))


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Silence transformers, and turn its errors into a ModelError that begins with `what`."""
    with quiet_transformers():
        try:
            yield
        except Exception as error:  # a damaged checkpoint can raise anything
            reason = first_line(error)
            if "custom code" in reason:  # transformers names an address, and no flag
                reason = "it needs code of its own: read it, then allow it with --trust-remote-code"
            raise ModelError(f"{what}: {reason}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and warnings of transformers; errors still raise."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def in_chat(tokenizer: Any, *turns: str) -> str | None:
    """Return a chat that ends with a user's turn in the model's template, up to the answer; None
    without a template, or if it refuses turns of only user and assistant."""
    return rendered(
        tokenizer,
        [{"role": ("user", "assistant")[at % 2], "content": t} for at, t in enumerate(turns)],
    )


def rendered(tokenizer: Any, chat: Sequence[Mapping[str, Any]], **how: Any) -> str | None:
    """Return the messages of a chat in the model's template, up to the answer; None without a
    template, or if it refuses or leaves out a message. Options such as `tools` are the template's.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = templated(tokenizer, chat, add_generation_prompt=True, **how)
    except ModelError:
        raise
    except Exception:  # templates can raise anything
        return None
    return text if all(str(one["content"] or "").strip() in text for one in chat) else None


def end_tokens(opened: OpenModel) -> list[int]:
    """Return the token ids that end a text: the tokenizer's, the generation configuration's and, if
    none of these ends a turn in the chat template, that which does (GGUF files name one token)."""
    configured = getattr(getattr(opened.model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    tokenizer = opened.tokenizer
    ends = {end for end in [tokenizer.eos_token_id, *listed] if end is not None}
    after = (in_chat(tokenizer, *TURNS) or "").partition(TURNS[1])[2].partition(TURNS[2])[0]
    turn = set(tokenizer(after, add_special_tokens=False)["input_ids"])
    return sorted(ends if turn & ends else ends | turn & turn_ends(tokenizer))


def turn_ends(tokenizer: Any) -> set[int]:
    """Return the ids of the tokens that usually end a turn in a chat."""
    known = set(map(tokenizer.convert_tokens_to_ids, END_OF_TURN))
    return known - {tokenizer.unk_token_id, None}


@contextlib.contextmanager
def generating(model: Any, plain: Any) -> Iterator[None]:
    """Replace the model's generation settings (such as a penalty or end tokens) temporarily."""
    with patch.object(model, "generation_config", plain), evaluating(model):
        yield
