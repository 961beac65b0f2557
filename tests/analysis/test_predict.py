"""Predictions against layers pruned and run by hand, and every mistake."""

import json
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from calmix import open_model, predict, resolve
from calmix.analysis import predict as module
from calmix.calibration.texts import texts
from calmix.models import find_blocks
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import Unstructured
from tests.study.conftest import write_texts
from tests.tiny import save_tiny_model

DRAW = {"rows": 12, "length": 32, "leakage": "off"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("calmix.calibration.texts.builtin_readers", dict)
    write_texts(tmp_path)
    return tmp_path


def inputs_of(opened, ids):
    """Return the linear layers of the blocks, and the inputs of each, float64 (tokens, columns)."""
    layers, seen = find_blocks(opened.model).layers, {}

    def keep(layer):
        return lambda _, args: seen.update({layer.name: args[0].flatten(0, 1).double()})

    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hooks.enter_context(layer.module.register_forward_pre_hook(keep(layer)))
        opened.model(ids)
    return layers, seen


def test_it_is_what_layers_pruned_on_a_mix_lose_on_other_text(place, tiny_folder, monkeypatch):
    opened = open_model(str(tiny_folder))
    letters, sums = (str(place / f"{name}.jsonl") for name in ("letters", "sums"))
    held_out = texts(opened, {"code": place / "code.jsonl", "sums": place / "sums.jsonl"},
                     rows=4, length=32)  # fmt: skip
    before = {name: value.clone() for name, value in opened.model.state_dict().items()}
    asked = {"every": 1, "held_out": held_out, **DRAW}
    mix = f"{letters}:3,{sums}:1"
    found = predict(opened, [letters, mix], pattern=Unstructured(0.5), **asked)
    assert all(torch.equal(value, before[n]) for n, value in opened.model.state_dict().items())

    ids = {name: resolve(name, opened, **DRAW).ids for name in (letters, sums)}
    layers, first = inputs_of(opened, ids[letters])
    second = inputs_of(opened, ids[sums])[1]
    for text, shares in ((letters, (1, 0)), (mix, (0.75, 0.25))):
        logs = {}
        for name, own in held_out.items():
            seen = inputs_of(opened, own)[1]
            each = []
            for layer in layers:
                gram = sum(share * x[layer.name].T @ x[layer.name]
                           for share, x in zip(shares, (first, second), strict=True))  # fmt: skip
                weight = layer.view()
                solved = get_method("sparsegpt").solve([weight], gram.float(), [Unstructured(0.5)])
                lost = (seen[layer.name] @ (weight - solved.weights[0]).double().T).square().sum()
                each.append((lost / (seen[layer.name] @ weight.double().T).square().sum()).log())
            logs[name] = torch.stack(each).mean().item()
        told = next(one for one in found if one.calibration == text)
        assert told.lost == pytest.approx({n: np.exp(v) for n, v in logs.items()}, rel=1e-3)
        assert told.total == pytest.approx(np.exp(np.mean(list(logs.values()))), rel=1e-3)
    assert found[0].calibration == mix, "the mix has sums in it"

    # A text runs only once; another mix, method or pattern needs no forward pass.
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_through", None)
        assert predict(opened, [letters, mix], pattern=Unstructured(0.5), **asked) == found
        other = predict(opened, [f"uniform:{letters},{sums}"], method="wanda", **asked)
        assert other[0].total > 0
        weighted = predict(opened, [mix], pattern=Unstructured(0.5), weights={"sums": 1}, **asked)
        assert weighted[0].total == pytest.approx(weighted[0].lost["sums"])
    for file in (place / "cache" / "grams").iterdir():
        file.write_bytes(file.read_bytes()[:100])  # damaged: made again
    assert predict(opened, [letters, mix], pattern=Unstructured(0.5), **asked) == found


def test_the_verb_orders_sets_and_each_mistake_is_one_line(calmix, place, tiny_folder):
    def run(*more, model=tiny_folder):
        return calmix(
            "calibrate", "predict", place / "letters.jsonl", place / "sums.jsonl", "--model", model,
            "--text", f"sums={place / 'sums.jsonl'}", "--rows", 12, "--length", 32, "--leakage",
            "off", *more,
        )  # fmt: skip

    told = json.loads(run("--json").out)
    assert [one["calibration"] for one in told] == [
        str(place / "sums.jsonl"), str(place / "letters.jsonl"),
    ]  # fmt: skip
    assert told[0]["total"] < told[1]["total"]
    ended = run("--method", "wanda", "--pattern", "2:4")
    assert "this ranks sets; it does not predict retention" in ended.out
    assert "Gram matrices take" in ended.err
    for more, line in (
        (("--method", "magnitude"), "all sets are equal"),
        (("--weights", "cod=1"), "has no dimension 'cod'"),
        (("--sparsity", 0.5, "--pattern", "2:4"), "give either --sparsity"),
        (("--pattern", "3:7"), "pattern 3:7 does not divide"),
    ):
        assert line in run(*more).line
    mixture = run(model=save_tiny_model(place / "mixture", "mixtral"))
    assert "has experts, which predictions do not support yet" in mixture.line
