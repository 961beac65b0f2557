"""Sample rows of a fixed number of tokens from a model, in batches, with transformers' generation.

Every row starts with an opener. When the model ends its text, the row's next opener follows, so
that all rows of a batch have one length, nothing is padded, and every step of every row is used.
A row's random numbers depend on its own number, so rows can be batched in any way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from calmix.errors import InputError
from calmix.files import write_bytes
from calmix.memory import halving, plan_writing
from calmix.models.caches import cache_argument, mixes_rows, reserved_cache
from calmix.models.chat import end_tokens, generating
from calmix.models.loading import quiet_transformers
from calmix.models.opening import OpenModel

BATCH = 128  # rows at a time; on two cores throughput does not grow beyond
MOSTLY_EMPTY = 0.5  # share of texts without a sampled token above which a model is refused
STRETCH = 256  # entries of a distribution that are summed before the running sum is taken
Tick = Callable[[int, int], None]  # takes numbers of rows, and of tokens that each has
WRITER_VERSION = 5  # raised when the same request writes other tokens, to invalidate the cache


@dataclass(frozen=True)
class WriteRequest:
    """Rows to write.

    Attributes:
        openers: for each row the openers it uses in turn, each of at least one token id.
        length: tokens per row, openers included.
        temperatures: one per row.
        seed: row i uses the random stream (seed, i).
        top_k, top_p: sample from the k likeliest tokens, then the fewest of probability p.
        repetition_penalty: on tokens already in the text (CTRL, arXiv 1909.05858).
    """

    openers: Sequence[Sequence[Sequence[int]]]
    length: int
    temperatures: Sequence[float]
    seed: int
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0


class Written(NamedTuple):
    """Rows the model wrote.

    Attributes:
        ids: int64 (rows, length).
        nll: float32 (rows, length), -log p of each token under the model at temperature 1,
            given the tokens before it in its row; nan for the first.
        sampled: bool (rows, length), false for the tokens of openers.
    """

    ids: Tensor
    nll: Tensor
    sampled: Tensor


class Sampler:
    """A logits processor that leaves each row one token: the opener's next, or a sampled one."""

    def __init__(
        self, request: WriteRequest, rows: range, ends: Sequence[int], device: Any, tick: Tick
    ) -> None:
        self.request, self.ends, self.tick = request, set(ends), tick
        count, length = len(rows), request.length
        # Apple's GPUs have no float64, which the running sums use.
        self.device = device = torch.device("cpu") if device.type == "mps" else device
        temperatures = [request.temperatures[row] for row in rows]
        self.temperatures = torch.tensor(temperatures, dtype=torch.float32, device=device)
        uniform = [np.random.default_rng([request.seed, row]).random(length) for row in rows]
        self.uniform = torch.from_numpy(np.stack(uniform)).to(device)
        self.turns = [itertools.cycle(request.openers[row]) for row in rows]
        self.pending = [list(next(turns))[1:] for turns in self.turns]
        self.start = [0] * count  # of each row's text
        self.nll = torch.full((count, length), math.nan, device=device)
        self.sampled = torch.zeros((count, length), dtype=torch.bool)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        from transformers import RepetitionPenaltyLogitsProcessor

        at, request = ids.shape[1], self.request
        logits = plain = scores.to(self.device, torch.float32)
        forced = [row.pop(0) if row else -1 for row in self.pending]
        # One copy to the device, and one back.
        prescribed, start = torch.tensor([forced, self.start]).to(self.device)
        if request.repetition_penalty != 1:
            ids, start = ids.to(self.device), start[:, None].clamp(max=at - 1)
            place = torch.arange(at, device=self.device)[None]
            text = torch.where(place >= start, ids, ids.gather(1, start))
            logits = RepetitionPenaltyLogitsProcessor(request.repetition_penalty)(text, plain)
        uniform, k, p = self.uniform[:, at], request.top_k, request.top_p
        sampled = sample(logits, self.temperatures, uniform, top_k=k, top_p=p)
        tokens = torch.where(prescribed >= 0, prescribed, sampled)
        self.nll[:, at] = plain.logsumexp(-1) - plain.gather(1, tokens[:, None])[:, 0]
        self.sampled[:, at] = torch.tensor([token < 0 for token in forced])
        for row, (token, opener) in enumerate(zip(tokens.tolist(), forced, strict=True)):
            if opener < 0 and token in self.ends:
                self.pending[row], self.start[row] = list(next(self.turns[row])), at + 1
        self.tick(len(tokens), at + 1)
        left = torch.full_like(plain, -torch.inf)
        return left.scatter_(1, tokens[:, None], 0.0).to(scores.device)


def sample(
    logits: Tensor,
    temperatures: Tensor,
    uniform: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Sample one token per row, of positive probability, by inverting the cumulative distribution.

    `logits` are (rows, vocabulary), `temperatures` and `uniform` (float64, in [0, 1)) one per row;
    `top_k` and `top_p` are applied in this order after the temperature.
    """
    if (top_k is None or top_k >= logits.shape[1]) and (top_p is None or top_p >= 1):
        weights = (logits - logits.amax(-1, keepdim=True)).div_(temperatures[:, None]).exp_()
        return _inverted(weights, uniform)
    scaled = logits / temperatures[:, None]
    scaled, order = scaled.topk(min(top_k or scaled.shape[1], scaled.shape[1]))
    if top_p is not None and top_p < 1:
        share = scaled.softmax(-1)
        # A token stays if those before it have less than top_p.
        scaled = scaled.masked_fill(share.cumsum(-1) - share >= top_p, -torch.inf)
    return order.gather(1, _inverted(scaled.softmax(-1), uniform)[:, None])[:, 0]


def _inverted(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return for each row the entry where the cumulative weight exceeds `uniform` of the total.

    Running sums over a whole vocabulary are slow, so stretches of it are summed first and the
    running sum is taken over those, then within one.
    """
    weights = F.pad(weights, (0, -weights.shape[1] % STRETCH))
    parts = weights.view(len(weights), -1, STRETCH)
    ends = parts.sum(-1).double().cumsum(-1)
    target = (uniform.to(ends.dtype) * ends[:, -1])[:, None]
    which = _passed(ends, target)
    inner = parts.gather(1, which[:, :, None].expand(-1, -1, STRETCH))[:, 0].double().cumsum(-1)
    before = torch.where(which > 0, ends.gather(1, (which - 1).clamp(min=0)), 0.0)
    return (which * STRETCH + _passed(inner, target - before))[:, 0]


def _passed(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return the first entry of each row above `target`, always one of positive weight."""
    place = torch.searchsorted(cumulative, target, right=True)
    # Rounding can raise the target to the total: take the last entry with any weight.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(place, last)


def write(
    opened: OpenModel,
    request: WriteRequest,
    *,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Written:
    """Sample rows from a model.

    Finished batches are cached under everything the tokens depend on, so an interrupted run resumes
    there, and the same request is not written twice. A row's tokens do not depend on its batch,
    except for the rounding of matrix products in half precision.

    `batch` is the number of rows at a time, fewer if memory is short. `progress` is called with
    tokens done and in total, `note` with a line when the batch had to be made smaller.
    """
    if request.length < 2:
        raise InputError(f"rows of {request.length} token leave the model nothing to write")
    say = note or (lambda line: None)
    ends, total = end_tokens(opened), len(request.openers)
    folder, planned = opened.cached("written", WRITER_VERSION, ends, asdict(request)), False
    size = 1 if mixes_rows(opened.model) else batch or BATCH
    parts: list[Written] = []
    at = 0

    def tick(rows: int, tokens: int) -> None:
        if progress is not None:
            progress(at * request.length + rows * tokens, total * request.length)

    def write_next(count: int) -> Written:
        return _batch(opened, request, range(at, at + count), ends, tick)

    while at < total:
        path = folder / f"{at:08d}.safetensors"
        try:
            part = Written(**load_file(path))
            tick(*part.ids.shape)
        except (SafetensorError, OSError):  # missing or damaged
            wanted = size = min(size, total - at)
            if not planned:
                size, planned = plan_writing(opened.model, request.length, wanted), True
            if size < wanted:
                say(f"memory holds {size} rows at a time, not {wanted}: writing in smaller batches")
            size, part = halving(write_next, size, say)
            write_bytes(path, save(part._asdict()))
        parts.append(part)
        at += len(part.ids)
    written = Written(*map(torch.cat, zip(*parts, strict=True)))
    first = written.sampled[:, 1:] & ~written.sampled[:, :-1]
    empty = first & torch.isin(written.ids[:, 1:], torch.tensor(ends))
    texts, none = int(first.sum()), int(empty.sum())
    if none > MOSTLY_EMPTY * texts:
        raise InputError(
            f"{opened.name} ends {none} of {texts} texts ({none / texts:.0%}) before their first "
            "word: it writes nothing to calibrate on; choose other prompts or a higher temperature"
        )
    return written


def _batch(
    opened: OpenModel, request: WriteRequest, rows: range, ends: Sequence[int], tick: Tick
) -> Written:
    from transformers import GenerationConfig, LogitsProcessorList

    device = opened.model.device
    ids = torch.tensor([[request.openers[row][0][0]] for row in rows], device=device)
    sampler = Sampler(request, rows, ends, device, tick)
    plain = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=request.length - 1,
        use_cache=True,
        pad_token_id=opened.tokenizer.pad_token_id or ids[0, 0].item(),
    )
    tick(len(ids), 1)
    with quiet_transformers(), generating(opened.model, plain), torch.inference_mode():
        written = opened.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=plain,
            logits_processor=LogitsProcessorList([sampler]),
            **{cache_argument(opened.model): reserved_cache(opened.model, request.length)},
        )
    return Written(written.cpu(), sampler.nll.cpu(), sampler.sampled)
