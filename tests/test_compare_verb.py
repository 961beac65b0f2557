import json
from dataclasses import replace

import pytest

from calmix.evaluation.scores import load_scores
from tests.evaluation.helpers import accuracy, bits, scored


def saved(path, values, suite="s"):
    text = bits([sum(values) + 1.0, 2.0], [3, 4], "gold")
    scored(accuracy(values, "arith", "math", 0.0), text, suite=suite).save(path)
    return path


@pytest.fixture
def files(tmp_path):
    dense = saved(tmp_path / "dense.json", [1, 1, 1, 1, 1, 1, 0, 1])
    half = saved(tmp_path / "half.json", [1, 0, 1, 0, 1, 0, 0, 1])
    return dense, half


def test_models_stand_side_by_side(calmix, files, tmp_path):
    dense, half = files
    told = json.loads(calmix("compare", half, "--against", dense, "--json").out)
    by_name = {d["name"]: d["kept"]["value"] for d in told["half"]["dimensions"]}
    assert by_name["math"] == pytest.approx(4 / 7)
    shown = calmix("compare", half, "--against", dense).out
    assert all(word in shown for word in ("57.1", "half", "worst", "flips %"))
    names = ["alpha", "beta", "gamma", "delta"]
    more = [saved(tmp_path / f"{name}.json", [1, 0, 1, 0, 1, 0, 0, 1]) for name in names]
    many = calmix("compare", half, *more, "--against", dense).out  # a row each
    (line,) = [line for line in many.splitlines() if line.strip().startswith("delta ")]
    assert "57.1" in line
    assert max(map(len, (shown + many).splitlines())) <= 80


def test_mistakes_are_one_line(calmix, files, tmp_path):
    dense, half = files
    other = saved(tmp_path / "other.json", [1, 0], suite="t")
    foreign = tmp_path / "foreign.json"
    against = replace(load_scores(dense), model="other", fingerprint="o").to_dict()
    foreign.write_text(json.dumps({**load_scores(half).to_dict(), "dense": against}))
    (tmp_path / "x").mkdir()
    twin = saved(tmp_path / "x" / "half.json", [1, 0, 1, 0, 1, 0, 0, 1])
    for arguments, words in [
        ((other, "--against", dense), "cannot be compared"),
        ((half, twin, "--against", dense), "two files are called half:"),
        ((half,), "was scored without a dense model"),
        ((half, foreign, "--against", dense), "foreign.json was scored against other, which is"),
    ]:
        assert words in calmix("compare", *arguments).line
