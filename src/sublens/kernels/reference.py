"""The definition of a gate's arithmetic, in plain PyTorch, for any device.

With one uniform number u per gate, log(u) - log(1 - u) is logistic noise, and the relaxed sample of Csordas et al. 2021
(after Maddison et al. 2017 and Jang et al. 2017) is

    s = sigmoid((logit + log(u) - log(1 - u)) / tau),    b = 1[s > 1/2].

With the odds o = exp(logit), s > 1/2 iff u > 1 / (1 + o), whatever tau is; and for tau = 1, s = u o / (u o + 1 - u)
and ds/dlogit = s (1 - s). Since u = (k + 1/2) / 65536 with an integer k (:mod:`sublens.noise`), an element is open iff
k >= T with the integer threshold T = floor(65536 / (1 + o) + 1/2). Every float32 operation here is rounded by
itself, in the order written, so a fused path that keeps the order gets the same bits.
"""

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


def slope(logits: Tensor, draw: Draw, tau: float) -> Tensor:
    """The straight-through derivative ds/dlogit of the relaxed sample. float32, shape of ``logits``, 0 to 1/(4 tau)."""
    k = bits(draw, logits.numel(), device=logits.device).view(logits.shape)
    a = (k + k + 1).to(torch.float32)
    b = 2.0 * LEVELS - a
    if tau != 1.0:
        # Both sides of the odds of s are raised to 1 / tau; their ratio stays within float32 for every tau >= 0.25.
        s = torch.sigmoid(torch.log(odds(logits) * a / b) / tau)
        return s * (1.0 - s) / tau
    a = a * odds(logits)
    d = a + b
    return a * b / (d * d)


def masked(weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
    """The weight with closed elements at zero; shape, dtype and device of ``weight``."""
    return torch.where(is_open(logits, draw), weight, weight.new_zeros(()))


def logit_gradient(gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw, tau: float) -> Tensor:
    """Gradient of the logits, given that of the masked weight: gradient * weight * ds/dlogit, in float32."""
    return gradient.to(torch.float32) * weight.to(torch.float32) * slope(logits, draw, tau)
