"""Compare an export with its model on the same random token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmix.errors import ModelError
from calmix.models.loading import load_config
from calmix.models.opening import OpenModel, open_model
from calmix.precision import dtype_name

TEST_ROWS, TEST_LENGTH = 2, 16


def open_as_stored(name: str, folder: Path) -> OpenModel:
    """Open a model on the CPU in its own type, however slow; `folder` is what it resolves to."""
    config = load_config(folder, name, False)
    dtype = dtype_name(getattr(config, "dtype", None) or "auto")
    return open_model(name, dtype=dtype, device="cpu")


def reference(model: Any) -> tuple[Tensor, Tensor]:
    """Return random token ids and a model's logits in float32, to which its weights are cast."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (TEST_ROWS, TEST_LENGTH), generator=generator)
    with torch.no_grad():
        return ids, model.float()(ids).logits


def check_logits(name: str, before: Tensor, after: Tensor, most: float, weights: str) -> float:
    """Return mean KL(model || export) in nats per token.

    Raises ModelError if the KL is more than `most` for an export with these `weights`.
    """
    after, before = (logits.double().log_softmax(-1) for logits in (after, before))
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    if not kl <= most:
        raise ModelError(
            f"the export of {name} differs from the model (KL {kl:.3g} nats per token, "
            f"limit {most:g} with {weights} weights): nothing was written"
        )
    return kl
