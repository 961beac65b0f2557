"""Fast log-likelihoods of answers given contexts.

Scoring a benchmark means running thousands of sequences with common prefixes: the choices of a
question share the question, and the questions of a task share its worked examples. This scorer
computes shared tokens only once. A *run* is a group of sequences with a long common prefix, whose
keys and values are cached. A *tree* holds the remainders of sequences that share further tokens,
each shared token once. A *row* packs several trees side by side, so that rows have nearly equal
length. In addition, the output head runs only at positions that predict a scored token, batches
are sized by tokens, and texts are tokenised in one call. Scores depend on the batch size only by
rounding.

Packed rows need a model that supports four-dimensional attention masks, position ids and a
key-value cache. This is tested by running a few tokens both ways, not looked up by name; other
models are scored one sequence per right-padded row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from calmix.errors import ModelError
from calmix.evaluation import likelihood
from calmix.evaluation.likelihood import Progress, close, decoder_and_head, log_sums
from calmix.machine import tokens_at_once
from calmix.memory import halving
from calmix.models.caches import cache_argument, repeated_cache
from calmix.models.loading import quiet_transformers, to_continue
from calmix.models.opening import OpenModel
from calmix.precision import dtype_name

ROW_TOKENS = 256
MAX_LENGTH = 2048  # if a model does not state its context
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

MIN_PREFIX = 48  # tokens; shorter prefixes are cheaper to recompute than to cache
MIN_SHARED = 6  # fewest common tokens for two neighbours to share a tree
OPEN_ROWS = 64  # most rows kept open while packing


def not_finite(opened: OpenModel, what: str) -> ModelError:
    """Return the error about a model whose `what` is not finite."""
    kind = dtype_name(opened.model.dtype)
    hint = "" if kind == "float32" else "try --dtype float32, or "
    return ModelError(
        f"{opened.name} gives {what} that are not finite in {kind}: {hint}check its weights"
    )


@dataclass
class PackedRow:
    """The token nodes of several trees, and the tokens to score.

    `parent` is the index of each node's predecessor, -1 at a root, always smaller than its own.
    `targets` are (owner, node, token): a token of the owner's sequence, predicted at the node.
    """

    ids: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


# Token ids of a sequence, the first position that is scored (at least 1), and its owner's number.
Scored = tuple[list[int], int, int]
PackedRun = tuple[
    list[int], list[PackedRow]
]  # a prefix, possibly empty, and the rows that follow it


class Scorer:
    """Scores requests with an open model.

    `progress` is called with the requests done and in total. `truncated` counts, by task, the
    requests whose context was truncated on the left to fit the model.
    """

    def __init__(self, opened: OpenModel, *, progress: Progress | None = None) -> None:
        self.opened, self.model, self.tokenizer = opened, opened.model, opened.tokenizer
        self.device = next(self.model.parameters()).device
        self.batch_tokens = tokens_at_once(self.device)
        self.max_length = opened.context or MAX_LENGTH
        self.truncated: Counter[str] = Counter()
        self.progress, self.done, self.total = progress, 0, 0
        self._decoder, self._head = decoder_and_head(self.model)
        # Longest sequence that is packed.
        self.window = attention_window(self.model) if self._packs() else 0.0

    def tick(self, count: int) -> None:
        """Count requests that are done, and report them."""
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)

    def loglikelihood(self, requests: Sequence[tuple[str, str, str]]) -> list[float]:
        """Return the log-likelihood of each answer in nats, for requests (task, context, answer).

        Context and answer are tokenised together, then split, as in lm-evaluation-harness.
        """
        if not requests:
            return []
        contexts = [context.rstrip() for _, context, _ in requests]
        distinct = list(dict.fromkeys(contexts))
        encoded = dict(zip(distinct, to_continue(self.tokenizer, distinct), strict=True))
        texts = [context + answer for _, context, answer in requests]
        whole, scored = to_continue(self.tokenizer, texts), []
        for owner, (request, text, ids) in enumerate(zip(requests, contexts, whole, strict=True)):
            task, context = request[0], encoded[text]
            answer = ids[len(context) :]
            if not 0 < len(answer) <= self.max_length:
                raise ModelError(
                    f"task {task} has an answer of {len(answer)} tokens; {self.opened.name} "
                    f"takes 1 to {self.max_length}: leave that task out"
                )
            ids = [*context, *answer]
            if len(ids) > self.max_length + 1:  # the last token is only predicted
                self.truncated[task] += 1
                ids = ids[-(self.max_length + 1) :]
            scored.append((ids, len(ids) - len(answer), owner))
        with torch.inference_mode():
            self.total += len(scored)
            totals = [0.0] * len(scored)
            for rows, hidden in self._hidden(scored):
                owners = [owner for row in rows for owner, _, _ in row.targets]
                values = self._values(rows, hidden)
                if not values.isfinite().all():
                    raise not_finite(self.opened, "log-likelihoods")
                for owner, value in zip(owners, values.tolist(), strict=True):
                    totals[owner] += value
                self.tick(len({*owners}))  # a request is never split between rows
        return totals

    def _hidden(self, scored: list[Scored]) -> Iterator[tuple[list[PackedRow], Tensor]]:
        """Yield batches of rows and the last hidden states of their nodes."""
        short = [one for one in scored if len(one[0]) - 1 <= self.window]
        for prefix, beside in packed_runs(short, row_tokens=ROW_TOKENS):
            cache = prefix_cache(self._decoder, prefix) if prefix else None
            run = partial(self._run_packed, cache=cache, prefix=len(prefix))
            yield from batches(beside, self.batch_tokens, run)
        long = [one for one in scored if len(one[0]) - 1 > self.window]
        yield from batches(trees(long, [0] * len(long)), self.batch_tokens, self._run)

    def _run(self, rows: Sequence[PackedRow], **more: Any) -> Tensor:
        """Return the last hidden states of right-padded rows; causality makes padding harmless."""
        ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
        return self._decoder(input_ids=ids.to(self.device), **{"use_cache": False} | more)[0]

    def _run_packed(self, rows: list[PackedRow], cache: Any, prefix: int) -> Tensor:
        """Return the last hidden states of packed rows, shape (rows, nodes, width)."""
        count, length, dtype = len(rows), len(rows[0]), self.model.dtype
        # A node sees the prefix, itself and its ancestors. Padding sees the prefix and itself, so
        # that no line of the mask is empty.
        visible = np.ones((count, 1, length, prefix + length), dtype=bool)
        visible[..., prefix:] = np.eye(length, dtype=bool)
        for lines, row in zip(visible[:, 0, :, prefix:], rows, strict=True):
            for node, parent in enumerate(row.parent):
                if parent >= 0:
                    lines[node] |= lines[parent]
        mask = torch.zeros(visible.shape, dtype=dtype)
        mask.masked_fill_(torch.from_numpy(~visible), torch.finfo(dtype).min)
        key = cache_argument(self._decoder)
        past = {} if cache is None else {key: repeated_cache(cache, count)}
        position = torch.from_numpy(visible[:, 0].sum(-1) - 1).to(self.device)  # all before it
        return self._run(
            rows,
            attention_mask=mask.to(self.device),
            position_ids=position,
            use_cache=bool(past),
            **past,
        )

    def _values(self, rows: list[PackedRow], hidden: Tensor) -> Tensor:
        """Return the log-probability of each target of the rows, in order."""
        width, device = hidden.shape[1], hidden.device
        targets = [
            (n * width + node, token)
            for n, row in enumerate(rows)
            for _, node, token in row.targets
        ]
        places, tokens = torch.tensor(targets).T
        distinct, which = places.unique(return_inverse=True)
        states = hidden.flatten(0, 1)[distinct.to(device)]
        values = torch.empty(len(tokens), device=device)
        for at in range(0, len(states), likelihood.HEAD_TOKENS):
            logits = self._head(states[at : at + likelihood.HEAD_TOKENS])
            part = ((which >= at) & (which < at + likelihood.HEAD_TOKENS)).nonzero().flatten()
            # Indexed on the host and sent together: no synchronisation with the device.
            line, token, part = torch.stack([which[part] - at, tokens[part], part]).to(device)
            right = logits[line, token].float()
            values[part] = right - log_sums(logits)[line]
        return values.cpu()

    @torch.inference_mode()
    def _packs(self) -> bool:
        """Test whether the model supports packed rows: three sequences in a tree, and alone."""
        size = self.model.get_input_embeddings().weight.shape[0]
        # Distinct, spread-out tokens, always the same. The first four are the prefix.
        ids = [(7 + 31 * i * i + 17 * i) % size for i in range(20)]
        lines = [ids[:12], ids[:8] + ids[12:16], ids[:4] + ids[14:20]]
        row = PackedRow(
            ids[4:12] + ids[12:16] + ids[14:20],
            [*range(-1, 7), 3, *range(8, 11), -1, *range(12, 17)],
        )
        other = PackedRow(row.ids[:5], row.parent[:5])  # shorter, to test padding too
        chains = trees([([*line, 0], 1, 0) for line in lines], [0] * len(lines))
        with quiet_transformers():
            try:
                packed = self._run_packed([row, other], prefix_cache(self._decoder, ids[:4]), 4)
                bare = self._run_packed(chains[:1], None, 0)
            except Exception:  # models without masks, caches or position ids fail in any way
                return False
            first, second, third = (self._run([one])[0] for one in chains)
        limit = TOLERANCE.get(self.model.dtype, 1e-1)
        return all(
            close(one, alone, limit)
            for one, alone in (
                (packed[0, 7], first[-1]),
                (packed[0, 11], second[-1]),
                (packed[0, 17], third[-1]),
                (packed[1, :5], first[4:9]),
                (bare[0], first),
            )
        )


def prefix_cache(decoder: Any, ids: list[int]) -> Any:
    """Return the keys and values of one row of tokens."""
    from transformers import DynamicCache

    cache = DynamicCache()  # without a config: with one, it would drop all but the window
    row = torch.tensor([ids], device=next(decoder.parameters()).device)
    decoder(input_ids=row, use_cache=True, **{cache_argument(decoder): cache})
    return cache


def attention_window(model: Any) -> float:
    """Return a model's narrowest attention window in tokens; infinity if it has none.

    A custom mask replaces a sliding window, so packed rows must be no longer than the window.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "use_sliding_window", True) is False:
        return float("inf")
    keys = ("sliding_window", "window_size", "attention_chunk_size")
    known = (getattr(config, key, None) for key in keys)
    return float(min((value for value in known if isinstance(value, int)), default=float("inf")))


def batches(
    rows: Sequence[PackedRow], tokens: int, run: Callable[[list[PackedRow]], Tensor]
) -> Iterator[tuple[list[PackedRow], Tensor]]:
    """Yield rows, longest first, in batches of at most `tokens` tokens including padding, and what
    running them returns; in smaller ones where a device has no memory for that."""
    left = sorted(rows, key=len, reverse=True)

    def run_next(count: int) -> Tensor:
        return run(left[:count])

    while left:
        count, result = halving(run_next, min(len(left), max(1, tokens // max(1, len(left[0])))))
        yield left[:count], result
        left = left[count:]


def packed_runs(sequences: Iterable[Scored], *, row_tokens: int) -> list[PackedRun]:
    """Pack sequences into runs of rows; each token to score occurs exactly once per sequence.

    A row exceeds `row_tokens` only if a single sequence does. The plan depends on the sequences,
    not on their order.
    """
    ordered = sorted(sequences, key=lambda scored: scored[:2])
    arrays = [np.asarray(ids[:-1], dtype=np.int64) for ids, _, _ in ordered]
    # Common tokens of k and k - 1.
    shared = [0, *(int((a[: len(b)] == b[: len(a)]).cumprod().sum()) for a, b in pairwise(arrays))]

    def size(low: int, high: int, prefix: int) -> int:
        new = sum(len(arrays[k]) - shared[k] for k in range(low, high))
        return new + shared[low] - prefix

    def length(low: int, high: int) -> int:
        # One context token must stay in the row to predict the first scored token.
        reach = min(start - 1 for _, start, _ in ordered[low:high])
        return min(reach, *shared[low + 1 : high]) if high - low > 1 else 0

    def split(low: int, high: int, prefix: int) -> list[tuple[int, int, int]]:
        """Split a range of sequences at its shortest common prefixes, while that pays off."""
        least = min(shared[low + 1 : high])
        cuts = [low, *(k for k in range(low + 1, high) if shared[k] == least), high]
        parts = [(a, b, length(a, b)) for a, b in pairwise(cuts)]
        worth = all(p >= prefix + MIN_PREFIX and size(a, b, p) >= row_tokens for a, b, p in parts)
        if len(parts) > 1 and worth:
            return [piece for part in parts for piece in split(*part)]
        return [(low, high, prefix)]

    groups, loose = list[tuple[Sequence[int], int]](), list[int]()  # members and their prefix
    apart = (k for k in range(1, len(ordered)) if shared[k] < MIN_PREFIX)
    for low, high in pairwise(sorted({0, *apart, len(ordered)})):
        prefix = length(low, high)
        if prefix < MIN_PREFIX or size(low, high, prefix) < row_tokens:
            loose += range(low, high)  # a row or less: trees already share all tokens
        else:
            groups += [(range(a, b), most) for a, b, most in split(low, high, prefix)]
    runs = list[PackedRun]()
    for members, most in groups + [(loose, 0)] * bool(loose):
        starts = [0, *(shared[b] - most if b == a + 1 else 0 for a, b in pairwise(members))]
        rows = trees([ordered[at] for at in members], starts, most, row_tokens)
        runs.append((ordered[members[0]][0][:most], fill_rows(rows, row_tokens)))
    return runs


def trees(
    members: Sequence[Scored], shared: Sequence[int], prefix: int = 0, row_tokens: int = 0
) -> list[PackedRow]:
    """Build trees over neighbours; start a new one when they share little or a tree gets long.

    `shared` is how many tokens after the prefix each sequence shares with the previous one.
    """
    rows, path = list[PackedRow](), list[int]()
    for (ids, start, owner), common in zip(members, shared, strict=True):
        ids = ids[prefix:]
        if common < MIN_SHARED or len(rows[-1]) + len(ids) - 1 - common > row_tokens:
            rows.append(PackedRow())
            path, common = [], 0
        tree, path = rows[-1], path[:common]
        for token in ids[common:-1]:
            tree.ids.append(token)
            tree.parent.append(path[-1] if path else -1)
            path.append(len(tree) - 1)
        for at in range(start - prefix, len(ids)):
            tree.targets.append((owner, path[at - 1], ids[at]))
    return rows


def fill_rows(partial: list[PackedRow], row_tokens: int) -> list[PackedRow]:
    """Pack trees into rows of at most `row_tokens` nodes: best fit, longest first."""
    rows: list[PackedRow] = []
    room: list[list[int]] = []  # [free tokens, row] of at most OPEN_ROWS rows
    for tree in sorted(partial, key=len, reverse=True):
        best = min((one for one in room if one[0] >= len(tree)), default=None)
        if best is None:
            rows.append(PackedRow())
            room.append(best := [row_tokens, len(rows) - 1])
        row = rows[best[1]]
        base = len(row)
        row.ids += tree.ids
        row.parent += [p + base if p >= 0 else -1 for p in tree.parent]
        row.targets += [(owner, node + base, token) for owner, node, token in tree.targets]
        best[0] -= len(tree)
        if len(room) > OPEN_ROWS:
            room.remove(min(room))
    return rows
