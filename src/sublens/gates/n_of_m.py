"""NOfM: no noise; of every M neighbouring inputs, the N with the highest scores are open."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from sublens.errors import SettingError
from sublens.gates.base import Gate, Penalty
from sublens.kernels import uniform
from sublens.noise import Draw


@dataclass(frozen=True)
class NOfM(Gate):
    """N of every M are open (N:M sparsity: Zhou et al., ICLR 2021; 2:4 is what sparse tensor cores compute).

    Along the inputs (dimension 1 of the logits, or dimension 0 where there is one input only), elements stand in runs
    of M; the last run may be shorter. The forward value is h = 1 for the N highest logits of each run, 0 for the
    others; the gradient passes through h as if it were not there, for closed elements too. Of equal logits the earlier
    one is open. The paper ranks the weights' absolute values, which are trained; here, where they are frozen, a
    learned score takes their place.

    It is a gate and no grouping, since the elements of a run compete where those of a group share their fate. It is no
    rule for reading a mask from other gates' logits either: samples that do not obey the pattern would train another
    network than the mask's.

    Logits start uniformly distributed between -1 and 1, divided by the square root of the fan-in; ``keep`` has no
    effect. How much is kept is given, so a penalty could change nothing, and is refused.

    Args:
        n: how many of a run are open, from 1 to ``m``.
        m: length of a run, 1 or more.

    Raises:
        SettingError: a number is out of range.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in (self.n, self.m))
        if not (whole and 1 <= self.n <= self.m):
            raise SettingError(f"n is {self.n!r} and m is {self.m!r}; they must be whole numbers with 1 <= n <= m.")

    @classmethod
    def for_run(cls, steps: int, kept: float) -> Self:
        """With the fraction nearest to ``kept`` whose runs are at most 32 long, and the shortest runs that have it."""
        ratio = Fraction(kept).limit_denominator(32)
        return cls(max(1, ratio.numerator), ratio.denominator)

    @property
    def takes_penalty(self) -> bool:
        """No: how much is kept is given."""
        return False

    @property
    def noisy(self) -> bool:
        """Never: equal logits give equal samples."""
        return False

    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The weight times h."""
        return torch.where(self._is_open(logits), weight, weight.new_zeros(()))

    def logit_gradient(self, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The gradient times the weight."""
        return gradient.float() * weight.float()

    def decision(self, logits: Tensor) -> Tensor:
        """1 where h is 1, -1 elsewhere; NaN stays NaN, so that no mask is made of it."""
        signs = torch.where(self._is_open(logits), 1.0, -1.0)
        return signs.masked_fill_(logits.detach().isnan(), math.nan)

    def keep_probability(self, logits: Tensor, step: int) -> Tensor:
        """h, without a gradient to the logits: none of them changes how many are open."""
        return self._is_open(logits) + 0.0 * logits

    def penalty(self, logits: Tensor, kind: Penalty, step: int) -> Tensor:
        """There is none.

        Raises:
            SettingError: always.
        """
        raise SettingError(
            f"{self} keeps {self.n} of {self.m} whatever the penalty is, so alpha would have no effect. Set alpha=0."
        )

    def start(self, logits: Tensor, draw: Draw) -> Tensor:
        """Scores in random order."""
        u = uniform(draw, logits.numel(), device=logits.device).view(logits.shape)
        return (2 * u - 1) / math.sqrt(max(1, logits.shape[1:].numel()))

    def _is_open(self, logits: Tensor) -> Tensor:
        along = 1 if logits.dim() > 1 and logits.shape[1] > 1 else 0
        scores = logits.detach().movedim(along, -1)
        size = scores.shape[-1]
        runs = functional.pad(scores, (0, -size % self.m), value=-math.inf).unflatten(-1, (-1, self.m))
        highest = runs.sort(dim=-1, descending=True, stable=True).indices[..., : self.n]
        chosen = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, highest, True)
        return chosen.flatten(-2)[..., :size].movedim(-1, along)
