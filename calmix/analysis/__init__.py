"""What a study shows: correlations, rankings, differences, and how sure each of them is."""

from calmix.analysis.analyse import Analysis, ConditionAnalysis, analyse
from calmix.analysis.cells import Settings
from calmix.analysis.recommend import Recommendation, recommend

__all__ = [
    "Analysis",
    "ConditionAnalysis",
    "Recommendation",
    "Settings",
    "analyse",
    "recommend",
]
