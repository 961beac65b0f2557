"""Open a model's tokenizer alone: building a calibration set needs no weights in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmix.errors import ModelError
from calmix.models import resolve_model
from calmix.models.opening import (
    context_of,
    load_tokenizer,
    quiet_transformers,
    tokenizer_fingerprint,
)


@dataclass(frozen=True)
class OpenTokenizer:
    """A model's tokenizer and context length, without its weights."""

    name: str
    folder: Path
    tokenizer: Any
    context: int | None
    tokenizer_fingerprint: str


def open_tokenizer(name: str, *, trust_remote_code: bool = False) -> OpenTokenizer:
    """Open the tokenizer of a model by hub id, local folder, `.gguf` file or `builtin:NAME`.

    Raises:
        ModelError: the model cannot be found or has no usable tokenizer.
    """
    folder = resolve_model(name)
    tokenizer = load_tokenizer(folder, name, trust_remote_code)
    with quiet_transformers():
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # transformers raises anything on a damaged checkpoint
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ModelError(f"{name} has no usable tokenizer: {reason[:300]}") from error
    fingerprint = tokenizer_fingerprint(tokenizer)
    return OpenTokenizer(name, folder, tokenizer, context_of(config), fingerprint)
