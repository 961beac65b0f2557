"""Exports for other tools."""

import json
import os
import subprocess
import textwrap

import pytest

from calmix.calibration import build, parse_mix
from calmix.calibration.export import export_datasets, export_jsonl
from calmix.errors import InputError


@pytest.fixture
def made(sources, tiny):
    mix = parse_mix(f"uniform:{sources['lower']},{sources['upper']}")
    return build(mix, tiny, rows=6, length=32)


def test_jsonl(made, tiny, tmp_path):
    export_jsonl(made, tiny.tokenizer, tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["source"] for row in rows] == list(made.sources)
    assert rows[0]["text"] == tiny.tokenizer.decode(made.ids[0], skip_special_tokens=True)
    with pytest.raises(InputError, match="is a folder"):
        export_jsonl(made, tiny.tokenizer, tmp_path)


def test_datasets_folder(made, tiny, tmp_path):
    import datasets

    export_datasets(made, tiny.tokenizer, tmp_path / "a")
    rows = datasets.load_from_disk(str(tmp_path / "a"))
    assert rows["input_ids"][:] == made.ids.tolist()
    assert rows["attention_mask"][:] == [[1] * 32] * 6
    assert rows["source"][:] == list(made.sources)
    export_datasets(made, tiny.tokenizer, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    with pytest.raises(InputError, match="exists and is not empty"):
        export_datasets(made, tiny.tokenizer, tmp_path / "a")


RIVAL = """
    import sys
    from datasets import load_from_disk
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_folder, set_folder = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    rows = load_from_disk(set_folder)
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(model_folder),
        dataset=rows.select_columns(["input_ids", "attention_mask"]),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]["input_ids"]),
        recipe=SparseGPTModifier(sparsity=0.5, targets=["Linear"], ignore=["re:.*lm_head"]),
    )
    weight = model.model.layers[0].self_attn.q_proj.weight
    print("zeros", float((weight == 0).float().mean()))
"""


@pytest.mark.skipif(
    not os.environ.get("CALMIX_RIVAL_PYTHON"),
    reason="CALMIX_RIVAL_PYTHON names no Python with llm-compressor",
)
def test_llm_compressor_prunes_with_an_exported_set(made, tiny, tiny_folder, tmp_path):
    export_datasets(made, tiny.tokenizer, tmp_path / "set")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(
        [os.environ["CALMIX_RIVAL_PYTHON"], "-c", textwrap.dedent(RIVAL), tiny_folder,
         tmp_path / "set"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    zeros = float(run.stdout.split("zeros")[-1])
    assert zeros == pytest.approx(0.5, abs=0.02)
