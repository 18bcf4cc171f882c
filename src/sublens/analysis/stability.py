"""How much of a mask is the luck of a seed: how alike masks of the same task are."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from sublens.analysis.overlap import overlap
from sublens.errors import SettingError
from sublens.mask import Mask

_RESAMPLES = 2000


def stability(masks: Sequence[Mask], *, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """Say how alike masks are that were trained for one task on one network, with other noise or data order.

    The interval is a percentile bootstrap over the masks, not over their pairs: two pairs that have a mask in common
    are not independent. It is ``None`` for fewer than three masks, and rough for fewer than about eight.

    Args:
        masks: at least two masks of one network.
        level: of the interval.
        seed: of the bootstrap.

    Returns:
        ``iou`` over all layers: ``mean`` over the pairs, ``low`` and ``high``; ``chance``, the mean that random masks
        of the same layer sizes have; ``per_layer``, mean IoU of each; ``pairs``, their number.

    Raises:
        SettingError: fewer than two masks, or an impossible level.
        MismatchError: they belong to different networks.
    """
    if isinstance(masks, Mapping):
        raise SettingError("Stability takes the masks without their names: stability(list(masks.values())).")
    if not 0 < level < 1:
        raise SettingError(f"level={level!r} must lie between 0 and 1, as in level=0.95.")
    if len(masks) < 2:
        raise SettingError(f"Stability needs two or more masks of the same task; {len(masks)} were given.")
    pairs = {(i, j): overlap(masks[i], masks[j]) for i, j in combinations(range(len(masks)), 2)}
    iou = np.zeros((len(masks), len(masks)))
    for (i, j), found in pairs.items():
        iou[i, j] = found["iou"]
    low = high = None
    if len(masks) > 2:
        low, high = _bootstrap(iou, level, seed)
    return {
        "iou": {"mean": float(np.mean([found["iou"] for found in pairs.values()])), "low": low, "high": high},
        "chance": float(np.mean([found["chance"]["iou"]["mean"] for found in pairs.values()])),
        "per_layer": {
            name: float(np.mean([found["per_layer"][name]["iou"] for found in pairs.values()])) for name in masks[0]
        },
        "pairs": len(pairs),
    }


def _bootstrap(upper: np.ndarray, level: float, seed: int) -> tuple[float, float]:
    """Resample masks; a pair of a mask with itself, which would always agree, counts for nothing."""
    count = len(upper)
    random = np.random.default_rng(seed)
    times = random.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES).astype(float)
    symmetric = upper + upper.T
    sums = np.einsum("bi,ij,bj->b", times, symmetric, times)
    weights = np.einsum("bi,ij,bj->b", times, 1 - np.eye(count), times)
    means = sums[weights > 0] / weights[weights > 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
