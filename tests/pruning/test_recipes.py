"""llama.cpp's recipes: the types its own quantiser chose for each matrix, and their solution."""

import json
from collections import defaultdict
from itertools import groupby
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from calmix import prune
from calmix.models.blocks import find_blocks, outer_layers
from calmix.pruning.patterns import Blocks, Recipe, as_pattern
from calmix.pruning.solvers.ggml_scales import fitting
from calmix.pruning.type_recipes import RECIPES
from tests.pruning.test_imatrix import ROLES
from tests.pruning.toy import refused
from tests.tiny import tiny_ids, tiny_model

# By llama.cpp's quantiser (build 11739, with an importance matrix, dry run) on files of the models.
RECORDED = json.loads(Path(__file__).with_name("llama_types.json").read_text())
SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
SHAPES = {
    "smollm2-135m": ("llama", True, (576, 1536, 30, 9, 3, 49152)),
    "qwen2.5-coder-1.5b": ("qwen2", False, (1536, 8960, 28, 12, 2, 151936)),
}
NAMES = ROLES | {"embed_tokens": "token_embd", "lm_head": "output"}


@pytest.mark.parametrize("name", SHAPES)
def test_types_are_those_of_llama_cpp(name):
    """But for IQ4_NL in place of Q4_0, of the same size, where blocks of 256 do not fit."""
    kind, tied, sizes = SHAPES[name]
    settings = dict(zip([*SIZES.split(), "vocab_size"], sizes, strict=True))
    settings["tie_word_embeddings"] = tied
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    blocks = find_blocks(model)
    columns = {layer.name: layer.shape[1] for layer in blocks.layers}
    columns |= {layer: weight.shape[1] for layer, weight in outer_layers(model).items()}
    assert RECORDED[name].keys() == RECIPES.keys()
    for recipe, recorded in RECORDED[name].items():
        found = defaultdict(list)
        for layer, pattern in Recipe(recipe).types(model, blocks).items():
            fitted = fitting(pattern.type, columns[layer]).name
            if pattern.type != fitted == "IQ4_NL" and not pattern.type.startswith("IQ"):
                fitted = "Q4_0"
            found[NAMES[layer.rpartition(".")[2]]].append(fitted)
        for role, types in found.items():
            found[role] = " ".join(f"{len(list(same))}*{kind}" for kind, same in groupby(types))
        assert found == recorded, recipe


def test_a_recipe_covers_other_architectures_by_the_names_of_their_matrices():
    for kind, expected in (
        ("phi3", {"qkv_proj": "Q6_K", "down_proj": "Q6_K", "o_proj": "Q4_K"}),
        ("falcon", {"query_key_value": "Q6_K", "dense_4h_to_h": "Q6_K"}),
        ("gemma2", {"v_proj": "Q6_K", "gate_proj": "Q4_K"}),
    ):
        model = tiny_model(kind)
        types = Recipe("Q4_K_M").types(model, find_blocks(model))
        last = {name.rpartition(".")[2]: pattern.type for name, pattern in types.items()}
        assert last.items() >= expected.items(), kind
        outer = outer_layers(model)
        assert [types[name].type for name in outer] == ["Q8_0", "Q4_K"][: len(outer)]


def test_types_are_for_one_method_alone():
    model, ids = tiny_model("llama"), tiny_ids()
    for method, says in (("sparsegpt", "choose --method ggml"), ("ecq", "takes --bits, not ")):
        for target in ("Q3_K_M", "Q3_K blocks", "3 bits mixed"):
            refused(says, prune, model, ids, method=method, pattern=target)
    refused(r"allocate\(model, ids, '3 bits'", prune, model, ids, method="ggml,bits=3")


def test_names_are_those_of_files_and_one_type_is_named_apart():
    assert as_pattern("q3_k_m") == as_pattern("Q3_K") == Recipe("Q3_K_M")
    assert as_pattern("Q2_K") == Recipe("Q2_K")
    assert as_pattern("Q2_K blocks") == Blocks("Q2_K") == as_pattern(str(Blocks("Q2_K")))
    refused("unknown type 'Q3_K_X': did you mean Q3_K_", Recipe, "Q3_K_X")
    for model in (tiny_model("mixtral"), tiny_model("gpt2")):
        says = "Q4_K_M are types for models without experts and tran"
        refused(says, Recipe("Q4_K_M").types, model, find_blocks(model))


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embeddings_are_solved_in_their_types(tied):
    model, ids = tiny_model("llama", tie_word_embeddings=tied), tiny_ids()
    report = prune(model, ids, method="ggml,type=Q4_0")
    types = {one.name: one.type for one in report.outer}
    both = {"lm_head": "Q8_0", "model.embed_tokens": "Q4_0"}
    assert types == ({"model.embed_tokens": "Q8_0"} if tied else both)
    assert report.pattern == "Q4_0"
    for name, weight in outer_layers(model).items():
        assert torch.equal(report.grids[f"{name}.weight"].values(), weight)
    assert {layer.type for layer in report.layers} == {"Q4_0"}
    chosen = dict.fromkeys((one.name for one in report.layers), Blocks("Q8_0"))
    says = "the pattern names 'lm_haed', which is not a layer"
    refused(says, prune, model, ids, method="ggml", pattern=chosen | {"lm_haed": Blocks("Q8_0")})
    for pattern in ("Q4_0", chosen):
        says = "--embeddings has no effect with Q"
        refused(says, prune, model, ids, method="ggml", pattern=pattern, embeddings=5)
