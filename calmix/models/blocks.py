"""Find the decoder blocks of a model and the weights in them, by structure alone.

Knows no model list: the decoder is the list of modules that holds most of the weights, and
what can be pruned in a block are its linear maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calmix.errors import ModelError


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear map whose weight the engine prunes."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is GPT-2's Conv1D: a linear map with its weight transposed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@dataclass(frozen=True)
class Prunable:
    """A linear map in a block, seen as a matrix of shape (rows = outputs, columns = inputs)."""

    name: str
    module: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        rows, columns = self.module.weight.shape
        return (columns, rows) if is_conv1d(self.module) else (rows, columns)

    def view(self) -> Tensor:
        """Return the module's own weight, seen as (rows, columns)."""
        weight = self.module.weight.detach()
        return weight.T if is_conv1d(self.module) else weight

    def matrix(self) -> Tensor:
        """Return the weight as float32 (rows, columns); a copy or view of the module's own."""
        return self.view().float()

    def assign(self, matrix: Tensor) -> None:
        """Write a (rows, columns) matrix into the module, in the module's own dtype."""
        weight = matrix.T if is_conv1d(self.module) else matrix
        self.module.weight.data.copy_(weight)


@dataclass(frozen=True)
class DecoderBlocks:
    """The decoder blocks of a model, in order, with the qualified name of their list."""

    name: str
    blocks: Any

    def __len__(self) -> int:
        return len(self.blocks)

    def prunables(self, index: int) -> list[Prunable]:
        """Return the linear maps of block `index` with their qualified names."""
        prefix = f"{self.name}.{index}"
        return [
            Prunable(f"{prefix}.{name}", module)
            for name, module in self.blocks[index].named_modules()
            if is_linear(module)
        ]


def find_blocks(model: nn.Module) -> DecoderBlocks:
    """Return the decoder blocks of a causal language model.

    The blocks are the outermost `ModuleList` with the most parameters in linear maps.

    Raises:
        ModelError: there is no such list, or a block holds weights the engine cannot prune
            (experts of a mixture, convolutions, state-space parameters).
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in _outermost_lists(model):
        linears: list[Any] = [m for m in module.modules() if is_linear(m)]
        size = sum(m.weight.numel() for m in linears) + sum(
            p.numel() for p in module.parameters() if p.ndim >= 3
        )
        if size and (best is None or size > best[0]):
            best = (size, name, module)
    if best is None:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks with linear maps")
    found = DecoderBlocks(best[1], best[2])
    for index in range(len(found)):
        _check_block(found, index)
    return found


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList):
            yield path, child
        else:
            yield from _outermost_lists(child, path)


def _check_block(found: DecoderBlocks, index: int) -> None:
    block = found.blocks[index]
    where = f"{found.name}.{index}"
    parameters = dict(block.named_parameters())
    for name, module in block.named_modules():
        if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] == "experts":
            raise _mixture(f"{where}.{name}")
    for name, parameter in parameters.items():
        if "expert" in name.lower() and parameter.ndim >= 2:
            raise _mixture(f"{where}.{name}")
    for name, parameter in parameters.items():
        path = f"{where}.{name}"
        if is_linear(block.get_submodule(name.rpartition(".")[0])):
            if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ModelError(f"weight {path} is {parameter.dtype}: only floats can be pruned")
        elif parameter.ndim >= 2 and parameter.numel() > max(parameter.shape):
            raise ModelError(
                f"weight {path} of shape {tuple(parameter.shape)} is no linear map, and the "
                "engine cannot prune it: only attention and dense feed-forward blocks work"
            )


def _mixture(path: str) -> ModelError:
    return ModelError(
        f"mixture-of-experts weights cannot be pruned yet (first: {path}); "
        "models with dense feed-forward blocks work"
    )
