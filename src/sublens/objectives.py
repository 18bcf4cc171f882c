"""Objectives beside a task's own loss: functions to give to ``fit`` as ``loss``."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from sublens.calling import at_rest
from sublens.errors import SettingError

Loss = Callable[[nn.Module, Any], Tensor]
Measure = Literal["kl", "mse"]


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _itself(output: Any) -> Any:
    return output


def agree(
    network: nn.Module,
    *,
    measure: Measure = "kl",
    inputs: Callable[[Any], Any] = _first,
    output: Callable[[Any], Tensor] = _itself,
) -> Loss:
    """The loss of not doing what the network does without a mask, whatever is right: no labels are needed.

    Args:
        network: the network to agree with, usually the one that is masked. It runs in evaluation mode and without
            gradients, and stays as it is.
        measure: ``"kl"``, the Kullback-Leibler divergence KL(network || masked network), in nats, of the distributions
            whose logits are the output along its last dimension, averaged over all others; or ``"mse"``, the mean
            squared difference.
        inputs: what of a batch the network is called with; by default the first of a tuple or list, or the batch.
        output: the tensor in the network's output that is compared, for example ``lambda out: out.logits``.

    Raises:
        SettingError: ``measure`` is unknown; or, when the loss is called, the outputs are not tensors of one shape,
            or are single numbers, of which ``"kl"`` sees nothing.
    """
    if measure not in get_args(Measure):
        raise SettingError(f"measure={measure!r} is unknown. Use 'kl' (for logits) or 'mse'.")

    def loss(net: nn.Module, batch: Any) -> Tensor:
        x = inputs(batch)
        with torch.no_grad(), at_rest(network):
            target = output(network(x))
        found = output(net(x))
        for tensor in (target, found):
            if not isinstance(tensor, Tensor):
                raise SettingError(
                    f"agree compares tensors, but the output is a {type(tensor).__name__}. Choose a tensor of it by "
                    "output=..., as in output=lambda out: out.logits."
                )
        if target.shape != found.shape:
            raise SettingError(
                f"agree compares outputs of one shape; the network's is {tuple(target.shape)}, the masked network's "
                f"{tuple(found.shape)}."
            )
        if measure == "mse":
            return functional.mse_loss(found, target)
        if found.shape[-1:] in ((), (1,)):
            raise SettingError(
                f"agree compares distributions along the last dimension, but the output's shape is "
                f"{tuple(found.shape)}: of one number softmax makes 1, whatever it is, so the loss would"
                " always be 0. Use measure='mse'."
            )
        ours, its = (functional.log_softmax(each.float().reshape(-1, each.shape[-1]), -1) for each in (found, target))
        return functional.kl_div(ours, its, reduction="batchmean", log_target=True)

    return loss


def contrast(solve: Loss, avoid: Loss, *, until: float, weight: float = 1.0) -> Loss:
    """The loss of a mask that solves one task and does not solve another.

    It is solve(net, first) + weight * max(0, until - avoid(net, second)) for a batch that is a pair, as
    ``batches=lambda step: (of_one(step), of_the_other(step))`` makes it. The second term is bounded: once the loss of
    the task to avoid has risen to ``until``, nothing more is gained by it. Without that bound it would be all that
    counts. The two are two calls of the network, with draws of their own.

    Args:
        solve: loss of the task to solve.
        avoid: loss of the task to avoid.
        until: what that loss is to rise to. For a cross-entropy, log(n) is that of guessing among n classes.
        weight: of the second term.

    Raises:
        SettingError: ``until`` or ``weight`` is not finite and above 0; or, when it is called, a batch is no pair.
    """
    for name, value in (("until", until), ("weight", weight)):
        if not (math.isfinite(value) and value > 0):
            raise SettingError(f"{name}={value} must be finite and above 0, or the task is not avoided.")

    def loss(net: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise SettingError(
                "This loss takes pairs, a batch of the task to solve and one of the task to avoid: "
                "batches=lambda step: (of_one(step), of_the_other(step))."
            )
        first, second = batch
        return solve(net, first) + weight * functional.relu(until - avoid(net, second))

    return loss


def forget(network: nn.Module, task: Loss, *, until: float, weight: float = 1.0, **agreement: Any) -> Loss:
    """The loss of a mask that keeps what the network does on one batch, and has lost a task on the other.

    It is :func:`contrast` of :func:`agree` and ``task``: batches are pairs, first of data on which nothing is to
    change, then of the task to forget.

    Args:
        network: the network to agree with.
        task: loss of the task to forget.
        until: what that loss is to rise to; see :func:`contrast`.
        weight: of the forgetting.
        agreement: ``measure``, ``inputs`` and ``output`` of :func:`agree`.

    Raises:
        SettingError: as :func:`contrast` and :func:`agree`.
    """
    return contrast(agree(network, **agreement), task, until=until, weight=weight)
