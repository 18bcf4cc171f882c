"""TopK: no noise; the elements of each parameter with the highest scores are open."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sublens.errors import SettingError
from sublens.gates.base import Gate, Penalty
from sublens.noise import Draw, uniform


@dataclass(frozen=True)
class TopK(Gate):
    """The highest scores of each parameter (edge-popup: Ramanujan et al., CVPR 2020; the logit is their score).

    The forward value is h = 1 for the ``fraction`` of elements with the highest logits, 0 for the others; the gradient
    passes through h as if it were not there. Of equal logits the earlier element (row-major) is kept. There is no noise
    after the start, so ``samples=1`` loses nothing.

    As in the authors' code, scores start uniformly distributed between -1 and 1, divided by the square root of the
    fan-in; ``keep`` has no effect.

    Args:
        fraction: how much of each parameter is kept, above 0 and at most 1: the nearest whole number of elements, but
            at least one.

    Raises:
        SettingError: ``fraction`` is out of range.
    """

    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise SettingError(
                f"fraction is {self.fraction}; it must be above 0 and at most 1 (0.5 keeps every second)."
            )

    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The weight times h."""
        return torch.where(self.decision(logits) > 0, weight, weight.new_zeros(()))

    def logit_gradient(self, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The gradient times the weight."""
        return gradient.float() * weight.float()

    def decision(self, logits: Tensor) -> Tensor:
        """1 where h is 1, -1 elsewhere; NaN stays NaN, so that no mask is made of it."""
        flat = logits.detach().flatten()
        highest = torch.sort(flat, descending=True, stable=True).indices[: max(1, round(self.fraction * flat.numel()))]
        signs = torch.full_like(flat, -1.0).index_fill_(0, highest, 1.0)
        return signs.masked_fill_(flat.isnan(), math.nan).view(logits.shape)

    def keep_probability(self, logits: Tensor, step: int) -> Tensor:
        """h, without a gradient to the logits: none of them changes how many are open."""
        return (self.decision(logits) > 0) + 0.0 * logits

    def penalty(self, logits: Tensor, kind: Penalty, step: int) -> Tensor:
        """The number of kept elements, a constant. The sum of logits would push all alike, to a tie at their bound."""
        return self.keep_probability(logits, step).sum()

    def start(self, logits: Tensor, draw: Draw) -> Tensor:
        """Scores of both signs, of the size of the authors' code."""
        u = uniform(draw, logits.numel(), device=logits.device).view(logits.shape)
        return (2 * u - 1) / math.sqrt(max(1, logits.shape[1:].numel()))
