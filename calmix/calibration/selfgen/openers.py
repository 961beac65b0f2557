"""What a self-generated text begins with: a start token, or the openers of a dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from calmix.calibration.build import begin_token
from calmix.errors import InputError
from calmix.files import sha256_json
from calmix.yaml_files import first_problem, read_yaml

Start = Literal["auto", "bos", "separator"]
STARTS: tuple[Start, ...] = get_args(Start)
# What tokenizers call the token that stands after every document in pretraining.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")


class Opener(BaseModel):
    """One opener: the beginning of a text, a request, or the start token alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | None = None
    ask: str | None = None
    begin: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> Opener:
        if sum(value is not None for value in (self.text, self.ask, self.begin)) != 1:
            raise ValueError("give exactly one of 'text', 'ask' and 'begin: true'")
        return self


@dataclass(frozen=True)
class Openers:
    """Openers by dimension, from the file `name`."""

    name: str
    dimensions: Mapping[str, tuple[Opener, ...]]

    @property
    def sha256(self) -> str:
        """Hash of what the file says."""
        return sha256_json(
            {name: [o.model_dump(exclude_none=True) for o in held]
             for name, held in self.dimensions.items()}
        )  # fmt: skip


def load_openers(path: Path | None = None) -> Openers:
    """Read a file of openers; without a path, calmix's own.

    Raises:
        InputError: the file cannot be used: which line, and why.
    """
    own = resources.files("calmix.calibration.selfgen") / "openers.yaml"
    with resources.as_file(own) as builtin:
        read = read_yaml(path or builtin)
    kind = TypeAdapter(dict[str, list[Opener]])
    where = str(path or "openers.yaml")
    try:
        found = kind.validate_python(read)
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error)}") from error
    if not found:
        raise InputError(f"{where} names no dimension: give each a list of openers")
    for dimension, openers in found.items():
        if not openers:
            raise InputError(f"{where}: dimension {dimension} has no openers")
    return Openers(
        "builtin" if path is None else str(path), {name: tuple(o) for name, o in found.items()}
    )


def tokenised(openers: Openers, tokenizer: Any) -> dict[str, list[list[int]]]:
    """Return the token ids of every opener, by dimension.

    A text follows the begin token where the tokenizer puts one before every text. Of the chat
    template only what follows the user's words is used: the system prompt would take a large
    share of every short text.

    Raises:
        InputError: an opener, or all of a dimension, becomes no token.
    """
    begin = begin_token(tokenizer)
    head = [] if begin is None else [begin]
    start = start_token(tokenizer)
    found: dict[str, list[list[int]]] = {}
    for dimension, held in openers.dimensions.items():
        rows = []
        for number, opener in enumerate(held, start=1):
            if opener.begin is not None:
                if opener.begin and start is not None:
                    rows.append([start])
                continue
            text = opener.text if opener.text is not None else _asked(tokenizer, opener.ask or "")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise InputError(
                    f"opener {number} of dimension {dimension} in {openers.name} becomes no token: "
                    "write some text, or 'begin: true'"
                )
            rows.append(head + list(ids))
        if not rows:
            raise InputError(
                f"dimension {dimension} in {openers.name} has no opener for a tokenizer without "
                "begin token and document separator: add one with text"
            )
        found[dimension] = rows
    return found


def start_token(tokenizer: Any, start: Start = "auto") -> int | None:
    """Return the id of the token that begins a text with nothing before it; None for no such.

    The rule is ours. A token is one of chats if the chat template puts it anywhere in a request
    but at its very beginning.

    Args:
        tokenizer: a tokenizer of transformers.
        start: `bos`, the begin token; `separator`, what stands between documents in pretraining:
            the end token or, if that is one of chats, the special token named as the end of a
            text (`END_OF_TEXT`); `auto`, the begin token unless it is one of chats and not put
            before every text by the tokenizer itself, else the separator if there is one.
    """
    begin = tokenizer.bos_token_id
    own = begin_token(tokenizer) is not None
    if start == "bos" or (start == "auto" and (own or _of_text(tokenizer, begin))):
        return begin
    separator = tokenizer.eos_token_id
    if not _of_text(tokenizer, separator):
        special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        separator = next((special[name] for name in END_OF_TEXT if name in special), None)
    return begin if separator is None and start == "auto" else separator


def _of_text(tokenizer: Any, token: int | None) -> bool:
    """Tell whether there is such a token, and it is none of chats."""
    if token is None:
        return False
    return _in_chat(tokenizer, "Hello").strip().rfind(tokenizer.convert_ids_to_tokens(token)) <= 0


def _asked(tokenizer: Any, request: str) -> str:
    """Return a request as the model's chat template puts it, from the user's words on."""
    if not request.strip():
        return ""
    whole = _in_chat(tokenizer, request)
    at = whole.rfind(request)
    return whole[at:] if at >= 0 else f"{request}\n\n"


def _in_chat(tokenizer: Any, request: str) -> str:
    """Return a request in the model's chat template, up to the answer; empty without one."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    chat: Sequence[dict[str, str]] = [{"role": "user", "content": request}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
