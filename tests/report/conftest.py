"""One report of a study of the real one's size, written once for all tests and their processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from calmix.analysis import Settings, analyse
from calmix.report import write_report
from tests.synthetic import failed, full_plan, study


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report: three conditions, some trials missing and one failed."""
    base = tmp_path_factory.getbasetemp()
    at = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # of all processes
    folder = at / "whole-report"
    with FileLock(f"{folder}.lock"):
        if not (folder / "report.html").is_file():
            results = study(full_plan(seeds=(0, 1)), failed=(failed("x"),), planned=140)
            settings = Settings(permutations=199, resamples=50)
            write_report(results, analyse(results, settings), folder)
    return folder
