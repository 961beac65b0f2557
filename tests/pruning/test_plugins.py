"""Methods from outside the package: registered, or shipped by another one, through every door."""

import pytest
import torch
from pydantic import model_validator

from calmix.errors import InputError
from calmix.pruning import Method, Unstructured, get_method, prune, register
from calmix.pruning.methods import METHODS, methods
from tests.pruning.toy import Toy
from tests.study.conftest import tiny_study  # noqa: F401
from tests.tiny import tiny_ids, tiny_model


class Unregistered(Toy):
    """Passed as an object, it needs no name."""

    name = "unregistered"


SMALL = ("--rows", 6, "--length", 32, "--leakage", "off")
HALF = Unstructured(0.5)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Whatever a test registers is forgotten."""
    monkeypatch.setattr("calmix.pruning.methods.METHODS", dict(METHODS))


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """The toy in an installed package of its own."""
    site = tmp_path / "site"
    info = site / "toy_methods-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[calmix.methods]\ntoy = tests.pruning.toy:Toy\ngone = toy_methods_gone:Gone\n"
        "other = tests.pruning.toy:Toy\nnone = json:dumps\nsilent = toy_silent:Toy\n"
        "late = toy_late:Late\n"
    )
    (site / "toy_silent.py").write_text("raise RuntimeError\n")
    (site / "toy_late.py").write_text(
        "from calmix.pruning import Method\nclass Late(Method):\n"
        "    name, statistic = 'late', None\n    def solve(self, *given): ...\n"
    )
    monkeypatch.syspath_prepend(str(site))


def pruned(method, **options):
    """The first layer's queries, of a tiny model pruned by half, and the report."""
    model = tiny_model("llama")
    report = prune(model, tiny_ids(), method=method, pattern=HALF, **options)
    return model.model.layers[0].self_attn.q_proj.weight, report


def test_a_registered_method_prunes():
    register(Toy)
    weight, report = pruned("toy", strength=2)
    assert (report.method, report.options, report.propagation) == (
        "toy", {"strength": 2}, "sequential",
    )  # fmt: skip
    # The first input's mean, by hand: embeddings through the first norm.
    dense = tiny_model("llama").model
    hidden = dense.layers[0].input_layernorm(dense.embed_tokens(tiny_ids()))
    score = dense.layers[0].self_attn.q_proj.weight.abs() * hidden.flatten(0, 1).abs().mean(0) ** 2
    bound = score.flatten().sort().values[score.numel() // 2 - 1]
    assert torch.equal(weight == 0, score <= bound)
    assert torch.equal(pruned(Unregistered(), strength=2)[0], weight)
    assert torch.equal(pruned("toy,strength=2")[0], weight)
    assert not torch.equal(pruned("toy")[0], weight)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("tox", r"unknown method 'tox': did you mean toy\?"),
        ("gone", r"the method 'gone' .* cannot be loaded: ModuleNotFoundError"),
        ("other", "tests.pruning.toy:Toy is not a method of the name 'other'"),
        ("none", "json:dumps is not a method of the name 'none'"),
        ("silent", r"'silent' \(toy_silent:Toy\) cannot be loaded: RuntimeError: $"),
        ("pytest", "unknown method 'pytest'"),  # another group's entry point
        ("toy,strength", r"^method 'toy,strength': 'strength' is not of the form option=value"),
        ("toy,strength=1,strength=2", "gives strength twice"),
        ("toy,strength=many", "method toy: strength many: Input should be a valid integer"),
        ("toy,strength=10", "method toy: strength 10: Input should be less than or equal to 9"),
        ("toy,strenth=1", "strenth has no effect with method toy: did you mean strength"),
        ("wanda,damping=1", "damping has no effect with method wanda: known: bits, group, refit"),
        ("sparsegpt,damping=nan", "damping nan: Input should be"),
    ],
)
def test_mistakes_are_one_line(shipped, method, says):
    with pytest.raises(InputError, match=says):
        get_method(method)


def test_methods_that_cannot_be_loaded_are_left_out(shipped):
    assert {"toy", "late", "wanda"} < set(methods())
    assert not {"gone", "other", "none", "silent"} & set(methods())


def test_options_of_a_method_in_hand():
    toy = Toy(strength=3)
    assert get_method(toy) is toy
    assert get_method(toy, strength=2) == Toy(strength=2)
    with pytest.raises(
        InputError, match=r"^refit is given twice, once in the method 'ria,refit=1'$"
    ):
        get_method("ria,refit=1", refit=2)
    wanda = get_method("wanda , refit = 2")
    assert wanda.changed == {"refit": 2}
    assert get_method(get_method("sparsegpt,damping=0.5"), refit=3).changed == {
        "damping": 0.5, "refit": 3,
    }  # fmt: skip


def test_what_a_method_itself_refuses_is_told_in_its_words():
    class Odd(Toy):
        name = "odd"

        @model_validator(mode="after")
        def odd(self):
            if self.strength % 2 == 0:
                raise ValueError("the strength is even")
            return self

    assert register(Odd) is register(Odd) is Odd  # once more
    with pytest.raises(InputError, match=r"^method odd: options \{.*\}: the strength is even$"):
        get_method("odd,strength=2")


def test_an_option_of_another_method_is_refused(calmix, shipped, tiny_folder, text_file, tmp_path):
    common = ("prune", tiny_folder, "--calibration", text_file, *SMALL, "--sparsity", 0.5)
    for how, says in [
        (("--strength", 2), "goes with its method: --method toy,strength=VALUE"),
        (("--method", "toy,strength=1,toy"), "two targets are the same, toy-0.5"),
        (("--method", "strength=1,toy"), "unknown method 'strength=1'"),
    ]:
        assert says in calmix(*common, "-o", tmp_path / "out", *how).line
        assert not (tmp_path / "out").exists()


def made(base=Toy, **parts):
    return type("Made", (base,), {"__module__": __name__} | parts)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (lambda: made(Method, statistic=None, solve=Toy.solve), "has no name"),
        (lambda: made(Method, name="blind", solve=Toy.solve), "has no statistic"),
        (lambda: made(Method, name="unsolved", statistic=None), "has no solve"),
        (lambda: made(name="wanda"), r"'wanda' is calmix\.pruning\.methods\.wanda\.Wanda's"),
        (lambda: made(name="a", __annotations__={"limit": int}), "limit without a default"),
        (lambda: made(name="a", __annotations__={"rows": int}, rows=1), "rows, which every prune"),
        (lambda: made(name="a,b"), "a method's name has small letters"),
        (lambda: 3, "3 is not a subclass of"),
    ],
)
def test_what_cannot_be_a_method_is_refused(kind, says):
    with pytest.raises(InputError, match=says):
        register(kind())
    assert "wanda" in methods()
