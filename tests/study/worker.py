"""What the tests that need processes of their own share: a study over the real archive."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.study.conftest import STUDY, write_texts

SUITE = """\
name: few
version: 1
description: a few items
dimensions:
  general:
    sciq:
      {archive: sciq/rc, form: question, metric: acc_norm, shots: 0, limit: 6, chance: choices}
  code:
    mbpp: {archive: codex_mbpp/gold_bpb, form: answer, metric: bits_per_byte, shots: 0, limit: 3}
"""


def write_study(folder: Path, model: Path, *, rows: int = 6) -> Path:
    """Write texts, suite and study; return the study's path."""
    write_texts(folder / "texts")
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")
    longer = shutil.copytree(model, folder / "model")
    config = longer / "config.json"
    # Real answers take more bytes than the tiny model's context holds tokens.
    settings = json.loads(config.read_text(encoding="utf-8")) | {"max_position_embeddings": 2048}
    config.write_text(json.dumps(settings), encoding="utf-8")
    text = STUDY.format(model=longer, suite=folder / "suite.yaml", texts=folder / "texts")
    path = folder / "study.yaml"
    path.write_text(text.replace("rows: 6", f"rows: {rows}"), encoding="utf-8")
    return path
