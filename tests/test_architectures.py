"""What docs/lab/architectures.md says is still true: a model of each family goes through it."""

import importlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from tests.tiny import quick

ROOT = Path(__file__).parents[1]
# Fused experts that are stored one by one; blocks that share weights.
FAMILIES = "mixtral", "zamba2"
# Latent attention; several streams; several parameters stored as one; biases; state spaces; soft
# caps and windows; transposed maps; the text of a model of images; linear attention.
MORE = (
    "deepseek_v32",
    "gemma3n_text",
    "sarvam_moe",
    "bloom",
    "falcon_h1",
    "gemma2",
    "granitemoehybrid",
    "mamba",
    "gpt2",
    "gpt_oss",
    "mamba2",
    "mllama",
    "qwen3_next",
)


@pytest.fixture(scope="module")
def architectures():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("architectures")


@pytest.fixture(scope="module")
def told():
    """The page's lines."""
    return (ROOT / "docs" / "lab" / "architectures.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("kind", quick(FAMILIES, MORE))
def test_one_of_each_family_is_as_the_page_says(architectures, told, tmp_path, kind):
    row = architectures.sweep(kind, tmp_path)
    assert architectures.line(row) in told, architectures.reasons(row)


def test_a_pruned_model_of_images_is_still_one(architectures, tmp_path):
    """calmix opens its text alone, and writes the whole."""
    made = architectures.Sweep("llama4", tmp_path)
    made.prune(made.pruned, "bfloat16")
    dense, pruned = (
        AutoModelForMultimodalLM.from_pretrained(folder) for folder in (made.dense, made.pruned)
    )
    others = dict(pruned.named_parameters())
    same = {name for name, p in dense.named_parameters() if torch.equal(p, others[name])}
    assert {name for name in others if name.startswith("vision_model.")} <= same
    assert "language_model.model.layers.0.self_attn.q_proj.weight" not in same
