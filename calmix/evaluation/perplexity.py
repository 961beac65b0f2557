"""Perplexity of a text under a model, in windows of one stated length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calmix.errors import InputError
from calmix.evaluation.likelihood import Progress, Ticker, row_nll
from calmix.models import OpenModel


@dataclass(frozen=True)
class Perplexity:
    """Perplexity with what it must always be quoted with.

    `bits_per_byte` is the same likelihood over the UTF-8 bytes of the scored text; `length` is of a
    window in tokens. A last partial window is left out.
    """

    perplexity: float
    bits_per_byte: float
    length: int
    windows: int
    tokens: int


def perplexity(
    opened: OpenModel, text: str, *, length: int = 2048, tick: Progress | None = None
) -> Perplexity:
    """Score a text in non-overlapping windows, as the SparseGPT and Wanda papers do.

    The whole text is tokenised once (with the tokenizer's own begin token, if any, at its very
    start) and cut into windows; the first token of each window is context only.

    Raises:
        InputError: the length is below 2 or beyond the context, or the text is shorter.
    """
    if length < 2:
        raise InputError(f"length {length} is too short to predict anything")
    if opened.context is not None and length > opened.context:
        raise InputError(
            f"length {length} is beyond the model's context of {opened.context} tokens"
        )
    ids = torch.tensor(opened.tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    windows = len(ids) // length
    if not windows:
        raise InputError(f"the text has {len(ids)} tokens, less than one window of {length}")
    rows = ids[: windows * length].view(windows, length)
    found = perplexity_of_rows(opened, rows, tick)
    return Perplexity(*found, length, windows, windows * (length - 1))


def perplexity_of_rows(
    opened: OpenModel, ids: Tensor, tick: Progress | None = None
) -> tuple[float, float]:
    """Return perplexity and bits per byte of full rows of token ids, shape (rows, length)."""
    nll = float(row_nll(opened.model, ids, tick=Ticker(tick, len(ids))).double().sum())
    predicted = ids[:, 1:]
    texts = opened.tokenizer.batch_decode(predicted.tolist(), skip_special_tokens=False)
    size = sum(len(text.encode()) for text in texts)
    return math.exp(nll / predicted.numel()), nll / (math.log(2) * size)
