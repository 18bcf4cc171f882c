"""How gates are executed.

The contract is two functions of one parameter and one draw: ``masked(weight, logits, draw)`` gives the weight with its
closed elements at zero, ``logit_gradient(gradient, weight, logits, draw, tau)`` what comes back. ``reference`` is plain
PyTorch and is the definition; ``cpu`` gives the same samples bit for bit, and the same gradients within float32
rounding; ``blocked`` makes linear layers of ``cpu`` and matrix products.
"""

import os

from torch import Tensor

from sublens.errors import SettingError
from sublens.kernels import cpu, reference
from sublens.kernels.reference import LOGIT_BOUND
from sublens.noise import Draw

__all__ = ["LOGIT_BOUND", "logit_gradient", "masked"]

_CHOICES = ("auto", "reference")


def fused() -> bool:
    """Whether fused paths may be used; ``SUBLENS_KERNELS=reference`` in the environment forbids them."""
    choice = os.environ.get("SUBLENS_KERNELS", "auto")
    if choice not in _CHOICES:
        raise SettingError(f"SUBLENS_KERNELS is {choice!r}; it must be one of {', '.join(_CHOICES)}.")
    return choice == "auto"


def masked(weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
    """The weight with the draw's closed elements at zero; shape, dtype and device of ``weight``."""
    if fused() and cpu.applies(weight, logits):
        return cpu.masked(weight, logits, draw)
    return reference.masked(weight, logits, draw)


def logit_gradient(gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw, tau: float) -> Tensor:
    """Gradient of the logits (float32, their shape) from that of the masked weight."""
    if tau == 1.0 and fused() and cpu.applies(weight, logits) and cpu.applies(gradient, logits):
        return cpu.logit_gradient(gradient, weight, logits, draw)
    return reference.logit_gradient(gradient, weight, logits, draw, tau)
