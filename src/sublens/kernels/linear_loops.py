"""The loops of a linear layer under K samples, compiled by Numba: mask, multiply and fold, block by block in the cache.

A block of weights has its thresholds computed and its noise drawn once; its masked weights live in a scratch that fits
the second-level cache, and so does what they are multiplied with.
"""

from typing import Any

from numba import carray, cfunc, njit, types

from sublens.kernels.gate_vectors import draw, draw_two, fold_of, fold_pair_of, masked_of
from sublens.kernels.halves import masked_halves_of, masked_rows_of
from sublens.kernels.loops import (
    COUNTER,
    GRADIENT,
    INT,
    KEY,
    LOGITS,
    PAIR,
    RESULT,
    SAMPLES,
    WEIGHT,
    WORDS,
    copy,
    f32,
    fill,
    gates,
    i64,
    loop,
    mask,
    mask_pair,
    times,
)
from sublens.kernels.packing import (
    ACROSS,
    BIAS,
    CHUNK_ROWS,
    COMES_PACKED,
    FIRST,
    HEIGHT,
    IN_WORD,
    INPUTS,
    LENGTH,
    LINEAR_FIELDS,
    OF_INPUTS,
    OF_WEIGHT,
    PACKED,
    PANEL,
    PIECES,
    RECTIFIED,
    ROUNDED,
    SCRATCH,
    SHARE,
    STAYS_PACKED,
    THREAD,
    TILED,
    TURNED,
    WIDE,
    add_to_rows,
    pack,
    paired_panel,
    panel_of_columns,
    panel_of_rows,
    rectify,
    round_all,
    round_row,
    rows_of,
    stop,
    whole,
)
from sublens.kernels.product import (
    AHEAD,
    AT_ONCE,
    COLUMN,
    EACH,
    EVERY,
    JUMP,
    LEFT,
    ONE,
    OTHER,
    PER_ROW,
    fetch_rest,
    fetch_some,
    product,
    product_of,
)
from sublens.kernels.tiles import SIDE, close_tiles, open_tiles, tile_product
from sublens.kernels.vector import LINE, REGISTER, pointer, take, written
from sublens.noise import PATTERNS, TILE

# A product works on a block of ROWS x COLUMNS weights. Its tables, the masked weights of two samples, the inputs of 128
# rows and the sums of their gradient fill a second-level cache of 512 KiB.
ROWS, COLUMNS = 48, 256
TILED_ROWS = 64  # with tiles: whole ones also where a block's rows are summed over
_PITCH = COLUMNS + 16  # of a block's rows: not a power of two, or the rows would fight for the same lines of the cache
_DRAWN = COLUMNS + 2 * TILE  # draws of a row: whole tiles, so more than the row at both ends
_SLICE, _STRIP = 96, 24  # columns whose masked weights stay in the first-level cache, forward and backward
LONGEST = 4 * REGISTER  # rows of a piece at most

# By what the rows of the first operand are apart: a masked block's rows, its columns, and rows of packed gradients.
_by_rows, _by_columns, _by_pieces = product(_PITCH), product(1), product_of(PANEL // REGISTER)
_reduced_by_rows, _reduced_by_columns = product(_PITCH, reduced=True), product(1, reduced=True)
_reduced_by_pieces = product_of(PANEL // REGISTER, reduced=True)


@loop(*[INT] * 6, WORDS)
def _look_ahead(state: Any, top: Any, left: Any, rows: Any, size: Any, steps: Any, p: Any) -> None:
    """Let the weights and logits of a block be fetched, spread over ``steps``: of products or, with tiles, of rows."""
    ahead = carray(pointer(state), (AHEAD,), i64)
    ahead[LEFT] = ahead[EACH] = 0
    if rows <= 0 or size <= 0:
        return
    at = 4 * (top * p[ACROSS] + left)
    lines = (4 * size + LINE - 1) // LINE + 1  # a row need not begin where a line does
    ahead[LEFT], ahead[COLUMN], ahead[PER_ROW] = rows * lines, 0, lines
    ahead[JUMP] = 4 * p[ACROSS] - (lines - 1) * LINE
    ahead[EVERY] = 1
    if p[TILED] == 1:
        ahead[EACH] = (rows * lines + steps - 1) // steps
    while 2 * ahead[EVERY] * rows * lines <= steps:
        ahead[EVERY] *= 2
    ahead[ONE], ahead[OTHER] = p[WEIGHT] + at, p[LOGITS] + at


# Scratch of a thread, in bytes from its beginning.
_ODDS = 0
_TOTAL = _ODDS + 4 * TILED_ROWS * _PITCH
_BLOCK = _TOTAL + 4 * TILED_ROWS * _PITCH
_APART = 4 * TILED_ROWS * _PITCH  # from the masked weights of a sample to those of the other one of its pair
_TILES = _BLOCK + 2 * _APART
_LIMITS = _TILES + 2 * 4 * TILED_ROWS * PANEL
_DRAWS = _LIMITS + 2 * TILED_ROWS * _PITCH
_HALVES = _DRAWS + 2 * TILED_ROWS * _DRAWN  # weights in bfloat16
_OF_WEIGHT = _HALVES + 2 * TILED_ROWS * _PITCH
_AHEAD = _OF_WEIGHT + 4 * TILED_ROWS * _PITCH
MORE = (_AHEAD + 8 * AHEAD + 8191) // 4096 * 4096  # with some bytes between, which vectors may read
"""Bytes that are the same for any layer. Then come the outputs of a block's rows, or the inputs of WIDE columns and
their gradient: for each row of the chunks' pieces as many numbers as the block has rows, or twice WIDE."""


@loop(INT, INT, INT)
def _accumulate(total: Any, numbers: Any, count: Any) -> None:
    s, x = carray(pointer(total), (count,), f32), carray(pointer(numbers), (count,), f32)
    for j in range(count):
        s[j] += x[j]


@loop(INT, INT, INT, INT, INT, INT, WORDS)
def _draw_block(scratch: Any, pair: Any, top: Any, left: Any, rows: Any, size: Any, p: Any) -> None:
    """Write the draws of all tiles that a block lies in. Of rows with an odd number of them, the last go in twos."""
    k0, k1, k2, k3, low, high = p[KEY], p[KEY + 1], p[KEY + 2], p[KEY + 3], p[COUNTER + 1], p[COUNTER + 2]
    waiting, number = i64(0), i64(0)
    for r in range(rows):
        out, element = scratch + _DRAWS + 2 * r * _DRAWN, (p[FIRST] + top + r) * p[ACROSS] + left
        tile, end = element // TILE, (element + size + TILE - 1) // TILE
        odd = (end - tile) % 2
        draw(out, tile, end - tile - odd, pair, low, high, k0, k1, k2, k3)
        if odd == 1:
            last, at = end - 1, out + 2 * TILE * (end - 1 - tile)
            if waiting == 0:
                waiting, number = at, last
            else:
                draw_two(waiting, number, at, last, pair, low, high, k0, k1, k2, k3)
                waiting = i64(0)
    if waiting != 0:
        draw(waiting, number, 1, pair, low, high, k0, k1, k2, k3)


@loop(*[INT] * 6, WORDS)
def _round_block(scratch: Any, top: Any, left: Any, rows: Any, size: Any, filled: Any, p: Any) -> None:
    """Weights of a block in bfloat16, of whole groups, and zeros up to ``filled`` rows."""
    for r in range(rows):
        fetch_some(scratch + _AHEAD)
        weight = p[WEIGHT] + 4 * ((top + r) * p[ACROSS] + left)
        round_row(scratch + _HALVES + 2 * r * _PITCH, weight, size, scratch + _BLOCK)
    for r in range(rows, filled):
        fill(scratch + _HALVES + 2 * r * _PITCH, whole(size) // 2, f32(0.0))


@njit(types.int64(*[INT] * 4, WORDS), error_model="numpy", cache=True, nogil=True)
def _draws_of(scratch: Any, top: Any, r: Any, left: Any, p: Any) -> Any:
    """Address of the draws of a block's row, from its first column on."""
    return scratch + _DRAWS + 2 * (r * _DRAWN + ((p[FIRST] + top + r) * p[ACROSS] + left) % TILE)


@loop(*[INT] * 8, WORDS)
def _mask_block(
    scratch: Any, sample: Any, together: Any, top: Any, left: Any, rows: Any, size: Any, down: Any, p: Any
) -> None:
    """Mask a block for a sample or, if ``together`` is 2, for both of the pair that begins with it.

    Of two weights in a word, rows follow each other if ``down`` is 1, and columns if it is 0.
    """
    if p[IN_WORD] == 2:
        for k in range(together):
            pattern, out, count = PATTERNS[(sample + k) % PAIR], scratch + _BLOCK + k * _APART, whole(size)
            for r in range(0, rows, 1 + down):
                fetch_some(scratch + _AHEAD)
                drawn, at = _draws_of(scratch, top, r, left, p), 2 * r * _PITCH
                halves, limits = scratch + _HALVES + at, scratch + _LIMITS + at
                if down == 1:
                    other = _draws_of(scratch, top, r + 1, left, p)
                    masked_rows_of(out + at, halves, 2 * _PITCH, drawn, other, limits, pattern, count)
                else:
                    masked_halves_of(out + 2 * at, halves, drawn, limits, pattern, count)
        return
    for r in range(rows):
        weight, drawn = p[WEIGHT] + 4 * ((top + r) * p[ACROSS] + left), _draws_of(scratch, top, r, left, p)
        limits = scratch + _LIMITS + 2 * r * _PITCH
        out = scratch + _BLOCK + 4 * r * _PITCH
        if together == 2:
            mask_pair(out, out + _APART, weight, drawn, limits, size)
        else:
            mask(out, weight, drawn, limits, PATTERNS[sample % PAIR], size)


@njit(types.int64(WORDS), error_model="numpy", cache=True, nogil=True)
def _tall(p: Any) -> Any:
    """Rows of a block."""
    return TILED_ROWS if p[TILED] == 1 else ROWS


@njit(types.int64(INT, INT, INT, WORDS), error_model="numpy", cache=True, nogil=True)
def _sums_of(room: Any, piece: Any, top: Any, p: Any) -> Any:
    """Where a block's sums for a piece are: in the scratch, or where packed outputs stay."""
    if p[STAYS_PACKED] == 1:
        return p[GRADIENT] + 4 * (piece * p[HEIGHT] + top) * p[LENGTH]
    return room + 4 * piece * _tall(p) * p[LENGTH]


@loop(WORDS)
def _forward(p: Any) -> None:
    height, across, samples, wide = p[HEIGHT], p[ACROSS], p[SAMPLES], p[WIDE]
    chunk, pieces, length, in_word = p[CHUNK_ROWS], p[PIECES], p[LENGTH], p[IN_WORD]
    words, tall = across if in_word == 1 else whole(across) // 2, _tall(p)
    scratch = p[SCRATCH] + take(p.ctypes.data + 8 * THREAD, 1) * p[SHARE]
    sums, ahead = scratch + MORE, scratch + _AHEAD
    if p[TILED] == 1:
        open_tiles()
    if p[COMES_PACKED] == 0:
        pack(p[INPUTS], across, scratch + _TOTAL, p)
    while True:
        top = take(p.ctypes.data, 1) * tall
        if top >= height:
            break
        rows = min(tall, height - top)
        for left in range(0, across, wide):
            size = min(wide, across - left)
            next_top, next_left = top, left + wide
            if next_left >= across:  # what this thread takes next, unless another one is faster
                next_top, next_left = take(p.ctypes.data, 0) * tall, 0
            next_size = min(wide, across - next_left) if next_top < height else 0
            steps = rows * size * samples * pieces * length // (AT_ONCE * in_word)
            if p[TILED] == 1:  # thresholds, and rounded and masked weights
                steps = (2 + samples) * rows
            _look_ahead(ahead, next_top, next_left, min(tall, height - next_top), next_size, steps, p)
            for r in range(rows):
                fetch_some(ahead)
                gates(scratch + _LIMITS + 2 * r * _PITCH, 0, p[LOGITS] + 4 * ((top + r) * across + left), size)
            if in_word == 2:
                _round_block(scratch, top, left, rows, size, rows, p)
            i = 0
            while i < samples:
                sample = p[COUNTER] + i
                if i == 0 or sample % PAIR == 0:
                    _draw_block(scratch, sample // PAIR, top, left, rows, size, p)
                together = 2 if sample % 2 == 0 and i + 1 < samples else 1
                _mask_block(scratch, sample, together, top, left, rows, size, 0, p)
                for piece in range(i * pieces, (i + together) * pieces if p[TILED] == 1 else 0):
                    masked = scratch + _BLOCK + (piece // pieces - i) * _APART
                    x, y = p[PACKED] + 4 * (piece * words + left // 2) * length, _sums_of(sums, piece, top, p)
                    tile_product(rows, length, masked, _PITCH, 0, x, length, 0, y, length, size, 1, i64(left == 0))
                for k in range(0 if p[TILED] == 1 else together):
                    for c in range(0, size, _SLICE):
                        deep = (min(_SLICE, size - c) + in_word - 1) // in_word
                        for part in range(pieces):
                            piece = (i + k) * pieces + part
                            x = p[PACKED] + 4 * (piece * words + (left + c) // in_word) * length
                            y = _sums_of(sums, piece, top, p)
                            masked = scratch + _BLOCK + k * _APART + 4 * (c // in_word)
                            if in_word == 2:
                                _reduced_by_rows(length // REGISTER, rows, masked, 1, _PITCH, 0, x, length, 0, y,
                                                 length, deep, 1, i64(left + c == 0), ahead)  # fmt: skip
                            else:
                                _by_rows(length // REGISTER, rows, masked, 1, _PITCH, 0, x, length, 0, y, length, deep,
                                         1, i64(left + c == 0), ahead)  # fmt: skip
                i += together
            fetch_rest(ahead)
        for i in range(samples):
            for first in range(0, chunk, length):
                y = p[GRADIENT] + 4 * ((i * chunk + first) * height + top)
                columns = _sums_of(sums, i * pieces + first // length, top, p)
                if p[BIAS] != 0:
                    add_to_rows(columns, p[BIAS] + 4 * top, rows, length)
                if p[RECTIFIED] == 1:
                    rectify(columns, rows * length)
                if p[ROUNDED] == 1:
                    round_all(columns, rows * length)
                if p[STAYS_PACKED] == 0:
                    rows_of(columns, length, y, height, min(length, chunk - first), rows)
    if p[TILED] == 1:
        close_tiles()


@njit(types.int64(*[INT] * 4, WORDS), error_model="numpy", cache=True, nogil=True)
def _of_columns(room: Any, piece: Any, left: Any, size: Any, p: Any) -> Any:
    """Where the gradient of a piece's inputs is, of ``size`` columns from ``left`` on: likewise."""
    if p[STAYS_PACKED] == 1:
        return p[OF_INPUTS] + 4 * (piece * p[ACROSS] + left) * p[LENGTH]
    return room + 4 * piece * size * p[LENGTH]


@loop(WORDS)
def _backward(p: Any) -> None:
    height, across, samples, wide = p[HEIGHT], p[ACROSS], p[SAMPLES], p[WIDE]
    chunk, pieces, length, in_word = p[CHUNK_ROWS], p[PIECES], p[LENGTH], p[IN_WORD]
    of_chunk, deep, tall = pieces * length, length // in_word, _tall(p)
    words, filling = height if in_word == 1 else whole(height) // 2, SIDE if p[TILED] == 1 else in_word
    scratch = p[SCRATCH] + take(p.ctypes.data + 8 * THREAD, 1) * p[SHARE]
    inputs = scratch + MORE
    of_inputs = inputs + 4 * samples * of_chunk * wide
    odds, limits, total = scratch + _ODDS, scratch + _LIMITS, scratch + _TOTAL
    tiles, of_weight, ahead = scratch + _TILES, scratch + _OF_WEIGHT, scratch + _AHEAD
    if p[TILED] == 1:
        open_tiles()
    if p[COMES_PACKED] == 0:
        pack(p[GRADIENT], height, total, p)
    while True:
        left = take(p.ctypes.data, 1) * wide
        if left >= across:
            break
        size = min(wide, across - left)
        panels = (size + PANEL - 1) // PANEL if p[RESULT] != 0 else 0
        for k in range(samples if p[RESULT] != 0 else 0):
            for c in range(0, size, PANEL):
                x = p[INPUTS] + 4 * (k * chunk * across + left + c)
                panel = inputs + 4 * (k * panels + c // PANEL) * of_chunk * PANEL
                if in_word == 2:
                    paired_panel(x, across, panel, chunk, of_chunk, min(PANEL, size - c), tiles)
                elif p[STAYS_PACKED] == 0:
                    panel_of_rows(x, across, panel, chunk, of_chunk, min(PANEL, size - c))
                else:
                    for part in range(pieces):
                        first = part * length
                        x = p[INPUTS] + 4 * ((k * pieces + part) * across + left + c) * length
                        room = panel + 4 * first * PANEL
                        panel_of_columns(x, length, room, min(length, chunk - first), min(PANEL, size - c))
        for top in range(0, height, tall):
            rows = min(tall, height - top)
            filled = (rows + filling - 1) // filling * filling
            products = i64(p[RESULT] != 0) + i64(p[OF_INPUTS] != 0)
            steps = products * rows * size * samples * of_chunk // (AT_ONCE * in_word)
            if p[TILED] == 1:  # thresholds, and rounded and folded weights
                steps = (2 + panels * ((samples + 1) // 2)) * rows
            _look_ahead(ahead, top + tall, left, min(tall, height - top - tall), size, steps, p)
            for r in range(rows):
                fetch_some(ahead)
                element = (top + r) * across + left
                gates(limits + 2 * r * _PITCH, odds + 4 * r * _PITCH, p[LOGITS] + 4 * element, size)
            if in_word == 2 and p[OF_INPUTS] != 0:
                _round_block(scratch, top, left, rows, size, filled, p)
            fill(total, rows * _PITCH, f32(0.0))
            if p[OF_WEIGHT] != 0:
                fill(of_weight, rows * _PITCH, f32(0.0))
            i = 0
            while i < samples:
                sample = p[COUNTER] + i
                if i == 0 or sample % PAIR == 0:
                    _draw_block(scratch, sample // PAIR, top, left, rows, size, p)
                together = 2 if sample % 2 == 0 and i + 1 < samples else 1
                for c in range(0, panels * PANEL, PANEL):
                    for k in range(i, i + together):
                        g = p[TURNED] + 4 * (k * pieces * height + top) * deep
                        x = inputs + 4 * (k * panels + c // PANEL) * of_chunk * PANEL
                        tile = tiles + 4 * (k - i) * TILED_ROWS * PANEL
                        if p[TILED] == 1:
                            tile_product(rows, PANEL, g, deep, height * deep, x, PANEL, deep * PANEL, tile, PANEL,
                                         length, pieces, 1)  # fmt: skip
                        elif in_word == 2:
                            _reduced_by_pieces(rows, g, 1, deep, height * deep, x, PANEL,
                                               deep * PANEL, tile, PANEL, deep, pieces, 1, ahead)  # fmt: skip
                        else:
                            _by_pieces(rows, g, 1, deep, height * deep, x, PANEL, deep * PANEL, tile,
                                       PANEL, deep, pieces, 1, ahead)  # fmt: skip
                    # Of a panel beyond the weight's last column the rest is computed too, from whatever the tables
                    # hold there, and never read.
                    for r in range(rows):
                        if p[TILED] == 1:
                            fetch_some(ahead)
                        drawn = _draws_of(scratch, top, r, left, p) + 2 * c
                        at, tile = 4 * (r * _PITCH + c), tiles + 4 * r * PANEL
                        if together == 2:
                            other = tile + 4 * TILED_ROWS * PANEL
                            fold_pair_of(total + at, tile, other, drawn, odds + at, PATTERNS[sample % PAIR], PANEL)
                        else:
                            fold_of(total + at, tile, drawn, odds + at, PATTERNS[sample % PAIR], PANEL)
                        if p[OF_WEIGHT] != 0:  # it is that of the masked weights where they are open
                            limit = limits + 2 * (r * _PITCH + c)
                            for k in range(together):
                                own, pattern = tile + 4 * k * TILED_ROWS * PANEL, PATTERNS[(sample + k) % PAIR]
                                masked_of(own, own, drawn, limit, pattern, PANEL)
                                _accumulate(of_weight + at, own, PANEL)
                if p[OF_INPUTS] != 0:
                    _mask_block(scratch, sample, together, top, left, filled, size, 1, p)
                    for piece in range(i * pieces, (i + together) * pieces if p[TILED] == 1 else 0):
                        g = p[PACKED] + 4 * (piece * length * words + top // 2)
                        masked = scratch + _BLOCK + (piece // pieces - i) * _APART
                        x = of_inputs + 4 * piece * length * wide
                        tile_product(length, size, g, words, 0, masked, _PITCH, 0, x, wide, rows, 1, i64(top == 0))
                    for k in range(i, i if p[TILED] == 1 else i + together):
                        for c in range(0, size, _STRIP):
                            for part in range(pieces):
                                piece = k * pieces + part
                                g = p[PACKED] + 4 * (piece * words + top // in_word) * length
                                x = _of_columns(of_inputs, piece, left, size, p) + 4 * c * length
                                masked = scratch + _BLOCK + (k - i) * _APART + 4 * c
                                strip, sums = min(_STRIP, size - c), (rows + in_word - 1) // in_word
                                if in_word == 2:
                                    _reduced_by_columns(length // REGISTER, strip, masked, _PITCH, 1, 0, g, length, 0,
                                                        x, length, sums, 1, i64(top == 0), ahead)  # fmt: skip
                                else:
                                    _by_columns(length // REGISTER, strip, masked, _PITCH, 1, 0, g, length, 0, x,
                                                length, sums, 1, i64(top == 0), ahead)  # fmt: skip
                i += together
            fetch_rest(ahead)
            for r in range(rows if p[RESULT] != 0 else 0):
                element = 4 * ((top + r) * across + left)
                times(p[RESULT] + element, total + 4 * r * _PITCH, p[WEIGHT] + element, size)
                if p[OF_WEIGHT] != 0:
                    copy(p[OF_WEIGHT] + element, of_weight + 4 * r * _PITCH, size)
        if p[OF_INPUTS] != 0:
            for i in range(samples):
                for first in range(0, chunk, length):
                    at, many = 4 * ((i * chunk + first) * across + left), min(length, chunk - first)
                    piece = i * pieces + first // length
                    if p[TILED] == 1:
                        x = of_inputs + 4 * piece * length * wide
                        if p[ROUNDED] == 1:
                            round_all(x, many * wide)
                        for r in range(many):
                            copy(p[OF_INPUTS] + at + 4 * r * across, x + 4 * r * wide, size)
                        if p[RECTIFIED] == 1:
                            stop(p[OF_INPUTS] + at, p[INPUTS] + at, across, many, size)
                        continue
                    columns = _of_columns(of_inputs, piece, left, size, p)
                    if p[ROUNDED] == 1:
                        round_all(columns, size * length)
                    if p[STAYS_PACKED] == 1:
                        if p[RECTIFIED] == 1:
                            x = p[INPUTS] + 4 * (piece * across + left) * length
                            stop(columns, x, 0, 1, size * length)
                        continue
                    rows_of(columns, length, p[OF_INPUTS] + at, across, many, size)
                    if p[RECTIFIED] == 1:
                        stop(p[OF_INPUTS] + at, p[INPUTS] + at, across, many, size)
    written()
    if p[TILED] == 1:
        close_tiles()


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def forward(address: Any) -> None:
    """Each sample's INPUTS times its masked weight, transposed, and BIAS, to GRADIENT.

    Both are (chunk, row, column), unless they come or stay packed: (chunk, piece, column, row of the piece).

    On many threads at once. A thread takes whole rows of blocks, so every output is summed by one thread, in one order.
    """
    _forward(carray(address, (LINEAR_FIELDS,), i64))


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def backward(address: Any) -> None:
    """Gradients of :func:`forward`, on many threads at once.

    GRADIENT is that of the outputs, it and INPUTS (chunk, row, column) or packed. Written are, unless they are 0,
    RESULT, the gradient of the logits, with it OF_WEIGHT, that of the weight, and OF_INPUTS, that of the inputs, or of
    what these were before they were rectified. A thread takes blocks of WIDE columns and all their rows, so every
    number is summed by one thread, in one order.
    """
    _backward(carray(address, (LINEAR_FIELDS,), i64))
