"""LSTMs on the fast route: all K samples go through a layer together, and each layer is one step of autograd.

PyTorch's layer takes one weight for all sequences, so under K samples it would be called once for each. Here the
sequences of all samples go on side by side, with one batched product a time step. Gates, cells and their gradients are
those of ``torch.nn.LSTM``; what comes in is multiplied by :mod:`sublens.kernels.blocked`, for all time steps at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sublens.kernels import blocked, cpu, threads
from sublens.kernels import cells as cells_of
from sublens.noise import Draw


class Source(Protocol):
    """What a layer needs to know of a weight under K samples."""

    @property
    def logits(self) -> Tensor:
        """Of the weight."""

    @property
    def weight(self) -> Tensor:
        """The weight."""

    @property
    def draw(self) -> Draw:
        """Names the first sample."""

    @property
    def reduced(self) -> bool:
        """Whether to multiply what comes in, and for the weights' gradients, in bfloat16."""


def lstm(
    x: Tensor, state: Sequence[Tensor], sources: Sequence[Source], biases: Sequence[Tensor], directions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.nn.LSTM`` under K samples.

    Args:
        x: (K, T, m, in) float32, sequences of T steps.
        state: first h and c, each (layers * directions, K, m, H).
        sources: of weight_ih and weight_hh, for each layer and direction.
        biases: likewise, or none.
        directions: 2 if bidirectional, else 1.

    Returns:
        Outputs (K, T, m, directions * H) of the last layer, and the last h and c, shaped as the first.
    """
    last_h, last_c = [], []
    for first in range(0, len(sources) // 2, directions):
        outputs = []
        for number in range(first, first + directions):
            into, on = sources[2 * number : 2 * number + 2]
            bias = (biases[2 * number] + biases[2 * number + 1]).contiguous() if biases else None
            backwards = number > first
            y, c = _Layer.apply(
                x.flip(1) if backwards else x,
                state[0][number],
                state[1][number],
                into.logits,
                on.logits,
                into,
                on,
                bias,
            )
            last_h.append(y[:, -1])
            last_c.append(c)
            outputs.append(y.flip(1) if backwards else y)
        x = torch.cat(outputs, -1) if directions > 1 else outputs[0]
    return x, torch.stack(last_h), torch.stack(last_c)


_AT_ONCE = 2**20
"""Masked recurrent weights that are held at a time; they are those of one sample at least."""


_scratch = threads.Scratch()


def _parts(source: Source, samples: int) -> Iterator[tuple[slice, Tensor]]:
    """Samples that are taken together, and their masked weights (k, 4 H, H), until the next ones are asked for."""
    each = source.weight.numel()
    count = min(max(1, _AT_ONCE // each), samples)
    size = 4 * count * each
    held = _scratch.of(size) if count * each <= _AT_ONCE else torch.empty(size, dtype=torch.uint8, device="cpu")
    memory = held.view(torch.float32).view(count, *source.weight.shape)
    for first in range(0, samples, count):
        part = slice(first, min(first + count, samples))
        masked = memory[: part.stop - part.start]
        draw = replace(source.draw, sample=source.draw.sample + first)
        cpu.walk(source.weight, source.logits.detach(), draw, masked=masked, samples=len(masked))
        yield part, masked


class _Layer(torch.autograd.Function):
    """One layer in one direction. Keeps gates, cells and outputs for the backward pass, no sample."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, c: Tensor, logits_in: Tensor, logits_on: Tensor, into: Source, on: Source,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        samples, steps, m, _ = x.shape
        size = on.weight.shape[1]
        x, h, c = (tensor.contiguous() for tensor in (x, h, c))
        rows = x.view(samples, steps * m, -1)
        came = blocked.forward(rows, into.weight, logits_in.detach(), into.draw, bias=bias, reduced=into.reduced)
        came = came.view(samples, steps, m, 4 * size)
        gates = x.new_empty(steps, samples, m, 4 * size)
        cells, outputs = x.new_empty(steps + 1, samples, m, size), x.new_empty(steps + 1, samples, m, size)
        cells[0], outputs[0] = c, h
        rested = not bool(h.any())  # nothing comes from before the first step, as where no state was given
        for part, recurrent in _parts(on, samples):
            for t in range(steps):
                source = came[part, t]
                if t > 0 or not rested:
                    source = torch.baddbmm(source, outputs[t, part], recurrent.mT, out=gates[t, part])
                done = (gates[t, part], cells[t, part], cells[t + 1, part], outputs[t + 1, part])
                cells_of.forward(source, *done)
        # The weights too, so that a change of theirs before the backward pass is noticed.
        ctx.save_for_backward(x, gates, cells, outputs, logits_in, logits_on, into.weight, on.weight)
        ctx.into, ctx.on, ctx.rested = into, on, rested
        # A copy of its own also of one step: autograd would forbid the network to change a view in place.
        return outputs[1:].transpose(0, 1).clone(memory_format=torch.contiguous_format), cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor, of_c: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, cells, outputs, logits_in, logits_on, *_ = ctx.saved_tensors
        into, on = ctx.into, ctx.on
        samples, steps, m, _ = x.shape
        of_gates = torch.empty_like(gates)
        of_first = torch.empty_like(cells[0]) if ctx.needs_input_grad[1] else None
        of_y, of_c = of_y.resolve_neg().contiguous(), of_c.resolve_neg().clone(memory_format=torch.contiguous_format)
        for part, recurrent in _parts(on, samples):
            of_h: Tensor | None = None
            for t in reversed(range(steps)):
                done = (gates[t, part], cells[t, part], cells[t + 1, part])
                cells_of.backward(of_y[part, t], of_h, *done, of_c[part], of_gates[t, part])
                if t > 0 or of_first is not None:
                    of_h = torch.bmm(of_gates[t, part], recurrent)
            if of_first is not None and of_h is not None:
                of_first[part] = of_h
        first = 1 if ctx.rested else 0  # step from which on something came from the one before
        if steps > first:
            rows, before = _by_sample(of_gates[first:]), _by_sample(outputs[first:-1])
            _, of_on = blocked.backward(rows, before, on.weight, logits_on, on.draw, wants_x=False, reduced=on.reduced)
        else:
            of_on = torch.zeros_like(logits_on)
        rows, came = _by_sample(of_gates), x.view(samples, steps * m, -1)
        of_x, of_into = blocked.backward(
            rows, came, into.weight, logits_in, into.draw, wants_x=ctx.needs_input_grad[0], reduced=into.reduced
        )
        return None if of_x is None else of_x.view(x.shape), of_first, of_c, of_into, of_on, None, None, None


def _by_sample(steps: Tensor) -> Tensor:
    """(T, K, m, n) as the blocked product has it, (K, T m, n): the steps of a sample are more rows of its chunk."""
    return steps.transpose(0, 1).flatten(1, 2).contiguous()
