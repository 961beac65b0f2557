"""Open any decoder-only causal language model; find its decoder blocks by structure."""

from calmix.models.blocks import Prunable as Prunable
from calmix.models.blocks import find_blocks as find_blocks
from calmix.models.hub import builtin_models as builtin_models
from calmix.models.opening import OpenModel as OpenModel
from calmix.models.opening import check_models as check_models
from calmix.models.opening import open_model as open_model
from calmix.models.opening import resolve_model as resolve_model
