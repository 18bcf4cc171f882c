"""Linear layers under K samples at once, block of weights by block of weights.

A masked weight never stands in main memory: a block is masked for each sample into a scratch that fits the cache, and
is multiplied there. The backward pass redraws the same samples, and folds the K weight gradients of a block into the
logits' gradient while they are in the cache. The products are our own (:func:`sublens.kernels.product.product`),
because a library's product first copies the weight into a layout of its own, which costs as much as masking it. Where
a chunk has so many rows that this no longer matters, :mod:`sublens.kernels.long_chunks` does it.

Shapes: K samples, m rows in each sample's chunk, the weight is (out, in), or (in, out) where it is called transposed.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sublens.kernels import cpu, long_chunks, reference, threads
from sublens.noise import Draw


@functools.cache
def pieces(rows: int, tiled: bool = False) -> tuple[int, int]:
    """Into how many pieces of which length a chunk of that many rows is cut: whole registers or tiles, few empty."""
    loops = cpu.compiled("linear_loops")
    count, least = math.ceil(rows / loops.LONGEST), loops.SIDE if tiled else loops.REGISTER
    return count, least * math.ceil(rows / count / least)


@dataclass(frozen=True)
class Packed:
    """Rows of K chunks in the order in which the loops multiply them, of short chunks in float32.

    Between two layers nobody else reads them, and what one layer's loops sum is what the next one's need.

    Attributes:
        values: (K, pieces of a chunk, columns, rows of a piece). Rows that fill a piece up may hold
            any finite numbers, and of a gradient zeros.
        rows: of a chunk.
    """

    values: Tensor
    rows: int

    def plain(self) -> Tensor:
        """(K, rows, columns)."""
        samples, _, columns, _ = self.values.shape
        return self.values.transpose(2, 3).reshape(samples, -1, columns)[:, : self.rows].contiguous()


def room_between(x: Tensor | Packed, height: int, reduced: bool) -> Tensor | Packed:
    """Memory for what a layer of that many outputs gives to a next one: packed, if both can be in the loops."""
    samples, rows, _ = _shape(x)
    count, length = pieces(rows)
    like = x.values if isinstance(x, Packed) else x
    if reduced or rows >= _long(samples, reduced) or count * length > 2 * rows:
        return like.new_empty(samples, rows, height)
    return Packed(like.new_empty(samples, count, height, length), rows)


def _shape(x: Tensor | Packed) -> tuple[int, int, int]:
    """K, rows of a chunk, columns."""
    if isinstance(x, Packed):
        return x.values.shape[0], x.rows, x.values.shape[2]
    samples, rows, columns = x.shape
    return samples, rows, columns


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
    precisions = (False, True) if multiplies_bfloat16() else (False,)
    found = [forward(x, weight, logits, draw, reduced=reduced) for reduced in precisions]
    return all(torch.equal(each, torch.stack(expected).unsqueeze(1)) for each in found)


def multiplies_bfloat16() -> bool:
    """Whether products in bfloat16 are faster on this processor than those in float32."""
    return bool(cpu.compiled("halves").FAST)


def takes_bfloat16(samples: int, rows: int) -> bool:
    """Whether chunks of so many rows, multiplied in bfloat16, may come in and go out in it: the library does that."""
    return rows >= _long(samples, reduced=True)


def by_tiles() -> bool:
    """Whether products in bfloat16 are made by a matrix unit here."""
    return bool(cpu.compiled("tiles").USED)


@threads.untraced
def forward(
    x: Tensor | Packed,
    weight: Tensor,
    logits: Tensor,
    draw: Draw,
    first: int = 0,
    bias: Tensor | None = None,
    out: Tensor | Packed | None = None,
    reduced: bool = False,
    rectified: bool = False,
    rounded: bool = False,
) -> Any:
    """Each sample's inputs times its masked weight, transposed, plus the bias.

    Args:
        x: (K, m, in) float32, chunk k in row k; contiguous, or packed. Or bfloat16: see :func:`takes_bfloat16`.
        weight: (out, in) float32, contiguous.
        logits: as ``weight``.
        draw: names sample 0 of K.
        first: row of the parameter that is the first of ``weight``, if that is not the whole parameter.
        bias: (out) float32, contiguous.
        out: (K, m, out), of the dtype of ``x``, contiguous: memory for the result, if there is some; or packed, of the
            same pieces.
        reduced: round what is multiplied to bfloat16. Sums stay float32; those of long chunks are rounded at the end,
            as PyTorch's own products in bfloat16 are. Then nothing is packed.
        rectified: replace what is below 0 by 0, as a ReLU after the layer does.
        rounded: round the result to numbers that bfloat16 has.

    Returns:
        (K, m, out) float32, or ``out``.
    """
    samples, m, width = _shape(x)
    height = weight.shape[0]
    if out is None:
        out = (x.values if isinstance(x, Packed) else x).new_empty(samples, m, height)
    if m >= _long(samples, reduced):
        assert isinstance(x, Tensor)
        assert isinstance(out, Tensor)
        long_chunks.forward(out, x, weight, logits, draw, first, reduced)
        out = out if bias is None else out.add_(bias)
        out = out.relu_() if rectified else out
        return out.copy_(out.bfloat16()) if rounded else out
    loops = cpu.compiled("linear_loops")
    fields = {loops.GRADIENT: _address(out), loops.BIAS: 0 if bias is None else bias.data_ptr()}
    packed = isinstance(x, Packed), isinstance(out, Packed)
    plan = _plan(
        samples, m, height, width, False, loops.COLUMNS, reduced, reduced and by_tiles(), rectified, rounded, *packed,
        torch.get_num_threads(),
    )  # fmt: skip
    _run(plan, fields, x, x, weight, logits, draw, first)
    return out


@threads.untraced
def backward(
    gradient: Tensor | Packed,
    x: Tensor | Packed,
    weight: Tensor,
    logits: Tensor,
    draw: Draw,
    first: int = 0,
    *,
    wants_x: bool,
    reduced: bool = False,
    rectified: bool = False,
    rounded: bool = False,
    of_weight: Tensor | None = None,
) -> tuple[Any, Tensor]:
    """Gradients of :func:`forward`, for the same draw.

    Args:
        gradient: (K, m, out), of the dtype of ``x``, contiguous, or packed; of what the layer gives before a ReLU that
            follows it.
        x: as in the forward pass.
        weight: likewise.
        logits: likewise. Memory of its gradient is used again when that one is no longer in use.
        draw: likewise.
        first: likewise.
        wants_x: whether the inputs' gradient is wanted.
        reduced: as in the forward pass.
        rectified: ``x`` comes from a ReLU, and the gradient is wanted of what went into that.
        rounded: round the gradient of ``x`` to numbers that bfloat16 has.
        of_weight: (out, in) float32, contiguous: memory for the gradient of the weight, if that is wanted too. It is
            the sum of the masked weights' gradients where these are open.

    Returns:
        Gradient of ``x`` ((K, m, in), packed if ``x`` is, or ``None``) and of the logits ((out, in)).
    """
    samples, m, width = _shape(x)
    if m >= _long(samples, reduced):
        assert isinstance(x, Tensor)
        assert isinstance(gradient, Tensor)
        # A sum over blocks of the weight, so in float32 until it is whole.
        of_x, of_logits = torch.empty_like(x, dtype=weight.dtype) if wants_x else None, _for_gradient(logits)
        long_chunks.backward(
            gradient, x, weight, logits, draw, first, of_x=of_x, of_logits=of_logits, of_weight=of_weight,
            reduced=reduced,
        )  # fmt: skip
        if of_x is not None and rectified:
            of_x.masked_fill_(x <= 0, 0)
        if of_x is not None and rounded:
            of_x.copy_(of_x.bfloat16())
        return None if of_x is None else of_x.to(x.dtype), of_logits
    loops = cpu.compiled("linear_loops")
    of_logits = _for_gradient(logits)
    of_inputs: Tensor | Packed | None = None
    if wants_x:
        of_inputs = Packed(torch.empty_like(x.values), m) if isinstance(x, Packed) else torch.empty_like(x)
    count, tiled = torch.get_num_threads(), reduced and by_tiles()
    wide = _wide(samples, m, width, tiled, count)
    fields = {
        loops.GRADIENT: _address(gradient),
        loops.RESULT: of_logits.data_ptr(),
        loops.OF_INPUTS: 0 if of_inputs is None else _address(of_inputs),
        loops.OF_WEIGHT: 0 if of_weight is None else of_weight.data_ptr(),
    }
    packed = isinstance(gradient, Packed), isinstance(x, Packed)
    plan = _plan(samples, m, weight.shape[0], width, True, wide, reduced, tiled, rectified, rounded, *packed, count)
    _run(plan, fields, gradient, x, weight, logits, draw, first)
    return of_inputs, of_logits


@threads.untraced
def forward_transposed(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    draw: Draw,
    first: int = 0,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    reduced: bool = False,
) -> Tensor:
    """Each sample's inputs times its masked weight, which is stored as inputs by outputs, plus the bias.

    That is what the backward pass of a layer with that weight does to a gradient of its outputs.

    Args:
        x: (K, m, in) float32, chunk k in row k; contiguous. Or bfloat16 (:func:`takes_bfloat16`).
        weight: (in, out) float32, contiguous.
        logits: as ``weight``.
        draw: names sample 0 of K.
        first: row of the parameter that is the first of ``weight``.
        bias: (out) float32.
        out: (K, m, out) float32, contiguous: memory for the result, if there is some.
        reduced: as in :func:`forward`.

    Returns:
        (K, m, out) float32, or ``out``.
    """
    (samples, m, height), width = x.shape, weight.shape[1]
    out = x.new_empty(samples, m, width) if out is None else out
    if m >= _long(samples, reduced):
        total = out if out.dtype == weight.dtype else torch.empty_like(out, dtype=weight.dtype)
        long_chunks.forward_transposed(total, x, weight, logits, draw, first, reduced)
        out = out if total is out else out.copy_(total)
    else:
        loops, count, tiled = cpu.compiled("linear_loops"), torch.get_num_threads(), reduced and by_tiles()
        wide = _wide(samples, m, width, tiled, count)
        plan = _plan(samples, m, height, width, True, wide, reduced, tiled, False, False, False, False, count)
        fields = {loops.GRADIENT: _address(x), loops.OF_INPUTS: _address(out)}
        _run(plan, fields, x, out, weight, logits, draw, first)
    return out if bias is None else out.add_(bias)


def _address(x: Tensor | Packed) -> int:
    values = x.values if isinstance(x, Packed) else x
    assert values.dtype == torch.float32  # loops read whatever lies at an address
    return values.data_ptr()


@functools.lru_cache(maxsize=1024)
def _wide(samples: int, m: int, width: int, tiled: bool, count: int) -> int:
    """Columns that one of ``count`` threads takes at a time in the backward pass.

    At least two blocks of columns for each thread, and inputs in no more scratch than a cache holds.
    """
    loops = cpu.compiled("linear_loops")
    pieces_of, length = pieces(m, tiled)
    most = min(loops.COLUMNS, width // (2 * count), _INPUTS // (samples * pieces_of * length))
    return int(max(1, most // loops.PANEL) * loops.PANEL)


_INPUTS = 2**20
"""Numbers of the inputs that a thread holds at a time."""


@functools.cache
def _long(samples: int, reduced: bool) -> int:
    """Rows of a chunk from which on the library's product is faster, about, for weights of any size.

    A constant of the processor: if it were measured in each process, the bits of a result would depend on the clock.
    """
    product = cpu.compiled("product")
    if reduced and by_tiles():
        return max(256, min(1024, 4096 // samples))
    if product.OUTRUNS:
        return max(256, (2048 if reduced else 8192) // samples)
    keeps_up = product.KEEPS_UP or (product.KEEPS_UP_WITH_FEW and samples <= 2)
    return 512 if keeps_up and not reduced else 256


_LARGE = 2**18  # numbers from which on the allocator gives freed memory back to the system
_MOST_HELD = 2**28
"""Bytes of such memory that are held between steps. Of larger networks, whose parameters are many, the allocator itself
keeps most; and what is held besides activations in the forward pass there is a large part of the peak."""
_memory_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # logits -> memory of gradients of theirs
_lending = threading.RLock()  # whose owner may find that logits have gone, while it allocates
_held = [object()]
_FREE = sys.getrefcount(_held[0])  # what is counted for something that only a list holds


def _for_gradient(logits: Tensor) -> Tensor:
    """Memory for a gradient of these logits.

    Memory of an earlier one is used again as soon as nobody holds it. Without that it would go back to the system in
    every step, which clears each page that it hands out: a step of 12 M or 48 M weights takes a tenth to a quarter
    longer (one of 101 M weights in 48 tensors does not).
    """
    if logits.numel() < _LARGE or not logits.is_leaf:
        return torch.empty_like(logits)
    with _lending:
        memory = _memory_of.setdefault(logits, [])
        # A tensor on a block of memory, or a view of one, holds it too.
        free = [i for i in range(len(memory)) if sys.getrefcount(memory[i]) == _FREE]
        if not free:
            size = 4 * logits.numel()
            if _held_bytes[0] + size > _MOST_HELD:
                return torch.empty_like(logits)
            _held_bytes[0] += size
            weakref.finalize(logits, _let_go, size)
            free = [len(memory)]
            memory.append(_on_a_line(logits.numel()))
        return torch.from_numpy(memory[free[0]]).view(logits.shape)


_held_bytes = [0]


def _let_go(size: int) -> None:
    with _lending:
        _held_bytes[0] -= size


def _on_a_line(count: int) -> np.ndarray:
    """Memory for so many numbers that begins where a line of the cache does."""
    memory = np.empty(count + 16, np.float32)
    begin = -(memory.ctypes.data // 4) % 16
    return memory[begin : begin + count]


_scratch = threads.Scratch()


@dataclass(frozen=True)
class _Plan:
    """What a loop is given for tensors of the same sizes, whichever they are.

    Attributes:
        fields: the loop's, with zeros where addresses come.
        room: numbers of packed rows.
        backward: which of the two loops.
        turned: where the same rows in words of neighbours in a column begin among them, in the backward pass.
        scratch: bytes of scratch for all threads.
        parallel: whether the work is worth more than one thread.
    """

    fields: tuple[int, ...]
    room: int
    backward: bool
    turned: int
    scratch: int
    parallel: bool


@functools.lru_cache(maxsize=1024)
def _plan(
    samples: int, m: int, height: int, across: int, backward: bool, wide: int, reduced: bool, tiled: bool,
    rectified: bool, rounded: bool, comes_packed: bool, stays_packed: bool, count: int,
) -> _Plan:  # fmt: skip
    """A plan for ``count`` threads that take ``wide`` columns at a time."""
    assert not (reduced and (comes_packed or stays_packed))
    loops = cpu.compiled("linear_loops")
    pieces_of, length = pieces(m, tiled)
    rows, in_word = samples * pieces_of * length, 2 if reduced else 1
    packed = height if backward else across
    # Beside what is the same for any layer: outputs of a block's rows, or inputs and their gradient.
    tall = loops.TILED_ROWS if tiled else loops.ROWS
    share = loops.MORE + 4 * rows * (2 * wide if backward else tall)
    parallel = rows * height * across >= _SMALL
    # Words of two are filled up to whole groups of columns. In columns they come last, and tiles may read beyond them.
    in_rows = rows * (loops.PANEL * math.ceil(packed / loops.PANEL) // 2 if reduced else packed)
    in_columns = rows * packed // 2 + loops.SIDE * length if reduced and backward else 0
    p = [0] * loops.LINEAR_FIELDS
    p[loops.HEIGHT], p[loops.ACROSS], p[loops.SAMPLES], p[loops.CHUNK_ROWS] = height, across, samples, m
    p[loops.PIECES], p[loops.LENGTH], p[loops.SHARE], p[loops.IN_WORD] = pieces_of, length, share, in_word
    p[loops.WIDE], p[loops.RECTIFIED], p[loops.ROUNDED] = wide, int(rectified), int(rounded)
    p[loops.COMES_PACKED], p[loops.STAYS_PACKED], p[loops.TILED] = int(comes_packed), int(stays_packed), int(tiled)
    return _Plan(
        fields=tuple(p),
        room=0 if comes_packed else in_rows + in_columns,
        backward=backward,
        turned=in_rows if in_columns else 0,
        scratch=share * (count if parallel else 1),
        parallel=parallel,
    )


def _run(
    plan: _Plan, fields: dict[int, int], comes: Tensor | Packed, x: Tensor | Packed, weight: Tensor, logits: Tensor,
    draw: Draw, first: int,
) -> None:  # fmt: skip
    """Run a loop; ``comes`` is what it packs first, unless it is packed."""
    loops = cpu.compiled("linear_loops")
    loop = loops.backward if plan.backward else loops.forward
    p, room = list(plan.fields), weight.new_empty(plan.room)
    p[loops.WEIGHT], p[loops.LOGITS], p[loops.INPUTS] = weight.data_ptr(), logits.data_ptr(), _address(x)
    p[loops.FIRST], p[loops.PACKED] = first, room.data_ptr() if plan.room else _address(comes)
    p[loops.TURNED] = p[loops.PACKED] + 4 * plan.turned if plan.backward else 0
    p[loops.SCRATCH] = _scratch.of(plan.scratch).data_ptr()
    cpu.name(p, draw)
    for field, value in fields.items():
        p[field] = value
    array = (ctypes.c_int64 * len(p))(*p)
    threads.run(loop.address, ctypes.addressof(array), parallel=plan.parallel)


_SMALL = 100_000
"""Products below which one thread is faster than waking the others."""
