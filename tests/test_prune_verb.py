"""The prune verb: its output, that it loads, and errors of one line."""

import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calmix.models.blocks import find_blocks
from tests.tiny import save_tiny_model

SMALL = ("--rows", 6, "--length", 32, "--leakage", "off")


def test_pruned_checkpoint_and_manifest(calmix, tiny_folder, text_file, tmp_path):
    """And the processor files of a vision-language model, which is opened as a text model."""
    source, output = shutil.copytree(tiny_folder, tmp_path / "model"), tmp_path / "pruned"
    kinds = ("preprocessor", "processor", "video_preprocessor")
    beside = (*(f"{kind}_config.json" for kind in kinds), "chat_template.json")
    for name in beside:
        (source / name).write_text(f'{{"is": "{name}"}}', encoding="utf-8")
    command = ("prune", source, "--calibration", text_file, *SMALL, "--sparsity", 0.5)
    assert "weights pruned (50.0" in calmix(*command, "-o", output).ok().out
    for name in beside:
        assert (output / name).read_bytes() == (source / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert torch.isfinite(model(**tokenizer("alpha beta", return_tensors="pt")).logits).all()
    zeros = sum(int((layer.view() == 0).sum()) for layer in find_blocks(model).layers)
    manifest = json.loads((output / "calmix.json").read_text(encoding="utf-8"))
    assert zeros == manifest["pruning"]["pruned"]
    assert manifest["pruning"]["tokens"] == 6 * 32
    assert manifest["calibration"]["sources"][str(text_file)]["rows"] == 6
    assert len(manifest["model"]["sha256"]) == 64
    assert {"torch", "transformers", "calmix", "python"} <= set(manifest["versions"])
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert not any("spars" in key or "quant" in key or "compress" in key for key in config)
    before = json.loads((tiny_folder / "tokenizer.json").read_text(encoding="utf-8"))
    after = json.loads((output / "tokenizer.json").read_text(encoding="utf-8"))
    assert before == after, "calibration must not leak into the tokenizer"
    run = json.loads((output / "calmix-run.json").read_text(encoding="utf-8"))
    assert run["seconds"]["total"] > 0


def test_prune_errors_leave_nothing(calmix, tiny_folder, text_file, tmp_path):
    """Those that only the model or its text shows; `tests/cli/test_mistakes.py` has the others."""
    odd, half = save_tiny_model(tmp_path / "mixture", "mixtral"), ("--sparsity", 0.5)
    before = sorted(tmp_path.iterdir())
    for model, more, words in (
        (odd, (*half, "--drop-experts", 0.75), "is routed to 2: drop fewer"),
        (tiny_folder, ("--pattern", "2:5"), "--skip '*.q_proj'"),
        (tiny_folder, (*half, "--only", "*.nothing"), "matches no layer: names are like model."),
        (tiny_folder, (*half, "--skip", "*"), "--only and --skip leave no layer to prune"),
        (tiny_folder, (*half, "--rows", 9999), "has"),
    ):
        data = ("--calibration", text_file, *SMALL, *more)
        ended = calmix("prune", model, *data, "-o", tmp_path / "out")
        assert ended.code == 2, (more, ended)
        # A line before the error says that calibration began.
        last = ended.err.strip().splitlines()[-1]
        assert last.startswith("error: "), (more, ended)
        assert words in last, (more, last)
        assert sorted(tmp_path.iterdir()) == before, more


def test_failed_write_keeps_the_old_folder(calmix, tiny_folder, tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    for name in ("calmix.json", "config.json"):
        (output / name).write_text("x", encoding="utf-8")
    arguments = ("--method", "magnitude", "--sparsity", 0.5, "-o", output, "--overwrite")
    command = ("prune", tiny_folder, *arguments)
    with monkeypatch.context() as patched:
        full = Mock(side_effect=OSError(28, "No space left on device"))
        patched.setattr("calmix.pruning.checkpoint.write_json", full)
        ended = calmix(*command)
    assert ended.code == 2
    note, error = ended.err.splitlines()
    assert note.startswith("2 blocks are kept in ")
    assert "no space left" in error
    assert {p.name for p in output.iterdir()} == {"calmix.json", "config.json"}
    # The work is kept and can resume when there is room.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.unfinished"]
    ended = calmix(*command, "--resume").ok()
    assert "resuming after 2 of 2 blocks" in ended.err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("more", [("--sparsity", "0.4"), ("--drop-experts", 0.25)])
def test_prune_dry_run(calmix, tmp_path, text_file, more, monkeypatch):
    monkeypatch.setattr("calmix.models.folder.cached_sha256", None)  # weights are not read
    model = save_tiny_model(tmp_path / "model", "mixtral" if "--drop-experts" in more else "llama")
    before = sorted(tmp_path.iterdir())
    data = ("--calibration", text_file, *SMALL, *more)
    command = ("prune", model, *data, "--dry-run", "-o", tmp_path / "out")
    (one,) = json.loads(calmix(*command, "--json").ok().out)
    stored = (model / "model.safetensors").stat().st_size
    assert (one["stage"], one["work"]) == ("prune", "6 rows of 32 tokens")
    assert one["memory"] > 0.2e9
    assert 0.9 * stored < one["disk"] < stored
    assert "cannot hold one block" in calmix(*command, "--max-memory", "1MiB").line
    assert sorted(tmp_path.iterdir()) == before
