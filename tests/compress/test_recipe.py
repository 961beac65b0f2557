"""Recipes: options of `compress` in a YAML file."""

from pathlib import Path

import pytest

from calmix.compression.plan import check_request
from calmix.compression.recipe import recipe_text, with_recipe
from calmix.options import Compression, checked
from tests.compress.conftest import shows
from tests.pruning.test_imatrix import save_gguf, vectors
from tests.tiny import tiny_gguf, tiny_model

RECIPES, MODEL = sorted(Path("recipes").glob("*.yaml")), "builtin:smollm2-135m"


def options(**values):
    return checked(Compression, {"model": MODEL, **values})


@pytest.mark.parametrize("file", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repository_are_options(file):
    assert len(RECIPES) >= 4
    assert with_recipe(options(), file) != options()
    assert f"--recipe recipes/{file.name}" in file.read_text(encoding="utf-8")


def test_options_beside_a_recipe_come_first(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("for: none\nsparsity: 60%\neffort: best\nkeep_at_least: code=0.9\n")
    made = with_recipe(options(effort="quick"), file)
    actual = (made.product, made.sparsity, made.effort, made.keep_at_least)
    assert actual == ("none", 0.6, "quick", "code=0.9")


def test_recipe_of_a_run_gives_its_options(tmp_path):
    """Of a search its floors, not the bits that it chose, which are trained in fewer epochs."""
    given = {"effort": "quick", "seed": 3, "calibration": "chat,c4:0.5"}
    record = options(**given, max_memory="9GiB", bits=3.4).model_dump(mode="json")
    file = tmp_path / "recipe.yaml"
    for kept in {"bits": 3.4}, {"keep_at_least": "code=0.9"}:
        file.write_text(recipe_text(record | kept))
        again = with_recipe(options(), file).model_dump(exclude_unset=True)
        assert again == {"model": MODEL, **given, **kept}


@pytest.mark.parametrize(
    "values",
    [
        {"sparsity": 0.6, "effort": "best", "calibration": "text.txt", "seed": 3},
        {"sparsity": 0.8, "anyway": True},
        {"pattern": "2:4", "bits": 4},
        {"bits": 1.7, "anyway": True, "no_corpus": True},
        {"size": "0.2", "product": "storage", "keep": {"code": 2, "general": 1}},
        {"size": "0.6", "product": "vllm", "asymmetric": True},
        {"size": "0.25", "product": "gguf", "model": "tiny.gguf"},
        {"keep_at_least": "code=0.5", "seeds": 2, "product": "vllm", "confidence": 0.9},
        {"model": "tiny.gguf", "product": "gguf", "licence": "permissive"},
        {"type": "Q4_0", "product": "gguf", "model": "tiny.gguf", "imatrix": "imatrix.gguf"},
    ],
    ids=str,
)
def test_the_recipe_of_a_run_repeats_its_request(values, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("one two three\n")
    tiny_gguf(tmp_path / "tiny.gguf")
    save_gguf(tmp_path / "imatrix.gguf", vectors(tiny_model("llama")))
    run = asked(**values)
    (tmp_path / "recipe.yaml").write_text(recipe_text(run.model_dump(mode="json")))
    again = with_recipe(Compression(model=run.model), tmp_path / "recipe.yaml")
    assert check_request(again) == run


def test_wrong_recipes_name_the_file(tmp_path, calmix):
    file, out = tmp_path / "mine.yaml", tmp_path / "out"
    for text, said in (
        ("sparsity: lots\n", "--sparsity"),
        ("- type\n", "not a mapping"),
        ("model: other\n", "unknown key 'model'"),
        ("output: here\n", "unknown key 'output'"),
    ):
        file.write_text(text)
        shows(calmix("compress", MODEL, "--recipe", file, "-o", out).line, said, "mine.yaml")
        assert not out.exists()
