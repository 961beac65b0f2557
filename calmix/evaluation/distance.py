"""Distance between a pruned model and its dense one, without labels.

It is measured on texts, by the Kullback-Leibler divergence KL(dense || pruned) of the next token,
exact over the whole vocabulary, and by how often both models predict the same token (top-1).

The dense model runs once: the hidden states that enter its output head are stored (`Reference`) and
turned into logits again alongside the pruned model's, a few positions at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from calmix.errors import DiskError, InputError, ModelError
from calmix.evaluation import likelihood, retention
from calmix.evaluation.likelihood import Progress
from calmix.evaluation.measures import Array
from calmix.evaluation.retention import interval, item_weights
from calmix.files import write_bytes
from calmix.memory import LOGIT_POSITIONS
from calmix.models.opening import OpenModel
from calmix.precision import dtype_name

REFERENCE_VERSION = 2  # raised when references change, so that cached ones are not reused
REPORTED = ("kl_median", "kl_p99", "top1")

Texts = Mapping[str, Tensor]  # dimension: int64 token ids, shape (rows, length)


@dataclass(frozen=True)
class Reference:
    """A dense model's fingerprints and hidden states, from which distances are computed.

    `hidden` holds the inputs of its output head by text: shape (rows, positions, width), `dtype`,
    at the last positions that predict a token.
    """

    dense: str
    tokenizer: str
    dtype: str
    head: str
    texts: Texts
    hidden: dict[str, Tensor]


@torch.inference_mode()
def reference(
    opened: OpenModel,
    texts: Texts,
    *,
    last: Mapping[str, int] | None = None,
    cache: bool = False,
) -> Reference:
    """Run a dense model over texts and return the reference for distances.

    `texts` holds int64 token ids of shape (rows, length) by dimension; `last` limits the distance
    to the predictions of so many last tokens of each row. With `cache`, hidden states are read from
    and written to the cache: leave it off for a model changed in memory.
    """
    hidden = None
    cached = opened.cached("reference", texts_hash(texts), REFERENCE_VERSION).with_suffix(
        ".safetensors"
    )
    if cache:
        with contextlib.suppress(OSError, SafetensorError):  # missing or damaged
            hidden = load(cached.read_bytes())
    if hidden is None:
        decoder, _ = likelihood.decoder_and_head(opened.model)
        hidden = {
            name: torch.cat(
                [
                    part[:, -(last or {}).get(name, ids.shape[1]) :].cpu()
                    for _, part in likelihood.hidden_states(decoder, ids)
                ]
            )
            for name, ids in texts.items()
        }
        if cache:
            with contextlib.suppress(DiskError):  # full or read-only
                write_bytes(cached, save(hidden))
    about = opened.fingerprint, opened.tokenizer_fingerprint, dtype_name(opened.model.dtype)
    return Reference(*about, head_hash(opened.model), texts, hidden)


def head_hash(model: Any) -> str:
    """Return a SHA-256 of all after the decoder: its weights, and the logits of a fixed input."""
    _, head = likelihood.decoder_and_head(model)
    with torch.inference_mode():
        ones = torch.ones(1, likelihood.width(model), dtype=model.dtype, device=model.device)
        digest = hashlib.sha256(head(ones).float().cpu().numpy().tobytes())
    weights = model.get_output_embeddings().state_dict() | likelihood.behind(model)
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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure how far a pruned model's predictions are from the dense model's.

    The record holds for each dimension, and in `total` (the mean over dimensions; the sum for
    tokens): `kl_mean`, `kl_median`, `kl_p99` of KL(dense || pruned) per token, in nats; `kl_low`
    and `kl_high`, a 95 % interval of the mean by bootstrap over rows, None for a single row;
    `top1`, the fraction of positions where both models predict the same token. `dense` is the
    dense model's fingerprint, `texts` a hash: distances on other texts are not comparable.

    Args:
        opened: the pruned model, in the dtype of the reference.
        reference: the dense model's reference.
        dense: opens the dense model, whose head is needed if the pruned model has another one
            (calmix leaves the head unchanged).

    Raises:
        InputError: the tokenizer or dtype differs from the reference, or the dense model's head
            is needed and `dense` is missing.
        ModelError: the model's logits are not finite.
    """
    if opened.tokenizer_fingerprint != reference.tokenizer:
        raise InputError(
            f"{opened.name} has another tokenizer than the dense model: their distance per token "
            "cannot be measured; leave it out (--no-distance)"
        )
    if (dtype := dtype_name(opened.model.dtype)) != reference.dtype:
        raise InputError(
            f"{opened.name} is open in {dtype}, but the dense model was open in "
            f"{reference.dtype}: open both in the same --dtype"
        )
    decoder, after = likelihood.decoder_and_head(opened.model)
    before = after
    if head_hash(opened.model) != reference.head:
        if dense is None:
            raise InputError(f"{opened.name} has another output head: pass the dense model too")
        before = likelihood.decoder_and_head(dense().model)[1]
    done, total = 0, sum(map(len, reference.texts.values()))
    distances: dict[str, dict[str, Any]] = {}
    points: list[Array] = []  # mean KL, then that of each resample
    for name, ids in reference.texts.items():
        divergence, agree = [], []
        for rows, states in likelihood.hidden_states(decoder, ids):
            dense_states = reference.hidden[name][rows].to(states.device)
            both = (dense_states.flatten(0, 1), states[:, -dense_states.shape[1] :].flatten(0, 1))
            for first, second in logit_pairs((before, after), both):
                agree.append(first.argmax(-1) == second.argmax(-1))
                divergence.append(likelihood.divergences(first, second))
            done += len(states)
            if progress is not None:
                progress(done, total)
        kls = torch.cat(divergence).cpu().double().numpy().reshape(len(ids), -1)
        if not np.isfinite(kls).all():
            raise ModelError(f"the distance of {opened.name} on the text {name} is not finite")
        weights = item_weights(name, len(ids), resamples=retention.RESAMPLES, seed=0)
        means = weights @ kls.mean(1) / len(ids)
        points.append(np.append(kls.mean(), means if len(ids) > 1 else np.full_like(means, np.nan)))
        top1 = torch.cat(agree).cpu().double().mean()
        distances[name] = _record(kls.size, points[-1], [*np.quantile(kls, [0.5, 0.99]), top1])
    others = [np.mean([one[key] for one in distances.values()]) for key in REPORTED]
    tokens = sum(one["tokens"] for one in distances.values())
    return {
        "dense": reference.dense,
        "texts": texts_hash(reference.texts),
        "dimensions": distances,
        "total": _record(tokens, np.mean(points, 0), others),
    }


def pool_distances(distances: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a record of `distance` on answers, one per item, as that of one dimension: means over
    items, with an interval by bootstrap over items, if there are several. The mean KL of each item
    stays in `items`."""
    rows = distances["dimensions"].values()
    kls = np.array([one["kl_mean"] for one in rows])
    weights = item_weights(name, len(kls), resamples=retention.RESAMPLES, seed=0)
    others = [np.mean([one[key] for one in rows]) for key in REPORTED]
    points = np.append(kls.mean(), weights @ kls / len(kls)) if len(kls) > 1 else kls
    record = _record(sum(one["tokens"] for one in rows), points, others)
    items = dict(zip(distances["dimensions"], kls.round(6).tolist(), strict=True))
    return {**distances, "dimensions": {name: record}, "total": record, "items": items}


def logit_pairs(
    heads: Sequence[likelihood.Head], states: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield float32 logits of two models, a few positions at a time; `states` enter their heads,
    shape (positions, width)."""
    for both in zip(*(one.split(LOGIT_POSITIONS) for one in states), strict=True):
        logits = [head(part) for head, part in zip(heads, both, strict=True)]
        for first, second in zip(*map(likelihood.in_cache, logits), strict=True):
            yield first.float(), second.float()


def _record(tokens: int, kl: Array, others: Sequence[Any]) -> dict[str, Any]:
    mean = interval(kl)
    return {
        "tokens": tokens,
        "kl_mean": mean.value,
        **dict(zip(REPORTED, map(float, others), strict=True)),
        "kl_low": mean.low,
        "kl_high": mean.high,
    }


def texts_hash(texts: Texts) -> str:
    """Return a SHA-256 of the texts' names and token ids."""
    digest = hashlib.sha256()
    for name in sorted(texts):
        digest.update(f"{name} {tuple(texts[name].shape)}\n".encode())
        digest.update(texts[name].contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
