"""What breaks when weights are replaced: by nothing, by their layer's mean, or by other weights of their layer.

Zero is not neutral: a network has never been trained with a weight at zero that is usually far from it. A function that
is lost under every replacement was in the replaced weights; one that only zeros destroy may have been disturbed.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from sublens.analysis.accuracy import Band, Metrics, accuracies, bands
from sublens.errors import SettingError, check_named
from sublens.mask import Mask
from sublens.mask.random_bits import random_bits
from sublens.seeds import seed_from
from sublens.selection import tied_names
from sublens.storage import unpack_bits

FILLS = ("zero", "mean", "resample")


def ablated(network: nn.Module, mask: Mask, *, fill: str = "zero", seed: int = 0) -> nn.Module:
    """Return a copy of the network in which every weight that the mask removes is replaced.

    Args:
        network: the network the mask was made for. It is not changed.
        mask: what stays. ``~mask`` ablates what the mask keeps, ``mask.only(layers)`` does it in some layers.
        fill: ``"zero"``; ``"mean"``, the mean of the layer's weights; or ``"resample"``, for each removed weight one of
            its layer's weights, drawn with replacement.
        seed: of the drawing.

    Raises:
        SettingError: no such ``fill``.
        MismatchError: the mask belongs to another network.
    """
    if fill not in FILLS:
        raise SettingError(f"fill={fill!r} must be one of {', '.join(FILLS)}.")
    replaced = mask.apply(network)
    if fill == "zero":
        return replaced
    originals = dict(network.named_parameters(remove_duplicate=False))
    copies = dict(replaced.named_parameters(remove_duplicate=False))
    aliases = tied_names(network)
    with torch.no_grad():
        for name in mask:
            weights, removed = originals[name].detach(), ~mask[name]
            new = _filling(weights, int(removed.sum()), fill, seed_from(seed, name))
            for alias in aliases[name]:
                copies[alias][removed.to(weights.device)] = new
    return replaced


def _filling(weights: Tensor, count: int, fill: str, seed: int) -> Tensor:
    if fill == "mean":
        return weights.mean().expand(count)
    drawn = torch.randint(weights.numel(), (count,), generator=torch.Generator().manual_seed(seed))
    return weights.flatten()[drawn.to(weights.device)]


def ablate(
    network: nn.Module, mask: Mask, metrics: Metrics, *, fill: str = "zero", draws: int = 3, seed: int = 0
) -> dict[str, Band]:
    """Return every metric of the network with what the mask removes replaced (see :func:`ablated`).

    Args:
        network: the network the mask was made for.
        mask: what stays.
        metrics: what is measured, by name.
        fill: what replaces the removed weights.
        draws: how often weights are resampled, 1 or more; the other fills draw nothing and are measured once.
        seed: of the first draw.

    Raises:
        SettingError: no such ``fill``, or no draws.
        MismatchError: the mask belongs to another network.
    """
    times = draws if fill == "resample" else 1
    found = [
        accuracies(ablated(network, mask, fill=fill, seed=seed_from(seed, draw)), metrics) for draw in range(times)
    ]
    return bands(found)


def ablate_layers(
    network: nn.Module,
    mask: Mask,
    metrics: Metrics,
    blocks: Mapping[str, Sequence[str]],
    *,
    fills: Sequence[str] = FILLS,
    draws: int = 3,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Band]]]:
    """Ablate, in one block of layers at a time, what the mask keeps; all other weights of the network stay.

    Args:
        network: the network the mask was made for.
        mask: what is ablated.
        metrics: what is measured, by name.
        blocks: name -> the layers of the block, such as :func:`blocks_of` gives.
        fills: what replaces the ablated weights.
        draws: how often weights are resampled.
        seed: of the first draw.

    Returns:
        block -> fill -> metric -> band.

    Raises:
        SettingError: no such fill, or no draws.
        MismatchError: the mask belongs to another network.
    """
    return {
        block: {
            fill: ablate(network, (~mask).only(list(layers)), metrics, fill=fill, draws=draws, seed=seed)
            for fill in fills
        }
        for block, layers in blocks.items()
    }


def blocks_of(names: Sequence[str], most: int = 8) -> dict[str, list[str]]:
    """Return the layers in at most ``most`` blocks of neighbours, as equal as can be; each named after its layers."""
    count = min(most, len(names))
    edges = [round(index * len(names) / count) for index in range(count + 1)] if count else [0]
    parts = [list(names[start:stop]) for start, stop in pairwise(edges)]
    return {part[0] if len(part) == 1 else f"{part[0]} to {part[-1]}": part for part in parts}


def thinned(mask: Mask, fraction: float, seed: int) -> Mask:
    """Return the mask without a random ``fraction`` (0..1) of what it keeps in each layer, rounded to whole weights.

    Raises:
        SettingError: ``fraction`` is not in 0..1.
    """
    if not 0 <= fraction <= 1:
        raise SettingError(f"fraction={fraction!r} must lie between 0 and 1.")
    kept = {}
    for name in mask:
        layer = mask[name]
        places = layer.flatten().nonzero().flatten()
        count = len(places)
        going = unpack_bits(random_bits(count, round(fraction * count), f"{seed}/thinned/{name}"), (count,))
        layer.view(-1)[places[going]] = False
        kept[name] = layer
    return Mask(kept, mask.network)


def minimality(
    network: nn.Module,
    mask: Mask,
    metrics: Metrics,
    *,
    fractions: Sequence[float] = (0.05, 0.2, 0.5),
    draws: int = 3,
    seed: int = 0,
) -> dict[float, dict[str, Band]]:
    """Ask whether the mask keeps more than is needed: remove random fractions of what it keeps in each layer.

    In a minimal mask every kept weight is needed, so that even a small fraction costs accuracy.

    Returns:
        fraction -> metric -> band over the draws.

    Raises:
        SettingError: a fraction is not in 0..1, ``fractions`` is one number, or there are no draws.
    """
    if not isinstance(fractions, Iterable):
        raise SettingError(f"fractions={fractions!r} must be several numbers; of one write fractions=[{fractions!r}].")
    return {
        fraction: bands(
            [
                accuracies(network, metrics, thinned(mask, fraction, seed_from(seed, fraction, draw)))
                for draw in range(draws)
            ]
        )
        for fraction in fractions
    }


def completeness(
    network: nn.Module, mask: Mask, metrics: Metrics, *, draws: int = 3, seed: int = 0
) -> tuple[dict[str, float], dict[str, Band]]:
    """Ask whether the mask has all of its function: does what it removes still know anything?

    Returns:
        Every metric with only the removed weights (the inverse mask); and the same for random masks that keep as many
        weights in each layer as the inverse does.

    Raises:
        SettingError: there are no draws.
    """
    inverse = ~mask
    drawn = [accuracies(network, metrics, Mask.random_like(inverse, seed_from(seed, draw))) for draw in range(draws)]
    return accuracies(network, metrics, inverse), bands(drawn)


def faithfulness(network: nn.Module, control: Mask, metrics: Metrics) -> dict[str, float]:
    """Return how far every metric under the mask of the whole problem lies from the network's own (0: faithful)."""
    whole, masked = accuracies(network, metrics), accuracies(network, metrics, control)
    return {name: masked[name] - whole[name] for name in metrics}


def transfer(network: nn.Module, masks: Mapping[str, Mask], metrics: Metrics) -> dict[str, dict[str, float]]:
    """Return mask -> metric -> the network's value under that mask: what each task's mask does on every task.

    Raises:
        SettingError: ``masks`` or ``metrics`` is no mapping of names.
    """
    check_named("masks", masks, "{'add': add}")
    return {name: accuracies(network, metrics, mask) for name, mask in masks.items()}
