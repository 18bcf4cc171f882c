"""TopK: no noise; the elements with the highest scores are open, of each parameter or of all together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from sublens.errors import SettingError
from sublens.gates.base import Gate, Penalty
from sublens.kernels import uniform
from sublens.noise import Draw
from sublens.ranking import count_of, highest, highest_of


@dataclass(frozen=True)
class TopK(Gate):
    """The highest scores are open (edge-popup: Ramanujan et al., CVPR 2020; the logit's absolute value is the score).

    The forward value is h = 1 for the ``fraction`` of elements with the highest ``|logit|``, 0 for the others; the
    gradient passes through h as if it were not there, so that of the logit is the sign of the logit times that of h.
    The paper's text calls the scores positive numbers; its authors' code lets a score take either sign and ranks
    ``|score|``, and so does this gate. Of equal scores the earlier element is kept. There is no noise after the start.

    As in that code, logits start uniformly distributed between -1 and 1, divided by the square root of the fan-in;
    ``keep`` has no effect. The fraction is given, so there is nothing that a penalty could change, and it is refused.

    Args:
        fraction: how much is kept, above 0 and at most 1: the nearest whole number of elements, but at least one.
        per_layer: whether each parameter keeps this fraction of its elements, or all parameters together.

    Raises:
        SettingError: ``fraction`` is out of range.
    """

    fraction: float = 0.5
    per_layer: bool = True
    _count: int | None = field(default=None, repr=False, kw_only=True)  # one parameter's part of all together

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise SettingError(
                f"fraction is {self.fraction}; it must be above 0 and at most 1 (0.5 keeps every second)."
            )

    @classmethod
    def for_run(cls, steps: int, kept: float) -> Self:
        """With this fraction, of all parameters together."""
        return cls(kept, per_layer=False)

    @property
    def takes_penalty(self) -> bool:
        """No: the fraction is given."""
        return False

    @property
    def noisy(self) -> bool:
        """Never: equal logits give equal samples."""
        return False

    def across(self, logits: Mapping[str, Tensor]) -> Mapping[str, Gate]:
        """Each parameter's part of the highest scores of all; itself for one parameter after the other."""
        if self.per_layer:
            return super().across(logits)
        chosen = highest_of({name: layer.detach().abs() for name, layer in logits.items()}, float(self.fraction),
                            per_layer=False)  # fmt: skip
        return {name: replace(self, _count=int(layer.sum())) for name, layer in chosen.items()}

    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The weight times h."""
        return torch.where(self._is_open(logits), weight, weight.new_zeros(()))

    def logit_gradient(self, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The gradient times the weight times the sign of the logit."""
        return gradient.float() * weight.float() * torch.sign(logits)

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
            f"{self} keeps its fraction whatever the penalty is, so alpha (and kept, which steers it) would have no "
            "effect. Set alpha=0, and choose how much is kept by the gate's fraction."
        )

    def start(self, logits: Tensor, draw: Draw) -> Tensor:
        """Scores of both signs, of the size of the authors' code."""
        u = uniform(draw, logits.numel(), device=logits.device).view(logits.shape)
        return (2 * u - 1) / math.sqrt(max(1, logits.shape[1:].numel()))

    def _is_open(self, logits: Tensor) -> Tensor:
        count = count_of(float(self.fraction), logits.numel()) if self._count is None else self._count
        return highest(logits.detach().abs(), count)
