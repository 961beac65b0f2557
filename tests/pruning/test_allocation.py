"""Sparsity by layer: the published formula, in Python and on the command line."""

import numpy as np
import pytest
import torch

from calmix.calibration import resolve
from calmix.errors import InputError
from calmix.models import find_blocks, open_model
from calmix.pruning import SemiStructured, Unstructured, allocate, prune
from calmix.pruning.allocation import OutlierPass, outlier_share, read_allocation, spread
from calmix.pruning.engine import run_through
from calmix.pruning.patterns import as_pattern
from tests.pruning.test_engine import input_gram
from tests.pruning.toy import SMALL, pruning_of
from tests.tiny import load_weights, tiny_ids, tiny_model


@pytest.fixture
def common(tiny_folder, text_file):
    return ("prune", tiny_folder, "--calibration", text_file, *SMALL)


def check_alike(folder, model):
    """A checkpoint has the layers of a model pruned in memory."""
    found = load_weights(folder)
    for layer in find_blocks(model).layers:
        assert torch.equal(found[f"{layer.name}.weight"], layer.view().float()), layer.name


def test_owl_formula():
    rng = np.random.default_rng(0)
    weights = [rng.standard_t(3, size=(6, 8)) for _ in range(2)]
    squares = [rng.uniform(0, 4, 8) for _ in range(2)]
    metric = np.abs(weights) * np.sqrt(squares)[:, None]
    expected = (metric > 5 * metric.mean()).mean()
    both = ([torch.tensor(v) for v in values] for values in (weights, squares))
    found = float(outlier_share(*both))
    assert found == pytest.approx(expected)
    assert 0 < found < 0.2
    # As the published code shares out what blocks of one size keep.
    ratios, lamda, sparsity = rng.uniform(0, 3, 12), 0.08, 0.7
    kept = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * lamda * 2)
    kept = kept - np.mean(kept) + (1 - sparsity)
    np.testing.assert_allclose(spread(list(ratios), [5] * 12, sparsity, 0.16), 1 - kept)
    shares = spread([1.0, 3.0, 2.0], [10, 30, 60], 0.6, 0.2)
    assert shares[0] > shares[2] > shares[1]
    assert shares[0] - shares[1] == pytest.approx(0.2)
    assert np.average(shares, weights=[10, 30, 60]) == pytest.approx(0.6)
    with pytest.raises(InputError, match=r"at sparsity 0\.95 there is no room"):
        spread([0.0, 1.0], [1, 1], 0.95, 0.16)


@pytest.mark.parametrize("kind", ["llama", "gemma4_text"])
def test_allocation_pass_leaves_the_model_unchanged(kind):
    model, ids = tiny_model(kind), tiny_ids()
    before = [p.clone() for p in model.parameters()]
    look = OutlierPass(model, find_blocks(model))
    run_through(look, ids, 5 * 32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    found = find_blocks(model)
    for layers in map(found.prunables, range(len(found))):
        grams = [input_gram(model, layer.module, ids) for layer in layers]
        share = outlier_share([one.view() for one in layers], [one.diagonal() for one in grams])
        for layer in layers:
            assert look.importance[layer.name] == pytest.approx(share, abs=1e-3)
    patterns = look.patterns(Unstructured(0.6))
    made = prune(tiny_model(kind), method="magnitude", pattern=patterns)
    assert (made.sparsity, made.pattern) == (pytest.approx(0.6, abs=2e-3), "by layer")
    assert len({round(layer.sparsity, 2) for layer in made.layers}) > 1
    for layer in made.layers:
        assert layer.sparsity == pytest.approx(patterns[layer.name].sparsity, abs=0.02)


def test_unreached_layers_have_a_pattern():
    """Gemma 3n calls some layers more than once in a pass: the engine leaves them dense."""
    model, ids = tiny_model("gemma3n_text"), tiny_ids()
    patterns = allocate(model, ids, 0.6, "owl")
    assert patterns.keys() == {layer.name for layer in find_blocks(model).layers}
    dense = {one.name for one in prune(tiny_model("gemma3n_text"), ids, pattern=patterns).dense}
    assert dense & patterns.keys()
    made, uniform = (
        prune(tiny_model("gemma3n_text"), method="magnitude", pattern=one)
        for one in (patterns, 0.6)
    )
    assert made.sparsity == pytest.approx(uniform.sparsity, abs=2e-3)


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


@pytest.mark.parametrize(
    ("asked", "target", "says"),
    [
        ("owll", 0.5, r"unknown allocation 'owll': did you mean owl\?"),
        ("owl", "2:4", "owl distributes a sparsity: it needs --sparsity"),
        ("owl", "3 bits", "owl distributes a sparsity: it needs --sparsity"),
    ],
)
def test_invalid_allocations(asked, target, says):
    with pytest.raises(InputError, match=says):
        read_allocation(asked, as_pattern(target))
    assert read_allocation("uniform", as_pattern("2:4")) is None
    assert read_allocation(None, as_pattern(0.5)) is None


def test_allocation_option(calmix, tiny_folder, text_file, common, tmp_path):
    common += ("--sparsity", 0.6, "-o")
    calmix(*common, tmp_path / "owl", "--allocation", "owl").ok()
    told = pruning_of(tmp_path / "owl")
    assert (told["allocation"], told["pattern"]) == ("owl", "by layer")
    # In memory, the same.
    opened = open_model(str(tiny_folder))
    ids = resolve(str(text_file), opened, rows=6, length=32, leakage="off").ids
    prune(opened.model, ids, pattern=allocate(opened.model, ids, 0.6, "owl"))
    check_alike(tmp_path / "owl", opened.model)


def test_block_without_layers(calmix, common, tmp_path):
    common += ("--sparsity", 0.6, "--allocation", "owl", "--skip", "*.layers.0.*")
    calmix(*common, "-o", tmp_path / "out").ok()
    told = pruning_of(tmp_path / "out")
    assert told["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert all(".layers.1." in layer["name"] for layer in told["layers"])
