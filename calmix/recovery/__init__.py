"""Recovery: what a prune has left is trained towards the dense model, its zeros held."""

from calmix.recovery.checkpoint import recover as recover
from calmix.recovery.job import RecoveryReport as RecoveryReport
