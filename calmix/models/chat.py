"""Chats in a model's template, and the tokens that end its turns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

from calmix.errors import ModelError
from calmix.models.blocks import evaluating
from calmix.models.chat_template import templated
from calmix.models.opening import OpenModel

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eot|>")
TURNS = ("one-turn", "two-turn", "three-turn")  # of a chat that shows a template's parts


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
