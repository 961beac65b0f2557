"""Tables fit into 80 columns without truncated or broken words and numbers."""

import json

import pytest

from calmix.evaluation.scores import CapabilityScores
from tests.evaluation.helpers import bits, choices

KL = ("kl_mean", "kl_low", "kl_high", "kl_median", "kl_p99")


def check(printed, columns, *whole):
    """Check that all lines fit and that each text of `whole` is in one line."""
    assert "…" not in printed
    lines = printed.splitlines()
    assert max(map(len, lines)) <= columns, max(lines, key=len)
    for text in whole:
        assert any(str(text) in line for line in lines), (text, printed)


def test_lists_fit_the_terminal(calmix, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("calmix.assets.Asset.state", "ok")  # hashing them takes a second
    for words in (
        "doctor models",
        "doctor methods",
        "doctor assets",
        "evaluate suites",
        "evaluate suite offline",
        "evaluate suite paper",
        "calibrate sources",
        "calibrate sources --dimension general --licence permissive",
    ):
        ended = calmix(*words.split()).ok()
        below = ended.out.rpartition("builtin:smollm2-135m: ")[0] if "models" in words else ""
        data = json.loads(calmix(*words.split(), "--json").out)
        rows = data["provenance"] if "suite " in words else [next(iter(r.values())) for r in data]
        check(below or ended.out, 80, *rows)
        assert "suite " not in words or len(data["hash"]) == 64
    assert {(row["dimension"], row["use"]) for row in data} == {("general", "permissive")}


def scores(model, nats):
    """Made-up scores with very wide names and numbers."""
    task = "a_rather_long_name_of_it"
    return CapabilityScores(
        model,
        "f",
        "bfloat16",
        {"name": "offline", "version": 3, "hash": "0" * 64},
        (
            choices([[-nats, -2.0, -2.5]] * 30, [0] * 30, [[-2.0, -2.0, -2.0]] * 30, task),
            bits([nats * 4] * 20, [4] * 20, name="text", dimension="commonsense"),
            bits([nats * 3] * 20, [4] * 20, name="other", dimension="mathematics"),
        ),
        distance={"dimensions": {}, "total": {**dict.fromkeys(KL, 1.7954), "top1": 0.412}},
    )


@pytest.mark.parametrize("count", [1, 3, 5])
def test_retention_table_fits(calmix, tmp_path, monkeypatch, count):
    monkeypatch.setenv("COLUMNS", "80")
    dense, *files = (tmp_path / f"model-{number}.json" for number in range(count + 1))
    scores("builtin:smollm2-135m", 0.1).save(dense)
    for number, file in enumerate(files):
        scores("out/smollm2-pruned/model", 0.6 + 0.1 * number).save(file)
    verb = ("evaluate", "rescore") if count == 1 else ("compare",)
    data = json.loads(calmix(*verb, *files, "--against", dense, "--json").out)
    ended = calmix(*verb, *files, "--against", dense).ok()
    assert all(word in ended.out for word in ("worst", "flips %"))
    for one in [data] if count == 1 else data.values():
        total = one.get("retention", one)["total"]
        low, value, high = (f"{100 * total[k]:.1f}" for k in ("low", "value", "high"))
        check(ended.out, 80, f"{value} [{low}, {high}]".replace("-", "\N{MINUS SIGN}"))
    check(calmix("evaluate", "rescore", files[0]).out, 80, "a_rather_long_name_of_it")
