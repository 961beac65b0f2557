"""Greedy answers in batches: prompts that begin alike share one cache, rows that have ended leave.

Rows of a batch are padded on the left, behind what all of them share. Models whose state is no
cache of keys and values (Mamba, hybrids) are batched by equal length, through transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from calmix.evaluation.likelihood import Tick
from calmix.evaluation.scorer import attention_window
from calmix.evaluation.tasks import shared_start
from calmix.machine import tokens_at_once
from calmix.models import OpenModel
from calmix.models.attention import cache_argument, reserved_cache
from calmix.models.opening import end_tokens, generating, in_chat, quiet_transformers

ROWS = 64  # at a time
SHARED = 8  # tokens that all prompts of a batch begin with, to be worth a pass of their own
LEAVING = 8  # one row in so many has to have ended before the batch is made smaller
TAIL = 16  # tokens at the end of an answer in which a stop is looked for
LOOP, PERIOD = 64, 16  # an answer whose last tokens repeat so few is cut: greedily it never ends


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: token ids, how many it may answer with, and texts that end it."""

    ids: Sequence[int]
    tokens: int
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a model wrote: `ended` is False where it was cut, at the limit or in a loop."""

    text: str
    ended: bool


def prompt(
    tokenizer: Any, chat: str | None, plain: str, tokens: int, until: tuple[str, ...]
) -> Prompt:
    """Return what a model is asked: in its chat template where there is one, else as plain text."""
    made = None if chat is None else in_chat(tokenizer, chat)
    if made is None:
        return Prompt(tokenizer(plain)["input_ids"], tokens, until)
    return Prompt(tokenizer(made, add_special_tokens=False)["input_ids"], tokens)


@torch.inference_mode()
def answers(
    opened: OpenModel, prompts: Sequence[Prompt], *, tick: Tick | None = None
) -> list[Answer]:
    """Return a model's greedy answer to each prompt, in order.

    A prompt too long for the model's context is cut on the left. `tick` is called with the number
    of answers that have just ended.
    """
    writer = _Writer(opened, tick)
    rows = [writer.row(one) for one in prompts]
    with quiet_transformers():
        for batch in writer.batches(rows):
            (writer.answer if writer.padded else writer.by_transformers)(batch)
    return [writer.answered(row) for row in rows]


@dataclass
class _Row:
    """An answer while it is written: `room` is what it may take, `over` says that it is done."""

    ids: list[int]
    room: int
    until: tuple[str, ...]
    written: list[int] = field(default_factory=list)
    ended: bool = False
    over: bool = False


class _Writer:
    def __init__(self, opened: OpenModel, tick: Tick | None) -> None:
        self.model: Any = opened.model
        self.tokenizer, self.tick = opened.tokenizer, tick
        self.device = next(self.model.parameters()).device
        self.ends = torch.tensor(end_tokens(opened), device=self.device)
        self.context = opened.context or 2**31
        known = inspect.signature(self.model.forward).parameters
        self.takes = {"position_ids", "logits_to_keep"} & set(known)
        self.cache = cache_argument(self.model)
        config = self.model.config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        self.padded = (
            not {"cache", "past_key_values"}.isdisjoint(known)
            and kinds <= {"full_attention", "sliding_attention"}
            and not getattr(self.model, "_is_stateful", False)
        )
        # A window would count what rows are padded with, and so would a model that knows where a
        # token stands by counting alone.
        window = min(self.context, attention_window(self.model))
        self.window = window if self.padded and "position_ids" in known else 0

    def row(self, prompt: Prompt) -> _Row:
        room = min(prompt.tokens, self.context // 2)
        ids = list(prompt.ids) or self.ends[:1].tolist() or [0]
        return _Row(ids[-(self.context - room) :], room, prompt.until)

    def batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Yield rows to answer together: of about one length, the longest first."""
        order = sorted(rows, key=lambda row: (-len(row.ids), row.ids))
        most = 8 * tokens_at_once(self.device)
        while order:
            longest = len(order[0].ids) + max(row.room for row in order[:ROWS])
            stop = min(len(order), ROWS, max(1, most // longest))
            if longest > self.window:
                same = [len(row.ids) == len(order[0].ids) for row in order[:stop]]
                stop = (*same, False).index(False)
            yield order[:stop]
            order = order[stop:]

    def answer(self, rows: list[_Row]) -> None:
        ids = [row.ids for row in rows]
        shared = min(shared_start(ids), min(map(len, ids)) - 1)
        shared = shared if shared >= SHARED and len(rows) > 1 else 0
        longest = max(map(len, ids))
        held = reserved_cache(self.model, longest + max(row.room for row in rows))
        mask = torch.ones(len(rows), longest, dtype=torch.long, device=self.device)
        given = torch.zeros(len(rows), longest - shared, dtype=torch.long, device=self.device)
        for row, one in enumerate(ids):
            pad = longest - len(one)
            mask[row, shared : shared + pad] = 0
            given[row, pad:] = torch.tensor(one[shared:])
        place = mask.cumsum(-1) - 1
        if shared:
            self._forward(torch.tensor([ids[0][:shared]], device=self.device), held, None, None)
            held.batch_repeat_interleave(len(rows))
        scores = self._forward(given, held, mask, place[:, shared:].clamp(min=0))
        at = place[:, -1:]
        while True:
            tokens = scores.argmax(-1)
            self._take(rows, tokens)
            left = [n for n, row in enumerate(rows) if not row.over]
            if not left:
                return
            if len(rows) - len(left) >= max(1, len(rows) // LEAVING):
                here = torch.tensor(left, device=self.device)
                held.batch_select_indices(here)
                rows, tokens, mask, at = [rows[n] for n in left], tokens[here], mask[here], at[here]
            at = at + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            scores = self._forward(tokens[:, None], held, mask, at)

    def _forward(self, ids: Any, held: Any, mask: Any, place: Any) -> Any:
        more = {"position_ids": place, "logits_to_keep": 1}
        more = {key: more[key] for key in self.takes if more[key] is not None} | {self.cache: held}
        return self.model(ids, attention_mask=mask, use_cache=True, **more).logits[:, -1]

    def _take(self, rows: Sequence[_Row], tokens: Any) -> None:
        """Note each row's next token, and which rows are over by now."""
        final = torch.isin(tokens, self.ends).tolist()
        for row, token, end in zip(rows, tokens.tolist(), final, strict=True):
            if row.over:
                continue
            if not end:
                row.written.append(token)
            tail = self.tokenizer.decode(row.written[-TAIL:]) if row.until else ""
            row.ended = end or any(stop in tail for stop in row.until)
            row.over = row.ended or len(row.written) >= row.room or loops(row.written)
            if row.over and self.tick is not None:
                self.tick(1)

    def answered(self, row: _Row) -> Answer:
        """Return a row's answer, without the text that ended it."""
        text = self.tokenizer.decode(row.written, skip_special_tokens=True)
        for stop in row.until:
            text = text.partition(stop)[0]
        return Answer(text, row.ended)

    def by_transformers(self, rows: list[_Row]) -> None:
        from transformers import GenerationConfig

        given = torch.tensor([row.ids for row in rows], device=self.device)
        ends = self.ends.tolist()
        config = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=max(row.room for row in rows),
            eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0,
        )  # fmt: skip
        with generating(self.model, config):
            made = self.model.generate(
                given, attention_mask=torch.ones_like(given), generation_config=config
            )
        for step in made[:, given.shape[1] :].T:
            self._take(rows, step)


def loops(ids: Sequence[int]) -> bool:
    """Tell whether the last tokens of an answer are a short piece again and again."""
    tail = ids[-LOOP:]
    return len(tail) == LOOP and any(tail[n:] == tail[:-n] for n in range(1, PERIOD + 1))
