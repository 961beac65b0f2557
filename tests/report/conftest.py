"""One report of a study like the real one, written once for all tests and processes."""

import os

import pytest
from filelock import FileLock

from calmix.options import Settings
from calmix.study.analyse import analyse
from calmix.study.page import write_report
from tests.synthetic import OTHERS, SOURCES, full_plan, study

SMALL = {
    "sources": SOURCES[6:14],
    "others": {name: OTHERS[name] for name in ("mix-8", "igsp")},
    "conditions": [("sparsegpt", "50%"), ("sparsegpt", "60%")],
    "seeds": (0, 1),
}
FEW = ("trivia", "stories", "mix-8")  # the sets of the second condition


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a report: two conditions, one of few sets; missing and failed trials."""
    base = tmp_path_factory.getbasetemp()
    at = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # shared by all processes
    folder = at / "whole-report"
    with FileLock(f"{folder}.lock"):
        if not (folder / "report.html").is_file():
            outcome = study(full_plan(**SMALL))
            chosen = [
                one for one in outcome.trials if one.pattern == "50%" or one.calibration in FEW
            ]
            changes = {
                "trials": tuple(chosen),
                "failed": 1,
                "planned": len(chosen) + 2,
            }
            results = outcome.model_copy(update=changes)
            settings = Settings(resamples=50)
            write_report(results, analyse(results, settings), folder)
    return folder
