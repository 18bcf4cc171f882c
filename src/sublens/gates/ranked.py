"""What gates that rank scores have in common: how much is kept is given, and nothing is drawn after the start."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from sublens.errors import SettingError
from sublens.gates.base import Gate, Penalty
from sublens.kernels import uniform
from sublens.noise import Draw


class RankedGate(Gate):
    """A gate whose open elements are those with the highest scores; they are the mask, in training too."""

    @abstractmethod
    def is_open(self, logits: Tensor) -> Tensor:
        """Which elements are open: bool, of the logits' shape."""

    @property
    @abstractmethod
    def given(self) -> str:
        """What says how much is kept, for a message."""

    @property
    def takes_penalty(self) -> bool:
        """No: how much is kept is given."""
        return False

    @property
    def noisy(self) -> bool:
        """Never: equal logits give equal samples."""
        return False

    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The weight times h, which is 1 for the open elements and 0 for the others."""
        return torch.where(self.is_open(logits), weight, weight.new_zeros(()))

    def decision(self, logits: Tensor) -> Tensor:
        """1 where h is 1, -1 elsewhere; NaN stays NaN, so that no mask is made of it."""
        signs = torch.where(self.is_open(logits), 1.0, -1.0)
        return signs.masked_fill_(logits.detach().isnan(), math.nan)

    def keep_probability(self, logits: Tensor, step: int) -> Tensor:
        """h, without a gradient to the logits: none of them changes how many are open."""
        return self.is_open(logits) + 0.0 * logits

    def penalty(self, logits: Tensor, kind: Penalty, step: int) -> Tensor:
        """There is none.

        Raises:
            SettingError: always.
        """
        raise SettingError(
            f"{self} keeps {self.given} whatever the penalty is, so alpha (and kept, which steers it) would have no "
            f"effect. Set alpha=0, and choose how much is kept by the gate's arguments."
        )

    def start(self, logits: Tensor, draw: Draw) -> Tensor:
        """Scores between -1 and 1, uniform, divided by the square root of the fan-in: the size of edge-popup's code."""
        u = uniform(draw, logits.numel(), device=logits.device).view(logits.shape)
        return (2 * u - 1) / math.sqrt(max(1, logits.shape[1:].numel()))
