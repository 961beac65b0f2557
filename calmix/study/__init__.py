"""Studies: a grid of trials from one file, run locally or on a cluster, and kept in a store."""

from calmix.study.results import StudyResults as StudyResults
from calmix.study.running import run_study as run_study
from calmix.study.spec import Study as Study
from calmix.study.spec import load_study as load_study
from calmix.study.store import read_results as read_results
