"""Distance of a pruned model to its dense one, which needs no labels.

On texts, the Kullback-Leibler divergence KL(dense || pruned) of the next token, exact over the
whole vocabulary, and how often both models' likeliest token is the same. On items with answers,
how many change sides (*flips*, arXiv 2407.09141).

The dense model is run once: what its output head sees is kept (`Reference`), and is turned into
logits again beside the pruned model's, a few positions at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calmix.errors import InputError, ModelError
from calmix.evaluation.likelihood import (
    Head,
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
    check_paired,
    column_means,
    estimate,
    item_weights,
)
from calmix.files import cache_dir, sha256_json, write_bytes
from calmix.models import OpenModel

VERSION = 2  # raised when a reference would hold other numbers, so that cached ones are not reused
POSITIONS = 128  # of which both models' logits are held at a time

Progress = Callable[[int, int], None]
Texts = Mapping[str, Tensor]  # dimension: int64 token ids, shape (rows, length)


@dataclass(frozen=True)
class Reference:
    """What is kept of a dense model to measure others' distance to it.

    Attributes:
        dense: fingerprint of its files; `tokenizer` of its tokenizer.
        dtype: what it was computed in.
        texts: hash of the texts' ids.
        head: hash of the output head's weights and of what is done to its logits.
        hidden: what the head saw by dimension, shape (rows, length - 1, width), in `dtype`.
    """

    dense: str
    tokenizer: str
    dtype: str
    texts: str
    head: str
    hidden: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Write the reference as safetensors, beside `path` first and then renamed onto it."""
        from safetensors.torch import save

        about = {name: getattr(self, name) for name in _ABOUT}
        write_bytes(path, save(self.hidden, {"version": str(VERSION), **about}))

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read a reference that `save` wrote.

        Raises:
            InputError: no such file, or it holds no reference of this version.
        """
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise InputError(f"there is no file {path}")
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                hidden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged: {error}") from error
        if about.pop("version", None) != str(VERSION):
            raise InputError(f"{path} holds no reference of this version of calmix")
        return cls(**about, hidden=hidden)


_ABOUT = ("dense", "tokenizer", "dtype", "texts", "head")


@dataclass(frozen=True)
class Distance:
    """Distance on one text, or the mean over texts.

    Attributes:
        tokens: predicted tokens.
        kl_mean, kl_median, kl_p99: KL(dense || pruned) of a token's prediction, in nats.
        top1: share of tokens for which both models' likeliest token is the same.
        kl_low, kl_high: 95 % interval of the mean, by bootstrap over rows; None of one row.
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

    Attributes:
        dense: fingerprint of the dense model's files.
        texts: hash of the texts' ids; distances on other texts do not compare.
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

    Args:
        opened: the dense model.
        texts: token ids by dimension, of `texts.texts`.
        cache: take the reference from the cache if there is one of this model's files on these
            texts, and keep it there otherwise. Leave it off for a model changed in memory.
        progress: called with the number of rows done and in all.
    """
    kept = _cache_file(opened, texts) if cache else None
    if kept is not None and kept.is_file():
        try:
            return Reference.load(kept)
        except InputError:  # damaged, or of another version: computed again and replaced
            pass
    decoder, _ = decoder_and_head(opened.model)
    tick = _ticker(texts, progress)
    hidden = {}
    for name, ids in texts.items():
        parts = []
        for states in hidden_states(decoder, ids, _device(opened)):
            parts.append(states.cpu())
            tick(len(states))
        hidden[name] = torch.cat(parts)
    made = Reference(
        opened.fingerprint,
        opened.tokenizer_fingerprint,
        _dtype(opened),
        texts_hash(texts),
        head_hash(opened.model),
        hidden,
    )
    if kept is not None:
        made.save(kept)
    return made


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
    texts: Texts,
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
        texts: token ids by dimension.
        dense: opens the dense model, whose head is needed if it is not the pruned model's own
            (calmix leaves the head as it is).
        resamples, seed: of the bootstrap.
        progress: called with the number of rows done and in all.

    Raises:
        InputError: the reference is of other texts, another tokenizer or dtype, or the dense
            model's head is needed and not to be had.
        ModelError: the model's logits are not finite.
    """
    _check(opened, reference, texts)
    decoder, after = decoder_and_head(opened.model)
    same_head = head_hash(opened.model) == reference.head
    before = after if same_head else _dense_head(opened.name, reference, dense)
    device = _device(opened)
    tick = _ticker(texts, progress)
    found: dict[str, Distance] = {}
    draws = []
    for name, ids in texts.items():
        divergence, agree = [], []
        start = 0
        for states in hidden_states(decoder, ids, device):
            stop = start + len(states)
            kept = reference.hidden[name][start:stop].to(device)
            pairs = zip(
                kept.flatten(0, 1).split(POSITIONS),
                states.flatten(0, 1).split(POSITIONS),
                strict=True,
            )
            for old, new in pairs:
                products = before.product(old), after.product(new)
                for one, other in zip(*map(in_cache, products), strict=True):
                    kl, same = _compare(before.logits(one), after.logits(other))
                    divergence.append(kl)
                    agree.append(same)
            tick(stop - start)
            start = stop
        kls = torch.cat(divergence).cpu().double().numpy().reshape(len(ids), -1)
        if not np.isfinite(kls).all():
            raise ModelError(f"{opened.name} gives no finite distance on the text {name}")
        times = item_weights(name, len(ids), resamples=resamples, seed=seed)
        draws.append(times @ kls.mean(1) / len(ids))
        found[name] = _summary(kls, torch.cat(agree).cpu(), draws[-1])
    return Distances(reference.dense, reference.texts, found, _total(found, draws))


def _compare(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(before || after) in nats and whether the largest logit is the same one.

    Args:
        before, after: float32 logits, shape (positions, vocabulary); both are overwritten.
    """
    same = before.argmax(-1) == after.argmax(-1)
    return divergences(before, after), same


def _summary(kls: Array, agree: Tensor, draws: Array) -> Distance:
    spread = estimate(float(kls.mean()), draws) if len(kls) > 1 else Estimate(None, None, None)
    median, high = np.quantile(kls, [0.5, 0.99])
    return Distance(
        kls.size, float(kls.mean()), float(median), float(high),
        float(agree.double().mean()), spread.low, spread.high,
    )  # fmt: skip


def _total(found: dict[str, Distance], draws: list[Array]) -> Distance:
    parts = list(found.values())
    means = {
        field: float(np.mean([getattr(part, field) for part in parts]))
        for field in ("kl_mean", "kl_median", "kl_p99", "top1")
    }
    known = all(part.kl_low is not None for part in parts)
    drawn = estimate(means["kl_mean"], column_means(draws))
    return Distance(
        sum(part.tokens for part in parts),
        **means,
        kl_low=drawn.low if known else None,
        kl_high=drawn.high if known else None,
    )


def _check(opened: OpenModel, reference: Reference, texts: Texts) -> None:
    if opened.tokenizer_fingerprint != reference.tokenizer:
        raise InputError(
            f"{opened.name} has another tokenizer than the dense model: there is no distance per "
            "token between them"
        )
    if texts_hash(texts) != reference.texts:
        raise InputError("the reference of the dense model is of other texts: make it again")
    if _dtype(opened) != reference.dtype:
        raise InputError(
            f"{opened.name} is open in {_dtype(opened)} and the dense model was in "
            f"{reference.dtype}: open both in one --dtype"
        )


def _dense_head(name: str, reference: Reference, dense: Callable[[], OpenModel] | None) -> Head:
    if dense is None:
        raise InputError(f"{name} has another output head than the dense model, which is needed")
    model = dense().model
    if head_hash(model) != reference.head:
        raise InputError("the reference is of another dense model: make it again")
    return decoder_and_head(model)[1]


def _cache_file(opened: OpenModel, texts: Texts) -> Path:
    # As for cached scores: with all that rounding depends on in the key, a model is at no
    # distance from itself.
    from importlib.metadata import version

    key = sha256_json(
        [
            opened.fingerprint,
            opened.tokenizer_fingerprint,
            _dtype(opened),
            texts_hash(texts),
            [_device(opened).type, torch.get_num_threads()],
            VERSION,
            {name: version(name) for name in ("torch", "transformers")},
        ]
    )
    return cache_dir() / "reference" / f"{key}.safetensors"


def _device(opened: OpenModel) -> torch.device:
    return next(opened.model.parameters()).device


def _dtype(opened: OpenModel) -> str:
    return str(opened.model.dtype).removeprefix("torch.")


def _ticker(texts: Texts, progress: Progress | None) -> Callable[[int], None]:
    done, total = 0, sum(len(ids) for ids in texts.values())

    def tick(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    return tick


@dataclass(frozen=True)
class Flipped:
    """How many items changed sides.

    Attributes:
        items: items with an accuracy.
        share: of items that are right under one model and wrong under the other, with its 95 %
            interval; `lost` of those the dense model alone has right, `gained` the others.
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

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable data."""
        return asdict(self)


def flips(
    dense: Sequence[TaskScores],
    pruned: Sequence[TaskScores],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Flips:
    """Return the share of items whose correctness differs between two models.

    Tasks of single answers, which are neither right nor wrong, are left out. Intervals are from
    the bootstrap over items that `retention` uses.

    Raises:
        InputError: the models were not scored on the same tasks and items.
    """
    check_paired(dense, pruned)
    tasks: dict[str, Flipped] = {}
    draws: dict[str, Array] = {}
    for before, after in zip(dense, pruned, strict=True):
        if not before.values or not after.values:
            continue
        change = np.subtract(after.values, before.values)
        flipped, count = change != 0, len(change)
        times = item_weights(before.name, count, resamples=resamples, seed=seed)
        draws[before.name] = times @ flipped / count
        tasks[before.name] = Flipped(
            count,
            estimate(float(flipped.mean()), draws[before.name]),
            float((change < 0).mean()),
            float((change > 0).mean()),
        )
    dimensions: dict[str, Flipped] = {}
    drawn: dict[str, Array] = {}
    for name in dict.fromkeys(task.dimension for task in dense if task.name in tasks):
        members = [task.name for task in dense if task.dimension == name and task.name in tasks]
        drawn[name] = column_means([draws[task] for task in members])
        dimensions[name] = _mean_flips([tasks[task] for task in members], drawn[name])
    total = None
    if dimensions:
        total = _mean_flips(list(dimensions.values()), column_means(list(drawn.values())))
    return Flips(tasks, dimensions, total)


def _mean_flips(parts: Sequence[Flipped], draws: Array) -> Flipped:
    return Flipped(
        sum(part.items for part in parts),
        estimate(float(np.mean([part.share.value for part in parts])), draws),
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
