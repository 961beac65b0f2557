"""One report of a study of the real one's size, written once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from calmix.analysis import Settings, analyse
from calmix.report import write_report
from tests.synthetic import failed, full_plan, study


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report: three conditions, some trials missing and one failed."""
    folder = tmp_path_factory.mktemp("whole") / "report"
    results = study(full_plan(seeds=(0, 1)), failed=(failed("x"),), planned=140)
    write_report(results, analyse(results, Settings(permutations=199, resamples=50)), folder)
    return folder
