"""Patterns by layer, in Python."""

import pytest

from calmix.errors import InputError
from calmix.models.blocks import find_blocks
from calmix.pruning.engine import prune
from calmix.pruning.patterns import SemiStructured, Unstructured
from tests.tiny import tiny_ids, tiny_model


def test_pattern_mapping():
    names = [layer.name for layer in find_blocks(tiny_model("llama")).layers]
    mixed = {n: SemiStructured(2, 4) if "mlp" in n else Unstructured(0.7) for n in names}
    report = prune(tiny_model("llama"), tiny_ids(), pattern=mixed)
    for layer in report.layers:
        assert layer.sparsity == pytest.approx(0.5 if "mlp" in layer.name else 0.7, abs=1e-3)
    few = {name: Unstructured(0.5) for name in names[1:]}
    for pattern, says in (
        (few, f"the pattern lacks 1 layers, the first is {names[0]}$"),
        (few | {"x": Unstructured(0.5)}, "the pattern names 'x', which is not a layer"),
        (mixed | {names[0]: SemiStructured(2, 5)}, "does not divide the 32 inputs of model"),
    ):
        with pytest.raises(InputError, match=says):
            prune(tiny_model("llama"), tiny_ids(), pattern=pattern)
