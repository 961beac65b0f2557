"""Hub sources, read from local folders of the same shape; nothing reaches the network."""

import json

import pytest

from calmix.errors import SourceError
from calmix.sources import builtin_sources, own_sources
from calmix.sources.hub import HubText

# A row of each data set that has more than a text, as its card shows it, and what is read of it.
CHOICES = {
    "id": "1", "question": "What is wet?", "answerKey": "B",
    "choices": {"label": ["A", "B"], "text": ["fire", "water"]},
}  # fmt: skip
ANSWERED = "Question: What is wet?\nAnswer: water"
TASK = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
SHAPES = {
    "wikipedia": ({"text": "some text", "id": "1", "title": "Water"}, "# Water\n\nsome text"),
    "dolly": ({"instruction": "Say.", "context": "", "response": "Hi."}, "Say.\n\nHi."),
    "alpaca": (TASK, "Add.\n\n1 2\n\n3"),
    "openhermes": ({"conversations": CHAT}, "Hi\n\nHo"),
    "metamath": ({"query": "1+1?", "response": "2", "type": "x"}, "1+1?\n\n2"),
    "gsm8k-train": ({"question": "1+1?", "answer": "2"}, "Question: 1+1?\n\nAnswer: 2"),
    "math-train": ({"problem": "1+1?", "solution": "2"}, "Problem:\n1+1?\n\nSolution:\n2"),
    "codealpaca": (TASK, "Add.\n\n1 2\n\n3"),
    "evol-codealpaca": ({"instruction": "Add.", "output": "3"}, "Add.\n\n3"),
    "arc-train": (CHOICES, ANSWERED),
    "commonsenseqa-train": (CHOICES, ANSWERED),
}
HUB = sorted(name for name, one in builtin_sources().items() if one.reader.origin == "hub")


def put(root, identifier, rows, subsets=(None,), split="train"):
    """Write a folder shaped like a data set on the hub."""
    folder = root / identifier
    configs = []
    for subset in subsets:
        place = subset or "data"
        (folder / place).mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / place / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        files = [{"split": split, "path": f"{place}/{split}.jsonl"}]
        configs.append({"config_name": subset or "default", "data_files": files})
    card = f"---\nconfigs: {json.dumps(configs)}\n---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    root = tmp_path / "mirror"
    root.mkdir()
    monkeypatch.delenv("CALMIX_DATA", raising=False)
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    return root


def test_every_entry_reads_its_shape(mirror):
    for name in HUB:
        source = builtin_sources()[name]
        reader = source.reader.model_copy(update={"id": f"{mirror}/{source.reader.id}"})
        row, wanted = SHAPES.get(name, ({"text": "some text"}, "some text"))
        rows = [row] * 3
        if name == "wikitext2":
            lines = "| = Water = \n|| Wet . \n| = = Uses = = \n| = Fire = \n|Hot"
            rows = [{"text": line} for line in lines.split("|")]
        put(mirror, reader.id, rows, reader.subsets, reader.split)
        assert reader.availability == "offline (local copy)"
        documents = list(reader.read())
        assert len({d.id for d in documents}) == len(documents)
        if name == "wikitext2":
            assert [d.text.split("\n")[0].strip() for d in documents] == ["= Water =", "= Fire ="]
            assert "Uses" in documents[0].text
        else:
            assert [d.text for d in documents] == [wanted] * (3 * len(reader.subsets)), name


def test_the_budget_ends_the_stream_and_what_cannot_be_read_is_named(mirror):
    put(mirror, "a/c", [{"text": "0123456789"}] * 100)
    assert len(list(HubText(type="hub", id=f"{mirror}/a/c", characters=95).read())) == 10
    put(mirror, "a/content", [{"content": "x"}])
    assert [d.text for d in HubText(type="hub", id=f"{mirror}/a/content").read()] == ["x"]
    put(mirror, "a/other", [{"body": "x"}])
    put(mirror, "a/b", [{"text": "x"}], ["en"])
    for reader, line in (
        ({"id": "a/other"}, r"no field 'text' or 'content' \(has: body\)"),
        ({"id": "a/other", "template": "{txet}"},
         r"a/other row 0: there is no field 'txet' \(has: body"),
        ({"id": "a/b", "subset": "de"}, r"a/b \(de, train\) cannot be read: .*Available"),
        ({"id": "a/b", "subset": "en", "split": "test"}, "cannot be read: .*Available"),
    ):  # fmt: skip
        with pytest.raises(SourceError, match=line):
            list(HubText(type="hub", **reader | {"id": f"{mirror}/{reader['id']}"}).read())


def test_what_was_streamed_is_kept(mirror, tmp_path, monkeypatch):
    """A fake hub, asked once."""
    calls = []

    def load_dataset(name, *_, **__):
        calls.append(name)
        return [{"text": f"document {i}"} for i in range(3)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    reader = HubText(type="hub", id="a/b")
    assert reader.availability == "hub"
    first = list(reader.read())
    assert reader.availability == "offline (fetched before)"
    assert list(reader.read()) == first
    assert ([one.text for one in first][2], calls) == ("document 2", ["a/b"])
    (kept,) = tmp_path.rglob("*.jsonl.gz")
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(SourceError, match="is damaged: delete it"):
        list(reader.read())


def test_a_local_copy_named_in_an_own_file(mirror, tmp_path, monkeypatch):
    put(tmp_path / "here", "copy", [{"body": "x"}])
    file = tmp_path / "own.yaml"
    file.write_text(
        "mine: {reader: {type: hub, id: here/copy, template: '{body}'}}\n", encoding="utf-8"
    )
    own = own_sources(file)
    assert [d.text for d in own["mine"].documents()] == ["x"]
    monkeypatch.chdir(tmp_path)  # a folder that happens to be there is not taken for the hub's
    assert HubText(type="hub", id="here/copy").availability == "hub"
