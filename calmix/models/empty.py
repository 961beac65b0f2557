"""A model without weights, built from its configuration, to know what work on it takes."""

from __future__ import annotations

from typing import Any

import torch

from calmix.models.blocks import find_blocks, outer_layers
from calmix.models.hub import known_model
from calmix.models.loading import loading
from calmix.models.opening import DTYPES, device_of, resolve_model
from calmix.precision import narrower, suited


class EmptyModel:
    """A model built from its configuration only, without weights, and the memory of work on it.

    Arguments are those of `open_model`; for a hub model only config.json is fetched.
    """

    merges = False  # `calmix.memory` reads this and the public attributes

    def __init__(
        self, name: str, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device = device_of(device)
        path = name if known_model(name) is None else resolve_model(name)
        trust = {"trust_remote_code": trust_remote_code}
        with loading(f"cannot read the configuration of {name}"):
            config = AutoConfig.from_pretrained(path, **trust)
            stored = getattr(config, "dtype", None) or torch.float32
            chosen = DTYPES.get(dtype, stored)
            self.dtype = suited(chosen, self.device) if dtype == "auto" else chosen
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, **trust)
            model.tie_weights()
        self.model: Any = model.requires_grad_(False).eval()
        self.blocks = find_blocks(self.model)
        self.weights = sum(p.numel() for p in self.model.parameters())
        self.block_weights = sum(p.numel() for p in self.blocks.blocks.parameters())
        self.vocabulary, self.hidden = self.model.get_output_embeddings().weight.shape
        self.bytes = self.weights * self.dtype.itemsize
        self.disk = self.weights * narrower(stored, self.dtype).itemsize  # of a checkpoint

    @property
    def outer_weights(self) -> int:
        """Number of weights in embeddings and output head."""
        return sum(weight.numel() for weight in outer_layers(self.model).values())

    def outside_bytes(self, *, head: bool = False) -> int:
        """Return the bytes outside the blocks; an untied output head counts only if `head`."""
        tied = len(outer_layers(self.model)) == 1
        untied = 0 if head or tied else self.vocabulary * self.hidden
        return (self.weights - self.block_weights - untied) * self.dtype.itemsize
