"""Making the optimizer of the logits, and refusing one that could not train them as :func:`sublens.fit` promises."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from sublens.errors import SettingError
from sublens.fit.settings import Settings


def make_optimizer(settings: Settings, logits: Mapping[str, nn.Parameter]) -> Optimizer:
    """The optimizer that the settings ask for, over exactly the logits.

    Raises:
        SettingError: no torch optimizer, one of other parameters than the logits, or one that needs the loss again.
    """
    parameters = list(logits.values())
    if settings.optimizer is None:
        return _adam(parameters, settings.lr)
    optimizer = settings.optimizer(parameters)
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise SettingError(f"optimizer(logits) returned a {kind}; it must return a torch.optim.Optimizer.")
    groups = optimizer.param_groups
    held = [parameter for group in groups for parameter in group["params"]]
    if missing := [name for name, logit in logits.items() if all(logit is not parameter for parameter in held)]:
        raise SettingError(
            f"{kind} does not hold the logits of {missing[0]!r} ({len(missing)} of {len(logits)} are missing), so they "
            "would never train. Build it from the list that it is given, as in "
            "optimizer=lambda logits: torch.optim.SGD(logits, lr=1.0)."
        )
    if len(held) > len(parameters):
        raise SettingError(
            f"{kind} holds {len(held) - len(parameters)} parameters beside the logits; fit trains the logits only."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise SettingError(
            f"{kind} computes the loss several times in one step, but each forward pass draws other gates. "
            "Use an optimizer that steps from one gradient, such as Adam or SGD."
        )
    if any(group.get("weight_decay") for group in groups):
        warnings.warn(
            f"{kind} has a weight decay, which pulls every logit towards 0, a keep probability of 0.5, beside the "
            "penalty. Unless you mean that, pass weight_decay=0.",
            stacklevel=4,
        )
    return optimizer


def describe_optimizer(optimizer: Optimizer) -> str:
    """Name and hyperparameters, to tell whether a run is resumed with the optimizer that it began with."""
    groups = [
        ", ".join(f"{name}={value!r}" for name, value in sorted(group.items()) if name != "params")
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__}({'; '.join(groups)})"


def _adam(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    try:
        # One pass over the logits where the device has it, the CPU included.
        return torch.optim.Adam(parameters, lr=lr, fused=True)
    except RuntimeError:
        return torch.optim.Adam(parameters, lr=lr)
