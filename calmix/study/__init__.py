"""Studies: a grid of trials from one file, run here or on a cluster, kept in a store."""

from calmix.study.export import export_results, read_results
from calmix.study.results import StudyResults
from calmix.study.running import run_study
from calmix.study.spec import Study, load_study

__all__ = [
    "Study",
    "StudyResults",
    "export_results",
    "load_study",
    "read_results",
    "run_study",
]
