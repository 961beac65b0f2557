"""The ways to specify a calibration set, and their results."""

import pytest
import torch

from calmix.calibration.request import calibration_set, parse_calibration
from calmix.errors import InputError, SourceError
from calmix.evaluation.suites import load_suite
from calmix.sources.mixes import MIXES, parse_mix
from calmix.sources.registry import get_source, own_sources
from tests.evaluation.helpers import benchmark, benchmarks_read


def drawn(spec, opened, **options):
    return calibration_set(str(spec), opened, leakage="off", **options)


def test_named_mix_expands_to_its_sources():
    paths = {"owner/name@part": 0.5, "./x.txt": 0.5}
    assert parse_mix("owner/name@part:1,./x.txt:1,b:0") == paths
    web = {"c4": 0.7, "github-code": 0.1, "gutenberg": 0.1, "stackexchange": 0.1}
    assert parse_calibration("web-mix-70").mix == pytest.approx(web)
    mix = parse_calibration("chat:1,web-mix:3").mix
    assert mix == {"chat": 0.25} | dict.fromkeys(web, 0.1875)
    eight = "encyclopedia,books,stories,activities,python-stdlib,code-compiled,math-solutions"
    assert parse_calibration("mix-8") == parse_calibration(f"uniform:{eight},word-problems")
    with pytest.raises(InputError, match="names 'c4' twice: web-mix has it"):
        parse_calibration("uniform:c4,web-mix")


def test_mix_clean_reads_no_scored_benchmark():
    sources = [get_source(name) for name in MIXES["mix-clean"]]
    assert {source.dimension for source in sources} == {"general", "commonsense", "code", "math"}
    read = benchmarks_read(sources)
    for suite in ("offline", "abilities"):
        for name, task in load_suite(suite).tasks.items():
            assert benchmark(task) not in read, (suite, name)
    tasks = load_suite("abilities").tasks
    named = [benchmark(tasks[name]) for name in ("mbpp", "math500", "triviaqa", "sums")]
    assert named == ["mbpp", "minerva_math", "trivia_qa", None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:1,a:2", "names 'a' twice"),
        ("a:1,b", "'b' has no weight"),
        ("a:-1,b:2", "weight of 'a' is -1.0"),
        ("a:nan,b:2", "weight of 'a' is nan"),
        ("a:0,b:0", "all weights are zero"),
        ("", "calibration '' has an empty name between commas"),
        ("igsp,temperatur=1", "unknown option 'temperatur': did you mean temperature"),
        ("self-cal,start=end", "--start end: must be 'prompts', 'auto', 'bos' or 'separator'"),
        ("igsp,stories", "'stories' is not of the form option=value"),
        ("self-written,temperature=inf", "--temperature inf: must be a finite number"),
        ("sgs,seeds=no-such", "unknown source 'no-such'"),
        ("igsp,prompts=no.yaml", "there is no file no.yaml"),
    ],
)
def test_invalid_specifications(text, message):
    with pytest.raises((InputError, SourceError), match=message):
        parse_calibration(text)


def test_mix_has_rows_by_weight(sources, tiny):
    mix = f"{sources['lower']}:3,{sources['upper']}:1"
    assert drawn(mix, tiny, rows=8, length=16, seed=5).counts[sources["lower"]] == 6
    with pytest.raises(InputError, match="257 is beyond the model's context of 256 tokens"):
        drawn(mix, tiny, length=257)
    with pytest.raises(InputError, match="unknown option 'select'"):
        drawn(mix, tiny, select="igsp")


def test_own_sources_from_file_or_python(sources, tiny, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("mine: {reader: {type: file, path: lower.jsonl}}", encoding="utf-8")
    size = {"rows": 4, "length": 16}
    drawn_set = drawn("mine", tiny, sources=own, **size)
    assert drawn_set.manifest["mix"] == {"mine": 1.0}
    for inputs in (own_sources(own), {"mine": get_source(sources["lower"])}):
        assert drawn("mine", tiny, sources=inputs, **size).sha256 == drawn_set.sha256
    named = {"chat": own_sources(own)["mine"]}  # alone as in a mix
    assert drawn("chat", tiny, sources=named, **size).counts == {"chat": 4}


def test_saved_set(sources, tiny, tmp_path):
    drawn_set = drawn(sources["lower"], tiny, rows=4, length=16, seed=3)
    folder = drawn_set.save(tmp_path / "set")
    assert torch.equal(calibration_set(str(folder), tiny).ids, drawn_set.ids)
    assert calibration_set(str(folder), tiny, rows=4, length=16, seed=3, packing="concat").rows == 4
    sizes = {"rows": 5, "length": 8, "seed": 0}
    for option, value in {**sizes, "packing": "window", "leakage": "offline"}.items():
        with pytest.raises(InputError, match=f"has {option} .*, not {value}: leave --{option} out"):
            calibration_set(str(folder), tiny, **{option: value})
