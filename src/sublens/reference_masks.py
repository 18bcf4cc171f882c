"""Masks without training: what a trained mask is to be compared with.

They are functions and no gates, since a gate says how logits are sampled and trained, and here there are no logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sublens.errors import NonFiniteError, SettingError
from sublens.fit.batches import Batches, BatchSource, random_state_kept
from sublens.fit.training import check_first_loss
from sublens.gates import Threshold
from sublens.mask import Mask, fingerprint
from sublens.mask.random_bits import random_bits
from sublens.masked_network import MaskedNetwork
from sublens.ranking import Kept, count_of, highest_of
from sublens.selection import Where, select
from sublens.storage import unpack_bits


def magnitude_mask(
    network: nn.Module, kept: Kept, *, per_layer: bool = False, where: Where = None, biases: bool = False
) -> Mask:
    """The mask that keeps the weights of largest absolute value (Han, Pool, Tran and Dally, NeurIPS 2015).

    Args:
        network: the network. It is only read.
        kept: how much is kept: a float is a fraction above 0 and at most 1, an int a number of weights.
        per_layer: whether ``kept`` is that of each layer, or of all layers together.
        where: which parameters are masked, see :func:`sublens.select`.
        biases: also mask the biases of the modules whose weights are masked.

    Raises:
        SettingError: ``kept`` is impossible.
        SelectionError: ``where`` matches nothing.
        NonFiniteError: a weight is NaN.
    """
    scores = {name: weight.detach().abs() for name, weight in select(network, where, biases=biases).items()}
    return _highest(scores, kept, per_layer, fingerprint(network), "weights")


def attribution_mask(
    network: nn.Module,
    batches: Batches,
    loss: Callable[[nn.Module, Any], Tensor],
    kept: Kept,
    *,
    steps: int = 100,
    seed: int = 0,
    per_layer: bool = False,
    where: Where = None,
    biases: bool = False,
) -> Mask:
    """The mask that keeps the weights without which the loss would change most, to first order.

    A weight's score is the mean over batches of (weight times gradient of the loss)^2, the first-order Taylor
    importance of Molchanov, Mallya, Tyree, Frosio and Kautz (CVPR 2019). With one batch it ranks weights as the
    connection sensitivity of SNIP does (Lee, Ajanthan and Torr, ICLR 2019).

    Args:
        network: the network, left exactly as it was.
        batches: as for :func:`sublens.fit`.
        loss: likewise.
        kept: as for :func:`magnitude_mask`, as are ``per_layer``, ``where`` and ``biases``.
        steps: number of batches, at least 1.
        seed: of all that draws from torch's random numbers on the way.
        per_layer: see above.
        where: see above.
        biases: see above.

    Raises:
        SettingError: ``kept`` or ``steps`` is impossible.
        SelectionError: ``where`` matches nothing.
        CutGraphError: the loss does not reach the weights.
        NonFiniteError: a gradient is NaN.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise SettingError(f"steps={steps!r} is not a whole number of at least 1: each step takes one batch.")
    source = BatchSource(batches, seed)
    with random_state_kept(), source.generators_kept(), torch.enable_grad():
        # All open, and straight through: the gradient of a logit is that of the loss times the weight.
        masked = MaskedNetwork(network, gate=Threshold(), where=where, biases=biases)
        logits = masked.logits
        scores = {name: torch.zeros(layer.shape, device=layer.device) for name, layer in logits.items()}
        for step in range(steps):
            masked.zero_grad()
            before, value = masked.step, loss(masked, source(step))
            if step == 0:
                check_first_loss(value, masked, before)
            value.backward()
            for name, layer in logits.items():
                if layer.grad is not None:
                    scores[name].addcmul_(layer.grad, layer.grad, value=1 / steps)
        return _highest(scores, kept, per_layer, masked.fingerprint, "gradients")


def random_mask(
    network: nn.Module,
    kept: Kept,
    *,
    seed: int = 0,
    per_layer: bool = False,
    where: Where = None,
    biases: bool = False,
) -> Mask:
    """A random mask, every choice of as many weights equally likely, the same for the same seed on every machine.

    Args:
        network: the network. It is only read.
        kept: as for :func:`magnitude_mask`, as are ``per_layer``, ``where`` and ``biases``.
        seed: any integer.
        per_layer: see above.
        where: see above.
        biases: see above.

    Raises:
        SettingError: ``kept`` is impossible.
        SelectionError: ``where`` matches nothing.
    """
    shapes = {name: tuple(weight.shape) for name, weight in select(network, where, biases=biases).items()}
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    if per_layer:
        bits = {
            name: unpack_bits(random_bits(size, count_of(kept, size), f"{seed}/{name}"), shapes[name])
            for name, size in sizes.items()
        }
    else:
        whole = sum(sizes.values())
        together = unpack_bits(random_bits(whole, count_of(kept, whole), f"{seed}"), (whole,)).split([*sizes.values()])
        bits = {name: part.view(shapes[name]) for name, part in zip(sizes, together, strict=True)}
    return Mask(bits, fingerprint(network))


def _highest(scores: dict[str, Tensor], kept: Kept, per_layer: bool, network: str, what: str) -> Mask:
    for name, layer in scores.items():
        if bool(layer.isnan().any()):
            raise NonFiniteError(f"The {what} of {name!r} contain NaN, so they have no order.", parameter=name)
    return Mask(highest_of(scores, kept, per_layer=per_layer), network)
