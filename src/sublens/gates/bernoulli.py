"""Bernoulli: hard samples, and the gradient of their probability."""

from dataclasses import dataclass

from torch import Tensor

from sublens import kernels
from sublens.gates.base import Gate
from sublens.noise import Draw


@dataclass(frozen=True)
class Bernoulli(Gate):
    """Bernoulli gates with a straight-through gradient (Bengio et al. 2013; as masks, Zhou et al. 2019).

    The forward value is b, which is 1 with probability p = sigmoid(logit) and 0 otherwise; the gradient is that of its
    mean p, so p (1 - p) for the logit. The samples are those of :class:`sublens.GumbelSigmoid` bit for bit, but the
    gradient does not depend on the noise.
    """

    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The weight times b."""
        return kernels.masked(weight, logits, draw)

    def logit_gradient(self, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The gradient times the weight times p (1 - p)."""
        return kernels.logit_gradient(gradient, weight, logits, None)
