"""The fast route for a plain chain of linear layers and ReLUs, as the method's feed-forward networks are.

Such a network is one step of autograd: each layer goes through the blocked product (:mod:`sublens.kernels.blocked`),
which rectifies what it writes, and nothing runs between two layers but their own loops. In small networks what lies
between them costs as much as a fifth of a step otherwise. Values and gradients are those of
:mod:`sublens.routes.linear_route`, bit for bit, which takes whatever this route does not; also the first training call
of a masked network, in which hooks look for checkpoints.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from sublens.kernels import blocked, cpu
from sublens.noise import Draw
from sublens.routes import eligibility, products


@dataclass(frozen=True)
class Layer:
    """A linear layer of a chain.

    Attributes:
        name: of its weight, a masked parameter.
        weight: (out, in).
        bias: (out), or ``None``.
        rectified: whether a ReLU follows.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    rectified: bool


def layers(network: nn.Module, logits: Mapping[str, Tensor], x: Any, chunks: int) -> list[Layer] | None:
    """The network's layers, if it is such a chain and can be called with ``x`` this way; otherwise ``None``.

    It is an ``nn.Sequential``, or several in one another, of ``nn.Linear``, ``nn.ReLU`` and what does nothing to
    vectors in evaluation mode. Its weights are what is masked, and nothing watches its modules. ``x`` is a float32
    batch of vectors on the CPU whose size is a multiple of ``chunks``, and if there is an autocast, it is to bfloat16.
    Nothing is differentiated forwards.
    Gate and logits are looked at by :func:`sublens.routes.eligibility.applies`.
    """
    if (
        type(x) is not Tensor
        or x.dim() != 2
        or x.shape[0] % chunks
        or not cpu.applies(x, x)
        or (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16)
        or any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
        or forward_ad._current_level >= 0
        or modules._global_forward_pre_hooks
        or eligibility.hooked_everywhere()
    ):
        return None
    found: list[Layer] = []
    if not _follow(network, "", found) or {layer.name for layer in found} != logits.keys():
        return None
    width = x.shape[1]
    for layer in found:
        scores = logits[layer.name]
        if layer.weight.shape != scores.shape or layer.weight.shape[1] != width or not _is_plain(scores):
            return None
        width = layer.weight.shape[0]
    return found


def _follow(module: nn.Module | None, prefix: str, found: list[Layer]) -> bool:
    """Add a module's layers to those found, if that is what it consists of."""
    if module is None:
        return False
    if eligibility.hooked(module) or "forward" in module.__dict__:
        return False
    kind = type(module)
    if kind is nn.Linear:
        if not {"weight", "bias"} <= module._parameters.keys():  # a bias that is a buffer, say
            return False
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        if not _is_plain(weight) or not (bias is None or _is_plain(bias)):
            return False
        assert weight is not None
        found.append(Layer(f"{prefix}weight", weight, bias, rectified=False))
        return True
    if kind is nn.ReLU:
        if not found:
            return False
        found[-1] = Layer(found[-1].name, found[-1].weight, found[-1].bias, rectified=True)
        return True
    if kind is nn.Sequential:
        return all(_follow(part, f"{prefix}{name}.", found) for name, part in module._modules.items())
    return kind in (nn.Identity, nn.Dropout)


def _is_plain(parameter: Tensor | None) -> bool:
    return parameter is not None and cpu.has_plain_data(parameter) and parameter.is_contiguous()


def call(chain: list[Layer], x: Tensor, logits: Mapping[str, Tensor], draws: Mapping[str, Draw], chunks: int) -> Tensor:
    """The network's output for a batch of which chunk k goes through sample k of every layer.

    Args:
        chain: what :func:`layers` gave for ``x``.
        x: (B, in) float32.
        logits: of every layer, by its name.
        draws: name its first sample.
        chunks: number K of chunks, which lie one after the other in ``x``.

    Returns:
        (B, out) float32, or bfloat16 under autocast to it.
    """
    last, rounded = chain[-1], torch.is_autocast_enabled("cpu")
    inner = [*chain[:-1], Layer(last.name, last.weight, last.bias, rectified=False)]
    scores, named = [logits[layer.name] for layer in chain], [draws[layer.name] for layer in chain]
    with torch.autocast("cpu", enabled=False) if rounded else nullcontext():
        y: Tensor = _Chain.apply(x, inner, named, chunks, rounded, *scores)
        y = y.bfloat16() if rounded else y
        return y.relu() if last.rectified else y


class _Chain(torch.autograd.Function):
    """Keeps what goes into each layer, logits and weights for the backward pass, no sample.

    Where it is ``rounded``, what lies between layers are numbers of bfloat16, as under autocast, and products are in it
    where the processor gains by that.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, chain: list[Layer], draws: list[Draw], chunks: int, rounded: bool, *logits: Tensor
    ) -> Tensor:
        reduced = rounded and blocked.multiplies_bfloat16()
        rows = x.shape[0]
        y = x.new_empty(rows, chain[-1].weight.shape[0])
        inputs: list[Tensor | blocked.Packed] = [x.contiguous().view(chunks, rows // chunks, -1)]
        for layer, scores, draw in zip(chain, logits, draws, strict=True):
            if layer is chain[-1]:
                out: Tensor | blocked.Packed = y.view(chunks, rows // chunks, -1)
            else:
                out = blocked.room_between(inputs[-1], layer.weight.shape[0], reduced)
            blocked.forward(
                inputs[-1], layer.weight, scores, draw, bias=layer.bias, out=out, reduced=reduced,
                rectified=layer.rectified, rounded=rounded,
            )  # fmt: skip
            inputs.append(out)
        came = [each.values if isinstance(each, blocked.Packed) else each for each in inputs[:-1]]
        ctx.save_for_backward(*came, *logits, *(layer.weight for layer in chain))
        ctx.chain, ctx.draws, ctx.rounded, ctx.reduced = chain, draws, rounded, reduced  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        chain, saved, count = ctx.chain, ctx.saved_tensors, len(ctx.chain)
        of_logits: list[Tensor | None] = [None] * count
        samples, rows, _ = saved[0].shape
        of_x: Any = gradient.resolve_neg().contiguous().view(samples, rows, -1)
        for i in reversed(range(count)):
            assert of_x is not None
            wants, inner = i > 0 or ctx.needs_input_grad[0], i > 0
            x, scores, weight, draw = saved[i], saved[count + i], saved[2 * count + i].detach(), ctx.draws[i]
            rectified, rounded = inner and chain[i - 1].rectified, inner and ctx.rounded
            x = x if x.dim() == 3 else blocked.Packed(x, rows)
            if wants and torch.is_grad_enabled():  # a graph of the gradient is asked for
                x = x.plain() if isinstance(x, blocked.Packed) else x
                of_x, of_logits[i] = products.gradients(of_x, x, weight, scores, draw, reduced=ctx.reduced)
                of_x = of_x.bfloat16().float() if rounded else of_x
                of_x = of_x * (x > 0) if rectified else of_x
                continue
            of_x, of_logits[i] = blocked.backward(
                of_x, x, weight, scores, draw, wants_x=wants, reduced=ctx.reduced, rectified=rectified, rounded=rounded
            )
        return None if of_x is None else of_x.view(-1, of_x.shape[-1]), None, None, None, None, *of_logits
