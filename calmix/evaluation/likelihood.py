"""Logits and likelihoods of full rows of tokens: used for scores and distance.

The blocks run in micro-batches that fit the CPU cache and the output head in slices, so that the
logits of a whole batch are never in memory. Softmax works on still smaller slices in float32:
outside the cache it takes longer than the matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from calmix.errors import ModelError, first_line
from calmix.machine import tokens_at_once, values_at_once
from calmix.memory import halving
from calmix.models.blocks import decoder_of
from calmix.precision import dtype_name

HEAD_TOKENS = 512  # whose logits are in memory at once
PROBE_TOKENS = 8  # tokens on which a head is compared with its model's forward pass
AHEAD = 0.05  # of the logits' norm: later tokens change more in any known non-causal model

Progress = Callable[[int, int], None]  # takes the number done and the total

Head = Callable[[Tensor], Tensor]  # from hidden states to logits, in the model's dtype

_outputs: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # decoder outputs by model


def in_cache(logits: Tensor) -> tuple[Tensor, ...]:
    """Split rows of logits into slices that fit the CPU cache in float32."""
    return logits.split(max(1, values_at_once(logits.device) // logits.shape[-1]))


def log_sums(rows: Tensor) -> Tensor:
    """Return the float32 logsumexp of each row of logits, which may be overwritten."""
    sums = []
    for part in in_cache(rows):
        logits = part.float()
        peak = logits.amax(-1)
        sums.append(logits.sub_(peak[:, None]).exp_().sum(-1).log_().add_(peak))
    return torch.cat(sums)


def divergences(before: Tensor, after: Tensor) -> Tensor:
    """Return KL(before || after) in nats for each row of float32 logits, shape (rows, vocabulary).
    Both tensors are overwritten by their softmax."""
    apart = before - after
    sums = []
    for logits in (before, after):
        peak = logits.amax(-1, keepdim=True)
        whole = logits.sub_(peak).exp_().sum(-1, keepdim=True)
        logits.div_(whole)
        sums.append((whole.log_() + peak)[:, 0])
    # Rounding can make it slightly negative.
    return (torch.linalg.vecdot(before, apart) + sums[1] - sums[0]).clamp_min(0)


def decoder_and_head(model: Any) -> tuple[Any, Head]:
    """Return a causal LM's decoder and its head: everything in its forward after the decoder."""
    decoder = decoder_of(model)
    if model not in _outputs:
        with torch.inference_mode(False), torch.no_grad():
            _outputs[model] = _output(model, decoder)
    return decoder, partial(_own_logits, model, decoder, _outputs[model])


def width(model: Any) -> int:
    """Return the width of the hidden states that enter a causal LM's head."""
    decoder_and_head(model)
    return int(_outputs[model][0].shape[-1])


def _output(model: Any, decoder: Any) -> Any:
    """Return a sample output of the decoder; a ModelError if logits depend on anything else."""
    size, device = model.get_input_embeddings().weight.shape[0], next(model.parameters()).device
    ids = (torch.arange(PROBE_TOKENS, device=device) * 31 % size)[None]
    name = type(model).__name__
    try:
        wanted = model(input_ids=ids, use_cache=False).logits
        few = model(input_ids=ids[:, : PROBE_TOKENS // 2], use_cache=False).logits
        output = decoder(input_ids=ids, use_cache=False)
        logits = _own_logits(model, decoder, output, output[0])
    except Exception as error:  # models fail in their own ways
        kind, why = dtype_name(model.dtype), first_line(error)
        raise ModelError(f"{name} gives no logits for token ids in {kind}: {why}") from error
    # Far above rounding, which may route a token to another expert.
    if not close(few.nan_to_num(), wanted[:, : few.shape[1]].nan_to_num(), AHEAD):
        raise ModelError(
            f"{name} is not causal: it looks at later tokens, so text has no likelihood under it "
            "and it can be neither scored nor distilled"
        )
    limit = max(1e-4, 2 * torch.finfo(model.dtype).eps)
    if not close(logits.nan_to_num(), wanted.nan_to_num(), limit):
        raise ModelError(f"{name} computes logits from more than its decoder's output")
    return output


def _own_logits(model: Any, decoder: Any, output: Any, hidden: Tensor) -> Tensor:
    """Return the logits that the model's own forward computes from hidden states, shape (...,
    width), which replace those in its decoder's output."""
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    if isinstance(output, tuple):
        output = flat, *output[1:]
    else:
        output = replace(output, **{next(iter(output)): flat})
    ids = torch.zeros(flat.shape[:2], dtype=torch.int64, device=flat.device)
    with patch.object(decoder, "forward", lambda *args, **kwargs: output):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.reshape(*hidden.shape[:-1], -1)


def close(a: Tensor, b: Tensor, limit: float) -> bool:
    """Whether two tensors differ by at most `limit`, relative to their norms."""
    a, b = a.float(), b.float()
    return bool((a - b).norm() <= limit * b.norm())


def behind(model: Any) -> dict[str, Tensor]:
    """Return a causal LM's parameters outside its decoder and output head, by name."""
    others = decoder_of(model), model.get_output_embeddings()
    known = {id(p) for module in others if module is not None for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in known}


def hidden_states(decoder: Any, ids: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the hidden states that enter the output head, in micro-batches of rows.

    `ids` has shape (rows, length). Yields a slice of rows and their states, shape (rows,
    length - 1, width): every position that predicts a token. Call it without gradients.
    """
    device = next(decoder.parameters()).device
    step = max(1, tokens_at_once(device) // ids.shape[1])
    start = 0

    def run(rows: int) -> Tensor:
        return decoder(input_ids=ids[start : start + rows].to(device), use_cache=False)[0][:, :-1]

    while start < len(ids):
        step, states = halving(run, min(step, len(ids) - start))
        yield slice(start, start + step), states
        start += step


@torch.inference_mode()
def row_nll(model: Any, ids: Tensor) -> Tensor:
    """Return -log p(ids[j + 1] | ids[: j + 1]) in nats, float32 of shape (rows, length - 1).

    `ids` are int64 token ids without padding, shape (rows, length).
    """
    (decoder, head), parts = decoder_and_head(model), []
    for rows, states in hidden_states(decoder, ids):
        targets = ids[rows, 1:].flatten().to(states.device)
        for hidden, target in zip(
            states.flatten(0, 1).split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True
        ):
            logits = head(hidden)
            right = logits.gather(1, target[:, None])[:, 0].float()
            parts.append(log_sums(logits) - right)
    return torch.cat(parts).view(len(ids), -1).cpu()
