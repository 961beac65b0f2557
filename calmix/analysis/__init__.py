"""What a study shows: correlations, rankings, differences, and how sure each of them is."""

from calmix.analysis.analyse import Analysis as Analysis
from calmix.analysis.analyse import ConditionAnalysis as ConditionAnalysis
from calmix.analysis.analyse import analyse as analyse
from calmix.analysis.ranking import Recommendation as Recommendation
from calmix.analysis.ranking import recommend as recommend
from calmix.options import Settings as Settings
