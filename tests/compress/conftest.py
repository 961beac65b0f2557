"""A place to compress in: a tiny model, a text, and a suite over a made-up archive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.capability.archive import suite_text, use_archive


@pytest.fixture
def command(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[object, ...]]:
    """Return the arguments of a compression into a folder, with more of them at the end."""
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    use_archive(monkeypatch)
    suite = tmp_path / "made.yaml"
    suite.write_text(suite_text(), encoding="utf-8")

    def made(output: Path, *more: object) -> tuple[object, ...]:
        return (
            "compress", tiny_folder, "-o", output, "--effort", "quick", "--calibration", text_file,
            "--suite", suite, *more,
        )  # fmt: skip

    return made
