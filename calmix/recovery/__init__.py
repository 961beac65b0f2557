"""Recovery: what a prune has left is trained towards the dense model, its zeros held."""

from calmix.recovery.checkpoint import recover
from calmix.recovery.job import RecoveryReport

__all__ = ["RecoveryReport", "recover"]
