"""How much two masks share, in each layer and altogether, beside what chance gives (paper, section 2 and appendix)."""

from typing import Any

from torch import Tensor

from sublens.analysis.chance import Distribution, shared_by_chance, total
from sublens.mask import Mask, check_mask


def overlap(first: Mask, second: Mask) -> dict[str, Any]:
    """Compare two masks of one network.

    ``iou`` is shared / (kept by either), ``iomin`` is shared / (kept by the smaller mask), ``shared`` is the share of
    the first mask's weights that the second keeps too, ``shared_back`` that of the second mask's weights. Each stands
    beside ``chance``: mean and 95 % band (``low``, ``high``) for random masks that keep as many weights in each layer.
    ``z`` is the distance of the number of shared weights from chance in standard deviations (``None`` where chance
    leaves no choice, as in a layer that is kept whole); ``p`` is two-sided. A layer's ``p`` is multiplied by the number
    of layers (Bonferroni), so that a small value in one layer out of many is no accident.

    Returns:
        Those figures over all layers, with ``sizes`` (``total``, ``first``, ``second``, ``both``, in weights), and
        under ``per_layer`` the same for every layer, where ``size`` is the number of weights.

    Raises:
        MismatchError: the masks belong to different networks or layers.
        SettingError: one of them is no mask.
    """
    for number, mask in (("first", first), ("second", second)):
        check_mask(f"The {number} of the two", mask)
    sizes, both = first.sizes(), (first & second).kept_counts()
    kept, kept_too = first.kept_counts(), second.kept_counts()
    chances = {name: shared_by_chance(sizes[name], kept[name], kept_too[name]) for name in sizes}
    per_layer = {}
    for name, chance in chances.items():
        figures = _figures(both[name], kept[name], kept_too[name], chance)
        counts = {"total": sizes[name], "first": kept[name], "second": kept_too[name], "both": both[name]}
        corrected = min(1.0, chance.p(both[name]) * len(sizes))
        per_layer[name] = {**figures, "size": sizes[name], "sizes": counts, "z": chance.z(both[name]), "p": corrected}
    counts = {
        "total": first.size,
        "first": first.kept_count,
        "second": second.kept_count,
        "both": sum(both.values()),
    }
    chance = total(list(chances.values()))
    return {
        **_figures(counts["both"], counts["first"], counts["second"], chance),
        "sizes": counts,
        "z": chance.z(counts["both"]),
        "p": chance.p(counts["both"]),
        "per_layer": per_layer,
    }


def _figures(both: int, first: int, second: int, chance: Distribution) -> dict[str, Any]:
    """Return the overlap figures of two masks that keep ``first`` and ``second`` weights, ``both`` of them shared."""

    def iou(x: Tensor) -> Tensor:
        return x / (first + second - x) if first + second else x + 1

    def share_of(kept: int) -> Any:
        return lambda x: x / kept if kept else x + 1

    measures = {
        "iou": iou,
        "iomin": share_of(min(first, second)),
        "shared": share_of(first),
        "shared_back": share_of(second),
    }
    seen = Tensor([both]).double()
    return {
        **{name: measure(seen).item() for name, measure in measures.items()},
        "chance": {name: chance.summary(measure) for name, measure in measures.items()},
    }
