"""The update of the logits, compiled by Numba: the norm of their gradient in one pass, all else in another."""

from typing import Any

import numpy as np
from numba import carray, cfunc, types

from sublens.kernels.loops import INT, WORDS, f32, held, i64, loop
from sublens.kernels.vector import GROUP, pointer, squares_of, sum_of, take

# Fields of an update of the logits. From RATE on they are float64.
CHUNK = 16384  # numbers that a thread takes at a time, and that are summed by themselves
VALUES, SLOPES, MEANS, MEAN_SQUARES, SIZE, SUMS = 1, 2, 3, 4, 5, 6
RATE, FACTOR, CONSTANT, BETA_1, BETA_2, EPSILON, ROOT = range(7, 14)
UPDATE_FIELDS = 14
"""VALUES are the logits, SLOPES their gradient, MEANS and MEAN_SQUARES its running averages: addresses of SIZE float32.
SUMS is that of one float64 for each chunk: its sum, of the squares of SLOPES or of VALUES. CONSTANT is added to each
gradient, and the sum multiplied by FACTOR. RATE is the learning rate over 1 - beta1**step, ROOT the square root of
1 - beta2**step."""


@loop(WORDS)
def _squares(p: Any) -> None:
    constant = f32(p.view(np.float64)[CONSTANT])
    while True:
        chunk = take(p.ctypes.data, 1)
        at = chunk * CHUNK
        if at >= p[SIZE]:
            break
        count = min(CHUNK, p[SIZE] - at)
        whole = count - count % GROUP
        total = np.float64(squares_of(p[SLOPES] + 4 * at, whole, constant))
        g = carray(pointer(p[SLOPES] + 4 * at), (count,), f32)
        for j in range(whole, count):
            x = g[j] + constant
            total += x * x
        carray(pointer(p[SUMS] + 8 * chunk), (1,), np.float64)[0] = total


@loop(INT, INT, INT)
def _sum(values: Any, count: Any, out: Any) -> None:
    whole = count - count % GROUP
    total = np.float64(sum_of(values, whole))
    v = carray(pointer(values), (count,), f32)
    for j in range(whole, count):
        total += v[j]
    carray(pointer(out), (1,), np.float64)[0] = total


@loop(WORDS)
def _sums(p: Any) -> None:
    while True:
        chunk = take(p.ctypes.data, 1)
        at = chunk * CHUNK
        if at >= p[SIZE]:
            break
        _sum(p[VALUES] + 4 * at, min(CHUNK, p[SIZE] - at), p[SUMS] + 8 * chunk)


@loop(WORDS)
def _adam(p: Any) -> None:
    f = p.view(np.float64)
    constant, factor, rate, root = f32(f[CONSTANT]), f32(f[FACTOR]), f32(f[RATE]), f32(f[ROOT])
    b1, b2, c1, c2 = f32(f[BETA_1]), f32(f[BETA_2]), f32(1.0 - f[BETA_1]), f32(1.0 - f[BETA_2])
    epsilon = f32(f[EPSILON])
    while True:
        chunk = take(p.ctypes.data, 1)
        at = chunk * CHUNK
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
            v[j] = held(v[j] - rate * mean / (np.sqrt(square) / root + epsilon))
        _sum(p[VALUES] + 4 * at, count, p[SUMS] + 8 * chunk)


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def squares(address: Any) -> None:
    """Sums of squares of the gradient and the constant added, one for each chunk. On many threads at once."""
    _squares(carray(address, (UPDATE_FIELDS,), i64))


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def sums(address: Any) -> None:
    """Sums of VALUES, one for each chunk. On many threads at once."""
    _sums(carray(address, (UPDATE_FIELDS,), i64))


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def adam(address: Any) -> None:
    """One step of Adam (Kingma and Ba, 2015, algorithm 1), VALUES put back within the logits' bound, and their sums.

    On many threads at once.
    """
    _adam(carray(address, (UPDATE_FIELDS,), i64))
