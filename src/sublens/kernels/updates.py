"""The update of all logits, compiled by Numba: the norm of their gradients in one pass, all else in another."""

from typing import Any

import numpy as np
from numba import carray, cfunc, types

from sublens.kernels.loops import INT, WORDS, f32, held, i64, loop
from sublens.kernels.vector import GROUP, pointer, squares_of, sum_of, take

CHUNK = 16384  # numbers that a thread takes at a time, and that are summed by themselves

# Fields of a parameter in an update of the logits. From RATE on they are float64.
NEXT, VALUES, SLOPES, MEANS, MEAN_SQUARES, SIZE, SUMS, FIRST, END, ALL = range(10)
RATE, FACTOR, CONSTANT, BETA_1, BETA_2, EPSILON, ROOT = range(10, 17)
UPDATE_FIELDS = 17
"""VALUES are the logits, SLOPES their gradient, MEANS and MEAN_SQUARES its running averages: addresses of SIZE float32.
All parameters are cut in chunks, which are counted through: this one's are FIRST to END - 1 of ALL, and NEXT, in the
first parameter's fields, is the first that is not yet taken. SUMS is the address of one float64 for each of all chunks:
its sum, of the squares of SLOPES or of VALUES. CONSTANT is added to each gradient, and the sum multiplied by FACTOR.
RATE is the learning rate over 1 - beta1**step, ROOT the square root of 1 - beta2**step."""
_BYTES = 8 * UPDATE_FIELDS


@loop(INT, INT, INT)
def _sum(values: Any, count: Any, out: Any) -> None:
    whole = count - count % GROUP
    total = np.float64(sum_of(values, whole))
    v = carray(pointer(values), (count,), f32)
    for j in range(whole, count):
        total += v[j]
    carray(pointer(out), (1,), np.float64)[0] = total


@loop(INT, INT, INT, types.float32)
def _sum_of_squares(values: Any, count: Any, out: Any, constant: Any) -> None:
    whole = count - count % GROUP
    total = np.float64(squares_of(values, whole, constant))
    v = carray(pointer(values), (count,), f32)
    for j in range(whole, count):
        x = v[j] + constant
        total += x * x
    carray(pointer(out), (1,), np.float64)[0] = total


@loop(INT, INT, WORDS)
def _step(at: Any, count: Any, p: Any) -> None:
    f = p.view(np.float64)
    constant, factor, rate, root = f32(f[CONSTANT]), f32(f[FACTOR]), f32(f[RATE]), f32(f[ROOT])
    b1, b2, c1, c2 = f32(f[BETA_1]), f32(f[BETA_2]), f32(1.0 - f[BETA_1]), f32(1.0 - f[BETA_2])
    epsilon = f32(f[EPSILON])
    v = carray(pointer(p[VALUES] + 4 * at), (count,), f32)
    g = carray(pointer(p[SLOPES] + 4 * at), (count,), f32)
    m = carray(pointer(p[MEANS] + 4 * at), (count,), f32)
    q = carray(pointer(p[MEAN_SQUARES] + 4 * at), (count,), f32)
    for j in range(count):
        x = (g[j] + constant) * factor
        mean, square = b1 * m[j] + c1 * x, b2 * q[j] + c2 * (x * x)
        m[j], q[j] = mean, square
        v[j] = held(v[j] - rate * mean / (np.sqrt(square) / root + epsilon))


SUM, SQUARES, STEP = 0, 1, 2


@loop(WORDS, INT)
def _each_chunk(first: Any, what: Any) -> None:
    address = first.ctypes.data
    while True:
        chunk = take(first.ctypes.data, 1)
        if chunk >= first[ALL]:
            break
        p = carray(pointer(address), (UPDATE_FIELDS,), i64)
        while chunk >= p[END]:
            address += _BYTES
            p = carray(pointer(address), (UPDATE_FIELDS,), i64)
        at = (chunk - p[FIRST]) * CHUNK
        count, out = min(CHUNK, p[SIZE] - at), p[SUMS] + 8 * chunk
        if what == SQUARES:
            _sum_of_squares(p[SLOPES] + 4 * at, count, out, f32(p.view(np.float64)[CONSTANT]))
        else:
            if what == STEP:
                _step(at, count, p)
            _sum(p[VALUES] + 4 * at, count, out)


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def squares(address: Any) -> None:
    """Sums of squares of the gradients and the constants added, one for each chunk. On many threads at once."""
    _each_chunk(carray(address, (UPDATE_FIELDS,), i64), SQUARES)


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def sums(address: Any) -> None:
    """Sums of VALUES, one for each chunk. On many threads at once."""
    _each_chunk(carray(address, (UPDATE_FIELDS,), i64), SUM)


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def adam(address: Any) -> None:
    """One step of Adam (Kingma and Ba, 2015, algorithm 1), VALUES put back within the logits' bound, and their sums.

    On many threads at once.
    """
    _each_chunk(carray(address, (UPDATE_FIELDS,), i64), STEP)
