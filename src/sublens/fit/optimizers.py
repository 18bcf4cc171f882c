"""Making the optimizer of the logits, and refusing one that could not train them as :func:`sublens.fit` promises."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sublens import kernels
from sublens.errors import SettingError
from sublens.fit.settings import Settings
from sublens.kernels import cpu


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


class Adam(torch.optim.Adam):
    """PyTorch's fused Adam, which can also take a whole update of the logits in two passes over memory.

    Its state is that of ``torch.optim.Adam``, and so are its results, but for rounding; :meth:`update` also puts the
    logits back within their bound.
    """

    def __init__(self, logits: list[nn.Parameter], lr: float) -> None:
        super().__init__(logits, lr=lr, fused=True)
        self._totals: tuple[list[int], list[float]] | None = None  # versions of the parameters, and their sums then

    def takes(self) -> bool:
        """Whether :meth:`squares` and :meth:`update` can be used: logits and gradients are float32 data on the CPU."""
        parameters = self.param_groups[0]["params"]
        return kernels.fused() and all(
            p.grad is not None and cpu.applies(p, p.grad) and p.is_contiguous() and p.grad.is_contiguous()
            for p in parameters
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Adam``'s, which does more around it than a small step has time for."""
        if not set_to_none:
            super().zero_grad(set_to_none)
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None if set_to_none else parameter.grad

    def squares(self, constants: Sequence[float]) -> list[float]:
        """Squared norm of each parameter's gradient, with a constant of its own added to each number."""
        return cpu.squares([p.grad for p in self.param_groups[0]["params"]], constants)

    def totals(self) -> list[float]:
        """Sum of each parameter. Those of the last :meth:`update` are known; if anything changed, all are read anew."""
        parameters = self.param_groups[0]["params"]
        versions = [parameter._version for parameter in parameters]
        if self._totals is None or self._totals[0] != versions:
            self._totals = versions, cpu.totals(parameters)
        return self._totals[1]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As ``torch.optim.Adam``'s, whose fused step counts no version of what it changes."""
        self._totals = None
        return super().step(closure)

    @torch.no_grad()
    def update(self, constants: Sequence[float], factor: float) -> None:
        """Step with the gradients, each parameter's constant added and then multiplied by ``factor``."""
        (group,) = self.param_groups
        parameters = group["params"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        torch._foreach_add_([state["step"] for state in states], 1)
        totals = cpu.adam(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            steps=[int(state["step"]) for state in states],
            lr=group["lr"],
            betas=group["betas"],
            epsilon=group["eps"],
            constants=constants,
            factor=factor,
        )
        torch._C._increment_version(parameters)
        self._totals = [parameter._version for parameter in parameters], totals


def _adam(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    try:
        return Adam(parameters, lr)
    except RuntimeError:  # a device without the fused kind
        return torch.optim.Adam(parameters, lr=lr)
