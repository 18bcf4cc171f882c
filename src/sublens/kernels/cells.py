"""One time step of an LSTM behind its products, for many sequences at once: gates, cells and outputs."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from sublens.kernels import cpu, threads


@functools.cache
def agrees() -> bool:
    """Whether the loop, as it is compiled here, gives PyTorch's outputs to their rounding; see :func:`cpu.agrees`."""
    source = torch.linspace(-9, 9, 4 * 50, dtype=torch.float32, device="cpu").view(1, 1, -1)
    before = torch.linspace(-2, 2, 50, dtype=torch.float32, device="cpu").view(1, 1, -1)
    gates, cells, outputs = torch.empty_like(source), torch.empty_like(before), torch.empty_like(before)
    forward(source, gates, before, cells, outputs)
    i, f, g, o = source.chunk(4, -1)
    after = f.sigmoid() * before + i.sigmoid() * g.tanh()
    return torch.allclose(cells, after, atol=1e-5) and torch.allclose(outputs, o.sigmoid() * after.tanh(), atol=1e-5)


@threads.untraced
def forward(source: Tensor, gates: Tensor, before: Tensor, cells: Tensor, outputs: Tensor) -> None:
    """Gates, cells and outputs of a step, as in ``torch.nn.LSTM``, to some 1e-7.

    All tensors are float32 on the CPU, and contiguous but for ``source``, whose samples need only be so each by itself.

    Args:
        source: (k, m, 4 H), what goes into the gates i, f, g and o of m sequences under each of k samples. May be
            ``gates``.
        gates: written, likewise.
        before: (k, m, H), the cells before the step.
        cells: written, likewise: those after it.
        outputs: written, likewise.
    """
    loops = cpu.compiled("cell_loops")
    p = _fields(gates, before, cells)
    p[loops.SOURCE], p[loops.APART], p[loops.OUTPUTS] = source.data_ptr(), source.stride(0), outputs.data_ptr()
    _run(loops.forward, p)


@threads.untraced
def backward(
    of_outputs: Tensor,
    of_hidden: Tensor | None,
    gates: Tensor,
    before: Tensor,
    cells: Tensor,
    of_cells: Tensor,
    of_gates: Tensor,
) -> None:
    """Gradients of :func:`forward`. Tensors as there; those of ``of_outputs`` may lie apart as those of ``source``.

    Args:
        of_outputs: (k, m, H), gradient of the step's outputs.
        of_hidden: likewise, what comes from the next step in addition; ``None`` for the last step.
        gates: (k, m, 4 H), as the forward pass wrote them.
        before: (k, m, H), likewise.
        cells: likewise.
        of_cells: that of ``cells``, which becomes that of ``before``.
        of_gates: written, (k, m, 4 H): that of ``source``.
    """
    loops = cpu.compiled("cell_loops")
    p = _fields(gates, before, cells)
    p[loops.OF_OUTPUTS], p[loops.APART] = of_outputs.data_ptr(), of_outputs.stride(0)
    p[loops.OF_HIDDEN] = 0 if of_hidden is None else of_hidden.data_ptr()
    p[loops.OF_CELLS], p[loops.OF_GATES] = of_cells.data_ptr(), of_gates.data_ptr()
    _run(loops.backward, p)


def _fields(gates: Tensor, before: Tensor, cells: Tensor) -> list[int]:
    loops = cpu.compiled("cell_loops")
    samples, m, size = cells.shape
    p = [0] * loops.CELL_FIELDS
    p[loops.ROWS], p[loops.OF_SAMPLE], p[loops.SIZE] = samples * m, m, size
    p[loops.GATES], p[loops.BEFORE], p[loops.CELLS] = gates.data_ptr(), before.data_ptr(), cells.data_ptr()
    return p


def _run(loop: Any, p: list[int]) -> None:
    loops = cpu.compiled("cell_loops")
    array = (ctypes.c_int64 * len(p))(*p)
    parallel = p[loops.ROWS] * p[loops.SIZE] >= _SMALL
    threads.run(loop.address, ctypes.addressof(array), parallel=parallel)


_SMALL = 4096
"""Cells below which one thread is faster than waking the others."""
