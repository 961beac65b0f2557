"""What a user may write for a calibration set."""

import pytest
import torch

from calmix.calibration import open_tokenizer, parse_spec, resolve
from calmix.errors import InputError, SourceError


def drawn(spec, opened, **options):
    return resolve(str(spec), opened, leakage="off", **options)


def test_names_mixes_and_yaml_files_agree(sources, tiny, tmp_path):
    file = tmp_path / "mix.yaml"
    lower, upper = sources["lower"], sources["upper"]
    file.write_text(
        f"mix: {{'{lower}': 3, '{upper}': 1}}\nrows: 8\nlength: 16\nseed: 5\nleakage: off\n",
        encoding="utf-8",
    )
    by_file = resolve(str(file), tiny)
    by_text = drawn(f"{lower}:3,{upper}:1", tiny, rows=8, length=16, seed=5)
    assert torch.equal(by_file.ids, by_text.ids)
    assert by_file.counts == by_text.counts
    assert by_file.counts[lower] == 6
    assert resolve(str(file), tiny, rows=4).rows == 4  # the command line comes first


def test_a_yaml_file_brings_its_own_sources(sources, tiny, tmp_path):
    file = tmp_path / "mix.yaml"
    file.write_text(
        "uniform: [mine, other]\n"
        "sources:\n"
        "  mine: {reader: {type: file, path: lower.jsonl}}\n"
        "  other: {reader: {type: file, path: upper.jsonl}}\n",
        encoding="utf-8",
    )
    made = drawn(file, tiny, rows=4, length=16)
    assert made.manifest["mix"] == {"mine": 0.5, "other": 0.5}


def test_defaults(sources, tiny, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("word " * 4000, encoding="utf-8")
    made = drawn(path, tiny, length=200)
    assert (made.rows, made.manifest["seed"], made.manifest["packing"]) == (64, 0, "concat")


def test_a_saved_folder(sources, tiny, tmp_path, foreign_folder):
    made = drawn(sources["lower"], tiny, rows=4, length=16, seed=3)
    folder = made.save(tmp_path / "set")
    assert torch.equal(resolve(str(folder), tiny).ids, made.ids)
    assert resolve(str(folder), tiny, rows=4, length=16, seed=3, packing="concat").rows == 4
    for option, value in {
        "rows": 5, "length": 8, "seed": 0, "packing": "window", "select": "zipcal",
        "leakage": "offline",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=f"has {option} .*, not {value}: leave --{option} out"):
            resolve(str(folder), tiny, **{option: value})
    with pytest.raises(InputError, match="another tokenizer"):
        resolve(str(folder), open_tokenizer(str(foreign_folder)))


def test_options_of_a_method_that_writes_text_agree_with_a_file(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("generate: igsp\noptions: {lambda: 0, candidates: 2, openers: a.yaml}\n")
    by_file, by_text = (
        parse_spec(str(file)),
        parse_spec("igsp,lambda=0, candidates=2,openers=a.yaml"),
    )
    assert by_text == by_file
    assert parse_spec("self-cal,start=bos").options.start == "bos"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("igsp,temperatur=1", "unknown option 'temperatur': did you mean temperature"),
        ("igsp,temperature=hot", "calibration 'igsp,temperature=hot': 'temperature': "),
        ("self-cal,start=end", "'start': "),
        ("igsp,stories", "'stories' is not of the form option=value"),
        ("igsp,band=0,band=0.1", "gives band twice"),
        ("igsp,band=0.1", "--band has no effect with --candidates 1"),
        ("sgs,candidates=2", "--candidates has no effect with sgs"),
    ],
)
def test_a_wrong_option_of_a_method_that_writes_text(text, message):
    with pytest.raises(InputError, match=message):
        parse_spec(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: 3", "give exactly one of 'mix'"),
        ("mix: {a: 1}\nuniform: [a]", "give exactly one of 'mix'"),
        ("mix: {a: 1, a: 2}", "line 1: 'a' is given twice"),
        ("mix: {a: -1}", "the weight of 'a' is -1.0"),
        ("mix: {a: 0}", "all weights are zero"),
        ("mix: {a: much}", "'mix"),
        ("uniform: [a, a]", "names 'a' twice"),
        ("uniform: []", "names no source"),
        ("uniform: [a]\nrow: 3", "unknown key 'row'"),
        ("uniform: [a]\nrows: many", "'rows': "),
        ("uniform: [a]\npacking: tight", "'packing': "),
    ],
)
def test_a_wrong_yaml_file(text, message, tmp_path):
    file = tmp_path / "mix.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        parse_spec(str(file))


def test_bad_requests(sources, tiny):
    with pytest.raises(InputError, match="seed -1 is negative"):
        drawn(sources["lower"], tiny, seed=-1)
    with pytest.raises(InputError, match="must be positive"):
        drawn(sources["lower"], tiny, rows=0)
    with pytest.raises(SourceError, match="unknown source"):
        drawn("no-such-source", tiny, rows=1, length=8)
    with pytest.raises(InputError, match="there is no file"):
        drawn("missing.yaml", tiny)


def test_long_mixes_and_odd_names_are_no_paths(tiny):
    names = ",".join(f"no-such-source-{i}" for i in range(40))
    with pytest.raises(SourceError, match="unknown source 'no-such-source-0'"):
        drawn(f"uniform:{names}", tiny, rows=80, length=8)
    with pytest.raises(SourceError, match="unknown source"):
        drawn("x" * 300, tiny, rows=1, length=8)
    with pytest.raises(SourceError, match="unknown source '~nobody-here'"):
        drawn("~nobody-here", tiny, rows=1, length=8)
