"""Load the configuration and the tokenizer of a model folder with transformers, or say why not."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from calmix.errors import InputError, ModelError, first_line
from calmix.models.folder import check_causal
from calmix.models.packed import PACKED_METHOD, is_packed, quantization
from calmix.models.shards import stored_tensors
from calmix.progress import quiet

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


def check_quantised(name: str, settings: Mapping[str, Any]) -> None:
    """Raise ModelError for a quantised checkpoint that cannot be dequantised here."""
    method, rotated = settings.get("quant_method"), settings.get("transform_config")
    if method == PACKED_METHOD:
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
    elif settings and not is_packed(settings):
        raise ModelError(
            f"{name} is quantised by {method} in a form that calmix does not read: name the "
            "full-precision model, or dequantise it (pip install gptqmodel, "
            "gptqmodel.utils.model_dequant.dequantize_model)"
        )


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
    if excess := too_large(config.get_text_config(decoder=True).to_dict(), counts):
        raise ModelError(f"{folder / 'config.json'} has {excess}, more than its weights allow")
    return config


def too_large(sizes: Mapping[str, Any], counts: Sequence[int]) -> str | None:
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
    endings = (n for n in range(len(full)) if full[: len(full) - n][-len(plain) :] == plain)
    appended = next(endings, 0)
    rows = tokenizer(list(texts), verbose=False)["input_ids"]
    return [row[: len(row) - appended] for row in rows]


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
