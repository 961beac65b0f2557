"""Distance of a pruned model to its dense one, which needs no labels.

On texts, the Kullback-Leibler divergence KL(dense || pruned) of the next token, exact over the
whole vocabulary, and how often both models' likeliest token is the same. On items with answers,
how many change sides (*flips*, arXiv 2407.09141).

The dense model is run once: what its output head sees is kept (`Reference`), and is turned into
logits again beside the pruned model's, a few positions at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from calmix.errors import InputError, ModelError
from calmix.evaluation.likelihood import (
    Progress,
    Ticker,
    behind,
    decoder_and_head,
    divergences,
    hidden_states,
    in_cache,
    logit_settings,
)
from calmix.evaluation.measures import Array
from calmix.evaluation.records import TaskScores
from calmix.evaluation.retention import (
    RESAMPLES,
    Estimate,
    Point,
    by_dimension,
    check_paired,
    estimate,
    item_weights,
    mean_point,
)
from calmix.files import cache_dir, sha256_json, write_bytes
from calmix.models import OpenModel
from calmix.precision import dtype_name

VERSION = 2  # raised when a reference would hold other numbers, so that cached ones are not reused
POSITIONS = 128  # of which both models' logits are held at a time

Texts = Mapping[str, Tensor]  # dimension: int64 token ids, shape (rows, length)


@dataclass(frozen=True)
class Reference:
    """What is kept of a dense model, fingerprints and all, to measure others' distance to it.

    `hidden` is what its output head saw of each text: shape (rows, length - 1, width), in `dtype`.
    """

    dense: str
    tokenizer: str
    dtype: str
    head: str
    texts: Texts
    hidden: dict[str, Tensor]


@dataclass(frozen=True)
class Distance:
    """Distance on one text, or the mean over texts.

    KL(dense || pruned) is of a token's prediction, in nats, with a 95 % interval of its mean by
    bootstrap over rows; `top1` is the share of tokens whose likeliest next one is the same.
    """

    tokens: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1: float
    kl_low: float | None
    kl_high: float | None


@dataclass(frozen=True)
class Distances:
    """Distance by dimension, and in total: the mean over dimensions (of tokens, the sum).

    `dense` is the fingerprint of the dense model, `texts` a hash: other texts do not compare.
    """

    dense: str
    texts: str
    dimensions: dict[str, Distance]
    total: Distance

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable data."""
        return asdict(self)


@torch.inference_mode()
def reference(
    opened: OpenModel, texts: Texts, *, cache: bool = False, progress: Progress | None = None
) -> Reference:
    """Run a dense model over texts and return what distances to it are measured by.

    `texts` holds int64 token ids of shape (rows, length) by dimension. With `cache`, hidden states
    are taken from the cache and kept there: leave it off for a model changed in memory.
    """
    # As for cached scores: with all that rounding depends on in the key, a model is at no
    # distance from itself.
    device, hidden = opened.model.device, None
    about = opened.fingerprint, opened.tokenizer_fingerprint, dtype_name(opened.model.dtype)
    versions = {name: version(name) for name in ("torch", "transformers")}
    rounding = [device.type, torch.get_num_threads()]
    key = sha256_json([*about, texts_hash(texts), rounding, VERSION, versions])
    kept = cache_dir() / "reference" / f"{key}.safetensors"
    if cache:
        with contextlib.suppress(OSError, SafetensorError):  # none there, or damaged
            hidden = load(kept.read_bytes())
    if hidden is None:
        decoder, _ = decoder_and_head(opened.model)
        tick = Ticker(progress, sum(map(len, texts.values())))
        hidden = {
            name: torch.cat([part.cpu() for _, part in hidden_states(decoder, ids, device, tick)])
            for name, ids in texts.items()
        }
        if cache:
            write_bytes(kept, save(hidden))
    return Reference(*about, head_hash(opened.model), texts, hidden)


def head_hash(model: Any) -> str:
    """Return a SHA-256 of what is behind the decoder: weights, and what is done to logits."""
    digest = hashlib.sha256(repr(logit_settings(model)).encode())
    weights = model.get_output_embeddings().state_dict() | behind(model)
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(memoryview(weight.cpu().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()


@torch.inference_mode()
def distance(
    opened: OpenModel,
    reference: Reference,
    *,
    dense: Callable[[], OpenModel] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Distances:
    """Return how far a pruned model's predictions are from the dense one's.

    Args:
        opened: the pruned model, in the dtype the reference was computed in.
        reference: of the dense model on the same texts.
        dense: opens the dense model, whose head is needed if it is not the pruned model's own
            (calmix leaves the head as it is).

    Raises:
        InputError: the reference is of another tokenizer or dtype, or the dense model's head is
            needed and not to be had.
        ModelError: the model's logits are not finite.
    """
    if opened.tokenizer_fingerprint != reference.tokenizer:
        raise InputError(
            f"{opened.name} has another tokenizer than the dense model: their distance per token "
            "cannot be measured"
        )
    if dtype_name(opened.model.dtype) != reference.dtype:
        raise InputError(
            f"{opened.name} is open in {dtype_name(opened.model.dtype)} and the dense model was in "
            f"{reference.dtype}: open both in one --dtype"
        )
    decoder, after = decoder_and_head(opened.model)
    before = after
    if head_hash(opened.model) != reference.head:
        if dense is None:
            raise InputError(f"{opened.name} has an output head of its own: give the dense model")
        whole = dense().model
        if head_hash(whole) != reference.head:
            raise InputError("the reference is of another dense model: make it again")
        before = decoder_and_head(whole)[1]
    device = opened.model.device
    tick = Ticker(progress, sum(map(len, reference.texts.values())))
    found: dict[str, Distance] = {}
    points: list[Point] = []
    for name, ids in reference.texts.items():
        divergence, agree = [], []
        for rows, states in hidden_states(decoder, ids, device, tick):
            kept = reference.hidden[name][rows].to(device)
            pairs = (all_rows.flatten(0, 1).split(POSITIONS) for all_rows in (kept, states))
            for old, new in zip(*pairs, strict=True):
                products = before.product(old), after.product(new)
                for one, other in zip(*map(in_cache, products), strict=True):
                    first, second = before.logits(one), after.logits(other)
                    agree.append(first.argmax(-1) == second.argmax(-1))
                    divergence.append(divergences(first, second))
        kls = torch.cat(divergence).cpu().double().numpy().reshape(len(ids), -1)
        if not np.isfinite(kls).all():
            raise ModelError(f"{opened.name} gives no finite distance on the text {name}")
        times = item_weights(name, len(ids), resamples=resamples, seed=seed)
        points.append((float(kls.mean()), times @ kls.mean(1) / len(ids)))
        spread = estimate(*points[-1]) if len(ids) > 1 else Estimate(None, None, None)
        median, high = np.quantile(kls, [0.5, 0.99])
        top1 = float(torch.cat(agree).cpu().double().mean())
        found[name] = Distance(
            kls.size, points[-1][0], float(median), float(high), top1, spread.low, spread.high
        )
    total = _total(list(found.values()), points)
    return Distances(reference.dense, texts_hash(reference.texts), found, total)


def _total(found: list[Distance], points: list[Point]) -> Distance:
    means = {
        field: float(np.mean([getattr(part, field) for part in found]))
        for field in ("kl_mean", "kl_median", "kl_p99", "top1")
    }
    drawn = estimate(*mean_point(points))
    if any(part.kl_low is None for part in found):
        drawn = Estimate(None, None, None)
    tokens = sum(part.tokens for part in found)
    return Distance(tokens, **means, kl_low=drawn.low, kl_high=drawn.high)


@dataclass(frozen=True)
class Flipped:
    """How many items with an accuracy changed sides.

    `share` are right under one model and wrong under the other: `lost` under the pruned one,
    `gained` under the dense one.
    """

    items: int
    share: Estimate
    lost: float
    gained: float


@dataclass(frozen=True)
class Flips:
    """Flips by task, by dimension (mean over its tasks) and in total (mean over dimensions)."""

    tasks: dict[str, Flipped]
    dimensions: dict[str, Flipped]
    total: Flipped | None


def flips(
    dense: Sequence[TaskScores],
    pruned: Sequence[TaskScores],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Flips:
    """Return the share of items whose correctness differs between two models.

    Tasks of single answers, which are neither right nor wrong, are left out. Intervals are from
    the bootstrap over items that `retention` uses, and so are the errors.
    """
    check_paired(dense, pruned)
    tasks: dict[str, Flipped] = {}
    points: dict[str, Point] = {}
    for before, after in zip(dense, pruned, strict=True):
        if before.values and after.values:
            change: Array = np.subtract(after.values, before.values)
            times = item_weights(before.name, len(change), resamples=resamples, seed=seed)
            point = float((change != 0).mean()), times @ (change != 0) / len(change)
            points[before.name] = point
            lost, gained = float((change < 0).mean()), float((change > 0).mean())
            tasks[before.name] = Flipped(len(change), estimate(*point), lost, gained)
    rolled = by_dimension(dense, points)
    dimensions = {
        name: _mean(
            [tasks[t.name] for t in dense if t.dimension == name and t.name in tasks], point
        )
        for name, point in rolled.items()
    }
    total = None
    if dimensions:
        total = _mean(list(dimensions.values()), mean_point(list(rolled.values())))
    return Flips(tasks, dimensions, total)


def _mean(parts: Sequence[Flipped], point: Point) -> Flipped:
    return Flipped(
        sum(part.items for part in parts),
        estimate(*point),
        float(np.mean([part.lost for part in parts])),
        float(np.mean([part.gained for part in parts])),
    )


def texts_hash(texts: Texts) -> str:
    """Return a SHA-256 of names and ids."""
    digest = hashlib.sha256()
    for name in sorted(texts):
        digest.update(f"{name} {tuple(texts[name].shape)}\n".encode())
        digest.update(texts[name].contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
