"""The gate of the paper: Gumbel-sigmoid samples, hard forward, soft backward."""

import math
from dataclasses import dataclass

from torch import Tensor

from sublens import kernels
from sublens.errors import SettingError
from sublens.gates.base import Gate
from sublens.noise import Draw


@dataclass(frozen=True)
class GumbelSigmoid(Gate):
    """Gumbel-sigmoid with a straight-through gradient (Csordas et al. 2021, section 2 and its equations 1 and 2).

    The relaxed sample is s = sigmoid((logit + log u - log(1 - u)) / tau) with one uniform u of its own for every gate
    and draw; the forward value is b = 1[s > 1/2]; the gradient is that of s. An element is therefore open with its
    keep probability sigmoid(logit), whatever tau is.

    Args:
        tau: temperature of the gradient, 0.25 or more (1 in the paper). Below that, s leaves float32's range.

    Raises:
        SettingError: tau is below 0.25 or not finite.
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau) and self.tau >= 0.25):
            raise SettingError(f"tau is {self.tau}; it must be a finite number of at least 0.25 (the paper uses 1).")

    @property
    def fused(self) -> bool:
        """For tau = 1, where no logarithm is needed."""
        return self.tau == 1.0

    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The weight times b."""
        return kernels.masked(weight, logits, draw)

    def logit_gradient(self, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The gradient times the weight times ds/dlogit."""
        return kernels.logit_gradient(gradient, weight, logits, draw, kernels.Curve(self.tau))
