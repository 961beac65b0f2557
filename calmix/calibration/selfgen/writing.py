"""Writing: rows of exactly so many tokens, sampled in batches through transformers' generation.

Every row starts with an opener. Where the model ends its text, the row's next opener follows, so
that all rows of a batch have one length, nothing is padded, and every step of every row is used.
The random numbers of a row come from its own number, so rows may be batched in any way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calmix.calibration.selfgen.sampling import Sampling, draw, penalised
from calmix.errors import InputError
from calmix.files import cache_dir, hidden, sha256_json
from calmix.machine import device_memory
from calmix.manifest import versions
from calmix.models import OpenModel
from calmix.models.attention import cache_argument, reserved_cache
from calmix.models.opening import quiet_transformers

BATCH = 128  # rows at a time: on two cores the throughput no longer grows beyond
MEMORY_SHARE = 0.7  # of the memory that is free, for what a batch needs
MOSTLY_EMPTY = 0.5  # share of texts without a sampled token above which a model is refused
VERSION = 3  # raised when the same request writes other tokens, so that the cache is not used

Openers = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Request:
    """Rows to write.

    Attributes:
        openers: for each row the openers it takes in turn, each of at least one token id.
        length: tokens a row, openers included.
        sampling: how to draw.
        temperatures: one a row; None for `sampling.temperature` throughout.
        seed: row i draws from the stream of (seed, i).
    """

    openers: Sequence[Openers]
    length: int
    sampling: Sampling
    seed: int
    temperatures: Sequence[float] | None = None

    def part(self, start: int, stop: int) -> Request:
        """Return the same request for some of its rows; their seeds are kept by the caller."""
        temperatures = None if self.temperatures is None else self.temperatures[start:stop]
        return replace(self, openers=self.openers[start:stop], temperatures=temperatures)


@dataclass(frozen=True)
class Written:
    """Rows the model wrote.

    Attributes:
        ids: int64 (rows, length).
        nll: float32 (rows, length), -log p of each token under the model at temperature 1,
            given what stands before it in its row; nan for the first.
        text: int32 (rows, length), the number of the text in its row each token belongs to.
        sampled: bool (rows, length), false for the tokens of openers.
    """

    ids: Tensor
    nll: Tensor
    text: Tensor
    sampled: Tensor

    @property
    def log_perplexity(self) -> Tensor:
        """Mean of -log p over each row's sampled tokens, float64 (rows,); nan without any."""
        sums = torch.where(self.sampled, self.nll.double(), 0.0).sum(1)
        return sums / self.sampled.sum(1)

    def rows(self, indices: Sequence[int]) -> Written:
        """Return some of the rows."""
        chosen = torch.as_tensor(indices, dtype=torch.long)
        return Written(*(tensor[chosen] for tensor in self.tensors()))

    @classmethod
    def joined(cls, parts: Iterable[Written]) -> Written:
        """Return the rows of several, in their order."""
        return cls(*map(torch.cat, zip(*(part.tensors() for part in parts), strict=True)))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.ids, self.nll, self.text, self.sampled


class _Sampler:
    """A logits processor that leaves each row one token: the opener's next, or one drawn."""

    def __init__(
        self,
        request: Request,
        first: int,
        ends: Sequence[int],
        device: Any,
        tick: Callable[[int], None] | None,
    ) -> None:
        self.tick = tick
        self.sampling = request.sampling
        self.openers = request.openers
        count, length = len(request.openers), request.length
        base = request.temperatures or [request.sampling.temperature] * count
        # Apple's GPUs have no float64, in which the running sums are.
        self.device = device = torch.device("cpu") if device.type == "mps" else device
        self.base = torch.tensor(base, dtype=torch.float32, device=device)
        draws = np.stack(
            [np.random.default_rng([request.seed, first + i]).random(length) for i in range(count)]
        )
        self.uniform = torch.from_numpy(draws).to(device)
        self.ends = set(ends)
        self.turn = [0] * count  # which text of its row is being written
        self.start = [0] * count  # where in the row it starts
        self.drawn = [0] * count  # tokens of it that were sampled
        self.pending = [list(opener[0])[1:] for opener in request.openers]
        self.nll = torch.full((count, length), math.nan, device=device)
        self.text = torch.zeros((count, length), dtype=torch.int32)
        self.sampled = torch.zeros((count, length), dtype=torch.bool)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        at = ids.shape[1]
        logits = scores.to(self.device, torch.float32)
        forced = [row.pop(0) if row else -1 for row in self.pending]
        # What the host knows goes to the device at once; the tokens come back at once.
        given, start, drawn = torch.tensor([forced, self.start, self.drawn]).to(self.device)
        chosen = self._drawn(ids.to(self.device), logits, at, start, drawn)
        tokens = torch.where(given >= 0, given, chosen)
        self.nll[:, at] = logits.logsumexp(-1) - logits.gather(1, tokens[:, None])[:, 0]
        self.text[:, at] = torch.tensor(self.turn, dtype=torch.int32)
        self.sampled[:, at] = torch.tensor([token < 0 for token in forced])
        for row, (token, opener) in enumerate(zip(tokens.tolist(), forced, strict=True)):
            if opener >= 0:
                continue
            self.drawn[row] += 1
            if token in self.ends:
                self.turn[row] += 1
                turns = self.openers[row]
                self.pending[row] = list(turns[self.turn[row] % len(turns)])
                self.start[row], self.drawn[row] = at + 1, 0
        if self.tick is not None:
            self.tick(len(tokens))
        left = torch.full_like(logits, -torch.inf)
        return left.scatter_(1, tokens[:, None], 0.0).to(scores.device)

    def _drawn(self, ids: Tensor, logits: Tensor, at: int, start: Tensor, drawn: Tensor) -> Tensor:
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            start = start[:, None].clamp(max=at - 1)
            place = torch.arange(at, device=logits.device)[None]
            held = torch.where(place >= start, ids, ids.gather(1, start))
            logits = penalised(logits, held, sampling.repetition_penalty)
        return draw(
            logits,
            sampling.temperatures(drawn, self.base),
            self.uniform[:, at],
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )


def end_tokens(opened: OpenModel) -> list[int]:
    """Return the token ids that end a text: the tokenizer's, and those the model generates to."""
    found: list[int] = []
    configured = getattr(getattr(opened.model, "generation_config", None), "eos_token_id", None)
    for value in (opened.tokenizer.eos_token_id, configured):
        if value is not None:
            found += value if isinstance(value, list) else [value]
    return sorted(set(found))


def write(
    opened: OpenModel,
    request: Request,
    *,
    batch: int | None = None,
    tick: Callable[[int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Written:
    """Sample rows from a model.

    Finished batches are kept in the cache, under a name that tells everything the tokens depend
    on: interrupted work goes on there, and the same request is not written twice. A row's
    tokens do not depend on the batch it is in, but for the rounding of matrix products: in half
    types another batch size may let a row take another turn.

    Args:
        opened: the model, with its own weights.
        request: what to write.
        batch: rows at a time; None for 128. Fewer are taken where memory does not allow them.
        tick: called with the number of tokens after each step (and for those from the cache).
        note: called with a line when the batch had to be made smaller.

    Raises:
        InputError: the model ends nearly every text at once, or memory does not hold one row.
    """
    if batch is not None and batch < 1:
        raise InputError(f"--batch {batch} is not positive")
    if request.length < 2:
        raise InputError(f"rows of {request.length} token hold nothing the model could write")
    say = note or (lambda line: None)
    ends = end_tokens(opened)
    folder = _folder(opened, request, ends)
    done = dict(_kept(folder, request))
    total = len(request.openers)
    size = batch or BATCH
    if len(done) < total:
        room = _room(opened, request.length)
        if room < 1:
            raise InputError(
                f"memory does not hold one row of {request.length} tokens beside the model: ask "
                "for shorter rows"
            )
        if room < min(size, total):
            say(f"memory holds {room} rows at a time, not {min(size, total)}: writing in smaller "
                "batches")  # fmt: skip
            size = room
    if tick is not None and done:
        tick(len(done) * request.length)
    at = 0
    while at < total:
        if at in done:
            at += 1
            continue
        stop = at + 1
        while stop < min(total, at + size) and stop not in done:
            stop += 1
        try:
            part = _batch(opened, request.part(at, stop), at, ends, tick)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; so is the CPU allocator's
            if stop - at == 1 or "memory" not in str(error).lower():
                raise
            size = (stop - at) // 2
            say(f"out of memory with {stop - at} rows at a time: going on with {size}")
            continue
        _keep(folder, at, part)
        done |= {at + i: part.rows([i]) for i in range(stop - at)}
        at = stop
    written = Written.joined(done[i] for i in range(total))
    _check_not_empty(written, opened.name)
    return written


def _batch(
    opened: OpenModel,
    request: Request,
    first: int,
    ends: Sequence[int],
    tick: Callable[[int], None] | None,
) -> Written:
    from transformers import GenerationConfig, LogitsProcessorList

    device = next(opened.model.parameters()).device
    ids = torch.tensor([[opener[0][0]] for opener in request.openers], device=device)
    sampler = _Sampler(request, first, ends, device, tick)
    plain = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=request.length - 1, use_cache=True,
        pad_token_id=opened.tokenizer.pad_token_id or ids[0, 0].item(),
    )  # fmt: skip
    if tick is not None:
        tick(len(ids))
    with (
        quiet_transformers(),
        _generating(opened.model, plain),
        torch.inference_mode(),
    ):
        made = opened.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=plain,
            logits_processor=LogitsProcessorList([sampler]),
            **{cache_argument(opened.model): reserved_cache(opened.model, request.length)},
        )
    return Written(made.cpu(), sampler.nll.cpu(), sampler.text, sampler.sampled)


@contextmanager
def _generating(model: Any, plain: Any) -> Iterator[None]:
    """Put the model's own generation settings (a penalty, end tokens) aside for a while."""
    own, training = model.generation_config, model.training
    model.generation_config = plain
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def _room(opened: OpenModel, length: int) -> int:
    """Return how many rows memory holds at a time: keys, values, logits and the sampler's work."""
    model = opened.model
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "hidden_size", None) or 4096
    layers = getattr(config, "num_hidden_layers", None) or 1
    each = getattr(config, "per_layer_config", None)  # layers may differ: the widest counts
    own = [config] if each is None else [each[index] for index in range(layers)]

    def most(key: str, otherwise: int) -> int:
        return max(getattr(layer, key, None) or otherwise for layer in own)

    heads = most("num_attention_heads", 1)
    shared, head = most("num_key_value_heads", heads), most("head_dim", width // heads)
    parameter = next(model.parameters())
    # Half a cache more than is kept: sliding windows are joined anew, and attention widens a layer.
    cache = 2 * layers * shared * head * length * parameter.element_size()
    widest = 2 * heads * head * length * parameter.element_size()
    logits = 6 * 4 * int(config.vocab_size)
    _, free, _ = device_memory(parameter.device)
    return int(MEMORY_SHARE * free / (1.5 * cache + widest + logits))


def _folder(opened: OpenModel, request: Request, ends: Sequence[int]) -> Path:
    parameter = next(opened.model.parameters())
    key = {
        "version": VERSION,
        "model": opened.fingerprint,
        "tokenizer": opened.tokenizer_fingerprint,
        "dtype": str(parameter.dtype),
        "device": parameter.device.type,
        "versions": versions(),
        "ends": list(ends),
        "openers": [[list(map(int, opener)) for opener in row] for row in request.openers],
        "length": request.length,
        "sampling": asdict(request.sampling),
        "temperatures": None if request.temperatures is None else list(request.temperatures),
        "seed": request.seed,
    }
    return cache_dir() / "written" / sha256_json(key)[:32]


def _keep(folder: Path, first: int, part: Written) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{first:08d}.safetensors"
    names = ("ids", "nll", "text", "sampled")
    with hidden(path, Path.touch) as beside:
        save_file(dict(zip(names, part.tensors(), strict=True)), beside)
        beside.replace(path)


def _kept(folder: Path, request: Request) -> Iterator[tuple[int, Written]]:
    """Yield the rows that earlier runs of the same request have finished."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        try:
            held = load_file(path)
            part = Written(*(held[name] for name in ("ids", "nll", "text", "sampled")))
            first = int(path.stem)
        except (SafetensorError, OSError, KeyError, ValueError):  # damaged: write it again
            continue
        if part.ids.shape[1:] == (request.length,):
            yield from ((first + i, part.rows([i])) for i in range(len(part.ids)))


def _check_not_empty(written: Written, name: str) -> None:
    """Refuse rows of texts that hold nothing but the token that ends them."""
    before, text, sampled = written.text[:, :-1], written.text[:, 1:], written.sampled
    first = sampled[:, 1:] & ~(sampled[:, :-1] & (before == text))
    texts = int(first[:, :-1].sum())
    empty = int((first[:, :-1] & (text[:, :-1] != text[:, 1:])).sum())
    if texts and empty / texts > MOSTLY_EMPTY:
        raise InputError(
            f"{name} ends {empty} of {texts} texts ({empty / texts:.0%}) before their first word: "
            "it writes nothing to calibrate on; choose other openers or a higher temperature"
        )
