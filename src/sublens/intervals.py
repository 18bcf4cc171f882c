"""Intervals over independent repetitions, such as the runs of several seeds."""

import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtrit

from sublens.errors import SettingError


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return mean and Student's t interval of the mean over independent repetitions, such as runs of several seeds.

    One value has no interval: its edges are infinite. ``values`` may be any flat sequence of numbers, an array or a
    tensor too.

    Raises:
        SettingError: there are no values, one is not finite, or ``level`` is not in 0..1.
    """
    try:
        values = [float(value) for value in values]
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(f"An interval needs a flat sequence of numbers: {error}.") from None
    if not values or not 0 < level < 1:
        raise SettingError(f"An interval of level {level} over {len(values)} values cannot be had.")
    if not all(math.isfinite(value) for value in values):
        raise SettingError(f"An interval needs finite numbers, and one of {values} is not.")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, -math.inf, math.inf
    half = float(stdtrit(len(values) - 1, (1 + level) / 2) * statistics.stdev(values) / math.sqrt(len(values)))
    return mean, mean - half, mean + half
