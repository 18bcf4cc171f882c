"""What gates mean: one estimator a file over one small base."""

from sublens.gates.base import Gate, Penalty
from sublens.gates.bernoulli import Bernoulli
from sublens.gates.continuous_sparsification import ContinuousSparsification
from sublens.gates.gumbel_sigmoid import GumbelSigmoid
from sublens.gates.hard_concrete import HardConcrete
from sublens.gates.n_of_m import NOfM
from sublens.gates.threshold import Threshold
from sublens.gates.top_k import TopK

__all__ = [
    "Bernoulli",
    "ContinuousSparsification",
    "Gate",
    "GumbelSigmoid",
    "HardConcrete",
    "NOfM",
    "Penalty",
    "Threshold",
    "TopK",
]
