"""The fused loops, compiled by Numba: draw, compare, mask, and fold gradients, a tile of 512 elements at a time.

Each loop restates :mod:`sublens.noise` and :mod:`sublens.kernels.reference` operation by operation, in the same order,
so that its samples have the same bits. What it saves is memory traffic: thresholds, noise and samples of a tile live in
the first-level cache only, and are used for all K samples while the tile's weights and logits are there.

The inner functions take plain slices and have no branches, which is what lets LLVM turn them into vector instructions;
``error_model="numpy"`` removes the test for a zero divisor for the same reason.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from sublens.kernels.reference import LOGIT_BOUND
from sublens.noise import LANES, LEVELS, PARITY, TILE

f32, i32, u32, i64 = np.float32, np.int32, np.uint32, np.int64
_BOUND = f32(LOGIT_BOUND)
_LEVELS = f32(LEVELS)
_PARITY = u32(PARITY)
_RUN = 8  # tiles that a thread takes at a time

# Where each argument stands in the int64 array that a loop is given.
NEXT, WEIGHT, LOGITS, MASKED, GRADIENT, RESULT, BEGIN, COUNT, SAMPLES, STRIDE = range(10)
KEY, COUNTER = 10, 14
FIELDS = 17
"""NEXT is the first tile not yet taken, counted from the first; WEIGHT ... RESULT are addresses of float32 data, of
element BEGIN; MASKED and GRADIENT hold SAMPLES rows, STRIDE elements apart; KEY is four words, COUNTER three (first
sample, step low, step high)."""


@intrinsic
def _take(typingctx: Any, address: Any, amount: Any) -> Any:
    """Atomically add to an int64 and give its former value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], args[1], "monotonic")

    return types.int64(types.CPointer(types.int64), types.int64), codegen


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """An address as a pointer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@intrinsic
def _as_float(typingctx: Any, word: Any) -> Any:
    """The float32 that has these 32 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@njit(inline="always")
def _mix(a: Any, b: Any, r: Any) -> Any:
    a = u32(a + b)
    return a, u32(u32(u32(b << u32(r)) | u32(b >> u32(32 - r))) ^ a)


@njit(inline="always")
def _inject(a: Any, b: Any, c: Any, d: Any, ka: Any, kb: Any, kc: Any, kd: Any, s: Any) -> Any:
    return u32(a + ka), u32(b + kb), u32(c + kc), u32(d + u32(kd + u32(s)))


@njit(inline="always")
def threefry(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any, k2: Any, k3: Any) -> Any:
    """Threefry-4x32-13: four counter words and four key words to four words."""
    k4 = u32(k0 ^ k1 ^ k2 ^ k3 ^ _PARITY)
    a, b, c, d = u32(c0 + k0), u32(c1 + k1), u32(c2 + k2), u32(c3 + k3)
    a, b = _mix(a, b, 10)
    c, d = _mix(c, d, 26)
    a, d = _mix(a, d, 11)
    c, b = _mix(c, b, 21)
    a, b = _mix(a, b, 13)
    c, d = _mix(c, d, 27)
    a, d = _mix(a, d, 23)
    c, b = _mix(c, b, 5)
    a, b, c, d = _inject(a, b, c, d, k1, k2, k3, k4, 1)
    a, b = _mix(a, b, 6)
    c, d = _mix(c, d, 20)
    a, d = _mix(a, d, 17)
    c, b = _mix(c, b, 11)
    a, b = _mix(a, b, 25)
    c, d = _mix(c, d, 10)
    a, d = _mix(a, d, 18)
    c, b = _mix(c, b, 20)
    a, b, c, d = _inject(a, b, c, d, k2, k3, k4, k0, 2)
    a, b = _mix(a, b, 10)
    c, d = _mix(c, d, 26)
    a, d = _mix(a, d, 11)
    c, b = _mix(c, b, 21)
    a, b = _mix(a, b, 13)
    c, d = _mix(c, d, 27)
    a, d = _mix(a, d, 23)
    c, b = _mix(c, b, 5)
    a, b, c, d = _inject(a, b, c, d, k3, k4, k0, k1, 3)
    a, b = _mix(a, b, 6)
    c, d = _mix(c, d, 20)
    return a, b, c, d


def _vector(signature: Any) -> Any:
    return njit(signature, error_model="numpy", cache=True, nogil=True)


_floats = types.Array(types.float32, 1, "C")
_ints = types.Array(types.int32, 1, "C")
_words = types.Array(types.int64, 1, "C")


@_vector(types.void(_ints, types.int64, types.int64, _words))
def _draw(k: Any, tile: Any, sample: Any, p: Any) -> None:
    """The 512 draws of a tile, for the first sample of a pair."""
    k0, k1, k2, k3 = u32(p[KEY]), u32(p[KEY + 1]), u32(p[KEY + 2]), u32(p[KEY + 3])
    c1, c2, c3 = u32(sample >> 1), u32(p[COUNTER + 1]), u32(p[COUNTER + 2])
    first = u32(tile * LANES)
    low = u32(0xFFFF)
    for j in range(LANES):
        a, b, c, d = threefry(u32(first + u32(j)), c1, c2, c3, k0, k1, k2, k3)
        k[j] = a & low
        k[64 + j] = a >> u32(16)
        k[128 + j] = b & low
        k[192 + j] = b >> u32(16)
        k[256 + j] = c & low
        k[320 + j] = c >> u32(16)
        k[384 + j] = d & low
        k[448 + j] = d >> u32(16)


@_vector(types.void(_ints))
def _mirror(k: Any) -> None:
    """From the first sample of a pair to the second: 1 - u for u."""
    for j in range(TILE):
        k[j] = i32(LEVELS - 1) - k[j]


@_vector(types.void(_floats, _floats))
def _odds(o: Any, logits: Any) -> None:
    for j in range(o.size):
        x = logits[j]
        x = _BOUND if x > _BOUND else x
        x = -_BOUND if x < -_BOUND else x
        n = np.floor(x * f32(1.4426950408889634) + f32(0.5))
        r = x - n * f32(0.693359375)
        r = r - n * f32(-2.12194440e-4)
        q = f32(1.9875691500e-4)
        q = q * r + f32(1.3981999507e-3)
        q = q * r + f32(8.3334519073e-3)
        q = q * r + f32(4.1665795894e-2)
        q = q * r + f32(1.6666665459e-1)
        q = q * r + f32(5.0000001201e-1)
        q = q * (r * r) + r + f32(1.0)
        o[j] = q * _as_float(i32(i32(i32(n) + 127) << 23))


@_vector(types.void(_ints, _floats))
def _thresholds(t: Any, o: Any) -> None:
    for j in range(t.size):
        t[j] = i32(_LEVELS / (f32(1.0) + o[j]) + f32(0.5))


@_vector(types.void(_floats, _floats, _ints, _ints))
def _mask(out: Any, weight: Any, k: Any, t: Any) -> None:
    for j in range(out.size):
        w = weight[j]
        out[j] = w if k[j] >= t[j] else f32(0.0)


@_vector(types.void(_floats, _floats, _ints, _floats))
def _fold(total: Any, gradient: Any, k: Any, o: Any) -> None:
    for j in range(total.size):
        a = f32(i32(k[j] + k[j] + 1))
        b = f32(2 * LEVELS) - a
        a = a * o[j]
        d = a + b
        total[j] += gradient[j] * (a * b / (d * d))


@_vector(types.void(_floats, _floats, _floats))
def _times(out: Any, total: Any, weight: Any) -> None:
    for j in range(out.size):
        out[j] = total[j] * weight[j]


@_vector(types.void(types.CPointer(types.int64)))
def _walk(pointer: Any) -> None:
    p = carray(pointer, (FIELDS,))
    begin, count, samples, stride = p[BEGIN], p[COUNT], p[SAMPLES], p[STRIDE]
    weight = carray(_pointer(p[WEIGHT]), (count,), f32)
    logits = carray(_pointer(p[LOGITS]), (count,), f32)
    rows = (samples - 1) * stride + count
    # An address of 0 stands for «not wanted»; the arrays made of it are never touched.
    masked = carray(_pointer(p[MASKED]), (rows,), f32)
    gradient = carray(_pointer(p[GRADIENT]), (rows,), f32)
    result = carray(_pointer(p[RESULT]), (count,), f32)
    wants_masked, wants_result = p[MASKED] != 0, p[RESULT] != 0
    draws, limit = np.empty(TILE, i32), np.empty(TILE, i32)
    odds, total = np.empty(TILE, f32), np.empty(TILE, f32)
    first, last = begin // TILE, (begin + count + TILE - 1) // TILE
    while True:
        start = first + _take(pointer, _RUN)
        if start >= last:
            break
        for tile in range(start, min(start + _RUN, last)):
            lo, hi = max(begin, tile * TILE), min(begin + count, (tile + 1) * TILE)
            a, b = lo - begin, hi - begin
            skip, size = lo - tile * TILE, hi - lo
            o, t, g = odds[:size], limit[:size], total[:size]
            k = draws[skip : skip + size]
            _odds(o, logits[a:b])
            if wants_masked:
                _thresholds(t, o)
            g[:] = f32(0.0)
            for s in range(samples):
                sample = p[COUNTER] + s
                if s == 0 or sample % 2 == 0:
                    _draw(draws, tile, sample, p)
                if sample % 2 == 1:
                    _mirror(draws)
                row = s * stride
                if wants_masked:
                    _mask(masked[row + a : row + b], weight[a:b], k, t)
                if wants_result:
                    _fold(g, gradient[row + a : row + b], k, o)
            if wants_result:
                _times(result[a:b], g, weight[a:b])


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def walk(pointer: Any) -> None:
    """Walk over the elements BEGIN to BEGIN + COUNT - 1, as the fields say; safe to run on many threads at once.

    If MASKED is not 0, each sample's masked weight is written there. If RESULT is not 0, the gradient of the logits is:
    the sum over samples of GRADIENT times ds/dlogit (tau = 1), times the weight.
    """
    _walk(pointer)
