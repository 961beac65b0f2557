"""`study power`: what it prints, and one line for every mistake."""

import json
import shutil
from dataclasses import replace

import pytest

from calmix.analysis import power as module
from calmix.analysis.power import Noise, needed
from calmix.study import load_study, run_study
from tests.study.conftest import writer
from tests.study.test_running import Recorder

NOISE = Noise(
    condition="SparseGPT 60%", quantity="total", kind="total", sets=14, draw=0.012, freedom=21,
    item=0.003, items=2000, signal=0.021, ratio=1.7,
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_folder):
    """A finished study of two draws a set under one method."""
    folder = tmp_path_factory.mktemp("power")
    with pytest.MonkeyPatch.context() as patch:
        path = writer(folder, tiny_folder, patch)((', wanda: ["2:4"]', ""), more="seeds: [0, 1]\n")
        run_study(load_study(path), folder / "store", Recorder())
    return folder / "store"


@pytest.fixture
def made_up(monkeypatch):
    """The noise that is found, to be changed at will."""
    task = {"quantity": "arc_challenge_of_24_ch", "kind": "task", "item": 0.02, "draw": 0.03}
    found = [NOISE, replace(NOISE, **task)]
    monkeypatch.setattr(module, "noises", lambda *_, **__: found)
    return found


def test_the_table_fits_80_columns_and_says_what_tells_so_many_points(calmix, store, made_up):
    ended = calmix("study", "power", store).ok()
    lines = ended.out.splitlines()
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


def test_mistakes_are_one_line(calmix, store, made_up):
    for text in ("x", "1,,2", "0", "nan"):
        assert "--difference" in calmix("study", "power", store, "--difference", text).line
    made_up[:] = [replace(one, draw=None, freedom=0, signal=None) for one in made_up]
    assert "power needs a set with two seeds" in calmix("study", "power", store).line


def test_nothing_finished_is_one_line(calmix, store, tmp_path):
    bare = shutil.copytree(store, tmp_path / "store", ignore=shutil.ignore_patterns("trials"))
    line = calmix("study", "power", bare).line
    assert "has no finished trials (6 planned): run it first" in line


def test_the_noise_of_a_real_study(calmix, store):
    told = json.loads(calmix("study", "power", store, "--json").out)
    total = told[0]["noise"]
    assert (total["quantity"], total["sets"], total["freedom"]) == ("total", 3, 3)
    assert total["draw"] > 0
    assert {one["noise"]["kind"] for one in told} >= {"total", "dimension", "task"}
    assert calmix("study", "power", store).code == 0
