"""`study power`: what it prints, and one line for every mistake."""

import json

from calmix.analysis.power import needed
from tests.synthetic import Plan, save, study


def test_the_noise_of_a_study_and_the_seeds_it_needs(calmix, tmp_path):
    results = study(Plan(sources=("news", "books", "stories"), seeds=(0, 1)))
    store = save(results, tmp_path / "store")
    told = json.loads(calmix("study", "power", store, "--difference", "1,2.5", "--json").out)
    assert {one["noise"]["kind"] for one in told} == {"total", "dimension", "task"}
    noise, wanted = told[0]["noise"], told[0]["needed"]
    assert (noise["quantity"], noise["sets"], noise["freedom"]) == ("total", 3, 3)
    assert [one["difference"] for one in wanted] == [0.01, 0.025]
    found = needed(0.025, noise["draw"], noise["freedom"], noise["item"])
    assert wanted[1]["draws"] == found.draws
    lines = calmix("study", "power", store, "--difference", "1,20").ok().out.splitlines()
    assert "SparseGPT 60%: 3 sets, 3 degrees of freedom" in lines[0]
    assert max(map(len, lines)) <= 80
    (row,) = [line.split() for line in lines if line.split()[:1] == ["total"]]
    assert row[1:4] == [f"{100 * noise[key]:.1f}" for key in ("signal", "draw", "item")]
    assert row[-1].count("/") == 1
    for text in ("x", "1,,2", "0", "nan"):
        assert "--difference" in calmix("study", "power", store, "--difference", text).line
    once = save(study(Plan(sources=("news", "books"), seeds=(0,))), tmp_path / "once")
    assert "power needs a set with two seeds" in calmix("study", "power", once).line
    for folder in (store / "trials").iterdir():
        (folder / "result.json").unlink()
    line = calmix("study", "power", store).line
    assert "has no finished trials (6 planned): run it first" in line
