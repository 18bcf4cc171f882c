"""What masked layers do under all K samples at once, as steps of autograd that keep no sample."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from sublens.kernels import blocked, cpu
from sublens.noise import Draw


def linear(
    x: Tensor, logits: Tensor, weight: Tensor, draw: Draw, first: int, reduced: bool, chunks: int, bias: Tensor | None,
    transposed: bool = False,
) -> Tensor:  # fmt: skip
    """A linear layer under K samples.

    Args:
        x: (..., in) float32, whose first dimension holds the K chunks one after the other. Or bfloat16, for long
            chunks (:func:`sublens.kernels.blocked.takes_bfloat16`).
        logits: (out, in) float32, contiguous.
        weight: likewise. It has a gradient too if it requires one.
        draw: names the first sample.
        first: row of the parameter that is the first of ``weight``.
        reduced: multiply in bfloat16.
        chunks: number K.
        bias: (out) float32, contiguous, without a gradient; or ``None``.
        transposed: weight and logits are (in, out).

    Returns:
        (..., out), of the dtype of ``x``.
    """
    y: Tensor = _Linear.apply(x, logits, weight, draw, first, reduced, chunks, bias, transposed)
    return y


def vectors(logits: Tensor, weight: Tensor, draw: Draw, first: int, samples: int) -> Tensor:
    """A masked vector under K samples.

    Args:
        logits: (n) float32, contiguous.
        weight: likewise. It has a gradient too if it requires one.
        draw: names the first sample.
        first: element of the parameter that is the first of ``weight``.
        samples: number K.

    Returns:
        (K, n) float32.
    """
    made: Tensor = _Vectors.apply(logits, weight, draw, first, samples)
    return made


def gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, logits: Tensor, draw: Draw, first: int = 0, reduced: bool = False,
    of_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What :func:`sublens.kernels.blocked.backward` gives, where a graph of it is asked for, as to penalise a gradient.

    The inputs' gradient is a product with the same masked weights, so it can be differentiated once more. Those of
    logits and weights cannot, as on the general route. Arguments as there.

    Returns:
        Gradient of ``x``, (K, m, in), of its dtype, and of the logits, (out, in) float32.
    """
    of_x, of_logits = _Gradients.apply(gradient, x, weight, logits, draw, first, reduced, of_weight)
    return of_x, of_logits


class _Vectors(torch.autograd.Function):
    """A masked vector (n) under K samples, (K, n)."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, weight: Tensor, draw: Draw, first: int, samples: int) -> Tensor:
        ctx.save_for_backward(logits, weight)
        ctx.draw, ctx.first = draw, first  # type: ignore[attr-defined]
        out = weight.new_empty(samples, len(weight))
        cpu.walk(weight, logits.detach(), draw, masked=out, samples=samples, before=first)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, weight = ctx.saved_tensors
        of_weight, gradient, samples = None, gradient.resolve_neg().contiguous(), len(gradient)
        of_logits = torch.empty_like(logits)
        run = {"samples": samples, "before": ctx.first}
        cpu.walk(weight, logits, ctx.draw, gradient=gradient, result=of_logits, **run)
        if ctx.needs_input_grad[1]:
            is_open = torch.empty_like(gradient)
            cpu.walk(torch.ones_like(weight), logits, ctx.draw, masked=is_open, **run)
            of_weight = torch.where(is_open != 0, gradient, 0).sum(0)
        return of_logits, of_weight, None, None, None


class _Linear(torch.autograd.Function):
    """Inputs (..., in), whose first dimension holds K chunks, under K samples.

    Keeps inputs, logits and weight for the backward pass, no sample.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, logits: Tensor, weight: Tensor, draw: Draw, first: int, reduced: bool,
        chunks: int, bias: Tensor | None, transposed: bool,
    ) -> Tensor:  # fmt: skip
        # In order, as torch's own layer keeps it: a network may write into a transposed input afterwards.
        flat = _in_order(x, chunks)
        ctx.save_for_backward(flat, logits, weight)
        ctx.draw, ctx.first, ctx.reduced, ctx.shape = draw, first, reduced, x.shape  # type: ignore[attr-defined]
        ctx.transposed = transposed  # type: ignore[attr-defined]
        # Not a view of the result: autograd would forbid the network to change that in place, as a ReLU may.
        y = x.new_empty(*x.shape[:-1], weight.shape[1 if transposed else 0])
        multiply = blocked.forward_transposed if transposed else blocked.forward
        multiply(flat, weight, logits.detach(), draw, first, bias, y.view(*flat.shape[:2], -1), reduced)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, logits, weight = ctx.saved_tensors
        wants, gradient = ctx.needs_input_grad[0], _in_order(gradient, x.shape[0])
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[2] else None
        of_x: Tensor | None
        named = (ctx.draw, ctx.first, ctx.reduced)
        if ctx.transposed:
            # The roles of what comes in and of the gradient change. A graph of the latter is autograd's affair.
            of_x = linear(gradient, logits, weight, *named, chunks=len(x), bias=None) if wants else None
            of_logits = _of_transposed(x, gradient.detach(), weight, logits, *named, of_weight)
        elif wants and torch.is_grad_enabled():
            of_x, of_logits = gradients(gradient, x, weight, logits, *named, of_weight)
        else:
            of_x, of_logits = blocked.backward(
                gradient, x, weight, logits, ctx.draw, ctx.first, wants_x=wants, reduced=ctx.reduced,
                of_weight=of_weight,
            )  # fmt: skip
        return None if of_x is None else of_x.view(ctx.shape), of_logits, of_weight, *(None,) * 6


@torch.no_grad()
def _of_transposed(
    x: Tensor, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw, first: int, reduced: bool,
    of_weight: Tensor | None,
) -> Tensor:  # fmt: skip
    return blocked.backward(
        x, gradient, weight, logits, draw, first, wants_x=False, reduced=reduced, of_weight=of_weight
    )[1]


class _Gradients(torch.autograd.Function):
    """See :func:`gradients`."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, logits: Tensor, draw: Draw, first: int, reduced: bool,
        of_weight: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        ctx.save_for_backward(gradient, weight, logits)
        ctx.named = (draw, first)
        of_x, of_logits = blocked.backward(
            gradient, x, weight, logits.detach(), draw, first, wants_x=True, reduced=reduced, of_weight=of_weight
        )
        ctx.mark_non_differentiable(of_logits)
        return of_x, of_logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        came, weight, logits = ctx.saved_tensors
        gradient, dtype = gradient.resolve_neg().float().contiguous(), came.dtype
        came = came.float()
        of_came = blocked.forward(gradient, weight, logits, *ctx.named).to(dtype)
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[2] else None
        of_logits = blocked.backward(came, gradient, weight, logits, *ctx.named, wants_x=False, of_weight=of_weight)[1]
        return of_came, None, of_weight, of_logits, None, None, None, None


def _in_order(x: Tensor, chunks: int) -> Tensor:
    """(..., n), whose first dimension holds the chunks, as (K, rows, n), contiguous."""
    return x.resolve_neg().reshape(chunks, -1, x.shape[-1]).contiguous()
