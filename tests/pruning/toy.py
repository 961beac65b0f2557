"""A plugin method, a tensor that seems to be on an accelerator, and shared helpers."""

import json

import pytest
import torch
from pydantic import Field

from calmix.errors import InputError
from calmix.pruning.gram import Statistic
from calmix.pruning.methods import METHODS, Method, Solution
from calmix.pruning.methods.base import Quantiser
from calmix.pruning.methods.ggml import Typed
from calmix.pruning.patterns import clear
from tests.tiny import ARCHITECTURES, MIXTURES

EVERY = (*ARCHITECTURES, *MIXTURES)
SMALL = ("--rows", 6, "--length", 32, "--leakage", "off")
SPARSE = [n for n, kind in METHODS.items() if not issubclass(kind, Quantiser | Typed)]


def cases(names, *rows):
    """Parametrise a test with rows of the arguments that are named."""
    return pytest.mark.parametrize(names.replace(" ", ","), rows)


def refused(says, act, /, *given, error=InputError, **more):
    """Such a call fails in these words."""
    with pytest.raises(error, match=says):
        act(*given, **more)


class Absolute(Statistic):
    """Sum of |x| of every input."""

    def add(self, inputs):
        self.sum += inputs.reshape(-1, inputs.shape[-1]).float().abs().sum(0)


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that claims to be on an accelerator."""

    device = property(lambda self: torch.device("xpu"))


class Toy(Method):
    """Prune by |W| sum(|x|)^strength within a layer."""

    name, title = "toy", "Toy"
    statistic = Absolute
    paper = "none"

    strength: int = Field(default=1, ge=0, le=9, description="Exponent of the inputs' sum.")

    def solve(self, weights, statistic, patterns):
        full = [weight.float() for weight in weights]
        pairs = list(zip(full, patterns, strict=True))
        masks = [pattern.mask(w.abs() * statistic**self.strength) for w, pattern in pairs]
        pruned = [clear(w.clone(), m) for w, m in zip(full, masks, strict=True)]
        return Solution(pruned, [int(m.sum()) for m in masks])


def pruning_of(folder):
    """What the manifest of a checkpoint says of its pruning."""
    return json.loads((folder / "calmix.json").read_text(encoding="utf-8"))["pruning"]
