"""What a run has measured when its questions are asked, and how numbers of it are put into words."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sublens.answers import Spread, Value, percent, span
from sublens.study import Asked

Band = Mapping[str, float]
BINS = 20  # of a histogram of keep probabilities
MANY_TASKS = 4  # from so many on, other tasks are put together


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the run has measured already, as in ``result.json``.

    Attributes:
        network: task -> accuracy of the network.
        masks: the control and the tasks -> what :func:`sublens.analysis.interrogate` says.
        repeats: task -> accuracies of its second mask.
        confusion: who was asked ("network" or a mask) -> told -> answered -> share; empty if nobody was.
        keep_probabilities: mask -> number of gates in each of :data:`BINS` equal bins of 0..1.
    """

    network: Mapping[str, float]
    masks: Mapping[str, Mapping[str, Any]]
    repeats: Mapping[str, Mapping[str, float]]
    confusion: Mapping[str, Mapping[str, Mapping[str, float]]]
    keep_probabilities: Mapping[str, Sequence[int]]


def keep_histogram(logits: Mapping[str, Tensor]) -> list[int]:
    """Return how many gates have their keep probability in each of :data:`BINS` equal bins of 0..1."""
    counts = torch.zeros(BINS, dtype=torch.float64)
    for logit in logits.values():
        counts += torch.histc(logit.detach().float().sigmoid().cpu(), BINS, 0, 1).double()
    return [int(count) for count in counts]


def unsure_share(counts: Sequence[int]) -> float:
    """Return the share of gates between keep probabilities of 0.1 and 0.9, of a histogram of :data:`BINS` bins."""
    near = BINS // 10
    return sum(counts[near:-near]) / max(sum(counts), 1)


def own_metrics(asked: Asked, name: str) -> Mapping[str, Callable[..., float]]:
    """A task's own metric, or all of them for the control."""
    return {name: asked.metrics[name]} if name in asked.metrics else asked.metrics


def each_by_chance(found: Found, name: str) -> Mapping[str, Band]:
    """Task -> accuracy of random masks of the sizes of that mask."""
    return cast(Mapping[str, Band], found.masks[name].get("random_accuracy", {}))


def by_chance(found: Found, name: str, task: str) -> Value:
    """The accuracy of random masks of the sizes of that mask, on one task, if it was measured."""
    band = each_by_chance(found, name).get(task)
    return None if band is None else as_spread(band)


def as_spread(band: Band) -> Spread:
    """A band as the report draws it."""
    return Spread(band["mean"], band["low"], band["high"])


def mean_spread(found: Sequence[Band]) -> Spread:
    """Return the mean over several metrics of what each draw's band says."""
    return Spread(*(mean_of([band[part] for band in found]) for part in ("mean", "low", "high")))


def mean_of(values: Sequence[float]) -> float:
    """The mean of at least one number."""
    return math.fsum(values) / len(values)


def spaced(count: int, most: int) -> list[float]:
    """Where ``count`` things stand of which at most ``most`` are shown, evenly."""
    shown = min(count, most)
    return [index * (count - 1) / max(shown - 1, 1) for index in range(shown)]


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, ..."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def told_of_each(values: Mapping[str, float], each: str, together: str) -> str:
    """Write each name with its value, or, where there are many, only how far the values reach."""
    if len(values) > MANY_TASKS:
        return together.format(span(list(values.values())))
    return listed(each.format(name, percent(value)) for name, value in values.items())


def in_points(difference: float) -> str:
    """How far an accuracy lies from the network's, in words."""
    points = 100 * difference
    if abs(points) < 0.05:
        return "the network's"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'} the network's"


def listed(parts: Any) -> str:
    """Parts of a sentence, with "and" before the last."""
    *front, last = parts
    return f"{', '.join(front)} and {last}" if front else last
