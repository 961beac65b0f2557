"""The folder that a compression writes: names of its files, and whether it has other contents."""

from __future__ import annotations

from pathlib import Path

from calmix.errors import InputError

COMPRESSED, COMPRESSED_RUN = "compress.json", "compress-run.json"
SEARCH = "search.json"  # state of a search for --keep-at-least
SCORES, BEHAVIOUR, PROMPTS = "scores.json", "abilities.json", "prompts.json"
CALIBRATION, PACK_FOLDER, QUANTISED = "calibration", "pack", "quantised"


def begun(out: Path) -> bool:
    """Whether a compression has begun in a folder."""
    return (out / COMPRESSED).exists() or (out / SEARCH).exists()


def check_foreign(out: Path) -> None:
    """Refuse a folder that holds something, but nothing of a compression."""
    if out.is_dir() and not begun(out) and any(out.iterdir()):
        raise InputError(
            f"{out} is not empty and was not made by calmix compress: name another folder"
        )
