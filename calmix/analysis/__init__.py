"""Analysis of a study: rankings and differences, with confidence intervals."""

from calmix.analysis.analyse import Analysis as Analysis
from calmix.analysis.analyse import ConditionAnalysis as ConditionAnalysis
from calmix.analysis.analyse import analyse as analyse
from calmix.options import Settings as Settings
