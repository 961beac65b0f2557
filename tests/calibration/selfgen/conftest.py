"""An open tiny model, and a cache of its own for every test."""

import pytest

from calmix.models import open_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def opened(tiny_folder):
    """The tiny llama in float32."""
    return open_model(str(tiny_folder), dtype="float32", device="cpu")
