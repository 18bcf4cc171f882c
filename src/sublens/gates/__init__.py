"""What gates mean: one estimator a file over one small base."""

from sublens.gates.base import Gate
from sublens.gates.gumbel_sigmoid import GumbelSigmoid

__all__ = ["Gate", "GumbelSigmoid"]
