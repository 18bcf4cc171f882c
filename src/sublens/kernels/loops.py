"""The fused loops, compiled by Numba: draw, compare, mask, multiply, and fold gradients, block by block in the cache.

Each loop restates :mod:`sublens.noise` and :mod:`sublens.kernels.reference` operation by operation, in the same order,
so that its samples have the same bits. What it saves is memory traffic: thresholds, noise, samples and masked weights
of a block live in the first- and second-level cache only, and serve all K samples while they are there.

The inner functions take plain runs of numbers and have no branches, which is what lets LLVM turn them into vector
instructions; ``error_model="numpy"`` removes the test for a zero divisor for the same reason.
"""

from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from sublens.kernels.reference import LOG2_E, LOGIT_BOUND, POLYNOMIAL, ROUNDER
from sublens.kernels.vector import (
    CHAINS,
    WIDTH,
    as_float,
    as_word,
    draw,
    fetch,
    limits_and_odds_of,
    limits_of,
    pointer,
    product,
    squares_of,
    take,
    transpose,
)
from sublens.noise import LEVELS, PATTERNS, TILE

f32, i32, u16, i64 = np.float32, np.int32, np.uint16, np.int64
_BOUND = f32(LOGIT_BOUND)
_LEVELS = f32(LEVELS)
_LOG2_E, _ROUNDER = f32(LOG2_E), f32(ROUNDER)
_C5, _C4, _C3, _C2, _C1, _C0 = map(f32, POLYNOMIAL)
_PAIR = len(PATTERNS)
_RUN = 512  # elements that a thread takes at a time from a run of them

# A product works on a block of ROWS x COLUMNS weights. Its tables and masked weights, and the sums of the inputs'
# gradient that it adds to, fill about two thirds of a second-level cache of 512 KiB.
ROWS, COLUMNS = 48, 256
_PITCH = COLUMNS + 16  # of a block's rows: not a power of two, or the rows would fight for the same lines of the cache
_DRAWN = COLUMNS + 2 * TILE  # draws of a row: whole tiles, so more than the row at both ends
_SLICE, _STRIP = 96, 24  # columns whose masked weights stay in the first-level cache, forward and backward
PANEL = 32  # columns of the inputs' layout for the weight gradient

# Where each argument stands in the int64 array that a loop is given.
NEXT, WEIGHT, LOGITS, MASKED, GRADIENT, RESULT, BEGIN, COUNT, SAMPLES, STRIDE = range(10)
KEY, COUNTER = 10, 14
FIELDS = 17
"""NEXT is the first run not yet taken, counted from the first; WEIGHT ... RESULT are addresses of float32 data, of
element BEGIN; MASKED and GRADIENT hold SAMPLES rows, STRIDE elements apart; KEY is four words, COUNTER three (first
sample, step low, step high)."""

INPUTS, SCRATCH, THREAD, PANELS = 3, 6, 7, 9
HEIGHT, ACROSS, PIECES, LENGTH, WIDE, WANTS = range(17, 23)
LINEAR_FIELDS = 23
"""Of a linear layer. WEIGHT, LOGITS, RESULT, SAMPLES, KEY and COUNTER are as above. INPUTS, GRADIENT and PANELS are
addresses of packed data; SCRATCH is that of SCRATCH_BYTES for each thread, THREAD the next thread's number. The weight
is HEIGHT x ACROSS, each sample's chunk is PIECES pieces of LENGTH rows, a thread takes WIDE columns at a time, and
WANTS says whether the gradient of the inputs is wanted."""


def _vector(*arguments: Any) -> Any:
    return njit(types.void(*arguments), error_model="numpy", cache=True, nogil=True)


_int = types.int64
_words = types.Array(types.int64, 1, "C")


@njit(error_model="numpy", inline="always")
def _odds_of(x: Any) -> Any:
    x = _BOUND if x > _BOUND else x
    x = -_BOUND if x < -_BOUND else x
    y = x * _LOG2_E
    z = y + _ROUNDER
    f = y - (z - _ROUNDER)
    q = _C5 * f + _C4
    q = q * f + _C3
    q = q * f + _C2
    q = q * f + _C1
    q = q * f + _C0
    return as_float(i32(as_word(q) + i32(as_word(z) << i32(23))))


@_vector(*[_int] * 4)
def _gates(limits: Any, odds: Any, logits: Any, count: Any) -> None:
    """Thresholds of the gates and, unless its address is 0, their odds."""
    whole = count - count % (CHAINS * WIDTH)
    if odds == 0:
        limits_of(limits, 0, logits, whole)
    else:
        limits_and_odds_of(limits, odds, logits, whole)
    t, x = carray(pointer(limits), (count,), u16), carray(pointer(logits), (count,), f32)
    o = carray(pointer(odds), (count,), f32)
    for j in range(whole, count):
        one = _odds_of(x[j])
        t[j] = u16(i32(_LEVELS / (f32(1.0) + one) + f32(0.5)))
        if odds != 0:
            o[j] = one


@_vector(*[_int] * 6)
def _mask(out: Any, weight: Any, drawn: Any, limits: Any, pattern: Any, count: Any) -> None:
    """Masked weights of one sample."""
    m, w = carray(pointer(out), (count,), f32), carray(pointer(weight), (count,), f32)
    k, t = carray(pointer(drawn), (count,), u16), carray(pointer(limits), (count,), u16)
    c = u16(pattern)
    for j in range(count):
        x = w[j]
        m[j] = x if u16(k[j] ^ c) >= t[j] else f32(0.0)


@_vector(*[_int] * 6)
def _fold(total: Any, gradient: Any, drawn: Any, odds: Any, pattern: Any, count: Any) -> None:
    """Add one sample's gradient of the masked weight times ds/dlogit."""
    s, g = carray(pointer(total), (count,), f32), carray(pointer(gradient), (count,), f32)
    k, o = carray(pointer(drawn), (count,), u16), carray(pointer(odds), (count,), f32)
    c = u16(pattern)
    for j in range(count):
        a = f32(2 * i32(u16(k[j] ^ c)) + 1)
        b = f32(2 * LEVELS) - a
        a = a * o[j]
        d = a + b
        s[j] += g[j] * (a * b / (d * d))


@_vector(*[_int] * 6)
def _fold_pair(total: Any, gradients: Any, drawn: Any, odds: Any, pattern: Any, distance: Any) -> None:
    """The same for a panel's row of two antithetic samples with one division.

    Where the first sample has a and b, the second has b and a. The second's gradients lie ``distance`` numbers on.
    """
    s, g = carray(pointer(total), (PANEL,), f32), carray(pointer(gradients), (PANEL,), f32)
    h = carray(pointer(gradients + 4 * distance), (PANEL,), f32)
    k, o = carray(pointer(drawn), (PANEL,), u16), carray(pointer(odds), (PANEL,), f32)
    c = u16(pattern)
    for j in range(PANEL):
        a = f32(2 * i32(u16(k[j] ^ c)) + 1)
        b = f32(2 * LEVELS) - a
        d, e = a * o[j] + b, b * o[j] + a
        both = d * e
        # At the bound of the logits, both^2 is 4e36, and still a float32.
        s[j] += (g[j] * (e * e) + h[j] * (d * d)) * (a * b * o[j] / (both * both))


@_vector(*[_int] * 4)
def _times(out: Any, total: Any, weight: Any, count: Any) -> None:
    r, s = carray(pointer(out), (count,), f32), carray(pointer(total), (count,), f32)
    w = carray(pointer(weight), (count,), f32)
    for j in range(count):
        r[j] = s[j] * w[j]


@_vector(_int, _int, types.float32)
def _fill(out: Any, count: Any, value: Any) -> None:
    o = carray(pointer(out), (count,), f32)
    for j in range(count):
        o[j] = value


@njit(types.int64(_int, _int, _int, _int, _words), error_model="numpy", cache=True, nogil=True)
def _draw(out: Any, element: Any, count: Any, pair: Any, p: Any) -> Any:
    """Write the draws of the tiles that hold ``count`` elements from ``element`` on; return the first one's address."""
    tile = element // TILE
    last = (element + count + TILE - 1) // TILE
    draw(
        out, tile, last - tile, pair, p[COUNTER + 1], p[COUNTER + 2], p[KEY], p[KEY + 1], p[KEY + 2], p[KEY + 3]
    )  # fmt: skip
    return out + 2 * (element - tile * TILE)


@_vector(_words)
def _walk(p: Any) -> None:
    begin, count, samples, stride = p[BEGIN], p[COUNT], p[SAMPLES], p[STRIDE]
    drawn, limit = np.empty(_RUN + 2 * TILE, u16), np.empty(_RUN, u16)
    odds, total = np.empty(_RUN, f32), np.empty(_RUN, f32)
    k0, t, o, s = drawn.ctypes.data, limit.ctypes.data, odds.ctypes.data, total.ctypes.data
    first, end = begin // _RUN, (begin + count + _RUN - 1) // _RUN
    while True:
        run = first + take(p.ctypes.data, 1)
        if run >= end:
            break
        lo, hi = max(begin, run * _RUN), min(begin + count, (run + 1) * _RUN)
        at, size = 4 * (lo - begin), hi - lo
        _gates(t, o, p[LOGITS] + at, size)
        _fill(s, size, f32(0.0))
        k = k0
        for i in range(samples):
            sample = p[COUNTER] + i
            if i == 0 or sample % _PAIR == 0:
                k = _draw(k0, lo, size, sample // _PAIR, p)
            pattern, row = PATTERNS[sample % _PAIR], 4 * i * stride + at
            if p[MASKED] != 0:
                _mask(p[MASKED] + row, p[WEIGHT] + at, k, t, pattern, size)
            if p[RESULT] != 0:
                _fold(s, p[GRADIENT] + row, k, o, pattern, size)
        if p[RESULT] != 0:
            _times(p[RESULT] + at, s, p[WEIGHT] + at, size)


@_vector(_int, _int, _int, _int, _int, _int)
def _turn(source: Any, source_r: Any, target: Any, target_r: Any, rows: Any, columns: Any) -> None:
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


# Fields of a packing.
SOURCE, TARGET, CHUNKS, CHUNK, ROW, PARTS, PART = 1, 2, 3, 4, 5, 6, 7
PACK_FIELDS = 8
"""CHUNKS x CHUNK rows of ROW numbers at SOURCE; each chunk becomes PARTS pieces of PART rows, of which the last may be
filled up with zeros."""


@_vector(_words)
def _pack(p: Any) -> None:
    """(chunk, row, column) to (chunk, piece, column, row of the piece)."""
    width, part, parts, chunk = p[ROW], p[PART], p[PARTS], p[CHUNK]
    columns = (width + PANEL - 1) // PANEL
    while True:
        unit = take(p.ctypes.data, 1)
        if unit >= p[CHUNKS] * parts * columns:
            break
        piece, c = unit // columns, unit % columns * PANEL
        first = piece % parts * part
        rows = max(0, min(part, chunk - first))
        size = min(PANEL, width - c)
        target = p[TARGET] + 4 * (piece * width + c) * part
        if rows < part:
            _fill(target, size * part, f32(0.0))
        if rows > 0:
            source = p[SOURCE] + 4 * ((piece // parts * chunk + first) * width + c)
            _turn(source, width, target, part, rows, size)


@_vector(_words)
def _unpack(p: Any) -> None:
    """The way back: SOURCE is packed."""
    width, part, parts, chunk = p[ROW], p[PART], p[PARTS], p[CHUNK]
    columns = (width + PANEL - 1) // PANEL
    while True:
        unit = take(p.ctypes.data, 1)
        if unit >= p[CHUNKS] * parts * columns:
            break
        piece, c = unit // columns, unit % columns * PANEL
        first = piece % parts * part
        rows = max(0, min(part, chunk - first))
        size = min(PANEL, width - c)
        if rows > 0:
            target = p[TARGET] + 4 * ((piece // parts * chunk + first) * width + c)
            _turn(p[SOURCE] + 4 * (piece * width + c) * part, part, target, width, size, rows)


@_vector(_words)
def _panels(p: Any) -> None:
    """(chunk, row, column) to (chunk, panel, row, column of the panel), rows and columns filled up with zeros."""
    width, chunk, rows = p[ROW], p[CHUNK], p[PARTS] * p[PART]
    panels = (width + PANEL - 1) // PANEL
    while True:
        unit = take(p.ctypes.data, 1)
        if unit >= p[CHUNKS] * panels:
            break
        k, c = unit // panels, unit % panels * PANEL
        size = min(PANEL, width - c)
        s = carray(pointer(p[SOURCE] + 4 * (k * chunk * width + c)), ((chunk - 1) * width + size,), f32)
        t = carray(pointer(p[TARGET] + 4 * unit * rows * PANEL), (rows * PANEL,), f32)
        for r in range(rows):
            for j in range(PANEL):
                t[r * PANEL + j] = s[r * width + j] if r < chunk and j < size else f32(0.0)


@_vector(*[_int] * 5, _words)
def _ahead(top: Any, left: Any, call: Any, calls: Any, rows: Any, p: Any) -> None:
    """Fetch a share of the weights and logits that come next, while products keep the processor busy."""
    across = p[ACROSS]
    size = min(p[WIDE], across - left)
    for r in range(call * rows // calls, (call + 1) * rows // calls):
        element = 4 * ((top + r) * across + left)
        fetch(p[WEIGHT] + element, size)
        fetch(p[LOGITS] + element, size)


# Scratch of a thread, in bytes from its beginning.
_ODDS = 0
_TOTAL = _ODDS + 4 * ROWS * _PITCH
_BLOCK = _TOTAL + 4 * ROWS * _PITCH
_TILES = _BLOCK + 4 * ROWS * _PITCH
_LIMITS = _TILES + 2 * 4 * ROWS * PANEL
_DRAWS = _LIMITS + 2 * ROWS * _PITCH
SCRATCH_BYTES = _DRAWS + 2 * ROWS * _DRAWN + 4096


@_vector(_int, _int, _int, _int, _int, _int, _words)
def _draw_block(scratch: Any, pair: Any, top: Any, left: Any, rows: Any, size: Any, p: Any) -> None:
    for r in range(rows):
        _draw(scratch + _DRAWS + 2 * r * _DRAWN, (top + r) * p[ACROSS] + left, size, pair, p)


@_vector(_int, _int, _int, _int, _int, _int, _words)
def _mask_block(scratch: Any, sample: Any, top: Any, left: Any, rows: Any, size: Any, p: Any) -> None:
    pattern = PATTERNS[sample % _PAIR]
    for r in range(rows):
        element = (top + r) * p[ACROSS] + left
        k = scratch + _DRAWS + 2 * (r * _DRAWN + element % TILE)
        limits = scratch + _LIMITS + 2 * r * _PITCH
        _mask(scratch + _BLOCK + 4 * r * _PITCH, p[WEIGHT] + 4 * element, k, limits, pattern, size)


@_vector(_words)
def _forward(p: Any) -> None:
    height, across, samples, wide = p[HEIGHT], p[ACROSS], p[SAMPLES], p[WIDE]
    pieces, length = p[PIECES], p[LENGTH]
    scratch = p[SCRATCH] + take(p.ctypes.data + 8 * THREAD, 1) * SCRATCH_BYTES
    while True:
        top = take(p.ctypes.data, 1) * ROWS
        if top >= height:
            break
        rows = min(ROWS, height - top)
        for left in range(0, across, wide):
            size = min(wide, across - left)
            call, calls = 0, samples * pieces * ((size + _SLICE - 1) // _SLICE)
            for r in range(rows):
                _gates(scratch + _LIMITS + 2 * r * _PITCH, 0, p[LOGITS] + 4 * ((top + r) * across + left), size)
            for i in range(samples):
                sample = p[COUNTER] + i
                if i == 0 or sample % _PAIR == 0:
                    _draw_block(scratch, sample // _PAIR, top, left, rows, size, p)
                _mask_block(scratch, sample, top, left, rows, size, p)
                for c in range(0, size, _SLICE):
                    for part in range(pieces):
                        piece = i * pieces + part
                        x = p[INPUTS] + 4 * (piece * across + left + c) * length
                        y = p[GRADIENT] + 4 * (piece * height + top) * length
                        product(length // WIDTH, rows, scratch + _BLOCK + 4 * c, 1, _PITCH, 0, x, length, 0, y, length,
                                min(_SLICE, size - c), 1, left + c == 0)  # fmt: skip
                        if left + wide < across:
                            _ahead(top, left + wide, call, calls, rows, p)
                        call += 1


@_vector(_words)
def _backward(p: Any) -> None:
    height, across, samples, wide = p[HEIGHT], p[ACROSS], p[SAMPLES], p[WIDE]
    pieces, length = p[PIECES], p[LENGTH]
    panels = (across + PANEL - 1) // PANEL
    scratch = p[SCRATCH] + take(p.ctypes.data + 8 * THREAD, 1) * SCRATCH_BYTES
    odds, limits, draws, total = scratch + _ODDS, scratch + _LIMITS, scratch + _DRAWS, scratch + _TOTAL
    tiles = scratch + _TILES
    while True:
        left = take(p.ctypes.data, 1) * wide
        if left >= across:
            break
        size = min(wide, across - left)
        for top in range(0, height, ROWS):
            rows = min(ROWS, height - top)
            for r in range(rows):
                element = (top + r) * across + left
                _gates(limits + 2 * r * _PITCH, odds + 4 * r * _PITCH, p[LOGITS] + 4 * element, size)
            _fill(total, rows * _PITCH, f32(0.0))
            call, calls = 0, samples * ((size + PANEL - 1) // PANEL)
            i = 0
            while i < samples:
                sample = p[COUNTER] + i
                if i == 0 or sample % _PAIR == 0:
                    _draw_block(scratch, sample // _PAIR, top, left, rows, size, p)
                together = 2 if sample % 2 == 0 and i + 1 < samples else 1
                for c in range(0, size, PANEL):
                    for k in range(i, i + together):
                        g = p[GRADIENT] + 4 * (k * pieces * height + top) * length
                        x = p[PANELS] + 4 * (k * panels + (left + c) // PANEL) * pieces * length * PANEL
                        product(PANEL // WIDTH, rows, g, 1, length, height * length, x, PANEL, length * PANEL,
                                tiles + 4 * (k - i) * ROWS * PANEL, PANEL, length, pieces, 1)  # fmt: skip
                        if top + ROWS < height:
                            _ahead(top + ROWS, left, call, calls, min(ROWS, height - top - ROWS), p)
                        call += 1
                    # Of a panel beyond the weight's last column the rest is computed too, from whatever the tables
                    # hold there, and never read.
                    for r in range(rows):
                        drawn = draws + 2 * (r * _DRAWN + ((top + r) * across + left) % TILE + c)
                        at, tile = 4 * (r * _PITCH + c), tiles + 4 * r * PANEL
                        if together == 2:
                            _fold_pair(total + at, tile, drawn, odds + at, PATTERNS[sample % _PAIR], ROWS * PANEL)
                        else:
                            _fold(total + at, tile, drawn, odds + at, PATTERNS[sample % _PAIR], PANEL)
                if p[WANTS] != 0:
                    for k in range(i, i + together):
                        _mask_block(scratch, p[COUNTER] + k, top, left, rows, size, p)
                        for c in range(0, size, _STRIP):
                            for part in range(pieces):
                                piece = k * pieces + part
                                g = p[GRADIENT] + 4 * (piece * height + top) * length
                                x = p[INPUTS] + 4 * (piece * across + left + c) * length
                                product(length // WIDTH, min(_STRIP, size - c), scratch + _BLOCK + 4 * c, _PITCH, 1, 0,
                                        g, length, 0, x, length, rows, 1, top == 0)  # fmt: skip
                i += together
            for r in range(rows):
                element = 4 * ((top + r) * across + left)
                _times(p[RESULT] + element, total + 4 * r * _PITCH, p[WEIGHT] + element, size)


# Fields of an update of the logits. From RATE on they are float64.
CHUNK = 16384  # numbers that a thread takes at a time, and whose squares are summed by themselves
VALUES, SLOPES, MEANS, MEAN_SQUARES, SIZE, SUMS = 1, 2, 3, 4, 5, 6
RATE, FACTOR, CONSTANT, BETA_1, BETA_2, EPSILON, ROOT = range(7, 14)
UPDATE_FIELDS = 14
"""VALUES are the logits, SLOPES their gradient, MEANS and MEAN_SQUARES its running averages: addresses of SIZE float32.
SUMS is that of one float64 for each chunk. CONSTANT is added to each gradient, and the sum multiplied by FACTOR. RATE
is the learning rate over 1 - beta1**step, ROOT the square root of 1 - beta2**step."""


@_vector(_words)
def _squares(p: Any) -> None:
    constant = f32(p.view(np.float64)[CONSTANT])
    while True:
        chunk = take(p.ctypes.data, 1)
        at = chunk * CHUNK
        if at >= p[SIZE]:
            break
        count = min(CHUNK, p[SIZE] - at)
        whole = count - count % (CHAINS * WIDTH)
        total = np.float64(squares_of(p[SLOPES] + 4 * at, whole, constant))
        g = carray(pointer(p[SLOPES] + 4 * at), (count,), f32)
        for j in range(whole, count):
            x = g[j] + constant
            total += x * x
        carray(pointer(p[SUMS] + 8 * chunk), (1,), np.float64)[0] = total


@_vector(_words)
def _adam(p: Any) -> None:
    f = p.view(np.float64)
    constant, factor, rate, root = f32(f[CONSTANT]), f32(f[FACTOR]), f32(f[RATE]), f32(f[ROOT])
    b1, b2, c1, c2 = f32(f[BETA_1]), f32(f[BETA_2]), f32(1.0 - f[BETA_1]), f32(1.0 - f[BETA_2])
    epsilon = f32(f[EPSILON])
    while True:
        at = take(p.ctypes.data, 1) * CHUNK
        if at >= p[SIZE]:
            break
        count = min(CHUNK, p[SIZE] - at)
        v = carray(pointer(p[VALUES] + 4 * at), (count,), f32)
        g = carray(pointer(p[SLOPES] + 4 * at), (count,), f32)
        m = carray(pointer(p[MEANS] + 4 * at), (count,), f32)
        q = carray(pointer(p[MEAN_SQUARES] + 4 * at), (count,), f32)
        for j in range(count):
            x = (g[j] + constant) * factor
            mean, square = b1 * m[j] + c1 * x, b2 * q[j] + c2 * (x * x)
            m[j], q[j] = mean, square
            v[j] = v[j] - rate * mean / (np.sqrt(square) / root + epsilon)


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def squares(address: Any) -> None:
    """Sums of squares of the gradient and the constant added, one for each chunk. On many threads at once."""
    _squares(carray(address, (UPDATE_FIELDS,), i64))


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def adam(address: Any) -> None:
    """One step of Adam (Kingma and Ba, 2015, algorithm 1). On many threads at once."""
    _adam(carray(address, (UPDATE_FIELDS,), i64))


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def walk(address: Any) -> None:
    """Walk over the elements BEGIN to BEGIN + COUNT - 1, as the fields say; safe to run on many threads at once.

    If MASKED is not 0, each sample's masked weight is written there. If RESULT is not 0, the gradient of the logits is:
    the sum over samples of GRADIENT times ds/dlogit (tau = 1), times the weight.
    """
    _walk(carray(address, (FIELDS,), i64))


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def pack(address: Any) -> None:
    """(chunk, row, column) to (chunk, piece, column, row of the piece); see PACK_FIELDS. On many threads at once."""
    _pack(carray(address, (PACK_FIELDS,), i64))


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def unpack(address: Any) -> None:
    """The way back from :func:`pack`: SOURCE is packed."""
    _unpack(carray(address, (PACK_FIELDS,), i64))


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def panels(address: Any) -> None:
    """(chunk, row, column) to (chunk, panel of 32 columns, row, column of the panel), filled up with zeros."""
    _panels(carray(address, (PACK_FIELDS,), i64))


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def forward(address: Any) -> None:
    """Each sample's INPUTS times its masked weight, to GRADIENT; both packed. On many threads at once.

    A thread takes blocks of ROWS rows, so every output is summed by one thread, in one order.
    """
    _forward(carray(address, (LINEAR_FIELDS,), i64))


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def backward(address: Any) -> None:
    """Gradients of :func:`forward`, on many threads at once.

    GRADIENT is that of the outputs, packed; PANELS are the inputs in panels. Written are RESULT, the gradient of the
    logits, and, if WANTS, INPUTS, that of the inputs, packed. A thread takes blocks of WIDE columns and all their rows,
    so every number is summed by one thread, in one order.
    """
    _backward(carray(address, (LINEAR_FIELDS,), i64))
