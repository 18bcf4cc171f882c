"""What gates mean: one estimator a file over one small base."""

from sublens.gates.base import Gate, Penalty
from sublens.gates.bernoulli import Bernoulli
from sublens.gates.gumbel_sigmoid import GumbelSigmoid
from sublens.gates.hard_concrete import HardConcrete
from sublens.gates.threshold import Threshold

__all__ = ["Bernoulli", "Gate", "GumbelSigmoid", "HardConcrete", "Penalty", "Threshold"]
