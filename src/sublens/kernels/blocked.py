"""Linear layers under K samples at once, block of rows by block of rows.

A masked weight never goes to main memory: a block of rows is masked for all K samples into a scratch that fits the
cache, and is given to the matrix product at once. The backward pass redraws the same samples, and folds the K weight
gradients of a block into the logits' gradient while they are in the cache.
"""

import torch
from torch import Tensor

from sublens.kernels import cpu
from sublens.noise import Draw

SCRATCH = 512 * 1024
"""Elements of the scratch for one block of all samples; 2 MiB."""


def _rows(samples: int, out_features: int, in_features: int) -> int:
    return max(1, min(out_features, SCRATCH // max(1, samples * in_features)))


def forward(x: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
    """Each sample's inputs times its masked weight, transposed.

    Args:
        x: (K, m, in) float32, chunk k in row k; contiguous.
        weight: (out, in) float32, contiguous.
        logits: as ``weight``.
        draw: names sample 0 of K.

    Returns:
        (K, m, out) float32.
    """
    (samples, m, width), height = x.shape, weight.shape[0]
    rows = _rows(samples, height, width)
    scratch = x.new_empty(samples * rows * width)
    y = x.new_empty(samples, m, height)
    for top in range(0, height, rows):
        size = min(rows, height - top)
        block = scratch[: samples * size * width].view(samples, size, width)
        cpu.walk(weight, logits, draw, masked=block, begin=top * width, samples=samples)
        if size == height:
            torch.bmm(x, block.transpose(1, 2), out=y)
        else:
            y[:, :, top : top + size] = torch.bmm(x, block.transpose(1, 2))
    return y


def backward(
    gradient: Tensor, x: Tensor, weight: Tensor, logits: Tensor, draw: Draw, *, wants_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of :func:`forward`, for the same draw.

    Args:
        gradient: (K, m, out) float32, contiguous.
        x: as in the forward pass.
        weight: likewise.
        logits: likewise.
        draw: likewise.
        wants_x: whether the inputs' gradient is wanted.

    Returns:
        Gradient of ``x`` ((K, m, in), or ``None``) and of the logits ((out, in)).
    """
    samples, width, height = x.shape[0], x.shape[2], weight.shape[0]
    rows = _rows(2 * samples, height, width)
    weight_gradients = x.new_empty(samples * rows * width)
    scratch = x.new_empty(samples * rows * width) if wants_x else None
    of_logits = torch.empty_like(logits)
    of_x = x.new_zeros(x.shape) if wants_x else None
    for top in range(0, height, rows):
        size = min(rows, height - top)
        part = gradient[:, :, top : top + size]
        products = weight_gradients[: samples * size * width].view(samples, size, width)
        torch.bmm(part.transpose(1, 2), x, out=products)
        block = None if scratch is None else scratch[: samples * size * width].view(samples, size, width)
        cpu.walk(
            weight,
            logits,
            draw,
            masked=block,
            gradient=products,
            result=of_logits[top : top + size],
            begin=top * width,
            samples=samples,
        )
        if of_x is not None and block is not None:
            of_x.baddbmm_(part, block)
    return of_x, of_logits
