"""Greedy answers in batches: prompts that begin alike share one cache, rows that have ended leave.

Rows of a batch are padded on the left, behind what all of them share. Models whose state is no
cache of keys and values (Mamba, hybrids) are batched by equal length, through transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calmix.evaluation.scorer import attention_window
from calmix.evaluation.tasks import shared_start
from calmix.machine import tokens_at_once
from calmix.models import OpenModel
from calmix.models.attention import cache_argument, reserved_cache
from calmix.models.opening import end_tokens, generating, quiet_transformers

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
    tokens: int
    ended: bool


@torch.inference_mode()
def answers(
    opened: OpenModel,
    prompts: Sequence[Prompt],
    *,
    tick: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Return a model's greedy answer to each prompt, in order.

    A prompt too long for the model's context is cut on the left. `tick` is called with the number
    of answers that have just ended.
    """
    writer = _Writer(opened, prompts, tick or (lambda count: None))
    with quiet_transformers():
        for batch in writer.batches():
            writer.answer(batch)
    return [writer.cut(row) for row in range(len(prompts))]


class _Writer:
    def __init__(
        self, opened: OpenModel, prompts: Sequence[Prompt], tick: Callable[[int], None]
    ) -> None:
        self.model: Any = opened.model
        self.tokenizer, self.tick = opened.tokenizer, tick
        self.device = next(self.model.parameters()).device
        self.ends = torch.tensor(end_tokens(opened), device=self.device)
        context = opened.context or 2**31
        self.room = [min(one.tokens, context // 2) for one in prompts]
        self.ids = [
            (list(one.ids) or self.ends[:1].tolist() or [0])[-(context - room) :]
            for one, room in zip(prompts, self.room, strict=True)
        ]
        self.until = [one.until for one in prompts]
        self.written: list[list[int]] = [[] for _ in prompts]
        self.ended, self.looping = [False] * len(prompts), [False] * len(prompts)
        known = inspect.signature(self.model.forward).parameters
        self.takes = {name for name in ("position_ids", "logits_to_keep") if name in known}
        config = self.model.config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        self.padded = not {"cache", "past_key_values"}.isdisjoint(known)
        self.padded &= kinds <= {"full_attention", "sliding_attention"}
        self.padded &= not getattr(self.model, "_is_stateful", False)
        # A window would count what rows are padded with, and so would a model that knows where a
        # token stands by counting alone.
        window = min(context, attention_window(self.model))
        self.window = window if "position_ids" in known else 0

    def batches(self) -> Iterator[list[int]]:
        """Yield rows to answer together: of about one length, the longest first."""
        order = sorted(range(len(self.ids)), key=lambda row: (-len(self.ids[row]), self.ids[row]))
        most = 8 * tokens_at_once(self.device)
        while order:
            longest = len(self.ids[order[0]]) + max(self.room[row] for row in order[:ROWS])
            stop = min(len(order), ROWS, max(1, most // longest))
            if not self.padded or longest > self.window:
                same = [len(self.ids[row]) == len(self.ids[order[0]]) for row in order[:stop]]
                stop = (*same, False).index(False)
            yield order[:stop]
            order = order[stop:]

    def answer(self, rows: list[int]) -> None:
        if not self.padded:
            self._by_transformers(rows)
            return
        ids = [self.ids[row] for row in rows]
        shared = min(shared_start(ids), min(map(len, ids)) - 1)
        shared = shared if shared >= SHARED and len(rows) > 1 else 0
        longest = max(map(len, ids)) - shared
        held = reserved_cache(self.model, shared + longest + max(self.room[row] for row in rows))
        mask = torch.ones(len(rows), shared + longest, dtype=torch.long, device=self.device)
        given = torch.zeros(len(rows), longest, dtype=torch.long, device=self.device)
        for row, one in enumerate(ids):
            pad = longest - len(one) + shared
            mask[row, shared : shared + pad] = 0
            given[row, pad:] = torch.tensor(one[shared:])
        place = mask.cumsum(-1) - 1
        if shared:
            self._forward(torch.tensor([ids[0][:shared]], device=self.device), held, None, None)
            held.batch_repeat_interleave(len(rows))
        scores = self._forward(given, held, mask, place[:, shared:].clamp(min=0))
        active, at = torch.arange(len(rows)), place[:, -1:]
        while True:
            tokens = scores.argmax(-1)
            over = self._take([rows[row] for row in active.tolist()], tokens)
            if all(over):
                return
            left = torch.tensor([n for n, done in enumerate(over) if not done])
            if len(active) - len(left) >= max(1, len(active) // LEAVING):
                held.batch_select_indices(left.to(self.device))
                active, here = active[left], left.to(self.device)
                tokens, mask, at = tokens[here], mask[here], at[here]
            at = at + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            scores = self._forward(tokens[:, None], held, mask, at)

    def _forward(self, ids: Any, held: Any, mask: Any, place: Any) -> Any:
        more = {"position_ids": place, "logits_to_keep": 1}
        more = {key: more[key] for key in self.takes if more[key] is not None}
        found = self.model(
            ids, attention_mask=mask, use_cache=True, **{cache_argument(self.model): held}, **more
        )
        return found.logits[:, -1]

    def _take(self, rows: list[int], tokens: Any) -> list[bool]:
        """Note each row's next token; return which rows have ended by now."""
        final = torch.isin(tokens, self.ends).tolist()
        over = []
        for row, token, end in zip(rows, tokens.tolist(), final, strict=True):
            if not self._over(row):
                if not end:
                    self.written[row].append(token)
                self.ended[row] = end or self._stopped(row)
                self.looping[row] = loops(self.written[row])
                if self._over(row):
                    self.tick(1)
            over.append(self._over(row))
        return over

    def _over(self, row: int) -> bool:
        full = len(self.written[row]) >= self.room[row]
        return self.ended[row] or self.looping[row] or full

    def _stopped(self, row: int) -> bool:
        if not self.until[row]:
            return False
        tail = self.tokenizer.decode(self.written[row][-TAIL:])
        return any(stop in tail for stop in self.until[row])

    def cut(self, row: int) -> Answer:
        """Return a row's answer, without the text that ended it."""
        text = self.tokenizer.decode(self.written[row], skip_special_tokens=True)
        for stop in self.until[row]:
            text = text.partition(stop)[0]
        return Answer(text, len(self.written[row]), self.ended[row])

    def _by_transformers(self, rows: list[int]) -> None:
        from transformers import GenerationConfig

        given = torch.tensor([self.ids[row] for row in rows], device=self.device)
        ends = self.ends.tolist()
        config = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=max(self.room[row] for row in rows),
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
