"""What chance alone gives: two masks that keep as many weights in a layer as the real ones, but random weights.

Drawing is not needed: the number of weights that two such masks share follows the hypergeometric distribution exactly.

Words: N weights in a layer, of which the first mask keeps a and the second b; X is the number kept by both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_NEGLIGIBLE = 1e-18  # probability below which an outcome is left out where layers are added up by Fourier transforms
_SURE = 1e-12  # tails from which on those are exact enough: they are off by some 1e-16
_FEW = 2048  # outcomes up to which layers are added up in logarithms, exactly in the tails too


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Probabilities of a whole number: ``probability[i]`` is that of ``low + i`` (float64, summing to 1).

    ``rough`` says that tails below about 1e-12 are not known. There the normal distribution serves.
    """

    low: int
    probability: Tensor
    log_probability: Tensor
    rough: bool = False

    def values(self) -> Tensor:
        """Return the possible numbers, float64."""
        return self.low + torch.arange(len(self.probability), dtype=torch.float64)

    def summary(self, of: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return mean and central 95 % band of ``of(X)``, for a function that never falls as X grows."""
        figures = of(self.values())
        below = self.probability.cumsum(0)
        low, high = (
            figures[min(int(torch.searchsorted(below, edge)), len(figures) - 1)].item() for edge in (0.025, 0.975)
        )
        return {"mean": (figures * self.probability).sum().item(), "low": low, "high": high}

    def z(self, seen: int) -> float | None:
        """Return how many standard deviations ``seen`` lies above the mean; ``None`` if only one number is possible."""
        values = self.values()
        mean = (values * self.probability).sum()
        deviation = ((values - mean).square() * self.probability).sum().sqrt().item()
        return (seen - mean.item()) / deviation if deviation > 0 else None

    def p(self, seen: int) -> float:
        """Return the two-sided probability of a number at least as far out as ``seen``: twice the smaller tail.

        A value below about 1e-300 comes out as 0.
        """
        if self.rough and (tail := self._tail(seen)) < _SURE:
            z = self.z(seen)
            return tail if z is None else math.erfc(abs(z) / math.sqrt(2))
        return self._tail(seen)

    def _tail(self, seen: int) -> float:
        if not self.low <= seen < self.low + len(self.probability):
            return 0.0
        position = seen - self.low
        # In logarithms: tails far out would otherwise be lost beside the 1 they are summed with.
        tails = self.log_probability[: position + 1], self.log_probability[position:]
        return min(1.0, 2 * math.exp(min(torch.logsumexp(tail, 0).item() for tail in tails)))


def shared_by_chance(size: int, first: int, second: int) -> Distribution:
    """Return the distribution of X for one layer: N = ``size``, a = ``first``, b = ``second`` (hypergeometric).

    Raises:
        ValueError: a or b is not in 0..N.
    """
    if not (0 <= first <= size and 0 <= second <= size):
        raise ValueError(f"A layer of {size} weights cannot keep {first} and {second} of them.")
    low, high = max(0, first + second - size), min(first, second)
    x = torch.arange(low, high, dtype=torch.float64)
    # log P(X = x+1) - log P(X = x), summed up: no factorials, which lose their last digits for millions of weights.
    ratio = (first - x).log() + (second - x).log() - (x + 1).log() - (size - first - second + x + 1).log()
    weight = torch.cat([torch.zeros(1, dtype=torch.float64), ratio.cumsum(0)])
    log_probability = weight - torch.logsumexp(weight, 0)
    return Distribution(low=low, probability=log_probability.exp(), log_probability=log_probability)


def total(layers: list[Distribution]) -> Distribution:
    """Return the distribution of the sum over independent layers.

    It is exact for up to a few thousand outcomes; of more, those rarer than 1e-18 in a layer are left out.
    """
    if sum(len(layer.probability) for layer in layers) <= _FEW:
        low, log_probability = 0, torch.zeros(1, dtype=torch.float64)
        for layer in layers:
            low, log_probability = low + layer.low, _convolved(log_probability, layer.log_probability)
        log_probability = log_probability - torch.logsumexp(log_probability, 0)
        return Distribution(low=low, probability=log_probability.exp(), log_probability=log_probability)
    low, probability = 0, torch.ones(1, dtype=torch.float64)
    for layer in layers:
        possible = (layer.probability > _NEGLIGIBLE).nonzero().flatten()
        start, stop = int(possible[0]), int(possible[-1]) + 1
        part = layer.probability[start:stop]
        length = len(probability) + len(part) - 1
        product = torch.fft.irfft(torch.fft.rfft(probability, length) * torch.fft.rfft(part, length), length)
        probability = product.clamp(min=0)
        low += layer.low + start
    probability = probability / probability.sum()
    return Distribution(low=low, probability=probability, log_probability=probability.log(), rough=True)


def _convolved(a: Tensor, b: Tensor) -> Tensor:
    """Logarithms of the probabilities of a sum, from those of its two terms."""
    a, b = (a, b) if len(a) >= len(b) else (b, a)
    edge = torch.full((len(b) - 1,), -math.inf, dtype=torch.float64)
    return torch.logsumexp(torch.cat([edge, a, edge]).unfold(0, len(b), 1) + b.flip(0), 1)
