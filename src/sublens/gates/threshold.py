"""Threshold: no noise; an element is open iff its logit is above 0."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sublens.gates.base import Gate
from sublens.noise import Draw


@dataclass(frozen=True)
class Threshold(Gate):
    """A hard threshold with a straight-through gradient (Piggyback: Mallya, Davis and Lazebnik, ECCV 2018).

    The forward value is m = 1[logit > 0]; the gradient passes through the threshold as if it were not there, so the
    gradient of the logit is that of m. The paper's real-valued mask weight is the logit plus its threshold: the gate
    depends on their difference only. Training calls are evaluation calls: there is one sample, whatever ``samples`` is.
    """

    @property
    def noisy(self) -> bool:
        """Never: equal logits give equal samples."""
        return False

    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The weight times m."""
        return torch.where(logits > 0, weight, weight.new_zeros(()))

    def logit_gradient(self, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The gradient times the weight."""
        return gradient.float() * weight.float()

    def keep_probability(self, logits: Tensor, step: int) -> Tensor:
        """m, with its straight-through gradient of 1."""
        return (logits.detach() > 0) + (logits - logits.detach())
