"""How text that the model writes begins: with a start token, or the prompts of a dimension."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, RootModel
from torch import Tensor

from calmix.calibration.tokenizer import begin_token
from calmix.errors import InputError
from calmix.models.chat import TURNS, in_chat, turn_ends
from calmix.options import Options
from calmix.yaml_files import parse_model, read_text

# Names of the token after every document in pretraining.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")


# The beginning of a text, a request, or (`begin: true`) the start token alone.
Prompt = Annotated[
    dict[Literal["text", "ask", "begin"], str | bool], Field(min_length=1, max_length=1)
]


class Dimension(Options):
    """The prompts of a dimension, and the temperature of what follows them."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.9
    prompts: Annotated[list[Prompt], Field(min_length=1)]


LISTED = BeforeValidator(lambda value: {"prompts": value} if isinstance(value, list) else value)
Prompts = RootModel[dict[str, Annotated[Dimension, LISTED]]]  # a file of prompts


Openers = list[list[int]]  # token ids that texts of one kind can begin with


def load_prompts(path: Path | None = None) -> dict[str, Dimension]:
    """Read a file of prompts by dimension; without a path, calmix's own."""
    path = path or Path(__file__).with_name("prompts.yaml")
    dimensions = parse_model(Prompts, read_text(path), str(path)).root
    if not dimensions:
        raise InputError(f"{path} names no dimension: give each a list of prompts")
    return dimensions


def beginnings(path: Path | None, tokenizer: Any) -> dict[str, Openers]:
    """Return the token ids of every prompt of a file, or of calmix's own, by dimension.

    A begin token comes first if the tokenizer puts one before every text. The part of the chat
    template before the user's words is left out: the system prompt would take a large share of
    every short text.
    """
    head, start = begin_token(tokenizer), start_token(tokenizer)
    starts: dict[str, Openers] = {}
    where = path or "prompts.yaml"
    for name, dimension in load_prompts(path).items():
        starts[name] = rows = []
        for number, prompt in enumerate(dimension.prompts, start=1):
            ((kind, value),) = prompt.items()
            if kind == "begin":
                rows += [[start]] if value and start is not None else []
                continue
            text = str(value) if kind == "text" else str(value).strip()
            if kind == "ask" and text:  # from the user's words on
                whole = in_chat(tokenizer, text) or f"{text}\n\n"
                text = whole[whole.rfind(text) :]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise InputError(
                    f"prompt {number} of dimension {name} in {where} has no tokens: write some "
                    "text, or 'begin: true'"
                )
            rows.append(head + list(ids))
        if not rows:
            raise InputError(
                f"dimension {name} in {where} has no prompt for a tokenizer without begin token "
                "and document separator: add one with text"
            )
    return starts


def chat_turns(tokenizer: Any) -> list[list[int]] | None:
    """Return the token ids before a chat's first user's turn, before an answer, and before the next
    user's turn, each without the token that ends the previous turn; None without a chat template,
    if no token ends a turn, or if no token is before the first."""
    text, request = in_chat(tokenizer, *TURNS), in_chat(tokenizer, TURNS[0])
    match = re.match("(.*?)one-turn.*?two-turn(.*?)three-turn", text or "", re.DOTALL)
    if match is None or request is None:
        return None
    # Where a request ends, templates turn thinking off.
    parts = match[1], request.partition(TURNS[0])[2], match[2]
    first, *later = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
    known = turn_ends(tokenizer) | {tokenizer.eos_token_id}
    if not first or not all(len(ids) > 1 and ids[0] in known for ids in later):
        return None
    return [first, *(ids[1:] for ids in later)]


def count_turns(ids: Tensor, tokenizer: Any) -> int | None:
    """Return the number of user's turns in rows of ids, in the model's own chat format; None if
    `chat_turns` finds no such format."""
    turns = chat_turns(tokenizer)
    if turns is None:
        return None
    head = tokenizer.decode(turns[-1]).strip()
    return sum(text.count(head) for text in tokenizer.batch_decode(ids.tolist()))


def start_token(tokenizer: Any, start: str = "auto") -> int | None:
    """Return the id of the token that begins a text with nothing before it; None if there is none.

    The rule is ours. A token counts as a chat token if the chat template puts it anywhere in a
    request except at the very beginning.
    """
    begin = tokenizer.bos_token_id
    begins_text = begin_token(tokenizer) or _of_text(tokenizer, begin)
    if start == "bos" or (start == "auto" and begins_text):
        return begin
    separator = tokenizer.eos_token_id
    if not _of_text(tokenizer, separator):
        special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        separator = next((special[name] for name in END_OF_TEXT if name in special), None)
    return begin if separator is None and start == "auto" else separator


def _of_text(tokenizer: Any, token: int | None) -> bool:
    """Whether the token exists and is not a chat token."""
    if token is None:
        return False
    whole = in_chat(tokenizer, "Hello") or ""
    return whole.strip().rfind(tokenizer.convert_ids_to_tokens(token)) <= 0
