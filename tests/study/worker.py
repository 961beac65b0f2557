"""What the tests that need processes of their own share: a study over the real archive."""

from tests.study.conftest import STUDY, write_texts
from tests.tiny import longer

SUITE = """\
name: few
version: 1
description: a few items
dimensions:
  general:
    sciq:
      {archive: sciq/rc, form: question, metric: acc_norm, shots: 0, limit: 3, chance: choices}
  programs:
    mbpp: {archive: codex_mbpp/gold_bpb, form: answer, metric: bits_per_byte, shots: 0, limit: 2}
"""


def write_study(folder, model, *, rows=6):
    """Write texts, suite and study; return the study's path."""
    write_texts(folder / "texts")
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")
    longer(model, folder / "model")
    text = STUDY.format(model=folder / "model", suite=folder / "suite.yaml", texts=folder / "texts")
    path = folder / "study.yaml"
    text = text.replace("rows: 6", f"rows: {rows}").replace(', wanda: ["2:4"]', "")
    path.write_text(text, encoding="utf-8")
    return path
