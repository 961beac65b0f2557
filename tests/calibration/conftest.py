"""Tiny models and sources for calibration tests."""

import json

import pytest

from calmix.calibration.tokenizer import open_tokenizer
from calmix.models.opening import open_model


def write_rows(path, texts):
    """Write texts as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The tiny model's tokenizer: one token a byte, no begin token."""
    return open_tokenizer(str(tiny_folder))


@pytest.fixture(scope="session")
def opened(tiny_folder):
    """The tiny llama in float32."""
    return open_model(str(tiny_folder), dtype="float32", device="cpu")


@pytest.fixture
def sources(tmp_path):
    """Two JSON-lines sources of 60 documents of 40 to 99 bytes, with different letters."""
    results = {}
    for name, letters in (("lower", "abcdefgh"), ("upper", "ABCDEFGH")):
        results[name] = str(tmp_path / f"{name}.jsonl")
        write_rows(
            tmp_path / f"{name}.jsonl",
            (
                "".join(letters[(i * i + number * i + number) % 8] for i in range(40 + number))
                for number in range(60)
            ),
        )
    return results
