"""Recovery: what a prune has left is trained towards the dense model, its zeros held."""

from calmix.recovery.checkpoint import RecoveryReport as RecoveryReport
from calmix.recovery.checkpoint import recover as recover
