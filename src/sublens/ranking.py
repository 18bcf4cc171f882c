"""The highest of many numbers: exactly as many as asked for. Of equal numbers the earlier (row-major) come first."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sublens.errors import SettingError

Kept = float | int
"""How much is kept: a float is a fraction (0.1 is every tenth, 1.0 all), an int a number of elements."""


def count_of(kept: Kept, size: int) -> int:
    """How many of ``size`` elements ``kept`` means: of a fraction the nearest whole number, but at least one.

    Raises:
        SettingError: a fraction that is not above 0 and at most 1, or a number that is not from 1 to ``size``.
    """
    check_kept(kept)
    if isinstance(kept, float):
        return max(1, round(kept * size))
    if kept > size:
        raise SettingError(f"kept={kept:,} elements are to be kept, but there are only {size:,}.")
    return kept


def check_kept(kept: object) -> None:
    """Refuse what is neither a fraction nor a number of elements.

    Raises:
        SettingError: as :func:`count_of`.
    """
    if isinstance(kept, float) and 0 < kept <= 1 and math.isfinite(kept):
        return
    if isinstance(kept, int) and not isinstance(kept, bool) and kept >= 1:
        return
    raise SettingError(
        f"kept={kept!r} is neither a fraction above 0 and at most 1 (a float, such as 0.1) nor a number of elements "
        "(an int of at least 1)."
    )


def highest(scores: Tensor, count: int) -> Tensor:
    """Which elements have the ``count`` highest scores. NaN is never among them.

    Args:
        scores: any shape and floating dtype, on any device.
        count: from 0 to the number of elements.

    Returns:
        bool tensor of the same shape and device.
    """
    flat = scores.detach().flatten()
    if count >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Selection, not sorting: linear in time, and no limit to the number of elements.
    lowest = torch.kthvalue(flat, flat.numel() - count + 1).values
    chosen = flat > lowest
    equal = (flat == lowest).nonzero().flatten()
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen.view(scores.shape)


def highest_of(scores: Mapping[str, Tensor], kept: Kept, *, per_layer: bool) -> dict[str, Tensor]:
    """Which elements have the highest scores, of each layer or of all layers together.

    Args:
        scores: name -> scores, as :func:`highest` takes them.
        kept: how much is kept: of each layer, or of all together.
        per_layer: whether layers are ranked one by one.

    Raises:
        SettingError: ``kept`` is impossible.
    """
    if per_layer:
        return {name: highest(layer, count_of(kept, layer.numel())) for name, layer in scores.items()}
    sizes = [layer.numel() for layer in scores.values()]
    together = torch.cat([layer.detach().flatten() for layer in scores.values()])
    chosen = highest(together, count_of(kept, sum(sizes))).split(sizes)
    return {name: part.view(layer.shape) for (name, layer), part in zip(scores.items(), chosen, strict=True)}
