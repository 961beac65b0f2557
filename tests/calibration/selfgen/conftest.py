"""An open tiny model, and a cache of its own for every test."""

from pathlib import Path

import pytest

from calmix.models import OpenModel, open_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def opened(tiny_folder: Path) -> OpenModel:
    """The tiny llama in float32."""
    return open_model(str(tiny_folder), dtype="float32", device="cpu")
