"""docs/lab/architectures.csv is still true for one model of each family."""

import csv
import importlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from calmix.pruning import engine
from tests.tiny import quick

ROOT = Path(__file__).parents[1]
FAMILIES = ("zamba2",)  # blocks that share weights
# Fused experts that are stored one by one; latent attention; several streams; several parameters
# stored as one; biases; state spaces; soft caps and windows; transposed maps; the text of a model
# of images; linear attention.
MORE = (
    "mixtral",
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
        patch.setattr(engine, "SMOOTHING", engine.SMOOTHING)  # which a sweep changes
        yield importlib.import_module("architectures")


@pytest.fixture(scope="module")
def table():
    with (ROOT / "docs" / "lab" / "architectures.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("kind", quick(FAMILIES, MORE))
def test_checks_match_the_table(architectures, table, tmp_path, kind):
    row = architectures.sweep(kind, tmp_path)
    assert architectures.cells(row) in table, architectures.reasons(row)


def test_pruning_a_multimodal_model_keeps_its_vision_tower(architectures, tmp_path):
    sweep = architectures.Sweep("llama4", tmp_path)
    sweep.prune(sweep.pruned, "bfloat16")
    dense, pruned = (
        AutoModelForMultimodalLM.from_pretrained(folder) for folder in (sweep.dense, sweep.pruned)
    )
    weights = dict(pruned.named_parameters())
    same = {name for name, p in dense.named_parameters() if torch.equal(p, weights[name])}
    assert {name for name in weights if name.startswith("vision_model.")} <= same
    assert "language_model.model.layers.0.self_attn.q_proj.weight" not in same
