"""How gates are executed.

The contract is a few functions of one parameter and one draw: ``masked(weight, logits, draw)`` gives the weight with
its closed elements at zero, ``scaled(weight, logits, draw, curve)`` the weight times a soft sample, and
``logit_gradient(gradient, weight, logits, draw, curve)`` what comes back from either; ``uniform(draw, count)`` gives
the noise itself, for whoever makes something else of it. ``reference`` is plain PyTorch and is the definition; ``cpu``
gives the same draws and hard samples bit for bit, and soft samples and gradients within float32 rounding; ``blocked``
makes linear layers of ``cpu`` and matrix products.
"""

import os

import torch
from torch import Tensor

from sublens import noise
from sublens.errors import SettingError
from sublens.kernels import cpu, reference
from sublens.kernels.reference import LOGIT_BOUND, SIGMOID, Curve
from sublens.noise import Draw

__all__ = ["LOGIT_BOUND", "SIGMOID", "Curve", "logit_gradient", "masked", "scaled", "uniform"]

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


def scaled(weight: Tensor, logits: Tensor, draw: Draw, curve: Curve) -> Tensor:
    """The weight times the draw's relaxed sample; shape, dtype and device of ``weight``."""
    if fused() and cpu.applies(weight, logits):
        return cpu.scaled(weight, logits, draw, curve)
    return reference.scaled(weight, logits, draw, curve)


def logit_gradient(
    gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw | None, curve: Curve = SIGMOID
) -> Tensor:
    """Gradient of the logits (float32, their shape) from that of the masked or scaled weight. No draw, no noise."""
    if fused() and cpu.applies(weight, logits) and cpu.applies(gradient, logits):
        return cpu.logit_gradient(gradient, weight, logits, draw, curve)
    return reference.logit_gradient(gradient, weight, logits, draw, curve)


def uniform(draw: Draw, count: int, *, device: torch.device | str = "cpu") -> Tensor:
    """As :func:`sublens.noise.uniform`, bit for bit: float32 of shape (count,), in 0..1 without its ends."""
    fast = torch.device(device).type == "cpu" and fused() and not torch.compiler.is_compiling() and count > 0
    if fast and cpu.agrees():
        return cpu.uniform(draw, count)
    return noise.uniform(draw, count, device=device)
