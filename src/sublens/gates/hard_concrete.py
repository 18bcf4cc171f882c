"""Hard concrete: a stretched and cut relaxed sample, with an expected L0 norm in closed form."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sublens import kernels
from sublens.errors import SettingError
from sublens.gates.base import Gate
from sublens.noise import Draw


@dataclass(frozen=True)
class HardConcrete(Gate):
    """Hard concrete gates (Louizos, Welling and Kingma, ICLR 2018; the logit is their log alpha).

    A sample is s = sigmoid((log u - log(1 - u) + logit) / beta), stretched to t = s (zeta - gamma) + gamma, and cut to
    z = min(1, max(0, t)). The weight is multiplied by z, which is 0 or 1 in part of the draws and between them in the
    others; the gradient is that of z, so 0 where t is cut. An element is open (z > 0) with probability
    sigmoid(logit - beta log(-gamma / zeta)), whose sum is the expected L0 norm: the penalty ``"expected"``.

    The paper's gate at test time is min(1, max(0, sigmoid(logit) (zeta - gamma) + gamma)). The mask keeps the elements
    where that is above 1/2; for gamma = 1 - zeta, as by default, those with a logit above 0.

    Args:
        beta: temperature, above 0 (2/3 in the paper).
        gamma: lower end of the stretched interval, below 0 (-0.1 in the paper).
        zeta: upper end, above 1 (1.1 in the paper).

    Raises:
        SettingError: a value is out of range.
    """

    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise SettingError(f"beta is {self.beta}; it must be finite and above 0 (the paper uses 2/3).")
        if not (-math.inf < self.gamma < 0 and 1 < self.zeta < math.inf):
            raise SettingError(
                f"gamma is {self.gamma} and zeta is {self.zeta}; gamma must be below 0 and zeta above 1, both finite, "
                "or no sample is exactly closed or open (the paper uses -0.1 and 1.1)."
            )

    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The weight times z."""
        return kernels.scaled(weight, logits, draw, self._curve)

    def logit_gradient(self, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The gradient times the weight times dz/dlogit."""
        return kernels.logit_gradient(gradient, weight, logits, draw, self._curve)

    def decision(self, logits: Tensor) -> Tensor:
        """The logit, less the one at which the paper's gate at test time is 1/2."""
        # Rounded, so that ends which lie evenly around 1/2 give 0, and a logit of 0 is closed as with every gate.
        return logits - round(math.log((0.5 - self.gamma) / (self.zeta - 0.5)), 12)

    def keep_probability(self, logits: Tensor, step: int) -> Tensor:
        """The probability of z > 0."""
        return torch.sigmoid(logits - self.beta * math.log(-self.gamma / self.zeta))

    def mask_probability(self, logits: Tensor, step: int) -> Tensor:
        """The probability of z > 1/2. Far more gates are above 0, so a mask steered by those would end too small."""
        return torch.sigmoid(logits - self.beta * math.log((0.5 - self.gamma) / (self.zeta - 0.5)))

    @property
    def _curve(self) -> kernels.Curve:
        return kernels.Curve(self.beta, self.gamma, self.zeta)
