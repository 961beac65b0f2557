"""One report of a study like the real one."""

import pytest

from calmix.options import Settings
from calmix.study.analyse import analyse
from calmix.study.page import write_report
from tests.synthetic import CONDITIONS, OTHERS, SOURCES, full_plan, study

FEW = ("trivia", "stories", "mix-8")  # the sets of the second condition


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a report: two conditions, one of few sets; missing and failed trials."""
    folder = tmp_path_factory.mktemp("whole") / "report"
    others = {name: OTHERS[name] for name in ("mix-8", "igsp")}
    plan = full_plan(sources=SOURCES[6:14], others=others, conditions=CONDITIONS[:2], seeds=(0, 1))
    results = study(plan)
    chosen = tuple(one for one in results.trials if one.pattern == "50%" or one.calibration in FEW)
    changes = {"trials": chosen, "failed": 1, "planned": len(chosen) + 2}
    results = results.model_copy(update=changes)
    write_report(results, analyse(results, Settings(resamples=50)), folder)
    return folder
