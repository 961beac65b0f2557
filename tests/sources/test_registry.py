"""The registry: builtin entries, the user's own, and what a name may mean."""

import pytest

from calmix.errors import InputError, SourceError
from calmix.sources import builtin_sources, get_source, load_sources, offline_sources
from calmix.sources.hub import HubText
from calmix.sources.readers import AssetText, LocalFile

DIMENSIONS = {"general", "commonsense", "code", "math"}


def test_builtin_entries_are_complete():
    known = builtin_sources()
    offline = offline_sources()
    hub = set(known) - set(offline)
    assert len(offline) >= 15
    assert len(hub) >= 20
    assert {source.dimension for source in offline.values()} == DIMENSIONS
    assert {known[name].dimension for name in hub} == DIMENSIONS
    for source in known.values():
        assert source.kind
        assert source.licence != "the user's own"
        assert source.description
        assert source.size != "-"
        assert not set(source.name) & set(":, /")


def test_what_the_suite_may_score_is_left_out():
    """The suite takes even items of these; a source of the same data set must keep away."""
    shared = ("piqa", "socialiqa", "lambada", "sciq", "hellaswag", "mbpp", "jeopardy")
    never = ("gsm8k", "codex_humaneval", "minerva_math_500", "mmlu", "basic_skills", "arc_",
             "csqa", "winogrande", "openbookqa", "boolq")  # fmt: skip
    for source in builtin_sources().values():
        if not isinstance(source.reader, AssetText):
            continue
        for member in source.reader.members:
            task = member.split("/")[2]
            assert not task.startswith(never), source.name
            if any(name in task for name in shared):
                assert source.reader.items == "odd" or source.reader.apart, source.name
            if "mbpp" in task:
                assert source.reader.number == "doc.task_id"
            if task.startswith("minerva_math"):
                assert source.reader.apart.items == "all"


def test_an_own_file_of_sources(tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"body": "hello"}\n', encoding="utf-8")
    file = tmp_path / "own.yaml"
    file.write_text(
        "notes:\n  dimension: math\n  reader: {type: file, path: notes.jsonl, template: '{body}'}\n"
        "web:\n  reader: {type: hub, id: some/where}\n",
        encoding="utf-8",
    )
    own = load_sources(file)
    assert [d.text for d in own["notes"].documents()] == ["hello"]
    assert get_source("notes", own) is own["notes"]
    assert own["web"].reader.origin == "hub"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 3", "source 'a' is no mapping"),
        ("a: {kind: x}", "source 'a': 'reader' is missing"),
        ("a: {reader: {type: nope}}", "source 'a': 'reader'.*does not match"),
        ("a: {reader: {type: file}}", r"source 'a': 'reader.file.path' is missing"),
        ("a: {colour: red, reader: {type: python-docs}}", "source 'a': unknown key 'colour'"),
        ("'a:b': {reader: {type: python-docs}}", "'a:b' cannot name a source"),
        ("a: {}\na: {}", "line 2: 'a' is given twice"),
        ("- a", "holds no mapping"),
        ("a: [", "line 1"),
        ("a: {name: b, reader: {type: python-docs}}", "source 'a'"),
    ],
)
def test_a_wrong_file_of_sources(tmp_path, text, message):
    file = tmp_path / "own.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_sources(file)


def test_unreadable_files_of_sources(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        load_sources(tmp_path / "no.yaml")
    with pytest.raises(InputError, match="cannot read"):
        load_sources(tmp_path)
    (tmp_path / "a.yaml").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        load_sources(tmp_path / "a.yaml")


def test_what_a_name_may_mean(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("x", encoding="utf-8")
    assert isinstance(get_source(str(file)).reader, LocalFile)
    reader = get_source("owner/data@part").reader
    assert isinstance(reader, HubText)
    assert (reader.id, reader.subset) == ("owner/data", "part")
    with pytest.raises(SourceError, match="did you mean python-stdlib"):
        get_source("pyton-stdlib")
    with pytest.raises(SourceError, match="there is no file"):
        get_source("missing/file.txt")
    with pytest.raises(SourceError, match="there is no file"):
        get_source("/no/such/place")


def test_listing(calmix, tmp_path):
    import json

    listed = json.loads(calmix("calibrate", "sources", "--json").out)
    assert {"name", "dimension", "kind", "licence", "size", "from", "available"} <= set(listed[0])
    assert "python-stdlib" in calmix("calibrate", "sources").out
    file = tmp_path / "own.yaml"
    file.write_text("mine: {reader: {type: file, path: a.txt}}", encoding="utf-8")
    mine = json.loads(calmix("calibrate", "sources", "--sources", file, "--json").out)[-1]
    assert (mine["name"], mine["available"]) == ("mine", "missing")


def test_show(calmix, text_file):
    assert calmix("calibrate", "show", text_file, "--documents", 1).code == 0
    assert "did you mean" in calmix("calibrate", "show", "pyton-docs").line
