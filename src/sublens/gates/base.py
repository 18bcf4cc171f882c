"""What every gate says about itself."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, Self

import torch
from torch import Tensor

from sublens.noise import Draw

Penalty = Literal["logits", "expected"]


class Gate(ABC):
    """An estimator: how logits become open or closed samples, and how gradients come back.

    A gate is immutable and has no tensors of its own. It acts on one masked parameter at a time. It must say its two
    directions; the rest takes the logits for those of keep probabilities, unless a gate says otherwise.
    """

    @property
    def fused(self) -> bool:
        """Whether :func:`sublens.kernels.cpu.walk` computes this gate, so that routes built on it may be used."""
        return False

    @classmethod
    def for_run(cls, steps: int, kept: float) -> Self:
        """This gate for a run of ``steps`` training calls that is to keep a fraction ``kept`` of all elements."""
        return cls()

    @property
    def takes_penalty(self) -> bool:
        """Whether a penalty changes how much is kept."""
        return True

    @property
    def noisy(self) -> bool:
        """Whether samples differ. If not, a training call is one sample of the whole batch, whatever ``samples`` is."""
        return True

    def across(self, logits: Mapping[str, Tensor]) -> Mapping[str, "Gate"]:
        """The gate of each parameter in one call, given the logits of all: this one, unless parameters compete."""
        return dict.fromkeys(logits, self)

    @abstractmethod
    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The weight as one sample leaves it: shape, dtype and device of ``weight``. Not differentiable."""

    @abstractmethod
    def logit_gradient(self, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """Gradient of the logits (float32, their shape), given that of :meth:`masked`'s result, for the same draw."""

    def decision(self, logits: Tensor) -> Tensor:
        """What the mask is read from: an element is kept iff its number here is above 0. Shape of ``logits``."""
        return logits

    def keep_probability(self, logits: Tensor, step: int) -> Tensor:
        """How likely each element is to be open in training call ``step``, in 0..1. Differentiable."""
        return torch.sigmoid(logits)

    def mask_probability(self, logits: Tensor, step: int) -> Tensor:
        """How likely each element's sample is to be above one half, in 0..1: what is steered where ``kept`` is given.

        The same as :meth:`keep_probability` where samples are 0 or 1.
        """
        return self.keep_probability(logits, step)

    def penalty(self, logits: Tensor, kind: Penalty, step: int) -> Tensor:
        """One parameter's part of :meth:`sublens.MaskedNetwork.penalty` for ``alpha`` = 1. Differentiable scalar."""
        return logits.sum() if kind == "logits" else self.keep_probability(logits, step).sum()

    def start(self, logits: Tensor, draw: Draw) -> Tensor:
        """The logits that training starts from, given a tensor full of the logit of ``keep``."""
        return logits
