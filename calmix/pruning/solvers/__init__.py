"""Pure solvers: tensors in, tensors out; they know no models, methods or command lines."""

from calmix.pruning.solvers.admm import admm
from calmix.pruning.solvers.refit import refit
from calmix.pruning.solvers.ria import ria
from calmix.pruning.solvers.scaled import Fitted, Products

__all__ = ["Fitted", "Products", "admm", "refit", "ria"]
