"""The definition of a gate's arithmetic, in plain PyTorch, for any device.

With one uniform number u per gate, log(u) - log(1 - u) is logistic noise, and the relaxed sample of Csordas et al. 2021
(after Maddison et al. 2017 and Jang et al. 2017) is

    s = sigmoid((logit + log(u) - log(1 - u)) / tau),    b = 1[s > 1/2].

With the odds o = exp(logit), s > 1/2 iff u > 1 / (1 + o), whatever tau is; and for tau = 1, s = u o / (u o + 1 - u)
and ds/dlogit = s (1 - s). Since u = (k + 1/2) / 65536 with an integer k (:mod:`sublens.noise`), an element is open iff
k >= T with the integer threshold T = floor(65536 / (1 + o) + 1/2). Every float32 operation here is rounded by
itself, in the order written, so a fused path that keeps the order gets the same bits.

A :class:`Curve` says what is made of the relaxed sample: its temperature, and whether it is stretched and cut.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sublens.noise import LEVELS, Draw, bits

LOGIT_BOUND = 10.0
"""Logits are held within -10 to 10, keep probabilities of 0.000045 to 0.999955.

Without a bound the paper's penalty drives a logit that no task needs on for ever (to -200 in 20,000 steps), and beyond
about 15 a float32 gate gives no gradient and cannot come back. At the bound a gate is open in one draw of 22,000, its
mask (logit > 0) is decided, and its way back is 1,000 steps of Adam at the paper's 1e-2: what a mask keeps does not
depend on it.
"""


LOG2_E = 1.44269504
ROUNDER = 12582912.0
"""1.5 * 2**23: a moderate float32 that it is added to is rounded to a whole number, found in its lowest bits."""
POLYNOMIAL = (
    0.0013274633092805743,
    0.009671961888670921,
    0.055506784468889236,
    0.24022234976291656,
    0.6931470632553101,
    1.0,
)
"""Coefficients of 2**f for f in -1/2..1/2, highest power first: relative error at most 8.1e-8, and exact at 0."""


def odds(logits: Tensor) -> Tensor:
    """exp(logit), with logits held within the bound; float32 in, float32 out, relative error below 7e-7.

    Written out (2**n times a polynomial) because library exponentials differ in the last bit from device to device, and
    one bit is enough to open another gate.
    """
    y = logits.clamp(-LOGIT_BOUND, LOGIT_BOUND) * LOG2_E
    z = y + ROUNDER
    f = y - (z - ROUNDER)
    p = torch.full_like(f, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        p = p * f + coefficient
    return (p.view(torch.int32) + (z.view(torch.int32) << 23)).view(torch.float32)


def thresholds(logits: Tensor) -> Tensor:
    """The integer T of each gate: open iff its draw k >= T. int32, values 3 to 65533."""
    return (LEVELS / (1.0 + odds(logits)) + 0.5).to(torch.int32)


def is_open(logits: Tensor, draw: Draw) -> Tensor:
    """The hard sample b. bool, shape of ``logits``."""
    k = bits(draw, logits.numel(), device=logits.device).view(logits.shape)
    return k >= thresholds(logits)


@dataclass(frozen=True)
class Curve:
    """How a relaxed sample follows from its logit: z = min(1, max(0, s (high - low) + low)), s with temperature tau.

    Attributes:
        tau: temperature, above 0.
        low: lower end of the stretched interval, at most 0; with 0 nothing is cut there.
        high: upper end, at least 1; likewise.
    """

    tau: float = 1.0
    low: float = 0.0
    high: float = 1.0


SIGMOID = Curve()
"""s itself, with tau = 1: the curve of the paper."""
SHARPEST = 80.0
"""Largest argument of a sigmoid that is told apart from infinity: exp(80) is still a float32, and 1 + it is not 1."""


def relaxed(logits: Tensor, draw: Draw | None, curve: Curve) -> Tensor:
    """The sigmoid s of a relaxed sample, before it is stretched. float32, shape of ``logits``, 0 to 1.

    Without a draw there is no noise.
    """
    odds_of_noise: Tensor | float = 1.0
    if draw is not None:
        a = (2 * bits(draw, logits.numel(), device=logits.device).view(logits.shape) + 1).to(torch.float32)
        odds_of_noise = a / (2.0 * LEVELS - a)
    # Both sides of the odds of s are raised to 1 / tau.
    argument = torch.log(odds(logits) * odds_of_noise) / curve.tau
    return torch.sigmoid(argument.clamp(-SHARPEST, SHARPEST))


def slope(logits: Tensor, draw: Draw | None, curve: Curve = SIGMOID) -> Tensor:
    """The derivative dz/dlogit of the relaxed sample. float32, shape of ``logits``, 0 where it is cut."""
    if curve == SIGMOID and draw is not None:
        k = bits(draw, logits.numel(), device=logits.device).view(logits.shape)
        a = (k + k + 1).to(torch.float32)
        b = 2.0 * LEVELS - a
        a = a * odds(logits)
        d = a + b
        return a * b / (d * d)
    s = relaxed(logits, draw, curve)
    width = curve.high - curve.low
    stretched = s * width + curve.low
    return torch.where((stretched <= 0) | (stretched >= 1), 0.0, s * (1.0 - s) * (width / curve.tau))


def masked(weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
    """The weight with closed elements at zero; shape, dtype and device of ``weight``."""
    return torch.where(is_open(logits, draw), weight, weight.new_zeros(()))


def scaled(weight: Tensor, logits: Tensor, draw: Draw, curve: Curve) -> Tensor:
    """The weight times the relaxed sample z; shape, dtype and device of ``weight``."""
    z = (relaxed(logits, draw, curve) * (curve.high - curve.low) + curve.low).clamp(0, 1)
    return weight * z.to(weight.dtype)


def logit_gradient(
    gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw | None, curve: Curve = SIGMOID
) -> Tensor:
    """Gradient of the logits, given that of the masked weight: gradient * weight * dz/dlogit, in float32."""
    return gradient.to(torch.float32) * weight.to(torch.float32) * slope(logits, draw, curve)


def noise_of_levels() -> Tensor:
    """The logistic noise log(u) - log(1 - u) of each of the 65,536 draws, to float32's precision."""
    a = 2 * torch.arange(LEVELS, dtype=torch.float64, device="cpu") + 1
    return (torch.log(a) - torch.log(2 * LEVELS - a)).to(torch.float32)
