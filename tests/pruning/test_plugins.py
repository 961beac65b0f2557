"""Methods of other packages: through Python, the command line and a study."""

import pytest
import torch

import calmix as api
from calmix.pruning.methods import METHODS, Method, get_method, methods, register
from calmix.pruning.methods.base import Saliency
from calmix.study.cells import method_name
from calmix.study.store import read_results
from tests.pruning.toy import SMALL, Absolute, Toy, cases, pruning_of, refused
from tests.study.conftest import run, tiny_study  # noqa: F401
from tests.tiny import load_weights, tiny_ids, tiny_model


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Whatever a test registers is forgotten."""
    monkeypatch.setattr("calmix.pruning.methods.METHODS", dict(METHODS))


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """What an installer writes: the toy, and some methods that cannot be loaded."""
    site = tmp_path / "site"
    info = site / "toy_methods-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-methods\nVersion: 1.0\n")
    points = ("toy = tests.pruning.toy:Toy", "gone = toy_methods_gone:Gone", "none = json:dumps")
    points += ("other = tests.pruning.toy:Toy", "silent = toy_silent:Toy")
    (info / "entry_points.txt").write_text("\n".join(["[calmix.methods]", *points]))
    (site / "toy_silent.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(str(site))


def made(base=Toy, **parts):
    return type("Made", (base,), {"__module__": __name__} | parts)


def test_method_class_with_own_statistic():
    """Which no option replaces."""
    own, model = (
        made(Saliency, name="own", statistic=Absolute, score=Toy.solve),
        tiny_model("llama"),
    )
    for method in (own(refit=2), own(bits=4)):
        says = "method own has a statistic of its own"
        refused(says, api.prune, model, tiny_ids(), method=method, pattern=0.5)
    api.prune(model, tiny_ids(), method=Toy(), pattern=0.5, strength=2, statistics="plain")
    # The first input's sum, by hand: embeddings through the first norm.
    dense = tiny_model("llama").model
    hidden = dense.layers[0].input_layernorm(dense.embed_tokens(tiny_ids()))
    score = dense.layers[0].self_attn.q_proj.weight.abs() * hidden.flatten(0, 1).abs().sum(0) ** 2
    bound = score.flatten().sort().values[score.numel() // 2 - 1]
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight == 0, score <= bound)


def test_method_from_entry_point(shipped, calmix, tiny_folder, text_file, tmp_path):
    common = ("prune", tiny_folder, "--calibration", text_file, *SMALL)
    calmix(*common, "--sparsity", 0.5, "--method", "toy,strength=3", "-o", tmp_path / "out").ok()
    told = pruning_of(tmp_path / "out")
    assert (told["method"], told["options"]) == ("toy", {"strength": 3})
    opened = api.open_model(str(tiny_folder))
    ids = api.calibration_set(str(text_file), opened, rows=6, length=32, leakage="off").ids
    report = api.prune(opened.model, ids, method="toy", pattern=0.5, strength=3)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    found = load_weights(tmp_path / "out")
    for name, weight in opened.model.state_dict().items():
        assert name not in found or torch.equal(found[name], weight), name
    assert "toy" in calmix("doctor", "methods").out
    assert not {"gone", "other", "none", "silent"} & set(methods())


def test_plugin_method_in_a_study(shipped, tiny_study, tmp_path):  # noqa: F811
    before = 'methods: {sparsegpt: [0.6], wanda: ["2:4"]}'
    study, store = tiny_study((before, "methods:\n  toy,strength=2: 0.6")), tmp_path / "store"
    assert run(study, store, only=["code*toy*"]).errors == {}
    assert {trial.method for trial in read_results(store).trials} == {"toy,strength=2"}
    assert method_name("toy,strength=2") == "Toy,strength=2"


@cases(
    "method says",
    ("tox", r"unknown method 'tox': did you mean toy\?"),
    ("gone", r"the method 'gone' .* cannot be loaded: ModuleNotFoundError"),
    ("other", "tests.pruning.toy:Toy is not a method named 'other'"),
    ("none", "json:dumps is not a method named 'none'"),
    ("silent", r"'silent' \(toy_silent:Toy\) cannot be loaded: RuntimeError: $"),
    ("pytest", "unknown method 'pytest'"),  # another group's entry point
    ("toy,strength", r"^method 'toy,strength': 'strength' is not of the form option=value"),
    ("toy,strength=1,strength=2", "gives strength twice"),
    ("toy,strength=many", "method toy: strength many: must be a valid integer"),
    ("toy,strength=10", "method toy: strength 10: must be less than or equal to 9"),
    ("toy,strenth=1", "strenth has no effect with method toy: did you mean strength"),
    ("wanda,damping=1", "damping has no effect with method wanda: known: bits, group, refit"),
    ("sparsegpt,damping=nan", "damping nan: must be"),
)
def test_plugin_errors_are_one_line(shipped, method, says):
    refused(says, get_method, method)


def test_options_of_a_method_class():
    toy = Toy(strength=3)
    assert get_method(toy) is toy
    assert get_method(toy, strength=2) == Toy(strength=2)
    says = r"^refit is given twice, once in the method 'ria,refit=1'$"
    refused(says, get_method, "ria,refit=1", refit=2)
    assert get_method("wanda , refit = 2").changed == {"refit": 2}
    again = get_method(get_method("sparsegpt,damping=0.5"), refit=3)
    assert again.changed == {"damping": 0.5, "refit": 3}


@cases(
    "kind says",
    (lambda: made(Method, statistic=None, solve=Toy.solve), "has no name"),
    (lambda: made(Method, name="blind", solve=Toy.solve), "has no statistic"),
    (lambda: made(Method, name="unsolved", statistic=None), "has no solve"),
    (lambda: made(name="wanda"), r"'wanda' is taken by calmix.pruning.methods.wanda.Wanda"),
    (lambda: made(name="a", __annotations__={"rows": int}, rows=1), "rows, which is reserved"),
    (lambda: made(name="a,b"), "a method name takes lowercase letters"),
    (lambda: 3, "3 is not a subclass of"),
)
def test_invalid_method_classes(kind, says):
    refused(says, register, kind())
    assert "wanda" in methods()
