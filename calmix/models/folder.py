"""The files of a model folder: which they are, their hashes, and what is written beside weights."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calmix.errors import (
    ModelError,
    PassingError,
)
from calmix.files import (
    cached_sha256,
    check_links,
    check_readable,
    copy_files,
    matching,
    parse_json,
    read_object,
    sha256_json,
)

TOKENIZER_FILES = (
    "tokenizer*",
    "*token*_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
# Beside weights and config.json; code runs only with --trust-remote-code, in a copy too.
BESIDE_WEIGHTS = (
    *TOKENIZER_FILES,
    "chat_template.*",
    "additional_chat_templates/*",
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "*.py",
)
ADAPTER = "adapter_config.json"  # of a LoRA adapter
INDEX = "model.safetensors.index.json"
PACK = "calmix-pack.json"  # marks a folder as a pack (calmix/deploy/pack.py)
# Classes whose text part may be a decoder; the last without its head.
CAUSAL_CLASS = re.compile(r"ForCausalLM|LMHeadModel|ForConditionalGeneration|Model$")


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
        beside = map(str, matching(self.folder, BESIDE_WEIGHTS))
        for name in [*model_files(self.folder), *beside]:
            with contextlib.suppress(FileNotFoundError):
                stat = (self.folder / name).stat()
                stats[name] = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        return stats

    def _hash(self) -> dict[str, str]:
        return {name: cached_sha256(self.folder / name) for name in self._stat()}

    def _changed(self) -> PassingError:
        return PassingError(f"the files of {self.name} changed while they were read: run it again")


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
        if (folder / ADAPTER).is_file():
            raise adapter_error(str(folder), read_object(folder / ADAPTER, ""))
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


def adapter_error(name: str, settings: Mapping[str, Any]) -> ModelError:
    """Return the error of a LoRA adapter, with the commands that merge it into its base model."""
    base = settings.get("base_model_name_or_path") or "BASE"
    return ModelError(
        f"{name} is a LoRA adapter of {base}: merge it with peft, and name the folder 'merged': "
        f"AutoPeftModelForCausalLM.from_pretrained('{name}').merge_and_unload()"
        f".save_pretrained('merged'), AutoTokenizer.from_pretrained('{base}')"
        ".save_pretrained('merged')"
    )


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


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files that transformers loads a model from: `model.safetensors`
    before those of an index. Others can repeat the weights.

    Raises ModelError if the index is damaged, or names a file in another folder.
    """
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            check_readable(index)
            raise ModelError(f"{index} is damaged: fetch the model again") from error
        for name in names:  # results are written under these names
            plain = isinstance(name, str) and Path(name).name == name and name not in ("", "..")
            if not plain or "\0" in name:
                raise ModelError(f"{index} names {name!r}, which is not a file in its folder")
        return sorted(names)
    return sorted(path.name for path in folder.glob("*.safetensors"))


def content_key(folder: Path) -> str:
    """Return a key of a model folder's configuration, weights and tokenizer for names of copies."""
    return combined(ModelFiles(folder, str(folder)).hashes)[:16]


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
    return _backend_hash(backend.to_str())


@functools.lru_cache(2)  # parsing megabytes takes long, and every stage opens the same tokenizer
def _backend_hash(text: str) -> str:
    state = json.loads(text)
    return sha256_json({k: v for k, v in state.items() if k not in ("padding", "truncation")})


def save_config(config: Any, dtype: str, folder: Path) -> None:
    """Write the configuration of a checkpoint with weights of this type; changes the type in it."""
    for part in (config, config.get_text_config(decoder=True)):
        part.dtype = dtype
    config.save_pretrained(folder)


def save_tokenizer(tokenizer: Any, source: Path, folder: Path) -> None:
    """Write a tokenizer to a folder, the files that its source has unchanged: transformers can
    write others than it has read."""
    tokenizer.save_pretrained(folder)
    copy_files(source, folder, matching(source, TOKENIZER_FILES))
