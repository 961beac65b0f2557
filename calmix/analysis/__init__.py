"""What a study shows: correlations, rankings, differences, and how sure each of them is."""

from calmix.analysis.analyse import Analysis, ConditionAnalysis, Settings, analyse
from calmix.analysis.recommend import Recommendation, propose, recommend
from calmix.analysis.surface import Proposal

__all__ = [
    "Analysis",
    "ConditionAnalysis",
    "Proposal",
    "Recommendation",
    "Settings",
    "analyse",
    "propose",
    "recommend",
]
