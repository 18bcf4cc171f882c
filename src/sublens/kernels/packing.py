"""The orders in which rows of inputs, outputs and gradients lie in the loops of a linear layer, and its fields.

Outside they are (chunk, row, column). A product reads (chunk, piece, column, row of the piece), which is called packed;
that of the weight gradient reads panels of PANEL columns, row by row.
"""

from typing import Any

from numba import carray, njit, types

from sublens.kernels.halves import paired_of, rounded_of
from sublens.kernels.loops import INT, SAMPLES, WORDS, copy, f32, fill, i32, loop
from sublens.kernels.vector import GROUP, WIDTH, as_float, as_word, pointer, take, transpose, wait

PANEL = GROUP  # columns of the inputs' layout for the weight gradient
_AT_A_TIME = 4 * PANEL  # columns that are packed at a time: rows so long that the processor sees what comes next

INPUTS, SCRATCH, THREAD, OF_INPUTS = 3, 6, 7, 9
HEIGHT, ACROSS, CHUNK_ROWS, PIECES, LENGTH, WIDE, FIRST, SHARE, BIAS, PACKED, PACKING, DONE = range(17, 29)
TURNED, IN_WORD, RECTIFIED, ROUNDED, OF_WEIGHT, COMES_PACKED, STAYS_PACKED, TILED = range(29, 37)
LINEAR_FIELDS = 37
"""Beside those of :mod:`sublens.kernels.loops`. INPUTS and GRADIENT are addresses of what comes in and goes out, and
OF_INPUTS of the former's gradient, or 0; SCRATCH is that of SHARE bytes for each thread, THREAD the next thread's
number. The weight is HEIGHT x ACROSS, the rows of a parameter from FIRST on, each sample's chunk is CHUNK_ROWS rows in
PIECES pieces of LENGTH, and a thread takes WIDE columns at a time. BIAS is the address of HEIGHT numbers, or 0. PACKED
is that of what is put in another order first, PACKING the next part of it and DONE the number of those that are ready;
both begin at 0. IN_WORD is the number of neighbours, along what a product sums over, that stand in 32 bits of what it
is given: 1, or 2 where products are in bfloat16. TURNED is the address of the same rows as at PACKED in words of
neighbours in a column (the same ones, if IN_WORD is 1), or 0. RECTIFIED is 1 where a ReLU follows the layer (forward)
or comes before it (backward), else 0. ROUNDED is 1 where outputs (forward), or the gradient of the inputs (backward),
are rounded to numbers that bfloat16 has, else 0. OF_WEIGHT is the address of the weight's gradient, or 0. COMES_PACKED
is 1 where what is put in another order first comes in that order, at PACKED, and STAYS_PACKED where outputs are written
in it (forward), or INPUTS come and OF_INPUTS are written in it (backward); neither with words of two. TILED is 1 where
products of words of two are made by :mod:`sublens.kernels.tiles`: LENGTH and WIDE are multiples of SIDE then."""


@loop(INT, INT, INT, INT, INT, INT)
def turn(source: Any, source_r: Any, target: Any, target_r: Any, rows: Any, columns: Any) -> None:
    """Write the transpose of ``rows`` x ``columns`` numbers."""
    whole, across = rows - rows % WIDTH, columns - columns % WIDTH
    for r in range(0, whole, WIDTH):
        for c in range(0, across, WIDTH):
            transpose(source + 4 * (r * source_r + c), source_r, target + 4 * (c * target_r + r), target_r)
    s = carray(pointer(source), ((rows - 1) * source_r + columns,), f32)
    t = carray(pointer(target), ((columns - 1) * target_r + rows,), f32)
    for r in range(rows):
        for c in range(across if r < whole else 0, columns):
            t[c * target_r + r] = s[r * source_r + c]


@njit(types.int64(INT), error_model="numpy", cache=True, nogil=True)
def whole(size: Any) -> Any:
    """The next multiple of GROUP."""
    return (size + GROUP - 1) // GROUP * GROUP


@loop(*[INT] * 4)
def round_row(out: Any, numbers: Any, size: Any, room: Any) -> None:
    """Write ``size`` numbers in bfloat16, filled up to whole groups with zeros; ``room`` is for a group."""
    done = size - size % GROUP
    rounded_of(out, numbers, done)
    if done < size:
        fill(room, GROUP, f32(0.0))
        copy(room, numbers + 4 * done, size - done)
        rounded_of(out + 2 * done, room, GROUP)


@loop(INT, INT, INT, WORDS)
def pack(source: Any, width: Any, room: Any, p: Any) -> None:
    """Put (chunk, row, column) in the order (chunk, piece, column, row of the piece), rows filled up with zeros.

    Of two in a word, columns follow each other at PACKED, filled up with zeros to whole groups, and rows at TURNED; if
    tiles multiply gradients, those at PACKED stay in the order (chunk, piece, row of the piece, column). ``room`` is
    for PANEL columns of a piece. The threads share the work, and each comes back when all of it is done.
    """
    chunk, pieces, length = p[CHUNK_ROWS], p[PIECES], p[LENGTH]
    most = PANEL if p[IN_WORD] == 2 else _AT_A_TIME  # at a time
    columns = (width + most - 1) // most
    units = p[SAMPLES] * pieces * columns
    while True:
        unit = take(p.ctypes.data + 8 * PACKING, 1)
        if unit >= units:
            break
        piece, c = unit // columns, unit % columns * most
        first = piece % pieces * length
        rows = max(0, min(length, chunk - first))
        size = min(most, width - c)
        target = room if p[IN_WORD] == 2 else p[PACKED] + 4 * (piece * width + c) * length
        if rows < length:
            fill(target, size * length, f32(0.0))
        if rows > 0:
            turn(source + 4 * ((piece // pieces * chunk + first) * width + c), width, target, length, rows, size)
        if p[IN_WORD] == 2:
            if p[TURNED] != 0:
                rounded_of(p[TURNED] + 2 * (piece * width + c) * length, room, size * length)
            if p[TURNED] != 0 and p[TILED] == 1:
                for r in range(length):
                    row = p[PACKED] + 2 * ((piece * length + r) * whole(width) + c)
                    if r < rows:
                        round_row(row, source + 4 * ((piece // pieces * chunk + first + r) * width + c), size, room)
                    else:
                        fill(row, PANEL // 2, f32(0.0))
            else:
                fill(room + 4 * size * length, (PANEL - size) * length, f32(0.0))
                words = p[PACKED] + 2 * (piece * whole(width) + c) * length
                for j in range(0, PANEL, 2):
                    paired_of(words + 2 * j * length, room + 4 * j * length, room + 4 * (j + 1) * length, length)
        take(p.ctypes.data + 8 * DONE, 1)
    wait(p.ctypes.data + 8 * DONE, units)


@loop(INT, INT, INT, INT, INT, INT)
def rows_of(columns: Any, length: Any, target: Any, target_r: Any, rows: Any, size: Any) -> None:
    """Write the first ``rows`` rows of a piece, of ``size`` numbers, from its columns, which are ``length`` apart."""
    for r in range(0, rows, WIDTH):
        turn(columns + 4 * r, length, target + 4 * r * target_r, target_r, size, min(WIDTH, rows - r))


@loop(*[INT] * 4)
def add_to_rows(columns: Any, bias: Any, rows: Any, length: Any) -> None:
    """Add a number of its own to each row of ``rows`` x ``length``."""
    s, b = carray(pointer(columns), (rows * length,), f32), carray(pointer(bias), (rows,), f32)
    for r in range(rows):
        for j in range(length):
            s[r * length + j] += b[r]


@loop(INT, INT)
def round_all(values: Any, count: Any) -> None:
    """Round to the nearest float32 that bfloat16 has too, to an even one of two."""
    v = carray(pointer(values), (count,), f32)
    for j in range(count):
        word = as_word(v[j])
        nearest = (word + i32(0x7FFF) + ((word >> i32(16)) & i32(1))) & i32(-0x10000)
        v[j] = as_float(i32(nearest)) if v[j] == v[j] else v[j]


@loop(INT, INT)
def rectify(values: Any, count: Any) -> None:
    """Replace what is below 0 by 0."""
    v = carray(pointer(values), (count,), f32)
    for j in range(count):
        v[j] = f32(0.0) if v[j] < f32(0.0) else v[j]


@loop(*[INT] * 5)
def stop(gradient: Any, rectified: Any, apart: Any, rows: Any, size: Any) -> None:
    """Replace the gradient by 0 where a ReLU gave 0, in ``rows`` rows of ``size`` numbers that are ``apart``."""
    for r in range(rows):
        g = carray(pointer(gradient + 4 * r * apart), (size,), f32)
        x = carray(pointer(rectified + 4 * r * apart), (size,), f32)
        for j in range(size):
            g[j] = f32(0.0) if x[j] <= f32(0.0) else g[j]


@loop(*[INT] * 6)
def panel_of_rows(source: Any, source_r: Any, target: Any, chunk: Any, rows: Any, size: Any) -> None:
    """(row, column) of a chunk's columns to ``rows`` rows of a panel, rows and columns filled up with zeros."""
    s = carray(pointer(source), (max(0, chunk - 1) * source_r + size,), f32)
    t = carray(pointer(target), (rows * PANEL,), f32)
    for r in range(rows):
        for j in range(PANEL):
            t[r * PANEL + j] = s[r * source_r + j] if r < chunk and j < size else f32(0.0)


@loop(*[INT] * 5)
def panel_of_columns(columns: Any, length: Any, target: Any, rows: Any, size: Any) -> None:
    """The same from a piece's columns: ``length`` rows, of which the first ``rows`` are a chunk's."""
    if size < PANEL:
        fill(target, length * PANEL, f32(0.0))
    turn(columns, length, target, PANEL, size, length)
    fill(target + 4 * rows * PANEL, (length - rows) * PANEL, f32(0.0))


@loop(*[INT] * 7)
def paired_panel(source: Any, source_r: Any, target: Any, chunk: Any, rows: Any, size: Any, room: Any) -> None:
    """The same in words of two neighbours in a column; ``room`` is for two rows of a panel."""
    for r in range(0, rows, 2):
        panel_of_rows(source + 4 * r * source_r, source_r, room, chunk - r, 2, size)
        paired_of(target + 2 * r * PANEL, room, room + 4 * PANEL, PANEL)
