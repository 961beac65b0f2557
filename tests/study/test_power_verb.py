"""`study power`: what it prints, and one line for every mistake."""

import json
from dataclasses import replace

import pytest

from calmix.analysis import power as module
from calmix.analysis.power import Noise, needed
from tests.synthetic import Plan, save, study

NOISE = Noise(
    condition="SparseGPT 60%", quantity="total", kind="total", sets=14, draw=0.012, freedom=21,
    item=0.003, items=2000, signal=0.021, ratio=1.7,
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A finished study of two draws a set under one method."""
    results = study(Plan(sources=("news", "books", "stories"), seeds=(0, 1)))
    return save(results, tmp_path_factory.mktemp("power"))


def test_the_table_fits_80_columns_and_mistakes_are_one_line(calmix, store, monkeypatch):
    task = {"quantity": "arc_challenge_of_24_ch", "kind": "task", "item": 0.02, "draw": 0.03}
    made_up = [NOISE, replace(NOISE, **task)]
    monkeypatch.setattr(module, "noises", lambda *_, **__: made_up)
    lines = calmix("study", "power", store).ok().out.splitlines()
    assert "SparseGPT 60%: 14 sets, 21 degrees of freedom" in lines[0]
    table = [line for line in lines if "/" in line and not line.startswith("In points")]
    assert all(len(line) <= 80 for line in lines if not line.startswith("In points"))
    wanted = needed(0.01, 0.012, 21, 0.003)
    assert table[1].split()[:6] == [
        "total", "2.1", "1.2", "0.3", "1.7", f"{wanted.draws}/{wanted.draws_items}",
    ]  # fmt: skip
    # 2.8^2 x 2^2 times the items for one point, and 7.8 for two.
    assert table[2].split()[5].endswith("/32x")
    told = json.loads(calmix("study", "power", store, "--difference", "2.5", "--json").out)
    assert told[0]["noise"]["draw"] == 0.012
    assert [one["difference"] for one in told[0]["needed"]] == [0.025]
    for text in ("x", "1,,2", "0", "nan"):
        assert "--difference" in calmix("study", "power", store, "--difference", text).line
    made_up[:] = [replace(one, draw=None, freedom=0, signal=None) for one in made_up]
    assert "power needs a set with two seeds" in calmix("study", "power", store).line


def test_the_noise_of_a_study(calmix, store):
    told = json.loads(calmix("study", "power", store, "--json").out)
    total = told[0]["noise"]
    assert (total["quantity"], total["sets"], total["freedom"]) == ("total", 3, 3)
    assert total["draw"] > 0
    assert {one["noise"]["kind"] for one in told} >= {"total", "dimension", "task"}
    for folder in (store / "trials").iterdir():
        (folder / "result.json").unlink()
    line = calmix("study", "power", store).line
    assert "has no finished trials (6 planned): run it first" in line
