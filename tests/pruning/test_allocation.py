"""Patterns by layer, types or whole bits by measured loss: the assignment, its budget, the pass."""

import itertools
import re

import pytest
import torch

from calmix import SemiStructured, Unstructured, prune
from calmix.models.blocks import find_blocks, outer_layers
from calmix.pruning import allocation
from calmix.pruning.allocation import LOGIT, LossPass, allocate, cheapest, types_for
from calmix.pruning.engine import run_through
from calmix.pruning.gram import relative_error
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import Mixed, as_pattern
from calmix.pruning.solvers.ggml_types import TYPES
from calmix.pruning.solvers.grids import Asymmetric, Symmetric
from calmix.pruning.solvers.libggml import quantise
from tests.pruning.test_engine import input_gram
from tests.pruning.toy import SMALL, refused
from tests.tiny import quick, tiny_ids, tiny_model


def test_pattern_mapping():
    names = [layer.name for layer in find_blocks(tiny_model("llama")).layers]
    mixed = {n: SemiStructured(2, 4) if "mlp" in n else Unstructured(0.7) for n in names}
    report = prune(tiny_model("llama"), tiny_ids(), pattern=mixed)
    for layer in report.layers:
        assert layer.sparsity == pytest.approx(0.5 if "mlp" in layer.name else 0.7, abs=1e-3)
    few = dict.fromkeys(names[1:], Unstructured(0.5))
    for pattern, says in (
        (few, f"the pattern lacks 1 layers, the first is {names[0]}$"),
        (few | {"x": Unstructured(0.5)}, "the pattern names 'x', which is not a layer"),
        (mixed | {names[0]: SemiStructured(2, 5)}, "does not divide the 32 inputs of model"),
    ):
        refused(says, prune, tiny_model("llama"), tiny_ids(), pattern=pattern)


def test_whole_bits_by_what_they_lose():
    method, ids = "gptq,group=32", tiny_ids()
    for bits in (2, 3.5, 8):
        model = tiny_model("llama")
        chosen = allocate(model, ids, f"{bits} bits", method=method)
        sizes = {one.name: one.view().numel() for one in find_blocks(model).layers}
        total = sum(chosen[name].bits * size for name, size in sizes.items())
        assert 0.95 * bits < total / sum(sizes.values()) <= bits
        assert len({chosen[f"model.layers.0.self_attn.{one}_proj"] for one in "qkv"}) == 1
        report = prune(model, ids, method=method, pattern=chosen)
        assert {int(layer.bits) for layer in report.layers} == {one.bits for one in chosen.values()}
    wrong = {"1.5 bits": "gptq takes 2 to 8 bits, not 1.5", "0.5": "for a number of"}
    for target, says in wrong.items():
        refused(says, allocate, tiny_model("llama"), ids, target, method=method)


@pytest.mark.parametrize("kind", [Symmetric, Asymmetric])
def test_nearest_levels(kind):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in range(2, 8):
        rounded = kind([weight], 16, bits).nearest(weight.T.contiguous(), torch.ones(32)).T
        groups = rounded.reshape(12, 16)
        assert max(len(set(one.tolist())) for one in groups) <= 2**bits
        errors.append(float((rounded - weight).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.25 * float(weight.square().mean())


def test_the_assignment_is_the_best_of_all_at_a_budget_on_its_hull():
    rng, sizes, choices, met = torch.Generator().manual_seed(0), (2, 3, 4, 7), {}, 0
    for name in "abcde":
        losses = torch.rand(4, generator=rng).tolist()
        choices[name] = [(n, one / n, str(n)) for n, one in zip(sizes, losses, strict=True)]

    def measured(taken):
        return sum(one[0] for one in taken), sum(one[1] for one in taken)

    every = [measured(taken) for taken in itertools.product(*choices.values())]
    for budget in range(10, 36):
        chosen = cheapest(choices, budget)
        taken = [next(one for one in choices[n] if one[2] == chosen[n]) for n in choices]
        size, loss = measured(taken)
        assert size <= budget
        best = min(least for other, least in every if other <= size)
        met += loss <= best + 1e-9
        assert loss < 1.15 * best
    assert met > 15
    # A choice that is larger and no better is never taken.
    assert cheapest({"a": [(1, 0.5, "x"), (2, 0.6, "y"), (3, 0.1, "z")]}, 9) == {"a": "z"}


def test_losses_are_those_of_the_library_on_the_inputs_of_the_dense_model():
    pytest.importorskip("libggml")
    model, ids = tiny_model("llama", tie_word_embeddings=False), tiny_ids()
    before = [p.clone() for p in model.parameters()]
    look = LossPass(model, find_blocks(model))
    run_through(look, ids, 5 * 32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    names = {one.name for one in find_blocks(model).layers}
    assert look.losses.keys() == names | {"lm_head", "model.embed_tokens"}
    layer, head = find_blocks(model).layers[3], model.lm_head.weight
    squares = input_gram(model, layer.module, ids).diagonal()
    after = quantise(layer.view(), squares, name="IQ4_NL").values()
    lost = float(relative_error(layer.view(), after, squares.diag()))
    assert look.losses[layer.name]["IQ4_NL"] == pytest.approx(lost, rel=0.02)
    squares = input_gram(model, model.lm_head, ids).diagonal()
    wrong = quantise(head, squares, name="Q4_0").values() - head
    logit = float((wrong.square() @ squares).mean()) / ids.numel()
    assert look.losses["lm_head"]["Q4_0"] == pytest.approx(LOGIT * logit, rel=0.02)
    assert [kind.name for kind in types_for(512)][:2] == ["IQ2_XXS", "IQ2_XS"]
    assert {kind.size for kind in types_for(96)} == {32}


@pytest.mark.parametrize("case", quick([(False, 3.0)], [(True, 4.7)]))
def test_a_file_has_at_most_the_bits_asked_for(case, monkeypatch):
    pytest.importorskip("libggml")
    tied, bits = case
    fast = {name: kind for name, kind in TYPES.items() if not name.startswith(("IQ2", "IQ3"))}
    monkeypatch.setattr(allocation, "TYPES", fast)  # codebooks take long to make
    settings = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    model, ids = tiny_model("llama", tie_word_embeddings=tied, **settings), tiny_ids()
    types = allocate(model, ids, f"{bits} bits")
    size = allocation.file_bytes(model, types)
    assert 0.98 * bits < 8 * size / allocation.file_weights(model) <= bits
    assert len({one.type for one in types.values()}) > 2
    report = prune(model, ids, method="ggml", pattern=types)
    written = sum(one.rows * one.columns * one.bits / 8 for one in (*report.layers, *report.outer))
    dense = [p for p in model.parameters() if p.ndim == 1]
    assert size == pytest.approx(written + sum(4 * p.numel() for p in dense), abs=32 * 40)
    assert {one.name for one in report.outer} == set(outer_layers(model))


def test_the_target_is_given_once_and_within_reach(calmix, text_file, tmp_path, tiny_folder):
    pytest.importorskip("libggml")
    assert get_method("ggml,bits=3.4").aim(None)[1] == Mixed(3.4) == as_pattern("3.4 bits mixed")
    assert get_method("ggml").aim(as_pattern("3.4 bits"))[1] == Mixed(3.4)
    says = "the type is given twice: Q3_K_M and 3"
    refused(says, get_method("ggml,type=Q3_K_M,bits=3").aim, None)
    command = ("prune", tiny_folder, "--calibration", text_file, *SMALL, "-o", tmp_path / "out")
    common = (*command, "--method")
    for bits in (3, 8.9):
        says = f"{bits} bits per weight are out of reach: GGUF files of this model have 4."
        assert says in calmix(*common, f"ggml,bits={bits}").line
    assert "--embeddings has no effect" in calmix(*common, "ggml", "--embeddings", 4).line
    assert not (tmp_path / "out").exists()
    odd, says = tiny_model("llama", intermediate_size=40), "no type of GGML fits the 40 inputs of "
    refused(f"{says}.* --skip", allocate, odd, tiny_ids(), "5 bits")
    told = calmix(*common, "ggml,bits=5.5", "--dry-run").ok()
    assert "of tensors in a GGUF file" in told.out
    made = calmix(*common, "ggml,bits=5.5").ok().out
    assert "matrices by type: " in made
    assert "IQ4_NL" in made
    assert 5.3 < float(re.search(r"^(\S+) bits per weight: ", made, re.MULTILINE)[1]) <= 5.5
