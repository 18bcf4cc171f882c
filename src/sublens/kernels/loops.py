"""The fused loops, compiled by Numba: draw, compare, mask, and fold gradients, run by run in the cache.

Each loop restates :mod:`sublens.noise` and :mod:`sublens.kernels.reference` operation by operation, in the same order,
so that its samples have the same bits. What it saves is memory traffic: thresholds, noise and samples live in the
cache only, and serve all K samples while they are there.

The inner functions take plain runs of numbers and have no branches, which is what lets LLVM turn them into vector
instructions; ``error_model="numpy"`` removes the test for a zero divisor for the same reason.
"""

from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from sublens.kernels.gate_vectors import (
    draw,
    fold_of,
    limits_and_odds_of,
    limits_of,
    masked_of,
    masked_pair_of,
    times_of,
)
from sublens.kernels.reference import LOG2_E, LOGIT_BOUND, POLYNOMIAL, ROUNDER
from sublens.kernels.vector import GROUP, REGISTER, as_float, as_word, pointer, take, written
from sublens.noise import LEVELS, PATTERNS, TILE

f32, i32, u16, i64 = np.float32, np.int32, np.uint16, np.int64
_BOUND = f32(LOGIT_BOUND)
_LEVELS = f32(LEVELS)
_LOG2_E, _ROUNDER = f32(LOG2_E), f32(ROUNDER)
_C5, _C4, _C3, _C2, _C1, _C0 = map(f32, POLYNOMIAL)
PAIR = len(PATTERNS)
_RUN = 512  # elements that a thread takes at a time from a run of them

# Where each argument stands in the int64 array that a loop is given.
NEXT, WEIGHT, LOGITS, MASKED, GRADIENT, RESULT, BEGIN, COUNT, SAMPLES, STRIDE = range(10)
KEY, COUNTER = 10, 14
FIELDS = 17
"""NEXT is the first run not yet taken, counted from the first; WEIGHT ... RESULT are addresses of float32 data, of
element BEGIN; MASKED and GRADIENT hold SAMPLES rows, STRIDE elements apart; KEY is four words, COUNTER three (first
sample, step low, step high)."""


def loop(*arguments: Any) -> Any:
    """Decorator of a compiled function of these argument types that returns nothing."""
    return njit(types.void(*arguments), error_model="numpy", cache=True, nogil=True)


INT = types.int64
WORDS = types.Array(types.int64, 1, "C")


@njit(error_model="numpy", inline="always")
def exp_of(x: Any) -> Any:
    """exp(x) by the polynomial of the reference, for moderate x (its result must be a normal float32)."""
    y = x * _LOG2_E
    z = y + _ROUNDER
    f = y - (z - _ROUNDER)
    q = _C5 * f + _C4
    q = q * f + _C3
    q = q * f + _C2
    q = q * f + _C1
    q = q * f + _C0
    return as_float(i32(as_word(q) + i32(as_word(z) << i32(23))))


@njit(error_model="numpy", inline="always")
def held(x: Any) -> Any:
    """A logit within its bound; NaN stays NaN."""
    x = _BOUND if x > _BOUND else x
    return -_BOUND if x < -_BOUND else x


@loop(*[INT] * 4)
def gates(limits: Any, odds: Any, logits: Any, count: Any) -> None:
    """Thresholds of the gates and, unless its address is 0, their odds."""
    whole = count - count % REGISTER
    if odds == 0:
        limits_of(limits, 0, logits, whole)
    else:
        limits_and_odds_of(limits, odds, logits, whole)
    t, x = carray(pointer(limits), (count,), u16), carray(pointer(logits), (count,), f32)
    o = carray(pointer(odds), (count,), f32)
    for j in range(whole, count):
        one = exp_of(held(x[j]))
        t[j] = u16(i32(_LEVELS / (f32(1.0) + one) + f32(0.5)))
        if odds != 0:
            o[j] = one


@loop(*[INT] * 6)
def mask(out: Any, weight: Any, drawn: Any, limits: Any, pattern: Any, count: Any) -> None:
    """Masked weights of one sample."""
    whole = count - count % REGISTER
    masked_of(out, weight, drawn, limits, pattern, whole)
    m, w = carray(pointer(out), (count,), f32), carray(pointer(weight), (count,), f32)
    k, t = carray(pointer(drawn), (count,), u16), carray(pointer(limits), (count,), u16)
    c = u16(pattern)
    for j in range(whole, count):
        x = w[j]
        m[j] = x if u16(k[j] ^ c) >= t[j] else f32(0.0)


@loop(*[INT] * 6)
def mask_pair(out: Any, other: Any, weight: Any, drawn: Any, limits: Any, count: Any) -> None:
    """Masked weights of the two samples of a pair."""
    whole = count - count % REGISTER
    masked_pair_of(out, other, weight, drawn, limits, PATTERNS[0], PATTERNS[1], whole)
    wide, narrow = 4 * whole, 2 * whole
    mask(out + wide, weight + wide, drawn + narrow, limits + narrow, PATTERNS[0], count - whole)
    mask(other + wide, weight + wide, drawn + narrow, limits + narrow, PATTERNS[1], count - whole)


@loop(*[INT] * 6)
def fold(total: Any, gradient: Any, drawn: Any, odds: Any, pattern: Any, count: Any) -> None:
    """Add one sample's gradient of the masked weight times ds/dlogit."""
    # By GROUP, which is the same for any register: the vectors' last sum is fused, that of the loop below is not.
    whole = count - count % GROUP
    fold_of(total, gradient, drawn, odds, pattern, whole)
    s, g = carray(pointer(total), (count,), f32), carray(pointer(gradient), (count,), f32)
    k, o = carray(pointer(drawn), (count,), u16), carray(pointer(odds), (count,), f32)
    c = u16(pattern)
    for j in range(whole, count):
        a = f32(2 * i32(u16(k[j] ^ c)) + 1)
        b = f32(2 * LEVELS) - a
        a = a * o[j]
        d = a + b
        s[j] += g[j] * (a * b / (d * d))


@loop(*[INT] * 4)
def times(out: Any, total: Any, weight: Any, count: Any) -> None:
    """The weight's part of the logits' gradient, which is written past the caches: end with ``written()``."""
    r, s = carray(pointer(out), (count,), f32), carray(pointer(total), (count,), f32)
    w = carray(pointer(weight), (count,), f32)
    begin = min(-(out // 4) % REGISTER, count)
    end = count - (count - begin) % REGISTER
    for j in range(begin):
        r[j] = s[j] * w[j]
    times_of(out + 4 * begin, total + 4 * begin, weight + 4 * begin, end - begin)
    for j in range(end, count):
        r[j] = s[j] * w[j]


@loop(INT, INT, types.float32)
def fill(out: Any, count: Any, value: Any) -> None:
    """One number everywhere."""
    o = carray(pointer(out), (count,), f32)
    for j in range(count):
        o[j] = value


@loop(INT, INT, INT)
def copy(out: Any, numbers: Any, count: Any) -> None:
    """The same numbers elsewhere."""
    o, x = carray(pointer(out), (count,), f32), carray(pointer(numbers), (count,), f32)
    for j in range(count):
        o[j] = x[j]


@njit(types.int64(INT, INT, INT, INT, WORDS), error_model="numpy", cache=True, nogil=True)
def draw_run(out: Any, element: Any, count: Any, pair: Any, p: Any) -> Any:
    """Write the draws of the tiles that hold ``count`` elements from ``element`` on; return the first one's address."""
    tile = element // TILE
    last = (element + count + TILE - 1) // TILE
    draw(
        out, tile, last - tile, pair, p[COUNTER + 1], p[COUNTER + 2], p[KEY], p[KEY + 1], p[KEY + 2], p[KEY + 3]
    )  # fmt: skip
    return out + 2 * (element - tile * TILE)


@loop(WORDS)
def _walk(p: Any) -> None:
    begin, count, samples, stride = p[BEGIN], p[COUNT], p[SAMPLES], p[STRIDE]
    drawn, limit = np.empty(_RUN + 2 * TILE, u16), np.empty(_RUN, u16)
    odds, total = np.empty(_RUN, f32), np.empty(_RUN, f32)
    first, end = begin // _RUN, (begin + count + _RUN - 1) // _RUN
    while True:
        # Inside the loop: Numba frees an array after its last use by name, which an address is not.
        k0, t, o, s = drawn.ctypes.data, limit.ctypes.data, odds.ctypes.data, total.ctypes.data
        run = first + take(p.ctypes.data, 1)
        if run >= end:
            break
        lo, hi = max(begin, run * _RUN), min(begin + count, (run + 1) * _RUN)
        at, size = 4 * (lo - begin), hi - lo
        gates(t, o, p[LOGITS] + at, size)
        fill(s, size, f32(0.0))
        k = k0
        for i in range(samples):
            sample = p[COUNTER] + i
            if i == 0 or sample % PAIR == 0:
                k = draw_run(k0, lo, size, sample // PAIR, p)
            pattern, row = PATTERNS[sample % PAIR], 4 * i * stride + at
            if p[MASKED] != 0:
                mask(p[MASKED] + row, p[WEIGHT] + at, k, t, pattern, size)
            if p[RESULT] != 0:
                fold(s, p[GRADIENT] + row, k, o, pattern, size)
        if p[RESULT] != 0:
            times(p[RESULT] + at, s, p[WEIGHT] + at, size)
    written()


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def walk(address: Any) -> None:
    """Walk over the elements BEGIN to BEGIN + COUNT - 1, as the fields say; safe to run on many threads at once.

    If MASKED is not 0, each sample's masked weight is written there. If RESULT is not 0, the gradient of the logits is:
    the sum over samples of GRADIENT times ds/dlogit (tau = 1), times the weight.
    """
    _walk(carray(address, (FIELDS,), i64))
