"""Linear layers under K samples at once, block of weights by block of weights.

A masked weight never goes to main memory: a block is masked for each sample into a scratch that fits the cache, and is
multiplied there. The backward pass redraws the same samples, and folds the K weight gradients of a block into the
logits' gradient while they are in the cache. The products are our own (:func:`sublens.kernels.vector.product`),
because a library's product first copies the weight into a layout of its own, which costs as much as masking it.

Shapes: K samples, m rows in each sample's chunk, the weight is (out, in).
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from sublens.kernels import cpu, reference, threads
from sublens.noise import Draw

def pieces(rows: int) -> tuple[int, int]:
    """Into how many pieces of which length a chunk of that many rows is cut: whole registers, few places empty."""
    loops = cpu.compiled("linear_loops")
    count = math.ceil(rows / loops.LONGEST)
    return count, loops.REGISTER * math.ceil(rows / count / loops.REGISTER)


@functools.cache
def agrees() -> bool:
    """Whether the loops, as they are compiled here, give the reference's masked weights; see :func:`cpu.agrees`."""
    if not cpu.agrees():
        return False
    draw, like = Draw(seed=1, step=2, sample=0, parameter=4), torch.empty(0, dtype=torch.float32, device="cpu")
    logits = torch.linspace(-3, 3, 50 * 300, dtype=like.dtype, device=like.device).view(50, 300)
    weight, x = like.new_ones(50, 300), like.new_ones(2, 1, 300)
    # Sums of ones are exact in float32, so they are equal or wrong.
    expected = [reference.masked(weight, logits, Draw(1, 2, k, 4)).sum(1) for k in range(2)]
    return torch.equal(forward(x, weight, logits, draw), torch.stack(expected).unsqueeze(1))


@threads.untraced
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
    samples, m, _ = x.shape
    height = weight.shape[0]
    loops = cpu.compiled("linear_loops")
    packed, sums = _packed(x), x.new_empty(_packed_numbers(x, height))
    p = _fields(x, weight, logits, draw)
    p[loops.INPUTS], p[loops.GRADIENT] = packed.data_ptr(), sums.data_ptr()
    p[loops.WIDE] = loops.COLUMNS
    _run(loops.forward, p, x, weight)
    return _unpacked(sums, samples, m, height)


@threads.untraced
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
    samples, m, width = x.shape
    loops = cpu.compiled("linear_loops")
    count, length = pieces(m)
    panels = x.new_empty(samples * math.ceil(width / loops.PANEL) * count * length * loops.PANEL)
    _pack(loops.panels, x, panels, x.shape)
    packed, of_logits = _packed(gradient), torch.empty_like(logits)
    of_x = x.new_empty(_packed_numbers(x, width)) if wants_x else None
    p = _fields(x, weight, logits, draw)
    p[loops.GRADIENT], p[loops.RESULT] = packed.data_ptr(), of_logits.data_ptr()
    p[loops.PANELS], p[loops.INPUTS] = panels.data_ptr(), 0 if of_x is None else of_x.data_ptr()
    p[loops.WANTS] = wants_x
    # At least two blocks of columns for each thread.
    wide = math.ceil(width / (2 * torch.get_num_threads()) / loops.PANEL) * loops.PANEL
    p[loops.WIDE] = min(loops.COLUMNS, wide)
    _run(loops.backward, p, x, weight)
    return None if of_x is None else _unpacked(of_x, samples, m, width), of_logits


def _fields(x: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> np.ndarray:
    loops = cpu.compiled("linear_loops")
    p = np.zeros(loops.LINEAR_FIELDS, np.int64)
    p[loops.WEIGHT], p[loops.LOGITS], p[loops.SAMPLES] = weight.data_ptr(), logits.data_ptr(), x.shape[0]
    p[loops.HEIGHT], p[loops.ACROSS] = weight.shape
    p[loops.PIECES], p[loops.LENGTH] = pieces(x.shape[1])
    cpu.name(p, draw)
    return p


def _run(loop: object, p: np.ndarray, x: Tensor, weight: Tensor) -> None:
    loops = cpu.compiled("linear_loops")
    parallel = x.shape[0] * x.shape[1] * weight.numel() >= _SMALL
    size = loops.SCRATCH_BYTES * (torch.get_num_threads() if parallel else 1)
    scratch = torch.empty(size, dtype=torch.uint8, device="cpu")
    p[loops.SCRATCH] = scratch.data_ptr()
    threads.run(loop.address, p.ctypes.data, parallel=parallel)  # type: ignore[attr-defined]


_SMALL = 100_000
"""Products below which one thread is faster than waking the others."""


def _packed_numbers(x: Tensor, width: int) -> int:
    count, length = pieces(x.shape[1])
    return x.shape[0] * count * length * width


def _packed(x: Tensor) -> Tensor:
    packed = x.new_empty(_packed_numbers(x, x.shape[2]))
    _pack(cpu.compiled("linear_loops").pack, x, packed, x.shape)
    return packed


def _unpacked(packed: Tensor, samples: int, m: int, width: int) -> Tensor:
    y = packed.new_empty(samples, m, width)
    _pack(cpu.compiled("linear_loops").unpack, packed, y, y.shape)
    return y


def _pack(loop: object, source: Tensor, target: Tensor, shape: torch.Size) -> None:
    p = np.array([0, source.data_ptr(), target.data_ptr(), *shape, *pieces(shape[1])], np.int64)
    threads.run(loop.address, p.ctypes.data, parallel=shape.numel() >= _SMALL)  # type: ignore[attr-defined]
