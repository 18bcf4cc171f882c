"""The settings of a training run, checked before anything else happens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sublens.errors import SettingError
from sublens.fit.strength import AlphaPath
from sublens.gates import Penalty
from sublens.ranking import Kept, check_kept

Record = dict[str, Any]
Loss = Callable[[nn.Module, Any], Tensor]
Evaluate = Callable[[nn.Module], dict[str, float]]
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
Callback = Callable[[Record], object]

DEFAULT_LR = 1e-2
DEFAULT_ALPHA = 1e-4
OWN_FIELDS = ("step", "loss", "penalty", "kept", "gradient_norm", "alpha")


@dataclass(frozen=True, kw_only=True)
class Settled:
    """When a mask counts as settled, so that training may stop early.

    It has settled when, over the last ``window`` evaluations, the kept fraction and every metric have each moved by no
    more than their threshold (largest minus smallest value). Without ``evaluate`` only the kept fraction is judged.

    Args:
        window: number of evaluations looked at, at least 2.
        kept: largest movement of the kept fraction, in 0..1.
        metric: largest movement of each metric, in the metric's own unit.

    Raises:
        SettingError: a value is out of range.
    """

    window: int = 5
    kept: float = 0.005
    metric: float = 0.005

    def __post_init__(self) -> None:
        _whole("window", self.window, 2, "one evaluation alone cannot show that nothing moves")
        _number("kept", self.kept, 0.0, "it is the largest movement of the kept fraction that still counts as settled")
        _number("metric", self.metric, 0.0, "it is the largest movement of a metric that still counts as settled")

    def reached(self, seen: Sequence[Sequence[float | None]]) -> bool:
        """Whether the evaluations ``seen`` (each: kept fraction, then the metrics) end in a settled window."""
        window = seen[-self.window :]
        if len(window) < self.window or len({len(evaluation) for evaluation in window}) > 1:
            return False
        kept, *metrics = zip(*window, strict=True)
        return _movement(kept) <= self.kept and all(_movement(metric) <= self.metric for metric in metrics)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one call of :func:`sublens.fit` was asked to do; see there for the meaning of each field."""

    steps: int
    alpha: float | AlphaPath | None
    kept: Kept | None
    per_layer: bool
    penalty: Penalty
    seed: int
    loss: Loss
    optimizer: MakeOptimizer | None
    lr: float
    clip: float | None
    evaluate: Evaluate | None
    evaluate_every: int
    record_every: int
    checkpoint_every: int
    settle: Settled | None
    folder: Any
    resume: bool
    progress: bool | str
    callbacks: tuple[Callback, ...]

    def __post_init__(self) -> None:
        _whole("steps", self.steps, 1, "each step trains on one batch")
        if not (self.alpha is None or isinstance(self.alpha, AlphaPath)):
            _number("alpha", self.alpha, 0.0, "a negative penalty would push every gate open; alpha=0 switches it off")
        self._check_kept()
        if self.penalty not in ("logits", "expected"):
            raise SettingError(
                f"penalty={self.penalty!r} is unknown. Use 'logits' (the sum of the logits, as in the paper) or "
                "'expected' (the expected number of kept elements, which is bounded)."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise SettingError(f"seed={self.seed!r} is not a whole number.")
        _number("lr", self.lr, 0.0, "it is the step size of the optimizer on the logits", above=True)
        if self.optimizer is not None and self.lr != DEFAULT_LR:
            raise SettingError(
                f"lr={self.lr!r} would have no effect beside optimizer=...: lr belongs to the default optimizer. "
                "Give yours its own, as in optimizer=lambda logits: torch.optim.SGD(logits, lr=1.0)."
            )
        if self.clip is not None:
            _number(
                "clip", self.clip, 0.0, "it is the largest gradient norm of the logits; clip=None leaves it", above=True
            )
        for name in ("evaluate_every", "record_every", "checkpoint_every"):
            _whole(name, getattr(self, name), 1, "it is a number of steps")
        if self.settle is not None and not isinstance(self.settle, Settled):
            raise SettingError(
                f"settle={self.settle!r} is not a sublens.fit.Settled. Use settle=Settled(window=5, kept=0.005)."
            )
        if self.resume and self.folder is None:
            raise SettingError("resume=True needs folder=...: the checkpoint to resume from lies in the run's folder.")
        self._check_functions()

    @property
    def scheduled(self) -> bool:
        """Whether a step depends on how many steps there are, so that a longer run is another run."""
        return self.kept is not None or isinstance(self.alpha, AlphaPath)

    def _check_kept(self) -> None:
        if self.kept is None:
            if self.per_layer:
                raise SettingError("per_layer=True says how kept=... is meant, which is not given.")
            return
        check_kept(self.kept)
        if self.alpha is not None:
            raise SettingError(
                f"alpha={self.alpha!r} and kept={self.kept!r} exclude each other: kept steers alpha. Leave one out."
            )
        if self.settle is not None:
            raise SettingError(
                f"settle={self.settle!r} and kept={self.kept!r} exclude each other: what is kept is steered "
                "over all steps. Leave one out."
            )

    def _check_functions(self) -> None:
        if not callable(self.loss):
            raise SettingError(
                f"loss is a {type(self.loss).__name__}; it must be a function loss(net, batch) -> scalar tensor."
            )
        if isinstance(self.optimizer, Optimizer) or not (self.optimizer is None or callable(self.optimizer)):
            raise SettingError(
                f"optimizer is a {type(self.optimizer).__name__}; it must be a function that makes one for the logits, "
                "as in optimizer=lambda logits: torch.optim.Adam(logits, lr=1e-2)."
            )
        if not (self.evaluate is None or callable(self.evaluate)):
            raise SettingError(
                f"evaluate is a {type(self.evaluate).__name__}; it must be a function evaluate(net) -> dict of numbers."
            )
        for callback in self.callbacks:
            if not callable(callback):
                raise SettingError(
                    f"callbacks holds a {type(callback).__name__}; each must be a function, or an object with "
                    "__call__, that takes one record (a dict)."
                )


def _movement(values: Sequence[float | None]) -> float:
    """Largest minus smallest; infinite where a value was undefined, which therefore never counts as settled."""
    known = [value for value in values if value is not None]
    return max(known) - min(known) if len(known) == len(values) else math.inf


def _whole(name: str, value: object, least: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingError(f"{name}={value!r} is not a whole number of at least {least}: {why}.")


def _number(name: str, value: object, least: float, why: str, *, above: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or (above and value == least):  # type: ignore[operator]
        relation = "above" if above else "of at least"
        raise SettingError(f"{name}={value!r} is not a finite number {relation} {least:g}: {why}.")
