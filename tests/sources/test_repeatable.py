"""Sources give the same documents whatever the hash seed of the process."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
from calmix.sources import get_source
from calmix.sources.registry import documents_hash
for name in ("word-problems", "arithmetic", "algebra", "logic-puzzles"):
    reader = get_source(name).reader.model_copy(update={"documents": 120})
    print(name, documents_hash(list(reader.read())))
"""


@pytest.mark.real
def test_generated_sources_do_not_depend_on_the_hash_seed():
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
