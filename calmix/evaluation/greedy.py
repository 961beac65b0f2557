"""Greedy answers, many at a time: prompts that begin alike are read once, and where an answer has
ended the next one begins.

Models whose state is no cache of keys and values (Mamba, hybrids) are batched by equal length,
through transformers.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from calmix.evaluation.likelihood import Tick
from calmix.evaluation.scorer import attention_window
from calmix.evaluation.tasks import shared_start
from calmix.machine import tokens_at_once
from calmix.models import OpenModel
from calmix.models.attention import cache_argument, own_places, repeated_cache
from calmix.models.opening import end_tokens, generating, in_chat, quiet_transformers

ROWS = 64  # at a time
SHARED = 8  # tokens that prompts begin with alike, to be read once for all of them
HELD = 0.5e9  # bytes of keys and values, where that is room for more than a few rows
LEAVING = 8  # one row in so many has to have ended before others take their places
WIDER = 1.25  # by so much more rows there has to be room for, before what is held is moved
TAIL = 16  # tokens at the end of an answer in which a stop is looked for
LOOP, PERIOD = 64, 16  # an answer whose last tokens repeat so few is cut: greedily it never ends


@dataclass
class Prompt:
    """What a model is asked: token ids, how many it may answer with, and texts that end it.

    While it is answered, `over` says that it is done, and its first tokens, the `head`, are those
    of other prompts too.
    """

    ids: list[int]
    tokens: int
    until: tuple[str, ...] = ()
    written: list[int] = field(default_factory=list)
    ended: bool = False
    over: bool = False
    head: int = 0

    @property
    def needs(self) -> int:
        """The tokens that it takes with its answer."""
        return len(self.ids) + self.tokens

    def begins(self) -> list[int]:
        """Return the tokens by which prompts that begin alike are known."""
        return self.ids[:SHARED]


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
) -> list[tuple[str, bool]]:
    """Return a model's greedy answer to each prompt, in order, and whether it ended by itself: not
    at the limit or in a loop.

    A prompt too long for the model's context is cut on the left. `tick` is called with the number
    of answers that have just ended.
    """
    if not prompts:
        return []
    found, rows, context = [], [], opened.context or 2**31
    for one in prompts:
        room = min(one.tokens, context // 2)
        rows.append(Prompt(one.ids[-(context - room) :], room, one.until))
    for _, some in itertools.groupby(sorted(rows, key=lambda row: row.ids), key=Prompt.begins):
        alike = list(some)
        head = min(shared_start([row.ids for row in alike]), min(len(row.ids) for row in alike) - 1)
        for row in alike:
            row.head = head if head >= SHARED and len(alike) > 1 else 0
    with quiet_transformers():
        writer = _Writer(opened, context, tick)
        for group in writer.groups(rows):
            (writer.answer if writer.padded else writer.by_transformers)(group)
    for row in rows:
        text = opened.tokenizer.decode(row.written, skip_special_tokens=True)
        for stop in row.until:
            text = text.partition(stop)[0]
        found.append((text, row.ended))
    return found


class _Writer:
    def __init__(self, opened: OpenModel, context: int, tick: Tick | None) -> None:
        self.model: Any = opened.model
        self.tokenizer, self.tick = opened.tokenizer, tick
        self.device = next(self.model.parameters()).device
        self.ends = torch.tensor(end_tokens(opened), device=self.device)
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
        window = min(context, attention_window(self.model))
        self.window = window if self.padded and "position_ids" in known else 0
        self.read: tuple[list[int], Any] = ([], None)  # the head that was read last, and its cache
        self.held = 8 * tokens_at_once(self.device)  # tokens there is room for
        if self.padded:  # by the keys and values of one
            cache = self._read([0])
            taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            self.held = max(self.held, int(HELD / taken))

    def _read(self, ids: list[int]) -> Any:
        """Return the keys and values of tokens, one row."""
        from transformers import DynamicCache

        cache = DynamicCache()  # without a configuration, as `repeated_cache`
        self._forward(torch.tensor([ids], device=self.device), cache, None, None)
        return cache

    def groups(self, rows: Sequence[Prompt]) -> Iterator[list[Prompt]]:
        """Yield rows to answer together: all, or those of one length where they must not be padded.
        Those that need most room come first; what begins alike stands together."""

        def kind(row: Prompt) -> int:
            return len(row.ids) if row.needs > self.window else 0

        ordered = sorted(
            rows, key=lambda row: (kind(row), -row.tokens, row.begins(), -len(row.ids), row.ids)
        )
        for length, some in itertools.groupby(ordered, key=kind):
            group = list(some)
            step = self._width(group) if length else len(group)
            yield from (group[at : at + step] for at in range(0, len(group), step))

    def _width(self, rows: Sequence[Prompt]) -> int:
        """Return how many rows may be answered at a time."""
        return max(1, min(ROWS, len(rows), self.held // max(row.needs for row in rows)))

    def answer(self, rows: Sequence[Prompt]) -> None:
        """Answer rows: where one is over, the next one begins."""
        waiting, inside, held = list(rows), list[Prompt](), own_places(self.model)
        idle, tokens = Prompt([], 0, (), over=True), self.ends.new_zeros(0)
        while waiting or not all(row.over for row in inside):
            free = [n for n, row in enumerate(inside) if row.over]
            if len(free) >= max(1, len(inside) // LEAVING) or not inside:
                left = [n for n, row in enumerate(inside) if not row.over]
                due = [*(inside[n] for n in left), *waiting]
                width = self._width(due)
                if not len(inside) <= width < WIDER * len(inside):
                    here = torch.tensor(left, dtype=torch.int64, device=self.device)
                    held.hold(width, max(row.needs for row in due), here)
                    free = list(range(len(left), width))
                    inside = [*(inside[n] for n in left), *(idle for _ in free)]
                    tokens = torch.cat([tokens[here], tokens.new_zeros(len(free))])
                if waiting:
                    _, some = next(itertools.groupby(waiting[: len(free)], key=Prompt.begins))
                    joined = list(some)
                    waiting = waiting[len(joined) :]
                    for place, row in zip(free, joined, strict=False):
                        inside[place] = row
                    places = torch.tensor(free[: len(joined)], device=self.device)
                    tokens[places] = self._begin(joined, held, places)
                    continue
            seen = torch.arange(held.last + 1, device=self.device) <= held.at[:, None]
            scores = self._forward(tokens[:, None], held, seen.long(), held.at[:, None])
            tokens = scores.argmax(-1)
            held.move(torch.tensor([not row.over for row in inside], device=self.device))
            self._take(inside, tokens)

    def _begin(self, rows: Sequence[Prompt], held: Any, places: Any) -> Any:
        """Read the prompts of rows, of one head, into their places, and return the first token of
        each."""
        from transformers import DynamicCache

        ids, head, cache = [row.ids for row in rows], rows[0].head, DynamicCache()
        longest = max(map(len, ids))
        mask = torch.ones(len(rows), longest, dtype=torch.long, device=self.device)
        given = torch.zeros(len(rows), longest - head, dtype=torch.long, device=self.device)
        for row, one in enumerate(ids):
            pad = longest - len(one)
            mask[row, head : head + pad] = 0
            given[row, pad:] = torch.tensor(one[head:])
        place = mask.cumsum(-1) - 1
        if head:
            if self.read[0] != ids[0][:head]:
                self.read = ids[0][:head], self._read(ids[0][:head])
            cache = repeated_cache(self.read[1], len(rows))
        scores = self._forward(given, cache, mask, place[:, head:].clamp(min=0))
        held.fill(places, cache, mask)
        tokens = scores.argmax(-1)
        self._take(rows, tokens)
        return tokens

    def _forward(self, ids: Any, held: Any, mask: Any, place: Any) -> Any:
        more = {"position_ids": place, "logits_to_keep": 1}
        more = {key: more[key] for key in self.takes if more[key] is not None} | {self.cache: held}
        return self.model(ids, attention_mask=mask, use_cache=True, **more).logits[:, -1]

    def _take(self, rows: Sequence[Prompt], tokens: Any) -> None:
        """Note each row's next token, and which rows are over by now."""
        final = torch.isin(tokens, self.ends).tolist()
        for row, token, end in zip(rows, tokens.tolist(), final, strict=True):
            if row.over:
                continue
            if not end:
                row.written.append(token)
            tail = self.tokenizer.decode(row.written[-TAIL:]) if row.until else ""
            row.ended = end or any(stop in tail for stop in row.until)
            row.over = row.ended or len(row.written) >= row.tokens or loops(row.written)
            if row.over and self.tick is not None:
                self.tick(1)

    def by_transformers(self, rows: Sequence[Prompt]) -> None:
        from transformers import GenerationConfig

        given = torch.tensor([row.ids for row in rows], device=self.device)
        ends = self.ends.tolist()
        config = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=max(row.tokens for row in rows),
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
