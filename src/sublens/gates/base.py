"""What every gate says about itself."""

from abc import ABC, abstractmethod

from torch import Tensor

from sublens.noise import Draw


class Gate(ABC):
    """An estimator: how logits become open or closed samples, and how gradients come back.

    A gate is immutable and has no tensors of its own. It acts on one masked parameter at a time.
    """

    @property
    def fused(self) -> bool:
        """Whether :func:`sublens.kernels.cpu.walk` computes this gate, so that routes built on it may be used."""
        return False

    @abstractmethod
    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The weight as one sample leaves it: shape, dtype and device of ``weight``. Not differentiable."""

    @abstractmethod
    def logit_gradient(self, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """Gradient of the logits (float32, their shape), given that of :meth:`masked`'s result, for the same draw."""
