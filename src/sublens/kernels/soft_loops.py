"""Compiled loops for what is not the paper's gate: uniform noise, and relaxed samples of any :class:`Curve`.

A relaxed sample is sigmoid((logit + noise) / tau). There are only 65,536 draws, so their logistic noise is looked up in
a table of 256 KiB, which stays in the second-level cache: no logarithm. The exponential is the polynomial of
:func:`sublens.kernels.reference.odds`.
"""

from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from sublens.kernels.loops import (
    COUNT,
    COUNTER,
    FIELDS,
    GRADIENT,
    INT,
    LOGITS,
    MASKED,
    PAIR,
    RESULT,
    WEIGHT,
    WORDS,
    draw_run,
    exp_of,
    f32,
    held,
    i64,
    loop,
    u16,
)
from sublens.kernels.reference import SHARPEST
from sublens.kernels.vector import pointer, take
from sublens.noise import LEVELS, PATTERNS, TILE

_RUN = 2048
_SHARPEST = f32(SHARPEST)

# Fields behind those of a walk. From TAU on they are float64.
NOISE, TAU, LOW, HIGH = range(FIELDS, FIELDS + 4)
SOFT_FIELDS = FIELDS + 4
"""NOISE is the address of the noise of each draw (float32), or 0: without noise. MASKED is where scaled weights go, or
0; RESULT where the gradient of the logits goes, or 0."""


@loop(*[INT] * 4, types.float32)
def _sigmoids(out: Any, logits: Any, noise: Any, count: Any, rate: Any) -> None:
    """s = sigmoid((logit + noise) rate)."""
    s, x = carray(pointer(out), (count,), f32), carray(pointer(logits), (count,), f32)
    n = carray(pointer(noise), (count,), f32)
    for j in range(count):
        t = (held(x[j]) + n[j]) * rate
        t = _SHARPEST if t > _SHARPEST else t
        t = -_SHARPEST if t < -_SHARPEST else t
        s[j] = f32(1.0) / (f32(1.0) + exp_of(-t))


@loop(*[INT] * 4)
def _look_up(out: Any, drawn: Any, table: Any, count: Any) -> None:
    n, k = carray(pointer(out), (count,), f32), carray(pointer(drawn), (count,), u16)
    v = carray(pointer(table), (LEVELS,), f32)
    for j in range(count):
        n[j] = v[k[j]]


@loop(*[INT] * 4, types.float32, types.float32)
def _scale(out: Any, weight: Any, sigmoids: Any, count: Any, width: Any, low: Any) -> None:
    m, w = carray(pointer(out), (count,), f32), carray(pointer(weight), (count,), f32)
    s = carray(pointer(sigmoids), (count,), f32)
    for j in range(count):
        z = s[j] * width + low
        z = f32(0.0) if z < f32(0.0) else z
        z = f32(1.0) if z > f32(1.0) else z
        m[j] = w[j] * z


@loop(*[INT] * 5, *[types.float32] * 3)
def _back(
    out: Any, gradient: Any, weight: Any, sigmoids: Any, count: Any, width: Any, low: Any, steepness: Any
) -> None:
    r, g = carray(pointer(out), (count,), f32), carray(pointer(gradient), (count,), f32)
    w, s = carray(pointer(weight), (count,), f32), carray(pointer(sigmoids), (count,), f32)
    for j in range(count):
        z = s[j] * width + low
        slope = s[j] * (f32(1.0) - s[j]) * steepness
        # In this form a NaN stays one.
        slope = f32(0.0) if z <= f32(0.0) else slope
        slope = f32(0.0) if z >= f32(1.0) else slope
        r[j] = g[j] * w[j] * slope


@njit(types.int64(INT, INT, INT, WORDS), error_model="numpy", cache=True, nogil=True)
def _draw(out: Any, element: Any, count: Any, p: Any) -> Any:
    """Write the draws of one sample's elements; return the first one's address."""
    at = draw_run(out, element, count, p[COUNTER] // PAIR, p)
    pattern = u16(PATTERNS[p[COUNTER] % PAIR])
    k = carray(pointer(at), (count,), u16)
    for j in range(count):
        k[j] = u16(k[j] ^ pattern)
    return at


@loop(WORDS)
def _soften(p: Any) -> None:
    f = p.view(np.float64)
    width, low = f32(f[HIGH] - f[LOW]), f32(f[LOW])
    rate, steepness = f32(1.0 / f[TAU]), f32((f[HIGH] - f[LOW]) / f[TAU])
    drawn = np.empty(_RUN + 2 * TILE, u16)
    noise, sigmoids = np.zeros(_RUN, f32), np.empty(_RUN, f32)
    while True:
        # Inside the loop: Numba frees an array after its last use by name, which an address is not.
        n, s = noise.ctypes.data, sigmoids.ctypes.data
        lo = take(p.ctypes.data, 1) * _RUN
        if lo >= p[COUNT]:
            break
        size = min(_RUN, p[COUNT] - lo)
        at = 4 * lo
        if p[NOISE] != 0:
            _look_up(n, _draw(drawn.ctypes.data, lo, size, p), p[NOISE], size)
        _sigmoids(s, p[LOGITS] + at, n, size, rate)
        if p[MASKED] != 0:
            _scale(p[MASKED] + at, p[WEIGHT] + at, s, size, width, low)
        if p[RESULT] != 0:
            _back(p[RESULT] + at, p[GRADIENT] + at, p[WEIGHT] + at, s, size, width, low, steepness)


@loop(WORDS)
def _uniform(p: Any) -> None:
    drawn = np.empty(_RUN + 2 * TILE, u16)
    while True:
        lo = take(p.ctypes.data, 1) * _RUN
        if lo >= p[COUNT]:
            break
        size = min(_RUN, p[COUNT] - lo)
        k = carray(pointer(_draw(drawn.ctypes.data, lo, size, p)), (size,), u16)
        u = carray(pointer(p[MASKED] + 4 * lo), (size,), f32)
        for j in range(size):
            u[j] = (f32(k[j]) + f32(0.5)) * f32(1.0 / LEVELS)


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def soften(address: Any) -> None:
    """Scaled weights, or gradients of logits, of one relaxed sample. On many threads at once."""
    _soften(carray(address, (SOFT_FIELDS,), i64))


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def uniform(address: Any) -> None:
    """The uniform noise of one sample, written to MASKED. On many threads at once."""
    _uniform(carray(address, (SOFT_FIELDS,), i64))
