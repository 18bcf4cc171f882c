"""TopK: no noise; the elements with the highest scores are open, of each parameter or of all together."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from sublens.errors import SettingError
from sublens.gates.base import Gate
from sublens.gates.ranked import RankedGate
from sublens.noise import Draw
from sublens.ranking import count_of, highest, highest_of


@dataclass(frozen=True)
class TopK(RankedGate):
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
    def given(self) -> str:
        """The fraction."""
        return "its fraction"

    def across(self, logits: Mapping[str, Tensor]) -> Mapping[str, Gate]:
        """Each parameter's part of the highest scores of all; itself for one parameter after the other."""
        if self.per_layer:
            return super().across(logits)
        chosen = highest_of({name: layer.detach().abs() for name, layer in logits.items()}, float(self.fraction),
                            per_layer=False)  # fmt: skip
        return {name: replace(self, _count=int(layer.sum())) for name, layer in chosen.items()}

    def logit_gradient(self, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The gradient times the weight times the sign of the logit."""
        return gradient.float() * weight.float() * torch.sign(logits)

    def is_open(self, logits: Tensor) -> Tensor:
        """Those with the highest absolute values."""
        count = count_of(float(self.fraction), logits.numel()) if self._count is None else self._count
        return highest(logits.detach().abs(), count)
