"""How well a network does under a mask, its inverse, half of it, and random masks of the same size."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sublens.errors import SettingError, check_named
from sublens.groups import Grouping
from sublens.mask import Mask, check_mask
from sublens.splitting import flatten

Metrics = Mapping[str, Callable[[nn.Module], float]]
Band = dict[str, float]
"""``mean``, ``low`` and ``high`` of a metric over several draws; the lowest and the highest, not an interval."""


@contextmanager
def measuring(network: nn.Module) -> Iterator[nn.Module]:
    """Put ``network`` into evaluation mode, without gradients; every module's training flag returns afterwards."""
    flags = {module: module.training for module in network.modules()}
    try:
        network.eval()
        with torch.no_grad():
            yield network
    finally:
        for module, flag in flags.items():
            module.training = flag


def accuracies(network: nn.Module, metrics: Metrics, mask: Mask | None = None) -> dict[str, float]:
    """Return every metric of ``network``, or of ``network`` under ``mask``. The weights are the same afterwards.

    Raises:
        SettingError: ``metrics`` is no mapping of names to functions, one returned no finite number, or ``mask`` is
            none.
    """
    check_named("metrics", metrics, "{'accuracy': accuracy}")
    if mask is not None:
        check_mask("What the network is measured under", mask)
    with measuring(network) as net:
        if mask is None:
            return {name: _number(name, metric(net)) for name, metric in metrics.items()}
        nan = _FirstNaN()
        handle = net.register_forward_hook(nan, with_kwargs=True)
        try:
            with mask.applied(net):
                found = {name: _number(name, metric(net)) for name, metric in metrics.items()}
        finally:
            handle.remove()
        nan.warn_of_what_the_mask_does(net)
        return found


class _FirstNaN:
    """A forward hook that keeps the first call whose outputs hold NaN. Not a closure, so that networks stay picklable.

    argmax takes NaN for the highest value, so that a metric may even come out at 1.
    """

    def __init__(self) -> None:
        self.call: tuple[Any, Any] | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        if self.call is None and not torch.compiler.is_compiling() and _holds_nan(outputs):
            self.call = args, kwargs

    def warn_of_what_the_mask_does(self, network: nn.Module) -> None:
        """Warn if the whole network gives no NaN for that call, as it may at padded places or in place of a loss."""
        if self.call is None or _holds_nan(network(*self.call[0], **self.call[1])):
            return
        warnings.warn(
            "Among what the network under the mask gives is NaN, which the whole network does not give. argmax takes"
            " NaN for the highest value, so accuracies of it say nothing. A usual cause is 0 / 0: a layer under"
            " weight_norm divides rows by their norms, also those that a mask removes wholly. Leave such layers out of"
            " the mask (where=), or remove the parametrization first.",
            stacklevel=3,
        )


def _holds_nan(outputs: Any) -> bool:
    try:
        return any(
            isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any())
            for leaf in flatten(outputs)[0]
        )
    except Exception:  # tensors under a transform such as vmap, and kinds of tensors that know no isnan
        return False


def bands(found: Sequence[Mapping[str, float]]) -> dict[str, Band]:
    """Return metric -> mean, lowest and highest over the metrics of several draws.

    Raises:
        SettingError: there are none.
    """
    if not found:
        raise SettingError("Nothing was drawn, so there is nothing to measure: draws must be 1 or more.")
    return {
        name: {
            "mean": sum(one[name] for one in found) / len(found),
            "low": min(one[name] for one in found),
            "high": max(one[name] for one in found),
        }
        for name in found[0]
    }


def _number(name: str, found: Any) -> float:
    try:
        value = math.nan if isinstance(found, str) else float(found)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        shown = repr(found) if len(repr(found)) <= 60 else f"a {type(found).__name__}"
        raise SettingError(f"The metric {name!r} returned {shown}; it must return one finite number.")
    return value


def first_half(names: Sequence[str]) -> list[str]:
    """Return the first half of the layers, in their order; of an odd number the larger half, as in the paper's code."""
    return list(names[: math.ceil(len(names) / 2)])


def interrogate(
    network: nn.Module,
    mask: Mask,
    metrics: Metrics,
    *,
    half: Sequence[str] | None = None,
    draws: int = 10,
    seed: int = 0,
    groupings: Mapping[str, Grouping] | None = None,
) -> dict[str, Any]:
    """Ask a mask the paper's questions.

    Args:
        network: the network the mask was trained on.
        mask: the mask.
        metrics: what is measured, by name, each in 0..1.
        half: names of the layers that count as the first half; ``None``: see :func:`first_half`.
        draws: random masks to measure; 0 leaves ``random_accuracy`` out.
        seed: seed of the random masks.
        groupings: those of the mask's logits; random masks then keep as many whole groups.

    Returns:
        ``accuracy``; ``inverse_accuracy`` (the weights that the mask removes, alone); ``half_accuracy`` (the mask in
        the first half of the layers, the rest kept whole) and ``late_half_accuracy`` (the other way round);
        ``random_accuracy`` (mean, lowest and highest of random masks that keep as many weights in each layer);
        ``kept`` and ``kept_per_layer`` (fractions).

    Raises:
        SettingError: ``half`` names layers that the mask does not have.
    """
    early = first_half(mask.names) if half is None else list(half)
    unknown = [name for name in early if name not in mask.names]
    if unknown:
        raise SettingError(f"The first half names {', '.join(unknown)}; the masked layers are {', '.join(mask.names)}.")
    late = [name for name in mask.names if name not in early]
    answers: dict[str, Any] = {
        "accuracy": accuracies(network, metrics, mask),
        "inverse_accuracy": accuracies(network, metrics, ~mask),
        "half_accuracy": accuracies(network, metrics, mask.only(early)),
        # A network of one layer has no second half: then nothing is masked.
        "late_half_accuracy": accuracies(network, metrics, mask.only(late) if late else None),
        "kept": mask.kept,
        "kept_per_layer": mask.kept_per_layer(),
    }
    if draws:
        random = (Mask.random_like(mask, seed + draw, groupings) for draw in range(draws))
        answers["random_accuracy"] = bands([accuracies(network, metrics, one) for one in random])
    return answers
