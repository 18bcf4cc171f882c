"""NOfM: no noise; of every M neighbouring inputs, the N with the highest scores are open."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from sublens.errors import SettingError
from sublens.gates.ranked import RankedGate
from sublens.noise import Draw


@dataclass(frozen=True)
class NOfM(RankedGate):
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
    def given(self) -> str:
        """N of M."""
        return f"{self.n} of {self.m}"

    def logit_gradient(self, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The gradient times the weight."""
        return gradient.float() * weight.float()

    def is_open(self, logits: Tensor) -> Tensor:
        """The N highest of each run."""
        along = 1 if logits.dim() > 1 and logits.shape[1] > 1 else 0
        scores = logits.detach().movedim(along, -1)
        size = scores.shape[-1]
        runs = functional.pad(scores, (0, -size % self.m), value=-math.inf).unflatten(-1, (-1, self.m))
        highest = runs.sort(dim=-1, descending=True, stable=True).indices[..., : self.n]
        chosen = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, highest, True)
        return chosen.flatten(-2)[..., :size].movedim(-1, along)
