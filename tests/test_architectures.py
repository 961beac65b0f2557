"""What docs/architectures.md says of architectures stays true: a sample of it is made again."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAMPLE = (
    "deepseek_v4", "falcon_h1", "glm_moe_dsa", "gpt_oss", "granitemoehybrid", "hrm_text", "jamba",
    "lfm2_moe", "mamba2", "qwen3_next", "recurrent_gemma", "zamba2", "zaya",
)  # fmt: skip


@pytest.fixture(scope="module")
def architectures():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("architectures")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def told():
    """Outcome and share by architecture, as the page has them."""
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| ([\w ]+) \| ([\d.]*)%? ?\|", text, re.MULTILINE)
    return {kind: (state, share) for kind, state, share in rows if kind != "architecture"}


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_is_as_the_page_says(architectures, told, kind):
    row = architectures.guarded(kind)
    state, share = told[kind]
    assert architectures.STATES[row.state] == state, row.why
    if share:
        assert f"{row.pruned:.1%}" == f"{share}%"
        assert row.same >= architectures.SAME


def test_nearly_all_are_pruned_and_none_wrongly(told):
    states = [state for state, _ in told.values()]
    assert len(states) > 150
    assert sum(state.startswith("pruned") for state in states) >= 0.95 * len(states)
    assert not any(state.isupper() for state in states)
