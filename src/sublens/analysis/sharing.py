"""How much of their weights masks share, beyond what random masks share, and how sure that is.

Two masks keep a and b weights, and share c. Random masks of the same layer sizes share e on average. Then
(c - e) / (min(a, b) - e) is 0 for masks that share as random ones do, and 1 where one mask lies in the other, whatever
their sizes.

Intervals are percentile bootstraps over the units (rows) of every layer, drawn anew within the layer. They say how far
a value would change with other units of this network, not with other networks.
"""

from collections.abc import Sequence

import numpy as np

from sublens.mask import Mask

_RESAMPLES = 1000
_LEVEL = 0.95
_CHUNK = 4_000_000  # numbers drawn at a time


def sharing_index(
    first: Mask,
    second: Mask,
    same: Sequence[tuple[Mask, Mask]],
    *,
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[float, float, float] | None:
    """Return the sharing of two masks (see the module) divided by that of the same task, and its 95 % interval.

    Args:
        first: one mask.
        second: the other.
        same: pairs of masks of the same task each, trained twice; their mean is what the index is measured in.
        layers: names of the layers that are compared; ``None``: all.
        seed: of the bootstrap.

    Returns:
        Index, lower and upper edge; ``None`` if ``same`` is empty, or shares no more than random masks do.
    """
    mine, others, both, chance = _sums([(first, second), *same], layers, seed)
    sharing = _of_room(both - chance, np.minimum(mine, others) - chance)
    if not same or np.isnan(sharing[:, 0]).any() or sharing[1:, 0].mean() <= 0:
        return None
    measure = sharing[1:].mean(0)
    # In a resample of few rows the same task may share no more than random masks: there is no index in it.
    return _with_interval(np.divide(sharing[0], measure, out=np.full_like(measure, np.nan), where=measure > 0))


def reused_share(
    mask: Mask, used: Mask, *, layers: Sequence[str] | None = None, seed: int = 0
) -> tuple[float, float, float] | None:
    """Return how much of a mask lies in ``used``, from 0 (as of a random mask) to 1 (all), and its 95 % interval.

    That is (c - e) / (a - e) in the module's terms, where a is what ``mask`` keeps.

    Args:
        mask: whose weights are asked for.
        used: the weights that were used before.
        layers: names of the layers that count; ``None``: all.
        seed: of the bootstrap.

    Returns:
        Share, lower and upper edge; ``None`` if the mask keeps nothing there or nothing was left unused.
    """
    mine, _, both, chance = (sums[0] for sums in _sums([(mask, used)], layers, seed))
    share = _of_room(both - chance, mine - chance)
    return None if np.isnan(share[0]) else _with_interval(share)


def _sums(pairs: Sequence[tuple[Mask, Mask]], layers: Sequence[str] | None, seed: int) -> np.ndarray:
    """Return kept by the first, by the second, by both, and by both by chance: each of shape (pairs, 1 + resamples)."""
    random = np.random.default_rng(seed)
    sums = np.zeros((4, len(pairs), 1 + _RESAMPLES))  # as they are, then resampled
    for name in pairs[0][0].names if layers is None else layers:
        rows, size = _rows(pairs, name)
        counts = np.concatenate([rows.sum(2, keepdims=True), _resampled(rows, random)], axis=2).swapaxes(0, 1)
        sums[:3] += counts
        sums[3] += counts[0] * counts[1] / size
    return sums


def _of_room(shared: np.ndarray, room: np.ndarray) -> np.ndarray:
    share: np.ndarray = np.divide(shared, room, out=np.full_like(room, np.nan), where=room > 1e-9)
    return share


def _with_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return a value and the edges of its interval from the value and its resamples, in one array."""
    edges = np.nanquantile(values[1:], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(values[0]), float(edges[0]), float(edges[1])


def _resampled(rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the sums over rows (the last axis) of each resample, in little memory for layers of many rows."""
    count = rows.shape[2]
    chunk = max(1, _CHUNK // count)
    parts = []
    for start in range(0, _RESAMPLES, chunk):
        size = min(chunk, _RESAMPLES - start)
        times = random.multinomial(count, np.full(count, 1 / count), size=size).astype(float)
        parts.append(rows @ times.T)
    return np.concatenate(parts, axis=2)


def _rows(pairs: Sequence[tuple[Mask, Mask]], name: str) -> tuple[np.ndarray, int]:
    """Return for each pair, of each row of a layer, what each mask keeps and what both keep, and the layer's size."""
    found = []
    size = 0
    for first, second in pairs:
        mine, others = (mask[name].numpy() for mask in (first, second))
        size = mine.size
        mine, others = (kept.reshape(kept.shape[0], -1) if kept.ndim else kept.reshape(1, 1) for kept in (mine, others))
        found.append([mine.sum(1), others.sum(1), (mine & others).sum(1)])
    return np.asarray(found, dtype=float), size
