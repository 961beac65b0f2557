"""`study analyse`, `study report` and `recommend` on exported results."""

import json

from tests.synthetic import CONDITIONS, SOURCES, full_plan, save, study, trial

QUICK = ("--permutations", 99, "--resamples", 20)


def test_analyse_writes_into_the_study_and_prints_the_summary(calmix, tmp_path):
    plan = full_plan(sources=SOURCES[:5], conditions=CONDITIONS[1:], others={}, seeds=(0, 1),
                     dimensions=("general", "code"))  # fmt: skip
    folder = save(study(plan), tmp_path / "study")
    ended = calmix("study", "analyse", folder, *QUICK).ok()
    assert "(dense model: 100 %): " in " ".join(ended.out.split())
    assert "findings" in ended.out
    assert (folder / "analysis" / "analysis.json").is_file()
    assert (folder / "analysis" / "correlations.csv").is_file()
    assert "shrunken" in ended.out
    lines = [line for line in ended.out.splitlines() if not line.startswith("written to")]
    assert max(map(len, lines)) <= 80
    again = calmix("study", "analyse", folder, "--json", "--method", "wanda", *QUICK)
    told = json.loads(again.out)
    assert [each["label"] for each in told["conditions"]] == ["Wanda 50%"]
    written = json.loads((folder / "analysis" / "analysis.json").read_text())
    assert written == told


def test_recommend_names_the_best_set_and_its_uncertainty(calmix, tmp_path):
    kept = {"coder": {"general": 0.3, "code": 0.8}, "reader": {"general": 0.9, "code": 0.2}}
    trials = tuple(
        trial(name, "single", "sparsegpt", "60%", seed,
              {key: value + 0.01 * seed for key, value in by.items()})
        for name, by in kept.items()
        for seed in (0, 1)
    )  # fmt: skip

    def recommended(trials, *more):
        place = tmp_path / str(len(trials))
        folder = place if place.exists() else save(study(full_plan(), trials=trials), place)
        return calmix("study", "recommend", folder, *more).ok().out

    text = recommended(trials, "--weights", "general=1,code=3")
    assert max(map(len, text.splitlines())) <= 80
    for words in ("take coder: expect 6", "coder keeps the most: 6", "ahead of reader by ",
                  "brackets: 95 % intervals over test items and seeds ("):  # fmt: skip
        assert words in " ".join(text.split())
    told = json.loads(recommended(trials, "--weights", "general=1", "--json"))
    assert told[0]["candidates"][0]["calibration"] == "reader"
    text = recommended(tuple(one for one in trials if one.seed == 0))
    assert "over test items alone, with one seed each" in text
    assert "weights all equal" in text
    assert "take coder or a set tied with it: expect 55" in text
    assert "take coder, the only set: " in recommended(trials[:1])
