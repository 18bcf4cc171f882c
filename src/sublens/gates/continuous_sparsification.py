"""Continuous sparsification: a sigmoid that hardens into a step while it trains."""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sublens.errors import SettingError
from sublens.gates.base import Gate
from sublens.noise import Draw


@dataclass(frozen=True)
class ContinuousSparsification(Gate):
    """Continuous sparsification (Savarese, Silva and Maire, NeurIPS 2020; the logit is their s).

    In training call t of ``steps``, the weight is multiplied by m = sigmoid(beta logit) with beta = final^(t / steps),
    which grows from 1 to ``final`` and then stays; the gradient is that of m. There is no noise. The penalty of the
    paper, the sum of m, is ``"expected"``; its mask is the limit for large beta: 1 where the logit is above 0.

    Args:
        steps: number of training calls until beta is ``final``, 1 or more. Usually that of the whole training.
        final: beta at the end, 1 or more (200 in the paper).

    Raises:
        SettingError: a value is out of range.
    """

    steps: int
    final: float = 200.0

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise SettingError(f"steps is {self.steps!r}; it must be a whole number of 1 or more training calls.")
        if not 1 <= self.final < math.inf:
            raise SettingError(f"final is {self.final}; it must be finite and 1 or more (the paper uses 200).")

    @classmethod
    def for_run(cls, steps: int, kept: float) -> Self:
        """With beta at its end when the run is."""
        return cls(steps)

    @property
    def noisy(self) -> bool:
        """Never: equal logits give equal samples."""
        return False

    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The weight times m."""
        return weight * self.keep_probability(logits, draw.step).to(weight.dtype)

    def logit_gradient(self, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The gradient times the weight times dm/dlogit."""
        m = self.keep_probability(logits, draw.step)
        return gradient.float() * weight.float() * m * (1 - m) * self.beta(draw.step)

    def keep_probability(self, logits: Tensor, step: int) -> Tensor:
        """m, which stands for the probability of being open."""
        return torch.sigmoid(self.beta(step) * logits)

    def beta(self, step: int) -> float:
        """What logits are multiplied with in a training call, the first one being 0."""
        return float(self.final ** min(step / self.steps, 1.0))
