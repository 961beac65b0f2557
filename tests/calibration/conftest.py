"""Tiny tokenizers and sources for calibration tests."""

import json

import pytest

from calmix.calibration import open_tokenizer
from tests.tiny import tiny_tokenizer


def write_rows(path, texts):
    """Write texts as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The tiny model's tokenizer: one token a byte, no begin token."""
    return open_tokenizer(str(tiny_folder))


@pytest.fixture(scope="session")
def foreign_folder(tmp_path_factory, tiny_folder):
    """The tiny model with another tokenizer: one more token."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes())
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def sources(tmp_path):
    """Two JSON-lines sources of 60 documents of 40 to 99 bytes, in letters of their own."""
    found = {}
    for name, letters in (("lower", "abcdefgh"), ("upper", "ABCDEFGH")):
        found[name] = str(tmp_path / f"{name}.jsonl")
        write_rows(tmp_path / f"{name}.jsonl", (
            "".join(letters[(i * i + number * i + number) % 8] for i in range(40 + number))
            for number in range(60)
        ))  # fmt: skip
    return found
