"""The whole analysis: small and unfinished studies, files, the ranking, mistakes, the verb."""

import csv
import json

import pytest

from calmix.errors import InputError
from calmix.options import Settings
from calmix.study.analyse import analyse
from calmix.study.page import write_report
from calmix.study.store import read_results
from tests.synthetic import (
    CONDITIONS,
    OTHERS,
    SOURCES,
    Plan,
    full_plan,
    save,
    study,
    trial,
    trials_of,
)

QUICK = Settings(resamples=50)


def test_analysis_files_are_reproducible(tmp_path):
    few = {name: OTHERS[name] for name in ("mix-8", "igsp")}
    plan = full_plan(seeds=(0,), sources=SOURCES[8:12], conditions=CONDITIONS[::2], others=few)
    results = study(plan)
    for name in ("one", "two"):
        write_report(results, analyse(results, QUICK), tmp_path / name)
    one, two = (
        {path.name: path.read_text() for path in sorted((tmp_path / name).iterdir())}
        for name in ("one", "two")
    )
    assert one == two
    tables = {f"{name}.csv" for name in ("differences", "gains", "ranking", "tasks")}
    assert set(one) == {"analysis.json", "report.html", "summary.txt", *tables}
    assert not any("nan" in one[name].lower() for name in one if name != "report.html")
    data = json.loads(one["analysis.json"])
    rows, tasks = (
        [*csv.DictReader(one[f"{name}.csv"].splitlines())] for name in ("ranking", "tasks")
    )
    assert (len(data["conditions"]), len(rows), len(tasks)) == (2, 12, 12 * 8)
    first = data["conditions"][0]["ranking"][0]
    assert float(rows[0]["dimensions_code_high"]) == first["dimensions"]["code"]["high"]
    assert float(rows[0]["distance_flips_total"]) == first["distance"]["flips"]["total"]
    assert float(tasks[0]["kept_value"]) == first["tasks"][tasks[0]["name"]]["value"]


def test_analysis_of_a_store(tmp_path):
    """A study uses the dense scores that most trials refer to, whatever the order."""
    results = study(full_plan(seeds=(0, 1), sources=SOURCES[:4], conditions=[("wanda", "50%")]))
    place = save(results, tmp_path / "once")
    assert analyse(read_results(place), QUICK).to_dict() == analyse(results, QUICK).to_dict()
    name = results.trials[0].id  # as if run on another processor
    (place / "dense/other.json").write_bytes((place / f"trials/{name}/scores.json").read_bytes())
    path = place / f"trials/{name}/result.json"
    path.write_text(path.read_text().replace('"dense": "d0"', '"dense": "other"'))
    again = read_results(place)
    assert again.dense == results.dense
    assert again.paired[name] == results.scores[name]
    assert again.paired[results.trials[1].id] == results.dense[results.trials[1].model]


def test_conditions_by_bits_ignore_sparsity():
    trials = tuple(
        trial(name, "mix", "ecq", "3 bits", seed, {"general": 0.5}, sparsity=0.1 * seed)
        for name in "ab"
        for seed in (1, 2)
    )
    (one,) = analyse(study(Plan(), trials=trials), QUICK).conditions
    assert {ranked.calibration for ranked in one.ranking} == {"a", "b"}


def test_incomplete_study_and_errors():
    whole = study(full_plan(conditions=[("wanda", "50%")], seeds=(0, 1)))
    part = whole.model_copy(update={"trials": whole.trials[:-1], "failed": 1})
    assert analyse(part, QUICK).conditions[0].missing == [("igsp", 1)]
    results = study(full_plan(seeds=(0,)))
    twin = results.trials[0].model_copy(update={"id": "again"})
    doubled = results.model_copy(update={"trials": (*results.trials, twin)})
    empty = results.model_copy(update={"trials": (), "failed": 1})
    for made, settings, words in [
        (doubled, QUICK, "two trials of encyclopedia at seed 0"),
        (empty, QUICK, r"no finished trials \(66 planned, 1 failed\)"),
        (results, QUICK.model_copy(update={"default": "c4"}), "calibration set 'c4'"),
    ]:
        with pytest.raises(InputError, match=words):
            analyse(made, settings)


def test_ranking_is_by_total():
    kept = {"coder": (0.3, 0.8), "reader": (0.9, 0.2), "mix": (0.6, 0.6)}
    trials = trials_of(kept, steps=(0, 0.01, 0.02))
    first, second, third = analyse(study(Plan(), trials=trials)).conditions[0].ranking
    assert [one.calibration for one in (first, second, third)] == ["mix", "coder", "reader"]
    assert sum(one.best or 0 for one in (first, second, third)) == pytest.approx(1)
    assert (second.worst, third.worst) == ("general", "code")
    assert third.lowest.value == pytest.approx(0.21, abs=1e-3)
    assert first.behind is None
    lead = second.behind
    assert lead.value < first.total.value - second.total.value  # of the shrunken ones
    assert 0 < lead.low < lead.draw_low < lead.value < lead.draw_high < lead.high
