"""A model's tokenizer without its weights, which is enough to sample a calibration set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calmix.files import sha256_json
from calmix.models.folder import tokenizer_fingerprint
from calmix.models.loading import context_of, load_config, load_tokenizer
from calmix.models.opening import OpenModel, resolve_model


@dataclass(frozen=True)
class OpenTokenizer:
    """A model's tokenizer and context length, without its weights."""

    name: str
    tokenizer: Any
    context: int | None
    tokenizer_fingerprint: str

    @property
    def identity(self) -> str:
        """A hash of the tokenizer and its chat template."""
        template = getattr(self.tokenizer, "chat_template", None)
        return sha256_json([self.tokenizer_fingerprint, template])


HasTokenizer = OpenModel | OpenTokenizer


def open_tokenizer(name: str, *, trust_remote_code: bool = False) -> OpenTokenizer:
    """Open the tokenizer of a model by hub id, local folder, `.gguf` file or `builtin:NAME`."""
    folder = resolve_model(name)
    tokenizer = load_tokenizer(folder, name, trust_remote_code)
    context = context_of(load_config(folder, name, trust_remote_code))
    return OpenTokenizer(name, tokenizer, context, tokenizer_fingerprint(tokenizer))


def token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the ids of texts, without special tokens and without warnings."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def begin_token(tokenizer: Any) -> list[int]:
    """Return the token that the tokenizer puts before every text, in a list; empty if none."""
    ids = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    return ids if ids == [tokenizer.bos_token_id] else []
