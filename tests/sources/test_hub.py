"""Hub sources, read from folders of the same layout instead of the hub."""

import gzip
import json
import shutil
from unittest.mock import Mock

import pytest

from calmix.errors import SourceError
from calmix.sources.hub import HubText
from calmix.sources.registry import builtin_sources

# A row of each data set with more fields than text, as on its card, and the text read from it.
CHOICES = {"label": ["A", "B"], "text": ["fire", "water"]}
QUIZ = {"id": "1", "question": "What is wet?", "answerKey": "B", "choices": CHOICES}
ANSWERED = QUIZ, "Question: What is wet?\nAnswer: water"
TASK = {"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2\n\n3"
CHAT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
SHAPES = {
    "wikipedia": ({"text": "some text", "id": "1", "title": "Water"}, "# Water\n\nsome text"),
    "dolly": ({"instruction": "Say.", "context": "", "response": "Hi."}, "Say.\n\nHi."),
    "alpaca": TASK,
    "openhermes": ({"conversations": CHAT}, "Hi\n\nHo"),
    "metamath": ({"query": "1+1?", "response": "2", "type": "x"}, "1+1?\n\n2"),
    "gsm8k-train": ({"question": "1+1?", "answer": "2"}, "Question: 1+1?\n\nAnswer: 2"),
    "math-train": ({"problem": "1+1?", "solution": "2"}, "Problem:\n1+1?\n\nSolution:\n2"),
    "codealpaca": TASK,
    "evol-codealpaca": ({"instruction": "Add.", "output": "3"}, "Add.\n\n3"),
    "arc-train": ANSWERED,
    "commonsenseqa-train": ANSWERED,
}
HUB = [name for name, one in builtin_sources().items() if one.reader.origin == "hub"]


def put(root, identifier, rows, subsets=(None,), split="train"):
    folder, configs = root / identifier, []
    for subset in subsets:
        path = f"{subset or 'data'}/{split}.jsonl"
        (folder / path).parent.mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / path).write_text(lines, encoding="utf-8")
        files = [{"split": split, "path": path}]
        configs.append({"config_name": subset or "default", "data_files": files})
    card = f"---\nconfigs: {json.dumps(configs)}\n---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder in place of the hub."""
    import datasets

    root, load = tmp_path / "mirror", datasets.load_dataset

    def load_dataset(name, *of, revision=None, **how):
        return load(str(root / name), *of, **how)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.delenv("CALMIX_DATA", raising=False)
    return root


def test_hub_entries_are_read_and_cached(mirror):
    for name in HUB:
        reader = builtin_sources()[name].reader
        row, wanted = SHAPES.get(name, ({"text": "some text"}, "some text"))
        rows = [row] * 3
        if name == "wikitext2":
            lines = "| = Water = \n|| Wet . \n| = = Uses = = \n| = Fire = \n|Hot"
            rows = [{"text": line} for line in lines.split("|")]
        put(mirror, reader.id, rows, reader.subsets, reader.split)
        assert reader.availability == "hub"
        documents = list(reader.read())
        shutil.rmtree(mirror)
        assert reader.availability == "offline (fetched before)"
        assert list(reader.read()) == documents
        assert len({d.id for d in documents}) == len(documents)
        if name == "wikitext2":
            assert [d.text.split("\n")[0].strip() for d in documents] == ["= Water =", "= Fire ="]
            assert "Uses" in documents[0].text
        else:
            assert [d.text for d in documents] == [wanted] * (3 * len(reader.subsets)), name


def test_damaged_cache_and_hub_refusals_are_reported(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path))
    reader = HubText(type="hub", id="a/b")
    cached, lines = reader.cache_path(), "".join(f'["{n}", "{n * n % 97}"]\n' for n in range(400))
    cached.parent.mkdir()
    whole = gzip.compress(lines.encode())
    for at in range(20, len(whole), 40):
        cached.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.raises(SourceError, match="is damaged: delete it"):
            list(reader.read())
    cached.unlink()
    for error, line in (
        (datasets.exceptions.DatasetNotFoundError("'a/b' is a gated dataset"), "read: 'a/b' is a"),
        (RuntimeError("Dataset scripts are no longer supported"), "read: Dataset scripts"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "the hub cannot be reached for a/b"),
    ):
        monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
        with pytest.raises(SourceError, match=line):
            list(reader.read())


def test_stream_stops_at_the_budget_and_errors_name_the_row(mirror, tmp_path):
    put(mirror, "a/c", [{"text": "0123456789"}] * 100)
    assert len(list(HubText(type="hub", id="a/c", characters=95).read())) == 10
    put(mirror, "a/content", [{"content": "x"}, {"content": None}])
    assert [d.text for d in HubText(type="hub", id="a/content").read()] == ["x"]
    put(mirror, "a/other", [{"body": "x"}])
    put(mirror, "a/b", [{"text": "x"}], ["en"])
    for reader, line in (
        ({"id": "a/other"}, r"no field 'text' or 'content' \(has: body\)"),
        ({"id": "a/other", "template": "{txet}"}, r"a/other row 0: there is no field 'txet'"),
        ({"id": "a/b", "subset": "de"}, r"a/b \(de, train\) cannot be read: .*Available"),
        ({"id": "a/b", "subset": "en", "split": "test"}, "cannot be read: .*Available"),
    ):
        with pytest.raises(SourceError, match=line):
            list(HubText(type="hub", **reader).read())
