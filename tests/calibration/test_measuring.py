"""Measuring sources, mixes and saved sets."""

import csv
import json
import math

import numpy as np
import pytest

import calmix as package
from calmix.calibration import resolve, text_metrics
from calmix.calibration.measuring import interval
from calmix.errors import InputError
from calmix.evaluation.likelihood import perplexity_of_rows
from tests.calibration.conftest import write_rows

BUDGET = {"rows": 4, "length": 32}
NAMES = ["few.jsonl", "many.jsonl"]


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    """Two small sources whose names, and so whose draws, are the same in every run."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, letters in zip(NAMES, ("ab ", "abcdefghijklmnop "), strict=True):
        write_rows(tmp_path / name, ("".join(rng.choice(list(letters), 90)) for _ in range(40)))


def test_metrics_match_the_drawn_set(opened):
    measured = package.measure(NAMES, opened, draws=2, seed=7, **BUDGET)
    for draw in range(2):
        how = {"leakage": "off", "seed": 7 + draw, **BUDGET}
        sets = [resolve(name, opened, **how) for name in NAMES]
        ids = [result.ids.numpy() for result in sets]
        for number, name in enumerate(NAMES):
            values = measured.draws[name][draw]
            assert values["aggregation_4"] == text_metrics.aggregation(ids[number], 4)
            assert values["coverage_2"] == text_metrics.coverage(ids, 2, ids)[number]
            assert values["mismatch"] == text_metrics.mismatch(ids[number], [ids[1 - number]])
            entry = sets[number].manifest["sources"][name]
            assert values["scope_documents"] == len(entry["drawn"])
            assert values["granularity"] == entry["drawn_tokens"] / len(entry["drawn"]) == 90
            own = perplexity_of_rows(opened, sets[number].ids)
            assert values["distortion"] == own["perplexity"]
            assert values["bits_per_byte"] == own["bits_per_byte"]
            texts = opened.tokenizer.batch_decode(ids[number].tolist())
            assert values["bytes"] == sum(len(text.encode()) for text in texts)
    assert measured["few.jsonl"]["entropy"].mean < measured["many.jsonl"]["entropy"].mean
    alone = package.measure(NAMES[:1], opened, draws=1, **BUDGET)[NAMES[0]]
    assert not {"mismatch", "coverage_1"} & set(alone)


def test_measure_is_reproducible_and_saved(opened, tmp_path):
    measured = package.measure(NAMES, opened, draws=3, **BUDGET)
    assert measured.to_dict() == package.measure(NAMES, opened, draws=3, **BUDGET).to_dict()
    measured.save(tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()))
    row = next(r for r in rows if (r["name"], r["metric"]) == (NAMES[1], "variety_3"))
    value = measured[NAMES[1]]["variety_3"]
    assert (float(row["mean"]), float(row["low"])) == (value.mean, value.low)
    assert row["budget_tokens"] == "128"
    assert interval([3.0]).low is None
    assert interval([1.0, 2.0, 3.0]).high - 2 == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)


def test_measure_mixes_saved_sets_and_bad_requests(opened, tiny, tmp_path):
    drawn_set = resolve(f"uniform:{','.join(NAMES)}", opened, leakage="off", rows=8, length=32)
    drawn_set.save(tmp_path / "saved")
    how = {"rows": 8, "length": 32, "perplexity": False, "draws": 2}
    measured = package.measure(["saved", "few.jsonl:1,many.jsonl:3"], opened, **how)
    assert (len(measured.draws["saved"]), measured.notes["saved"]) == (1, "saved: one draw")
    alone = package.measure(["saved", *NAMES], opened, **(how | {"rows": None}))
    assert alone.budget["rows"] == 8  # those of the saved set
    for specs, model, options, message in (
        (
            ["saved"],
            opened,
            {"rows": 8, "length": 16},
            r"has 8 rows of 32 tokens, not 8 of 16: .*--rows 8 --length 32",
        ),
        ([], opened, {}, "name at least one source"),
        (NAMES, opened, {"draws": 0}, "--draws 0: must be 1 or more"),
        (NAMES, opened, {"length": 1}, "too short to predict"),
        (NAMES, tiny, {}, "needs the model"),
    ):
        with pytest.raises(InputError, match=message):
            package.measure(specs, model, **(BUDGET | options))


def test_measure_command(calmix, tiny_folder, tmp_path):
    arguments = ["-m", tiny_folder, "--rows", 4, "--length", 32, "--draws", 2, "--no-perplexity"]
    ended = calmix("calibrate", "measure", *NAMES, *arguments, "-o", "out.json", "--json").ok()
    assert json.loads(ended.out) == json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    shown = calmix("calibrate", "measure", *NAMES, *arguments).out
    assert "128 tokens per sample" in shown
    assert "aggregation_4" in shown
    ended = calmix("calibrate", "measure", *NAMES, *arguments, "-o", "out.txt")
    assert "cannot write results to out.txt" in ended.line
    assert "unknown source 'nothin'" in calmix("calibrate", "measure", "nothin", *arguments).line
    mixes = [f"few.jsonl:{i},many.jsonl:1" for i in range(1, 5)]  # many get a compact table
    assert "cover.1" in calmix("calibrate", "measure", *NAMES, *mixes, *arguments).ok().out
