"""Study files: what they mean, and every mistake with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from calmix.errors import InputError
from calmix.study.spec import check_study, load_study, parse_study
from calmix.study.trials import Resolver, differences, plan

HEAD = "name: s\nmodels: [builtin:smollm2-135m]\n"


def parsed(text: str):
    checked = parse_study(text, Path("s.yaml"))
    assert not checked.problems, checked.problems
    return checked.study


def problems(text: str) -> list[str]:
    return parse_study(text, Path("s.yaml")).problems


def test_the_grid_is_every_combination_and_one_set_stands_together() -> None:
    study = parsed(
        HEAD + "calibrations: {a: news, b: 'uniform:news,books'}\n"
        "methods: {sparsegpt: [0.5, 2:4], wanda: 0.5}\nseeds: [0, 1]\n"
    )
    labels = [trial.label for trial in plan(study)]
    assert labels == [
        f"{name} {method} seed {seed}"
        for seed in (0, 1)
        for name in ("a", "b")
        for method in ("sparsegpt 50%", "sparsegpt 2:4", "wanda 50%")
    ]
    assert [trial.strategy for trial in plan(study)[:4]] == ["single"] * 3 + ["mix"]


def test_magnitude_needs_no_calibration_and_comes_once() -> None:
    study = parsed(HEAD + "calibrations: {a: news}\nmethods: {magnitude: [0.5]}\nseeds: [0, 1]\n")
    (trial,) = plan(study)
    assert (trial.calibration, trial.strategy, trial.draw, trial.seed) == ("none", "none", None, 0)


def test_grids_replace_what_they_name_and_what_they_share_comes_once() -> None:
    study = parsed(
        HEAD + "calibrations: {a: news, b: books, igsp: igsp}\nmethods: {sparsegpt: 0.6}\n"
        "rows: 8\ngrids:\n  - {}\n  - {seeds: [0, 1], calibrations: [b]}\n"
        "  - {methods: {wanda: 2:4}, rows: 4}\n"
    )
    labels = [trial.label for trial in plan(study)]
    assert labels == [
        "a sparsegpt 60% seed 0",
        "b sparsegpt 60% seed 0",
        "igsp sparsegpt 60% seed 0",
        "b sparsegpt 60% seed 1",
        "a wanda 2:4 seed 0",
        "b wanda 2:4 seed 0",
        "igsp wanda 2:4 seed 0",
    ]
    assert [trial.draw.rows for trial in plan(study)] == [8] * 4 + [4] * 3
    assert plan(study)[2].strategy == "igsp"


def test_labels_tell_models_and_sizes_apart() -> None:
    study = parsed(
        "name: s\nmodels: {one: a/b, two: c/d}\ncalibrations: {a: news}\n"
        "methods: {wanda: 0.5, magnitude: 0.5}\nrows: 8\n"
        "grids:\n  - {}\n  - {models: [one], rows: 4, methods: {wanda: 0.5}, seeds: [1]}\n"
    )
    assert [trial.label for trial in plan(study)] == [
        "magnitude 50%, one",
        "a wanda 50%, one, 8 x 512 seed 0",
        "magnitude 50%, two",
        "a wanda 50%, two, 8 x 512 seed 0",
        "a wanda 50%, one, 4 x 512 seed 1",
    ]


def test_a_set_may_be_drawn_in_its_own_way() -> None:
    study = parsed(
        HEAD + "calibrations:\n  a: {from: news, rows: 3, packing: window, leakage: off}\n"
        "  b: {mix: {news: 3, books: 1}}\n  c: {from: igsp}\n"
        "methods: {wanda: 0.5}\nlength: 40\npacking: window\n"
    )
    a, b, c = (trial.draw for trial in plan(study))
    assert (a.rows, a.length, a.options["packing"], a.options["leakage"]) == (
        3,
        40,
        "window",
        "off",
    )
    assert (b.text, b.rows, b.options["packing"]) == ("news:3.0,books:1.0", 64, "window")
    # How text is drawn means nothing to a model that writes its own.
    assert c.options == {"length": 40, "seed": 0}
    assert problems(
        HEAD + "calibrations: {a: {from: sgs, packing: concat}}\nmethods: {wanda: 0.5}\n"
    ) == ["s.yaml line 3: calibrations.a: 'packing' has no effect with sgs: leave it out"]


def test_two_settings_of_a_generated_set_are_two_sets(tiny_study, tmp_path: Path) -> None:
    spec = tmp_path / "bos.yaml"
    spec.write_text("generate: self-cal\noptions: {start: bos}\n", encoding="utf-8")
    path = tiny_study(("letters: ", f"auto: self-cal\n  bos: {spec}\n  letters: "))
    study = load_study(path)
    auto, bos = (
        Resolver(study).resolve(next(t for t in plan(study) if t.calibration == name))
        for name in ("auto", "bos")
    )
    assert (auto.planned.strategy, bos.planned.strategy) == ("self-cal", "self-cal")
    assert list(differences(auto.request, bos.request)) == [
        "calibration.settings.start: auto, now bos"
    ]
    assert auto.calibration_id != bos.calibration_id


def test_a_setting_out_of_range_is_told_with_its_line() -> None:
    found = problems(
        HEAD + "calibrations:\n  a: igsp\n  b: 'igsp,repeats=5'\nmethods: {wanda: 0.5}\n"
    )
    assert found == [
        "s.yaml line 5: calibrations.b: calibration 'igsp,repeats=5': --repeats 5: must be less "
        "than or equal to 1"
    ]


def test_every_mistake_of_form_is_told_with_its_line() -> None:
    found = problems(
        "name: a b\nmodels: [builtin:smollm2-135m]\nsuit: offline\nrows: '64'\n"
        "calibrations:\n  b: {mix: {x: 1}, uniform: [y]}\n  c: {form: x}\n"
        "  d: {from: news, packing: row}\n"
        "methods:\n  sparsegpt: [1.6]\n  wandda: 0.5\n  wanda: 4-2\nseeds: [-1]\ngrids:\n"
        "  - sedes: [1]\n  - {propagation: two}\n"
    )
    wanted = [
        (1, "name: String should match"),
        (3, "suit: unknown key: did you mean suite"),
        (4, "rows: Input should be a valid integer"),
        (6, "calibrations.b: give exactly one of"),
        (7, "calibrations.c.form: unknown key: did you mean from"),
        (8, "calibrations.d.packing: Input should be 'concat' or 'window'"),
        (10, "methods.sparsegpt.0: Input should be less than 1"),
        (11, "methods.wandda: unknown method 'wandda': did you mean wanda"),
        (13, "seeds.0: Input should be greater than or equal to 0"),
        (15, "grids.0.sedes: unknown key: did you mean seeds"),
        (16, "grids.1.propagation: unknown propagation 'two'"),
    ]
    for line, (number, words) in zip(found, wanted, strict=True):
        assert line.startswith(f"s.yaml line {number}: {words}"), line


def test_methods_may_have_options_of_their_own() -> None:
    study = parsed(
        HEAD + "calibrations: {a: news}\ndamping: 0.2\nmethods:\n  sparsegpt: 0.5\n"
        "  sparsegpt,damping=0.1: 0.5\n  wanda: 0.5\n"
    )
    assert [(trial.method, trial.damping) for trial in plan(study)] == [
        ("sparsegpt,damping=0.2", 0.2),
        ("sparsegpt,damping=0.1", 0.1),
        ("wanda", None),
    ]
    found = problems(
        HEAD + "calibrations: {a: news}\ndamping: 0.2\nmethods:\n  wanda: 0.5\n"
        "grids:\n  - {}\n  - {methods: {magnitude: 0.5}, damping: 0.1}\n"
    )
    assert found == [
        "s.yaml line 4: damping has no effect with wanda, magnitude",
        "s.yaml line 9: grids.1.damping has no effect with magnitude",
    ]
    (line,) = problems(HEAD + "calibrations: {a: news}\nmethods:\n  wanda,damping=1: 0.5\n")
    assert line.endswith("damping has no effect with method wanda: known: refit")


def test_a_pattern_that_is_none_is_told() -> None:
    (line,) = problems(HEAD + "calibrations: {a: news}\nmethods:\n  wanda: 4-2\n")
    assert line == (
        "s.yaml line 4: methods: wanda: pattern '4-2' is not of the form N:M, such as 2:4"
    )


def test_every_unknown_name_is_told_with_its_line(tmp_path: Path) -> None:
    found = problems(
        "name: s\nmodels:\n  m: builtin:smollm\nsuite: ofline\ncalibrations:\n"
        "  a: python-stdlb\n"
        f"  b: a:1,a:2\n  c: {tmp_path}/none.jsonl\n  none: news\n"
        "methods:\n  sparsegpt: []\ngrids:\n"
        "  - calibrations:\n      - a\n      - zz\n    seeds: []\n    models: [q]\n"
    )
    wanted = [
        (3, "models.m: unknown builtin model 'smollm': did you mean smollm2-135m"),
        (4, "suite: unknown suite 'ofline': did you mean offline"),
        (6, "calibrations.a: unknown source 'python-stdlb': did you mean python-stdlib"),
        (7, "calibrations.b: calibration 'a:1,a:2' names 'a' twice"),
        (8, "calibrations.c: there is no file"),
        (9, "calibrations.none: 'none' stands for"),
        (11, "methods.sparsegpt names no sparsity"),
        (15, "grids.0.calibrations: unknown 'zz': known"),
        (16, "grids.0.seeds is empty"),
        (17, "grids.0.models: unknown 'q': known: m"),
    ]
    for line, (number, words) in zip(found, wanted, strict=True):
        assert line.startswith(f"s.yaml line {number}: {words}"), line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + "calibrations: {}\nmethods: {wanda: 0.5}\n", "calibrations is empty: the grid"),
        (HEAD + "calibrations: {a: news}\n", "methods is empty or missing: the grid"),
        (HEAD + "calibrations: {a: news}\nmethods: {wanda: 0.5}\nseeds: []\n", "seeds is empty"),
        ("name: s\nmodels: []\ncalibrations: {a: news}\nmethods: {wanda: 0.5}\n", "at least 1"),
        (HEAD + "models: [x]\n", "'models' is given twice"),
        ("- a\n", "holds no mapping"),
        ("a: [\n", "line 2:"),
    ],
)
def test_empty_grids_and_broken_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        load_study(path)


def test_the_first_mistake_is_raised_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("name: s\nmodels: [builtin:smollm2-135m]\nsuit: 1\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 1: lacks 'calibrations' \(and 1 more: calmix"):
        load_study(path)
    assert len(check_study(path).problems) == 2
    with pytest.raises(InputError, match="there is no file"):
        load_study(tmp_path / "none.yaml")


def test_sources_of_ones_own_are_rooted_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a b c", encoding="utf-8")
    path = tmp_path / "s.yaml"
    path.write_text(
        HEAD + "sources:\n  mine: {reader: {type: file, path: notes.txt}}\n"
        "calibrations: {a: mine}\nmethods: {wanda: 0.5}\n",
        encoding="utf-8",
    )
    study = load_study(path)
    assert [d.text for d in study.own["mine"].documents()] == ["a b c"]
    path.write_text(
        HEAD + "calibrations: {a: news}\nmethods: {wanda: 0.5}\nsources:\n  mine: {red: 1}\n",
        encoding="utf-8",
    )
    with pytest.raises(InputError, match=r"line 5: .*source 'mine'"):
        load_study(path)


def test_what_differs_in_recovery_alone_comes_right_after_its_prune() -> None:
    study = parsed(
        HEAD + "calibrations: {a: news, b: stories}\nmethods: {sparsegpt: [0.5, 0.6]}\n"
        "grids:\n  - {calibrations: [a, b]}\n"
        "  - {calibrations: [b], methods: {sparsegpt: 0.6}, recovery: distill}\n"
    )
    assert [trial.label for trial in plan(study)] == [
        "a sparsegpt 50% seed 0", "a sparsegpt 60% seed 0", "b sparsegpt 50% seed 0",
        "b sparsegpt 60% seed 0", "b sparsegpt + distill 60% seed 0",
    ]  # fmt: skip


def test_allocations_and_recoveries_are_part_of_a_condition() -> None:
    study = parsed(
        HEAD + "calibrations: {a: news}\nmethods: {sparsegpt: 0.6, magnitude: 0.5}\n"
        "allocation: owl\nrecovery: [none, 'blocks,epochs=2', 'distill,lr=2e-3']\n"
    )
    ways = [
        "magnitude", "sparsegpt + owl", "sparsegpt + owl + blocks",
        "sparsegpt + owl + distill,lr=0.002",
    ]  # fmt: skip
    assert [trial.way for trial in plan(study)] == ways
    assert len({trial.condition for trial in plan(study)}) == 4
    asked = [Resolver(study)._around(trial) for trial in plan(study)]
    assert asked[0] == {}
    assert asked[2]["recovery"] == {"method": "blocks", "epochs": 2, "lr": 3e-3, "batch": 4}
    assert asked[3]["recovery"]["lr"] == 2e-3
    found = problems(
        HEAD + "calibrations: {a: news}\nmethods: {wanda: 0.5}\ngrids:\n"
        "  - {recovery: []}\n  - {methods: {magnitude: 0.5}, recovery: distill}\n"
        "  - {methods: {wanda: 2:4}, allocation: owl}\n  - {recovery: none}\n"
    )
    assert found == [
        "s.yaml line 6: grids.0.recovery is empty",
        "s.yaml line 7: grids.1.recovery has no effect with magnitude",
        "s.yaml line 8: grids.2.allocation has no effect with 2:4, the same in every layer: give "
        "it a grid of its own",
    ]
    for line, told in (
        ("recovery: distil", "unknown recovery 'distil': did you mean distill"),
        ("recovery: 'distill,epochs=0'", "--epochs 0 is not positive"),
        ("allocation: [olw]", "unknown allocation 'olw': did you mean owl"),
        ("allocation: no.yaml", "s.yaml line 5: allocation: there is no file no.yaml"),
    ):
        (problem,) = problems(
            HEAD + f"calibrations: {{a: news}}\nmethods: {{wanda: 0.5}}\n{line}\n"
        )
        assert told in problem


def test_a_file_of_sparsities_lies_beside_the_study_and_is_known_by_its_content(
    tmp_path: Path,
) -> None:
    text = HEAD + "calibrations: {a: news}\nmethods: {wanda: 0.5}\nallocation: [own/by.yaml]\n"
    (tmp_path / "own").mkdir()

    def asked(shares: str) -> tuple[str, dict[str, str]]:
        (tmp_path / "own" / "by.yaml").write_text(shares, encoding="utf-8")
        study = parse_study(text, tmp_path / "s.yaml").study
        assert study is not None
        (trial,) = plan(study)
        return trial.label, Resolver(study)._around(trial)

    label, first = asked("{a.q: 0.4, a.k: 0.6}")
    assert label == "a wanda + own/by.yaml 50% seed 0"
    assert asked("a.k: 0.6\na.q: 0.4\n") == (label, first)
    assert asked("{a.q: 0.4, a.k: 0.7}")[1] != first
    (tmp_path / "own" / "by.yaml").write_text("{a.q: 1.4}", encoding="utf-8")
    (line,) = parse_study(text, tmp_path / "s.yaml").problems
    assert line.endswith("the sparsity of a.q is 1.4, not between 0 and 1")
