"""Study files: their meaning, and every mistake with its line."""

import tarfile
from pathlib import Path

import pytest

from calmix.manifest import differences
from calmix.study.declaration import Declaration, declaration
from calmix.study.spec import check_study, load_study
from calmix.study.trials import planned_trials, resolve_all
from tests.compress.conftest import read, refused

HEAD = "name: s\nmodels: [builtin:smollm2-135m]\n"
NEWS = HEAD + "calibrations: {a: news}\n"
DECLARES = (
    HEAD + "calibrations: {a: news, b: books, c: stories, mix: 'uniform:news,books'}\n"
    "grids:\n  - methods: {sparsegpt: [0.5, 0.6]}\n    seeds: [0, 1]\n"
    "  - {methods: {admm: 0.5}, calibrations: [a, mix], recovery: [none, distill]}\n"
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def problems(text):
    Path("s.yaml").write_text(text, encoding="utf-8")
    return check_study(Path("s.yaml"))[1]


def parsed(text):
    assert problems(text) == []
    return load_study(Path("s.yaml"))


# Each with the labels of its trials.
GRIDS = {
    "every combination, what uses one set together": (
        HEAD + "calibrations: {a: news, b: 'uniform:news,books'}\n"
        "methods: {sparsegpt: 2:4, wanda: 0.5, magnitude: [50%, 60%]}\nseeds: [0, 1]\n",
        "magnitude 50%; magnitude 60%; a sparsegpt 2:4 seed 0; a wanda 50% seed 0; "
        "b sparsegpt 2:4 seed 0; b wanda 50% seed 0; a sparsegpt 2:4 seed 1; "
        "a wanda 50% seed 1; b sparsegpt 2:4 seed 1; b wanda 50% seed 1",
    ),
    "embeddings are rounded by methods without a set too, methods have options": (
        NEWS + "methods: {'sparsegpt,bits=4': 0.5, magnitude: 0.5}\nembeddings: 4\n",
        "magnitude + embeddings 4 50%; a sparsegpt,bits=4 + embeddings 4 50% seed 0",
    ),
    "grids replace what they name, and what they share comes once": (
        HEAD + "calibrations: {a: news, b: books, igsp: igsp}\nmethods: {sparsegpt: 0.6}\n"
        "rows: 8\ngrids:\n  - {}\n  - {seeds: [0, 1], calibrations: [b]}\n"
        "  - {methods: {wanda: 2:4}, rows: 4}\n",
        "a sparsegpt 60% seed 0; b sparsegpt 60% seed 0; igsp sparsegpt 60% seed 0; "
        "b sparsegpt 60% seed 1; a wanda 2:4 seed 0; b wanda 2:4 seed 0; igsp wanda 2:4 seed 0",
    ),
    "labels tell models, sizes and options apart, recoveries come right after their prune": (
        "name: s\nmodels: {one: a/b, two: c/d}\ncalibrations: {a: news}\n"
        "methods: {'sparsegpt,damping=0.1': 0.5, magnitude: 0.5}\nrows: 8\ngrids:\n  - {}\n"
        "  - {models: [one], rows: 4, methods: {wanda: 0.5}, seeds: [1]}\n"
        "  - {models: [one], recovery: distill}\n",
        "magnitude 50%, one; a sparsegpt,damping=0.1 50%, one seed 0; "
        "a sparsegpt,damping=0.1 + distill 50% seed 0; magnitude 50%, two; "
        "a sparsegpt,damping=0.1 50%, two seed 0; a wanda 50% seed 1",
    ),
}


def test_grids_become_trials():
    planned = [planned_trials(parsed(text)) for text, _ in GRIDS.values()]
    for (name, (_, labels)), trials in zip(GRIDS.items(), planned, strict=True):
        assert [trial.label for trial in trials] == labels.split("; "), name
    (bare, *every), embedded, replaced, _ = planned
    assert (bare.calibration, bare.request.calibration, bare.rows) == ("none", None, 0)
    assert [trial.strategy for trial in every[:4]] == ["none", "single", "single", "mix"]
    assert {trial.request.embeddings for trial in embedded} == {4}
    assert [trial.rows for trial in replaced] == [8] * 4 + [4] * 3
    assert replaced[2].strategy == "igsp"


def test_per_set_sampling_options():
    study = parsed(
        HEAD + "calibrations:\n  a: {from: news, rows: 3, packing: window, leakage: off}\n"
        "  b: {mix: {news: 3, books: 1}}\n  c: {from: igsp}\n"
        "methods: {wanda: 0.5}\nlength: 40\npacking: window\n"
    )
    a, b, c = (trial.request for trial in planned_trials(study))
    assert a.drawn() == {"rows": 3, "length": 40, "packing": "window", "leakage": "off", "seed": 0}
    assert (b.calibration, b.drawn()["packing"]) == ("news:3.0,books:1.0", "window")
    assert [trial.rows for trial in planned_trials(study)] == [3, 64, 64]
    # Packing does not apply to self-written text.
    assert c.drawn() == {"length": 40, "seed": 0, "leakage": "offline"}


@pytest.mark.parametrize(("more", "usual"), [("", "abilities"), ("leakage: offline\n", "offline")])
def test_leakage_suite_of_a_study(more, usual):
    sets = "calibrations: {a: news, c: {from: news, leakage: smoke}, igsp: igsp}\n"
    text = f"{HEAD}suite: abilities\n{sets}methods: {{wanda: 0.5}}\n{more}"
    trials = planned_trials(parsed(text))
    guards = [(one.parsed.draw.leakage, one.request.drawn().get("leakage")) for one in trials]
    assert guards == [(usual,) * 2, ("smoke",) * 2, (usual,) * 2]


def test_committed_study_file_gives_its_set_ids(tmp_path, monkeypatch):
    """Those of sets whose texts come with the tool and have not changed since."""
    root = Path(__file__).parents[2]
    with tarfile.open(root / "studies/results/noise/store.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    listed = read(tmp_path / "noise/store.json")["trials"]
    stored = {one["label"]: one["set"] for one in listed}
    request = read(tmp_path / "noise/trials" / listed[0]["id"] / "request.json")
    model = request["model"]["sha256"]
    monkeypatch.setattr("calmix.study.trials.resolve_model", lambda name: name)
    monkeypatch.setattr("calmix.study.trials.fingerprint", lambda path: model)
    study = load_study(root / "studies/noise.yaml")
    trials = resolve_all(study, planned_trials(study))
    same = {one.calibration for one in trials if one.calibration_id == stored[one.label]}
    assert same >= {"python-algorithms", "math-solutions"}


def test_generator_settings_distinguish_sets(tiny_study):
    sets = "auto: self-cal,start=auto\n  bos: self-cal,start=bos\n  letters: "
    study = load_study(tiny_study(("letters: ", sets)))
    auto, bos = resolve_all(study, planned_trials(study)[:4:2])
    changes = list(differences(auto.definition, bos.definition))
    assert changes == ["calibration.settings.start: auto, now bos"]
    assert auto.calibration_id != bos.calibration_id


# Study files with their mistakes behind `#!`.
MISTAKEN = {
    "form": """\
name: a b  #! name: String should match
models: [builtin:smollm2-135m]
suit: offline  #! suit: unknown key: did you mean suite
calibrations:
  b: {mix: {x: 1}, uniform: [y]}  #! calibrations.b: give exactly one of
  c: {form: x}  #! calibrations.c.form: unknown key: did you mean from
methods:
  sparsegpt: [1.6]  #! methods.sparsegpt.0: sparsity 1.6 is above 1: write 1.6% or 0.016
  wandda: 0.5  #! methods.wandda: unknown method 'wandda': did you mean wanda
  wanda: 4-2  #! methods.wanda: sparsity '4-2' is not a share
  ria: []  #! methods.ria: Value should have at least 1 item
  wanda,damping=1: 0.5  #! methods.wanda,damping=1: damping has no effect with method wanda: known
seeds: [-1]  #! seeds.0: must be greater than or equal to 0
grids:
  - sedes: [1]  #! grids.0.sedes: unknown key: did you mean seeds
recovery: 'distill,epochs=0'  #! recovery: --epochs 0: must be greater
""",
    "names": """\
name: s
models:
  m: builtin:smollm  #! models.m: unknown builtin model 'smollm': did you mean smollm2-135m
suite: ofline  #! suite: unknown suite 'ofline': did you mean offline
calibrations:
  a: python-stdlb  #! calibrations.a: unknown source 'python-stdlb': did you mean python-stdlib
  b: a:1,a:2  #! calibrations.b: calibration 'a:1,a:2' names 'a' twice
  c: ./none.jsonl  #! calibrations.c: there is no file
  none: news  #! calibrations.none: 'none' is reserved for
  e: {from: sgs, packing: window}  #! calibrations.e: 'packing' has no effect with sgs
methods:
  sparsegpt: 0.5
  gptq: 1.5 bits  #! methods.gptq: gptq takes 2 to 8 bits, not 1.5
sources: {mine: {red: 1}}  #! sources: s.yaml: source 'mine'
grids:
  - calibrations: [a, zz]  #! grids.0.calibrations.1: unknown 'zz': known
    models: [q]  #! grids.0.models.0: unknown 'q': known: m
  - {methods: {magnitude: 0.5}, recovery: distill}  #! grids.1.recovery: no effect with magnitude
  - {recovery: none}
""",
    "keys at the top apply to the grids": NEWS
    + "methods: {magnitude: 0.5}\nrecovery: distill\ngrids:\n  - methods: {wanda: 0.5}\n",
    "twins": NEWS
    + "methods: {wanda: 0.5, 'wanda,refit=0': 0.6}  #! methods: two names mean the same method:\n",
    "no sets": HEAD
    + """\
calibrations: {}  #! calibrations: Dictionary should have at least 1
methods: {wanda: 0.5}
seeds: []  #! seeds: List should have at least 1
""",
    "no trials": NEWS.replace("\n", "  #! methods: the grid has no trials\n", 1),
    "declaration": DECLARES
    + """\
primary: rigth  #! primary: must be 'right'
margin: 0  #! margin: must be greater
exclude: {arc_easy: ''}  #! exclude.arc_easy: String should match
amends: {study: t}  #! amends: lacks 'reason'
comparisons:
  - {name: x, of: {calibration: a}, over: {method: wanda}}  #! comparisons.0: 'of' and 'over' must
  - {name: y, over: {calibration: b},
     of: {calibration: a, best_of: [a, b]}}  #! comparisons.1.of: give one of 'calibration' and 'be
  - {name: z, of: {calibration: a}, over: {calibration: a}}  #! comparisons.2: 'of' and 'over' are
  - {name: w,  #! comparisons.3: 'where.calibrations' has no effect: 'of' and 'over' name it
     of: {calibration: a}, over: {calibration: b}, where: {calibrations: c}}
  - {name: v,  #! comparisons.4: 'predict' must be two numbers, the lower one first
     of: {calibration: a}, over: {calibration: b}, predict: [3, 1]}
  - {name: u, over: {target: 0.5},
     of: {target: 60},  #! comparisons.5.of.target: sparsity 60 is above 1: write 60% or 0.6
     refuted: {}}  #! comparisons.5.refuted: give 'below' or 'above'
""",
    "declared names": DECLARES
    + """\
exclude: {arc_esy: x}  #! exclude.arc_esy: the suite has no such task: did you mean arc_easy
amends: {study: s, reason: x}  #! amends.study: a study cannot amend itself
comparisons:
  - name: x
    of: {calibration: mx}  #! comparisons.0.of.calibration: the study has no 'mx': did you mean mix
    over: {best_of: [a, d]}  #! comparisons.0.over.best_of: the study has no 'd': known
  - name: x  #! comparisons.1.name: two comparisons have this name
    of: {method: wanda}  #! comparisons.1.of.method: the study has no 'wanda'
    over: {method: admm}
    where:
      targets: [0.7]  #! comparisons.1.where.targets: the study has no '70%':
      models: [q]  #! comparisons.1.where.models: the study has no 'q'
      recoveries: blocks  #! comparisons.1.where.recoveries: the study has no 'blocks'
""",
}


@pytest.mark.parametrize("text", MISTAKEN.values(), ids=MISTAKEN)
def test_mistakes_name_their_line(text):
    lines = [line.partition("  #! ")[2] for line in text.splitlines()]
    wanted = [f"s.yaml line {number}: {said}" for number, said in enumerate(lines, 1) if said]
    actual = problems(text)
    assert [line[: len(start)] for line, start in zip(actual, wanted, strict=True)] == wanted


def test_first_mistake_of_a_file():
    assert len(problems(HEAD + "suit: 1\n")) == 2
    said = r"line 1: lacks 'calibrations' \(and 1 more: calmix"
    refused(said, load_study, Path("s.yaml"))


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("studies/*.yaml")))
def test_committed_studies_are_valid(path, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    if "calibrations:" in path.read_text(encoding="utf-8"):
        assert check_study(path)[1] == []


def test_own_sources_are_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("a b c", encoding="utf-8")
    own = "sources: {mine: {reader: {type: file, path: notes.txt}}}\n"
    (tmp_path / "s.yaml").write_text(f"{NEWS}{own}methods: {{wanda: 0.5}}\n", encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    study = load_study(tmp_path / "s.yaml")
    assert [d.text for d in study.own["mine"].documents()] == ["a b c"]


@pytest.mark.real
def test_recovery_and_statistics_identify_trials():
    """Trials of stores without a word of statistics were plain."""
    methods = "methods: {sparsegpt: 0.5, magnitude: 0.5, llama: Q4_K_M}\n"
    recovery = "recovery: [none, 'blocks,epochs=2', 'distill,lr=2e-3']\n"
    requests = []
    for said in ("", "statistics: robust\n", "statistics: plain\n"):
        trials = planned_trials(study := parsed(NEWS + methods + recovery + said))
        assert len({trial.condition for trial in trials}) == len(trials) == 7
        requests.append({one.recipe: one.definition for one in resolve_all(study, trials)})
    default, robust, plain = requests
    assert (default, "statistics" in plain["sparsegpt"]) == (robust, False)
    both = "robust, targets of the dense model"
    assert robust["sparsegpt"] == plain["sparsegpt"] | {"statistics": both}
    for name in ("magnitude", "llama"):
        assert (robust[name], "recovery" in robust[name]) == (plain[name], False)
    request = robust["sparsegpt + blocks"]["recovery"]
    assert request == {"method": "blocks", "epochs": 2, "lr": 3e-3, "batch": 4}
    assert robust["sparsegpt + distill,lr=0.002"]["recovery"]["lr"] == 2e-3


def compared(*lines):
    """Return what a study with these comparisons declares."""
    study = parsed(DECLARES + "comparisons:\n" + "".join(f"  - {one}\n" for one in lines))
    return declaration(study, planned_trials(study))


def test_comparison_pairs_matching_trials():
    actual = compared(
        "{name: mixed, of: {calibration: mix}, over: {calibration: a}, where: {targets: 0.5}}",
        "{name: solver, of: {method: admm}, over: {method: sparsegpt}}",
        "{name: best, of: {calibration: mix}, over: {best_of: [a, b, c]},"
        " where: {methods: sparsegpt, targets: 50%}}",
        "{name: recovered, of: {recovery: distill, calibration: mix},"
        " over: {recovery: none, calibration: a}}",
    ).pairs

    def labels(side):
        return [f"{of} {how} {at} {seed}" for _, of, how, at, *_, seed, _ in side]

    def sides(name):
        return [[labels(pair.of), labels(pair.over)] for pair in actual[name]]

    assert sides("mixed") == [
        [[f"{name} sparsegpt 50% {seed}" for seed in (0, 1)] for name in ("mix", "a")],
        [["mix admm 50% 0"], ["a admm 50% 0"]],
        [["mix admm + distill 50% 0"], ["a admm + distill 50% 0"]],
    ]
    assert sides("solver") == [
        [[f"{name} admm 50% 0"], [f"{name} sparsegpt 50% {seed}" for seed in (0, 1)]]
        for name in ("a", "mix")
    ]
    ((ours, theirs),) = sides("best")
    assert len(ours) == 2
    assert [text[0] for text in theirs] == ["a", "b", "c"] * 2
    assert sides("recovered") == [[["mix admm + distill 50% 0"], ["a admm 50% 0"]]]


def test_declaration_hash():
    line = "{name: mixed, of: {calibration: mix}, over: {calibration: a}}"
    whole = DECLARES + f"margin: 5\ncomparisons:\n  - {line}\n"

    def hashed(*change):
        study = parsed(whole.replace(*change))
        actual = declaration(study, planned_trials(study))
        assert Declaration.model_validate_json(actual.model_dump_json()) == actual
        return actual.hash

    first = hashed("", "")
    for old, new, same in (
        ("c: stories", "c: history", True),
        ("name: s", "name: t\ndescription: x", True),
        ("margin: 5", "margin: 4", False),
        ("margin: 5", "primary: accuracy", False),
        ("seeds: [0, 1]", "", False),
        ("margin: 5", "margin: 5\nexclude: {arc_easy: too easy}", False),
        ("0.6]", "0.7]", False),
        ("uniform:news,books", "uniform:news,stories", False),
        ("builtin:smollm2-135m", "a/b", False),
        ("calibration: a}}", "calibration: a}, predict: [1, 2]}", False),
    ):
        assert old in whole
        assert (hashed(old, new) == first) == same, new


def test_primary_measure_and_comparisons_without_pairs():
    abilities = DECLARES + "suite: abilities\n"
    texts = DECLARES, abilities, abilities + "primary: accuracy\n"
    assert [parsed(text).primary for text in texts] == ["primary", "right", "accuracy"]
    mixed = "{recovery: distill, calibration: mix}, over: {recovery: none, calibration: b}"
    for sides, says in (
        ("{calibration: b}, over: {calibration: a}, where: {methods: admm}", " at"),
        ("{method: admm}, over: {method: sparsegpt}, where: {targets: [.5, .6]}", "alike at 60%"),
        (mixed, "alike: add"),
    ):
        said = rf"s\.yaml line 9: comparison 'x' has no .*{says}"
        refused(said, compared, f"{{name: x, of: {sides}}}")
