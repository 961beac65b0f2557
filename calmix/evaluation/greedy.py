"""Greedy decoding with continuous batching: a common prompt prefix is computed once, and finished
rows are replaced by waiting prompts.

Models without a key-value cache (Mamba, hybrids) run in batches of equal prompt length through
transformers.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from calmix.evaluation.likelihood import Progress
from calmix.evaluation.prompts import before_stops, loops
from calmix.evaluation.scorer import attention_window, not_finite, prefix_cache
from calmix.evaluation.tasks import shared_start
from calmix.machine import tokens_at_once
from calmix.models.blocks import decoder_of
from calmix.models.caches import cache_argument, mixes_rows, own_places, repeated_cache
from calmix.models.chat import end_tokens, generating, rendered
from calmix.models.loading import quiet_transformers, to_continue
from calmix.models.opening import OpenModel

ROWS = 64  # largest batch
FEWER = 0.6  # size of rearranged batches over that of others
SHARED_TOKENS = 8  # shortest common prefix, in tokens, that is computed once
HELD = 0.5e9  # smallest capacity of the key-value cache, in bytes
LEAVING = 8  # refill the batch once one row in this many has finished
WIDER = 1.25  # reallocate the cache once there is room for this many times more rows
TAIL = 16  # last tokens of an answer that are searched for a stop text
LOOP, PERIOD = 64, 16  # stop if the last LOOP tokens repeat with at most this PERIOD


@dataclass
class Prompt:
    """A prompt and its answer: token ids, the most tokens to generate, and texts that stop it.

    During generation `written` holds the answer's tokens and `over` is set once it is finished;
    `head` is the length of the prefix shared with other prompts.
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
        """Tokens of the prompt and its longest answer."""
        return len(self.ids) + self.tokens

    def begins(self) -> list[int]:
        """Return the first tokens, by which prompts are grouped."""
        return self.ids[:SHARED_TOKENS]


def prompt(
    tokenizer: Any,
    chat: Sequence[Mapping[str, Any]] | None,
    plain: str,
    tokens: int,
    until: tuple[str, ...],
    **how: Any,
) -> Prompt:
    """Make a prompt of `chat` in the model's chat template if it has one, else of `plain` text.
    `how` are options of the template, such as `tools`."""
    text = None if chat is None else rendered(tokenizer, chat, **how)
    if text is None:
        return Prompt(to_continue(tokenizer, [plain])[0], tokens, until)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Prompt(ids, tokens)


@torch.inference_mode()
def answers(
    opened: OpenModel,
    prompts: Sequence[Prompt],
    *,
    rearranged: bool = False,
    progress: Progress | None = None,
) -> list[tuple[str, bool]]:
    """Return a model's greedy answer to each prompt, in order, and whether it ended by itself
    rather than at the limit or in a loop.

    Prompts too long for the model's context are truncated on the left. `rearranged` prompts are
    decoded in another order and in smaller batches, which changes the rounding. `progress` is
    called with the number of answers finished and in total.
    """
    if not prompts:
        return []
    texts, rows, context = [], [], opened.context or 2**31
    for one in prompts:
        room = min(one.tokens, max(context // 2, context - len(one.ids)))
        rows.append(Prompt(one.ids[-(context - room) :], room, one.until))
    for _, some in itertools.groupby(sorted(rows, key=lambda row: row.ids), key=Prompt.begins):
        alike = list(some)
        ids = [row.ids for row in alike]
        head = min(shared_start(ids), min(map(len, ids)) - 1)
        for row in alike:
            row.head = head if head >= SHARED_TOKENS and len(alike) > 1 else 0
    with quiet_transformers():
        writer = _Writer(opened, context, len(rows), rearranged, progress)
        for group in writer.groups(rows):
            (writer.answer if writer.padded else writer.by_transformers)(group)
    decode = partial(opened.tokenizer.decode, skip_special_tokens=True)
    # Some decoders drop the first space of a text: put a letter before it.
    before = opened.tokenizer("a", add_special_tokens=False)["input_ids"]
    start = len(decode(before))
    for row in rows:
        text = decode([*before, *row.written])[start:]
        texts.append((before_stops(text, row.until), row.ended))
    return texts


class _Writer:
    def __init__(
        self,
        opened: OpenModel,
        context: int,
        total: int,
        rearranged: bool,
        progress: Progress | None,
    ) -> None:
        self.model, self.opened, self.rearranged = opened.model, opened, rearranged
        self.tokenizer, self.progress = opened.tokenizer, progress
        self.done, self.total = 0, total
        self.device = next(self.model.parameters()).device
        self.ends = torch.tensor(end_tokens(opened), dtype=torch.int64, device=self.device)
        known = inspect.signature(self.model.forward).parameters
        self.takes = {"position_ids", "logits_to_keep"} & set(known)
        share = FEWER if rearranged else 1.0
        most = 1 if mixes_rows(self.model) else max(1, int(share * min(ROWS, total)))
        self.cache, self.most = cache_argument(self.model), most
        config = self.model.config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        self.padded = (
            self.cache in known
            and kinds <= {"full_attention", "sliding_attention"}
            and not getattr(self.model, "_is_stateful", False)
        )
        # Padding would count as tokens in a sliding window, and in a model without position ids.
        window = min(context, attention_window(self.model))
        self.window = window if self.padded and "position_ids" in known else 0
        self.read: tuple[list[int], Any] = ([], None)  # the last shared prefix, and its cache
        self.capacity = 8 * tokens_at_once(self.device)  # tokens that fit into memory
        if self.padded:
            cache = prefix_cache(decoder_of(self.model), [0])
            per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            self.capacity = max(self.capacity, int(HELD / per_token))
        self.capacity = int(share * self.capacity)

    def groups(self, rows: Sequence[Prompt]) -> Iterator[list[Prompt]]:
        """Yield rows to answer together: all that may be padded, and the others by equal length.
        Rows with the longest answers come first, then those with a common prefix are together."""

        def kind(row: Prompt) -> int:
            return len(row.ids) if row.needs > self.window else 0

        ordered = sorted(
            rows, key=lambda row: (row.begins(), -len(row.ids), row.ids), reverse=self.rearranged
        )
        ordered.sort(key=lambda row: (kind(row), -row.tokens))
        for length, some in itertools.groupby(ordered, key=kind):
            group = list(some)
            step = self._width(group) if length else len(group)
            yield from (group[at : at + step] for at in range(0, len(group), step))

    def _width(self, rows: Sequence[Prompt]) -> int:
        """Return how many of the rows fit into one batch."""
        return max(1, min(self.most, len(rows), self.capacity // max(row.needs for row in rows)))

    def answer(self, rows: Sequence[Prompt]) -> None:
        """Answer rows; those that finish are replaced by waiting ones."""
        waiting, batch, cache = list(rows), list[Prompt](), own_places(self.model)
        exact = rows[0].needs > self.window  # a row that joined late would see too few tokens
        idle, tokens = Prompt([], 0, (), over=True), self.ends.new_zeros(0)
        while waiting or not all(row.over for row in batch):
            free = [n for n, row in enumerate(batch) if row.over]
            leaving = 1 if exact and waiting else max(1, len(batch) // LEAVING)
            if len(free) >= leaving or not batch:
                active = [n for n, row in enumerate(batch) if not row.over]
                due = [*(batch[n] for n in active), *waiting]
                width = self._width(due)
                if not len(batch) <= width < WIDER * len(batch):
                    remaining = torch.tensor(active, dtype=torch.int64, device=self.device)
                    cache.hold(width, max(row.needs for row in due), remaining)
                    free = list(range(len(active), width))
                    batch = [*(batch[n] for n in active), *(idle for _ in free)]
                    tokens = torch.cat([tokens[remaining], tokens.new_zeros(len(free))])
                if waiting:
                    _, some = next(itertools.groupby(waiting[: len(free)], key=Prompt.begins))
                    joined = list(some)
                    waiting = waiting[len(joined) :]
                    for place, row in zip(free, joined, strict=False):
                        batch[place] = row
                    places = torch.tensor(free[: len(joined)], device=self.device)
                    tokens[places] = self._prefill(joined, cache, places)
                    continue
            mask = torch.arange(cache.last + 1, device=self.device) <= cache.at[:, None]
            tokens = self._forward(tokens[:, None], cache, mask.long(), cache.at[:, None])
            cache.move(torch.tensor([not row.over for row in batch], device=self.device))
            self._append(batch, tokens)

    def _prefill(self, rows: Sequence[Prompt], target: Any, places: Any) -> Any:
        """Prefill rows with a common prefix into their places; return the first token of each."""
        from transformers import DynamicCache

        ids, head, cache = [row.ids for row in rows], rows[0].head, DynamicCache()
        longest = max(map(len, ids))
        mask = torch.ones(len(rows), longest, dtype=torch.long, device=self.device)
        inputs = torch.zeros(len(rows), longest - head, dtype=torch.long, device=self.device)
        for row, one in enumerate(ids):
            pad = longest - len(one)
            mask[row, head : head + pad] = 0
            inputs[row, pad:] = torch.tensor(one[head:])
        positions = (mask.cumsum(-1) - 1)[:, head:].clamp(min=0)
        if head:
            if self.read[0] != ids[0][:head]:
                self.read = ids[0][:head], prefix_cache(decoder_of(self.model), ids[0][:head])
            cache = repeated_cache(self.read[1], len(rows))
        tokens = self._forward(inputs, cache, mask, positions)
        target.fill(places, cache, mask)
        self._append(rows, tokens)
        return tokens

    def _forward(self, ids: Any, cache: Any, mask: Any, positions: Any) -> Any:
        more = {"position_ids": positions, "logits_to_keep": 1}
        more = {key: more[key] for key in self.takes} | {self.cache: cache}
        output = self.model(ids, attention_mask=mask, use_cache=True, **more)
        return self._sound(None, output.logits[:, -1]).argmax(-1)

    def _sound(self, _: Any, logits: Any) -> Any:
        """Return logits of shape (rows, vocabulary), or raise a `ModelError` if any is nan."""
        if logits.amax(-1).isnan().any():  # nan is the largest
            raise not_finite(self.opened, "logits")
        return logits

    def _append(self, rows: Sequence[Prompt], tokens: Any) -> None:
        """Append the next token of each row, and mark the rows that are finished."""
        final = torch.isin(tokens, self.ends).tolist()
        for row, token, end in zip(rows, tokens.tolist(), final, strict=True):
            if row.over:
                continue
            if not end:
                row.written.append(token)
            tail = self.tokenizer.decode(row.written[-TAIL:]) if row.until else ""
            row.ended = end or any(stop in tail for stop in row.until)
            row.over = (
                row.ended or len(row.written) >= row.tokens or loops(row.written, LOOP, PERIOD)
            )
            self.done += row.over
            if row.over and self.progress is not None:
                self.progress(self.done, self.total)

    def by_transformers(self, rows: Sequence[Prompt]) -> None:
        from transformers import GenerationConfig

        inputs = torch.tensor([row.ids for row in rows], device=self.device)
        ends = self.ends.tolist()
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(row.tokens for row in rows),
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        with generating(self.model, config):
            generated = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config,
                logits_processor=[self._sound],
            )
        for step in generated[:, inputs.shape[1] :].T:
            self._append(rows, step)
