"""Linear layers whose chunks have so many rows that a library's product is faster than the loops.

Larger blocks of weights are masked for all samples, and PyTorch multiplies them; then copying a weight into a layout of
its own costs little beside the product. :mod:`sublens.kernels.blocked` says when, and what the arguments are.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sublens.kernels import cpu, threads
from sublens.noise import Draw

_BLOCK = 2**20  # masked weights that the library's product is given at a time


def forward(y: Tensor, x: Tensor, weight: Tensor, logits: Tensor, draw: Draw, first: int, reduced: bool) -> None:
    """Write to ``y`` what :func:`sublens.kernels.blocked.forward` gives without a bias."""
    x = _in_precision(x, reduced)
    for rows, masked in _masked_blocks(len(x), weight, logits, draw, first):
        for k in range(len(x)):
            _multiply(x[k], _in_precision(masked[k], reduced).T, y[k, :, rows])


def forward_transposed(
    y: Tensor, x: Tensor, weight: Tensor, logits: Tensor, draw: Draw, first: int, reduced: bool
) -> None:
    """Write to ``y`` what :func:`sublens.kernels.blocked.forward_transposed` gives without a bias."""
    x = _in_precision(x, reduced)
    y.zero_()
    for rows, masked in _masked_blocks(len(x), weight, logits, draw, first):
        for k in range(len(x)):
            _add_product(y[k], x[k, :, rows], masked[k])


@torch.no_grad()  # where a graph of the gradient is asked for, there is none, as for short chunks
def backward(
    gradient: Tensor, x: Tensor, weight: Tensor, logits: Tensor, draw: Draw, first: int, *, of_x: Tensor | None,
    of_logits: Tensor, of_weight: Tensor | None, reduced: bool,
) -> None:  # fmt: skip
    """Write what :func:`sublens.kernels.blocked.backward` gives to ``of_x``, if there is such, and ``of_logits``."""
    samples, width = len(x), weight.shape[1]
    x, gradient = _in_precision(x, reduced), _in_precision(gradient, reduced)
    if of_x is not None:
        of_x.zero_()
    for rows in _blocks(samples, weight):
        of_weights = _memory_of(samples, rows.stop - rows.start, width, number=1)
        for k in range(samples):
            _multiply(gradient[k, :, rows].T, x[k], of_weights[k])
        masked = None if of_x is None else _memory_of(samples, rows.stop - rows.start, width)
        cpu.walk(
            weight, logits, draw, masked=masked, gradient=of_weights, result=of_logits[rows], samples=samples,
            begin=rows.start * width, before=first * width,
        )  # fmt: skip
        if of_weight is not None:
            of_weight[rows] = 0
            for k in range(samples):
                of_sample, of_block = replace(draw, sample=draw.sample + k), torch.empty_like(of_weights[k])
                cpu.walk(of_weights[k], logits[rows], of_sample, masked=of_block, before=(first + rows.start) * width)
                of_weight[rows] += of_block
        if of_x is not None and masked is not None:
            for k in range(samples):
                _add_product(of_x[k], gradient[k, :, rows], masked[k])


def _blocks(samples: int, weight: Tensor) -> Iterator[slice]:
    height, width = weight.shape
    rows = max(1, _BLOCK // (samples * width))
    for top in range(0, height, rows):
        yield slice(top, min(top + rows, height))


def _masked_blocks(
    samples: int, weight: Tensor, logits: Tensor, draw: Draw, first: int
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight, and these under each sample (K, rows, in), until the next ones are asked for."""
    width = weight.shape[1]
    for rows in _blocks(samples, weight):
        masked = _memory_of(samples, rows.stop - rows.start, width)
        where = {"begin": rows.start * width, "before": first * width}
        cpu.walk(weight, logits, draw, masked=masked, samples=samples, **where)
        yield rows, masked


_held = threads.Scratch(), threads.Scratch()


def _memory_of(*shape: int, number: int = 0) -> Tensor:
    """Memory for float32 numbers of a block, the same in every call: first or second."""
    return _held[number].of(4 * math.prod(shape)).view(torch.float32).view(shape)


def _in_precision(x: Tensor, reduced: bool) -> Tensor:
    return x.bfloat16() if reduced else x


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a product of float32 or bfloat16 matrices as float32 numbers."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a product to a float32 matrix, in the precision of its first factor."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b.to(a.dtype))
