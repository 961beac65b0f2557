"""Log-likelihoods of answers after contexts, fast.

What makes it fast is in `packing`: shared prefixes and shared beginnings run once. Beyond that
the output head sees only positions that predict a scored token, rows are batched by tokens, and
texts are tokenised in one go. Scores do not depend on the batch size beyond rounding.

The packed rows need a model that honours a four-dimensional attention mask, position ids and a
key-value cache. Whether it does is found out by running a few tokens both ways, not from a list
of names; any other model is scored one sequence a row, right-padded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from calmix.errors import ModelError
from calmix.evaluation import likelihood
from calmix.evaluation.likelihood import Progress, Ticker, close, decoder_and_head, log_sums
from calmix.evaluation.packing import Row, Scored, chain, plan
from calmix.models import OpenModel
from calmix.models.attention import cache_argument, repeated_cache
from calmix.models.opening import quiet_transformers

BATCH_TOKENS = 2048
ROW_TOKENS = 256
MAX_LENGTH = 2048  # where a model does not state its context
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Scorer:
    """An open model that gives likelihoods.

    Speed and memory depend on `batch_tokens`, the tokens in one forward pass; scores do not.
    `progress` is called with the requests done and in all, `truncated` counts each task's
    requests whose context was cut on the left to fit the model.
    """

    def __init__(
        self,
        opened: OpenModel,
        *,
        batch_tokens: int = BATCH_TOKENS,
        progress: Progress | None = None,
    ) -> None:
        self.opened, self.model, self.tokenizer = opened, opened.model, opened.tokenizer
        self.batch_tokens = batch_tokens
        self.device = next(self.model.parameters()).device
        self.max_length = opened.context or MAX_LENGTH
        self.truncated: Counter[str] = Counter()
        self.tick = Ticker(progress)
        self._decoder, self._head = decoder_and_head(self.model)
        self._window = attention_window(self.model)
        self._cache_key = cache_argument(self._decoder)
        self.packed = self._packs()

    def encode(self, texts: list[str], *, special: bool = True) -> list[list[int]]:
        """Return the token ids of texts; special tokens as the tokenizer itself adds them."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]

    def loglikelihood(self, requests: Sequence[tuple[str, str, str]]) -> list[float]:
        """Return the log-likelihood in nats of each answer, of requests (task, context, answer)."""
        pairs = self.pairs([one[1:] for one in requests])
        scored = []
        for owner, ((task, *_), (context, answer)) in enumerate(zip(requests, pairs, strict=True)):
            if not 0 < len(answer) <= self.max_length:
                raise ModelError(
                    f"task {task} has an answer of {len(answer)} tokens; "
                    f"{self.opened.name} takes 1 to {self.max_length}: leave that task out"
                )
            ids = [*context, *answer]
            if len(ids) > self.max_length + 1:  # the last token is only predicted
                self.truncated[task] += 1
                ids = ids[-(self.max_length + 1) :]
            scored.append(Scored(ids, len(ids) - len(answer), owner))
        with torch.inference_mode():
            self.tick.total += len(scored)
            totals = [0.0] * len(scored)
            for rows, hidden in self._hidden(scored):
                targets = [target for row in rows for target in row.targets]
                for target, value in zip(targets, self._values(rows, hidden).tolist(), strict=True):
                    totals[target.owner] += value
                self.tick(len({target.owner for target in targets}))  # it is in one row whole
        return totals

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Tokenise pairs as lm-evaluation-harness does: together, then split by the context, which
        no item is without."""
        contexts = [context.rstrip() for context, _ in texts]
        distinct = list(dict.fromkeys(contexts))
        known = dict(zip(distinct, self.encode(distinct), strict=True))
        whole = self.encode([context + answer for context, answer in texts])
        return [(known[context], ids[len(known[context]) :])
                for context, ids in zip(contexts, whole, strict=True)]  # fmt: skip

    def _hidden(self, scored: list[Scored]) -> Iterator[tuple[list[Row], Tensor]]:
        """Yield batches of rows with the last hidden states of their nodes."""
        window = self._window if self.packed else 0
        short = [one for one in scored if len(one.ids) - 1 <= window]
        for prefix, beside in plan(short, row_tokens=ROW_TOKENS):
            cache = self._remember(prefix) if prefix else None
            for rows in batches(beside, self.batch_tokens):
                yield rows, self._run_packed(rows, cache, len(prefix))
        chains = [chain(one) for one in scored if len(one.ids) - 1 > window]
        for rows in batches(chains, self.batch_tokens):
            yield rows, self._run_plain(rows)

    def _run_plain(self, rows: list[Row]) -> Tensor:
        """Run right-padded chains; what follows a token never changes it."""
        return self._decoder(input_ids=padded(rows).to(self.device), use_cache=False)[0]

    def _remember(self, prefix: list[int]) -> Any:
        """Return the keys and values of a prefix, one row."""
        from transformers import DynamicCache

        cache = DynamicCache()  # without a configuration: it keeps all, sliding windows included
        ids = torch.tensor([prefix], device=self.device)
        self._decoder(input_ids=ids, use_cache=True, **{self._cache_key: cache})
        return cache

    def _run_packed(self, rows: list[Row], cache: Any, prefix: int) -> Tensor:
        """Return the last hidden states of packed rows, shape (rows, nodes, width)."""
        count, length, dtype = len(rows), len(rows[0]), self.model.dtype
        visible = torch.zeros(count, 1, length, prefix + length, dtype=torch.bool)
        visible[..., :prefix] = True
        # A padded node sees itself, so that no line of the mask is empty.
        visible[..., prefix:] |= torch.eye(length, dtype=torch.bool)
        for number, row in enumerate(rows):
            size = len(row)
            visible[number, 0, :size, prefix : prefix + size] = torch.from_numpy(row.visible())
        mask = torch.zeros(visible.shape, dtype=dtype)
        mask.masked_fill_(~visible, torch.finfo(dtype).min)
        past = {} if cache is None else {self._cache_key: repeated_cache(cache, count)}
        return self._decoder(
            input_ids=padded(rows).to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=(visible[:, 0].sum(-1) - 1).to(self.device),  # all before it
            use_cache=bool(past),
            **past,
        )[0]

    def _values(self, rows: list[Row], hidden: Tensor) -> Tensor:
        """Return the log-probability of every target of the rows, in order."""
        width, device = hidden.shape[1], hidden.device
        places = torch.tensor([n * width + t.node for n, r in enumerate(rows) for t in r.targets])
        tokens = torch.tensor([t.token for row in rows for t in row.targets])
        distinct, which = places.unique(return_inverse=True)
        states = hidden.flatten(0, 1)[distinct.to(device)]
        values = torch.empty(len(tokens), device=device)
        for at in range(0, len(states), likelihood.HEAD_TOKENS):
            logits = self._head(states[at : at + likelihood.HEAD_TOKENS])
            here = ((which >= at) & (which < at + likelihood.HEAD_TOKENS)).nonzero().flatten()
            # Counted on the host, and sent at once: nothing waits for the device.
            line, token, here = torch.stack([which[here] - at, tokens[here], here]).to(device)
            right = logits[line, token].float()
            values[here] = right - log_sums(logits)[line]
        return values.cpu()

    @torch.inference_mode()
    def _packs(self) -> bool:
        """Find out whether the model runs packed rows: three lines in a tree, and each alone."""
        size = self.model.get_input_embeddings().weight.shape[0]
        # Distinct, spread-out tokens; the same ones every time. Four of them are the prefix.
        ids = [(7 + 31 * i * i + 17 * i) % size for i in range(20)]
        lines = [ids[:12], ids[:8] + ids[12:16], ids[:4] + ids[14:20]]
        row = Row(
            ids[4:12] + ids[12:16] + ids[14:20],
            [*range(-1, 7), 3, *range(8, 11), -1, *range(12, 17)],
        )
        other = Row(row.ids[:5], row.parent[:5])  # shorter: padding is tried too
        chains = [chain(Scored([*line, 0], 1)) for line in lines]
        with quiet_transformers():
            try:
                packed = self._run_packed([row, other], self._remember(ids[:4]), 4)
                bare = self._run_packed(chains[:1], None, 0)
            except Exception:  # a model without masks, caches or positions fails in its own way
                return False
            first, second, third = (self._run_plain([one])[0] for one in chains)
        limit = TOLERANCE.get(self.model.dtype, 1e-1)
        return all(close(one, alone, limit) for one, alone in (
            (packed[0, 7], first[-1]), (packed[0, 11], second[-1]), (packed[0, 17], third[-1]),
            (packed[1, :5], first[4:9]), (bare[0], first),
        ))  # fmt: skip


def attention_window(model: Any) -> float:
    """Return how many tokens a model's narrowest attention sees; infinity if all of them.

    A ready-made mask replaces a sliding window, so packed rows must stay within it.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "use_sliding_window", True) is False:
        return float("inf")
    keys = ("sliding_window", "window_size", "attention_chunk_size")
    known = (getattr(config, key, None) for key in keys)
    return float(min((value for value in known if isinstance(value, int)), default=float("inf")))


def padded(rows: Sequence[Row]) -> Tensor:
    """Return the tokens of rows, padded on the right."""
    return pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)


def batches(rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """Yield rows, longest first, in batches of at most `tokens` tokens with padding."""
    left = sorted(rows, key=len, reverse=True)
    while left:
        count = max(1, tokens // max(1, len(left[0])))
        yield left[:count]
        left = left[count:]
