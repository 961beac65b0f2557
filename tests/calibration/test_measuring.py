"""Measuring sources, mixes and saved sets."""

import csv
import io
import json
import math

import numpy as np
import pytest
import torch

import calmix as package
from calmix.calibration import open_tokenizer, resolve, text_metrics
from calmix.calibration.measuring import interval
from calmix.errors import InputError, SourceError
from calmix.models import open_model


@pytest.fixture(scope="session")
def opened(tiny_folder):
    return open_model(str(tiny_folder), dtype="float32", device="cpu")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two small sources whose names, and so whose draws, are the same in every run."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, letters in (("few.jsonl", "ab "), ("many.jsonl", "abcdefghijklmnop ")):
        lines = [
            json.dumps({"text": "".join(letters[i] for i in rng.integers(0, len(letters), 90))})
            for _ in range(40)
        ]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    return ["few.jsonl", "many.jsonl"]


BUDGET = {"rows": 4, "length": 32}


def test_values_are_those_of_the_drawn_set(files, opened):
    found = package.measure(files, opened, draws=2, seed=7, **BUDGET)
    sets = [
        [resolve(name, opened, leakage="off", seed=7 + i, **BUDGET) for name in files]
        for i in range(2)
    ]
    for number, name in enumerate(files):
        for draw in range(2):
            ids = [made.ids.numpy() for made in sets[draw]]
            values = found.draws[name][draw]
            assert values["aggregation_4"] == text_metrics.aggregation(ids[number], 4)
            assert values["coverage_2"] == text_metrics.coverage(ids, 2)[number]
            assert values["mismatch"] == text_metrics.mismatch(ids[number], [ids[1 - number]])
            entry = sets[draw][number].manifest["sources"][name]
            assert values["scope_documents"] == len(entry["drawn"])
            assert values["granularity"] == entry["drawn_tokens"] / len(entry["drawn"]) == 90
    assert found["few.jsonl"]["entropy"].mean < found["many.jsonl"]["entropy"].mean


def test_distortion_is_the_model_s_own_perplexity(files, opened):
    found = package.measure([files[0]], opened, draws=1, **BUDGET)
    ids = resolve(files[0], opened, leakage="off", **BUDGET).ids
    with torch.inference_mode():
        logits = opened.model(ids).logits[:, :-1].flatten(0, 1)
    nll = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    values = found.draws[files[0]][0]
    assert values["distortion"] == pytest.approx(math.exp(nll / (4 * 31)), rel=1e-4)
    assert values["bytes"] == sum(
        len(text.encode()) for text in opened.tokenizer.batch_decode(ids.tolist())
    )
    assert "mismatch" not in values
    assert "coverage_1" not in values


def test_repeatable_and_written(files, opened, tmp_path):
    found = package.measure(files, opened, draws=3, **BUDGET)
    again = package.measure(files, opened, draws=3, **BUDGET)
    assert found.to_dict() == again.to_dict()
    found.save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == found.to_dict()
    found.save(tmp_path / "a.csv")
    text = (tmp_path / "a.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {row["name"] for row in rows} == set(files)
    row = next(r for r in rows if r["name"] == files[1] and r["metric"] == "variety_3")
    value = found[files[1]]["variety_3"]
    assert (float(row["mean"]), float(row["low"])) == (value.mean, value.low)
    assert row["budget_tokens"] == "128"


def test_mixes_and_saved_sets(files, opened, tmp_path):
    made = resolve(f"uniform:{','.join(files)}", opened, leakage="off", rows=8, length=32)
    made.save(tmp_path / "saved")
    found = package.measure(
        ["saved", "few.jsonl:1,many.jsonl:3"], opened, draws=2, rows=8, length=32, perplexity=False
    )
    assert len(found.draws["saved"]) == 1
    assert found.notes["saved"]
    for rows, length in ((4, 32), (8, 16)):
        told = rf"has 8 rows of 32 tokens, not {rows} of {length}: .*--rows 8 --length 32"
        with pytest.raises(InputError, match=told):
            package.measure(["saved"], opened, rows=rows, length=length)


def test_intervals():
    assert interval([3.0]).low is None
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.high - found.mean == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)


@pytest.mark.parametrize(
    ("specs", "options", "message"),
    [
        ([], {}, "name at least one source"),
        (["few.jsonl", "few.jsonl"], {}, "is named twice"),
        (["few.jsonl"], {"draws": 0}, "--draws 0: must be 1 or more"),
        (["few.jsonl"], {"length": 1}, "too short to predict"),
    ],
)
def test_bad_requests(files, opened, specs, options, message):
    with pytest.raises((InputError, SourceError), match=message):
        package.measure(specs, opened, **(BUDGET | options))


def test_perplexity_needs_the_model(files, tiny_folder):
    alone = open_tokenizer(str(tiny_folder))
    with pytest.raises(InputError, match="needs the model"):
        package.measure(files, alone, **BUDGET)
    assert package.measure(files, alone, perplexity=False, draws=1, **BUDGET)


def test_the_verb(calmix, files, tiny_folder, tmp_path):
    arguments = ["-m", tiny_folder, "--rows", 4, "--length", 32, "--draws", 2]
    ended = calmix("calibrate", "measure", *files, *arguments, "-o", "out.json", "--json").ok()
    assert json.loads(ended.out) == json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    shown = calmix("calibrate", "measure", *files, *arguments, "--no-perplexity").out
    assert "128 tokens a draw" in shown
    assert "aggregation_4" in shown
    assert (
        "cannot write results to out.txt"
        in calmix("calibrate", "measure", *files, *arguments, "-o", "out.txt").line
    )
    assert "unknown source 'nothin'" in calmix("calibrate", "measure", "nothin", *arguments).line
    assert not (tmp_path / "out.txt").exists()


def test_many_sources_get_a_compact_table(calmix, files, tiny_folder):
    mixes = [f"few.jsonl:{i},many.jsonl:1" for i in range(1, 5)]
    ended = calmix("calibrate", "measure", *files, *mixes, "-m", tiny_folder,
                   "--rows", 4, "--length", 32,
                   "--draws", 1, "--no-perplexity").ok()  # fmt: skip
    assert "cover.1" in ended.out
