"""How strong the penalty is at each step: one alpha, a path of them, or what leads to a given number of elements."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sublens.errors import SettingError
from sublens.masked_network import MaskedNetwork
from sublens.ranking import Kept, count_of, highest_of


@dataclass(frozen=True)
class AlphaPath:
    """An alpha that grows through a run, so that one run goes from a dense mask to a sparse one.

    In step t of ``steps``, alpha is first * (last / first)^(t / (steps - 1)). The history then holds the whole curve of
    the metrics against the kept fraction, each mask warm-started from the one before.

    Args:
        first: alpha in the first step, above 0.
        last: alpha in the last step, above 0.

    Raises:
        SettingError: a value is not finite and above 0.
    """

    first: float
    last: float

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise SettingError(f"AlphaPath({name}={value!r}) must be a finite number above 0: a path is geometric.")

    def at(self, step: int, steps: int) -> float:
        """Alpha in ``step``, from 0, of ``steps``."""
        return float(self.first * (self.last / self.first) ** (step / max(1, steps - 1)))


@dataclass(slots=True)
class Steered:
    """What a controller remembers of one group of layers from look to look.

    Attributes:
        log_alpha: logarithm of its alpha; ``None`` before the first step.
        share: its expected kept fraction at the last look.
        speed: how fast that changes by step, smoothed.
    """

    log_alpha: float | None = None
    share: float = 1.0
    speed: float = 0.0


START = 3e-3
"""The first alpha, in root mean squares of the first gradient of the task: far below what closes needed elements."""
RATE = 12.0
"""Largest change of log alpha over a whole run."""
GAIN = 4.0
"""Change of log alpha, in units of the largest, for a predicted miss of the target by as much as the target itself."""
ARRIVAL = 0.8
"""Part of the run after which the target is to be reached. The rest settles the mask there."""
LOOKS = 500
"""How often a run looks at its expected fraction, which takes a pass over all logits: at every step of a short run."""
ENOUGH = 100
"""Steps from which on a mask of no use is worth a word; fewer are a trial."""
LEFT_OVER = 0.1
"""Share of the elements that may be taken away by ranking at the end of a run before it is worth a word."""
MEMORY = 0.9
"""Part of the smoothed speed that is kept from one look to the next."""


@dataclass
class Controller:
    """Alpha such that a run ends with a given number of kept elements, of all layers together or of each.

    Alpha is the Lagrange multiplier of the constraint that the expected number of kept elements is the one asked for
    (Gallego-Posada, Ramirez, Erraqabi, Bengio and Lacoste-Julien, NeurIPS 2022, constrain the L0 norm of hard concrete
    gates in this way by dual ascent). How strong a penalty must be depends on network, task and gate by orders of
    magnitude, so it is the logarithm that moves; and gates answer slowly, so it moves by where they will be, not by
    where they are: it rises while the expected fraction, at its present speed, would be above the target at the time of
    arrival, and falls while it would be below. At the end, what little is left is taken away by ranking: see
    :meth:`finish`.

    Args:
        masked: what is trained.
        steps: of the run.
        kept: how much is kept at the end.
        per_layer: of each layer, or of all together.
        memory: what it remembers, one for each group of layers; belongs to the checkpoint. It is changed in place.

    Raises:
        SettingError: ``kept`` is impossible.
    """

    masked: MaskedNetwork
    steps: int
    kept: Kept
    per_layer: bool
    memory: list[Steered]
    _groups: list[tuple[list[str], int, int]] = field(init=False)  # names, elements, how many of them to keep

    def __post_init__(self) -> None:
        logits = self.masked.logits
        names = [[name] for name in logits] if self.per_layer else [list(logits)]
        sizes = [sum(logits[name].numel() for name in group) for group in names]
        self._groups = [(group, size, count_of(self.kept, size)) for group, size in zip(names, sizes, strict=True)]
        if not self.memory:
            self.memory += [Steered() for _ in self._groups]

    def alphas(self, step: int) -> dict[str, float]:
        """Alpha of each layer in ``step``, from the gradients of the task alone and the logits as they stand."""
        every = max(1, self.steps // LOOKS)
        found: dict[str, float] = {}
        shares = self._shares() if step % every == 0 else None
        for (names, size, count), memory in zip(self._groups, self.memory, strict=True):
            if shares is None and memory.log_alpha is not None:
                found |= dict.fromkeys(names, math.exp(memory.log_alpha))
                continue
            shares = shares or self._shares()
            share = sum(shares[name] for name in names) / size
            if memory.log_alpha is None:
                gradient = self._gradient(names, size)
                if not math.isfinite(gradient):
                    return dict.fromkeys(self.masked.logits, 0.0)  # the step will be refused
                memory.log_alpha = math.log(max(START * gradient, 1e-30))
                memory.share = share
            memory.speed = MEMORY * memory.speed + (1 - MEMORY) * (share - memory.share) / every
            memory.share = share
            horizon = max(ARRIVAL * self.steps - step, 0.1 * self.steps) / 3
            target = count / size
            miss = (share + horizon * memory.speed - target) / target
            memory.log_alpha += RATE * every / self.steps * max(-1.0, min(1.0, GAIN * miss))
            found |= dict.fromkeys(names, math.exp(memory.log_alpha))
        return found

    def finish(self) -> None:
        """Shift the logits of each group alike, as little as is needed for its mask to keep the number asked for.

        The elements kept are those with the highest decisions. A mask that keeps the right number stays as it is.
        """
        logits = self.masked.logits
        before, kept = self.masked.decisions(), dict[str, Tensor]()
        with torch.no_grad():
            for names, size, count in self._groups:
                decisions = {name: before[name] for name in names}
                held = sum(int((decision > 0).sum()) for decision in decisions.values())
                if held == count:
                    continue
                self._warn_of_ranking(names, held / size, count / size)
                highest = highest_of(decisions, count, per_layer=False)
                lowest = min(float(decisions[name][highest[name]].min()) for name in names if highest[name].any())
                below = [float(decisions[name][~highest[name]].max()) for name in names if not highest[name].all()]
                border = (lowest + max(below, default=lowest - 1.0)) / 2
                for name in names:
                    logits[name].sub_(border)
                kept |= highest
            after = self.masked.decisions()
            for name, chosen in kept.items():
                # Equal ones on the border, and those that rounding put on its other side.
                logits[name].add_(1e-5 * (chosen & (after[name] <= 0))).sub_(1e-5 * (~chosen & (after[name] > 0)))

    def _warn_of_ranking(self, names: list[str], held: float, asked: float) -> None:
        if self.steps >= ENOUGH and abs(held - asked) > max(LEFT_OVER, asked):
            where = f"of {', '.join(names)}" if self.per_layer else "of the weights"
            warnings.warn(
                f"After {self.steps} steps the mask kept {held:.1%} {where}, where {asked:.1%} were asked for: what is"
                " between was taken away by ranking and not by training, so this mask may do far worse than one of its"
                " size can. Take more steps, or a larger lr (with Adam a logit moves by at most about lr in a step).",
                stacklevel=2,
            )

    def _shares(self) -> dict[str, float]:
        with torch.no_grad():
            return {name: float(share.sum()) for name, share in self.masked.mask_probabilities().items()}

    def _gradient(self, names: list[str], size: int) -> float:
        """Root mean square of the gradients that the logits have now."""
        logits: Mapping[str, Tensor] = self.masked.logits
        squares = [float(grad.square().sum()) for name in names if (grad := logits[name].grad) is not None]
        return math.sqrt(sum(squares) / size)
