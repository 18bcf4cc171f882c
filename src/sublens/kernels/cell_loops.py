"""What an LSTM does with its gates and cells at one time step, and its gradient, compiled by Numba.

PyTorch would do it in some ten operations a step, each of which starts threads and writes what the next one reads.
"""

from typing import Any

from numba import carray, cfunc, njit, types

from sublens.kernels.loops import INT, WORDS, copy, exp_of, f32, i64, loop
from sublens.kernels.vector import pointer, take

_ROWS = 8  # that a thread takes at a time

NEXT, ROWS, OF_SAMPLE, SIZE, SOURCE, APART, GATES, BEFORE, CELLS, OUTPUTS = range(10)
OF_OUTPUTS, OF_HIDDEN, OF_CELLS, OF_GATES = 9, 10, 11, 12
CELL_FIELDS = 13
"""NEXT is the first row not yet taken. There are ROWS sequences, OF_SAMPLE for each sample, with cells of SIZE numbers.
The others are addresses of contiguous float32: GATES has 4 SIZE for each row, in the order i, f, g, o, and BEFORE and
CELLS (the cells before this step and after it) have SIZE. SOURCE is what goes into the gates, or OF_OUTPUTS, which
stands at OUTPUTS in the backward pass, the gradient of the step's outputs; samples are APART numbers apart in both.
OF_HIDDEN is the gradient that comes from the next step, or 0; OF_CELLS, for its cells, is read and written."""


@njit(error_model="numpy", inline="always")
def _sigmoid(x: Any) -> Any:
    x = f32(-80.0) if x < f32(-80.0) else x  # beyond it, exp is no normal number; NaN stays NaN
    x = f32(80.0) if x > f32(80.0) else x
    return f32(1.0) / (f32(1.0) + exp_of(-x))


# tanh(x) / x - 1 over x^2, as a polynomial of x^2: fitted for |x| <= 5/8, where it leaves an error of 5e-9 of tanh.
_T4, _T3, _T2, _T1, _T0 = map(
    f32, (-0.0057049826718866825, 0.02063908241689205, -0.05373971536755562, 0.13331441581249237, -0.3333328068256378)
)


@njit(error_model="numpy", inline="always")
def _tanh(x: Any) -> Any:
    """tanh(x) to some 2e-7 of it, also where x is small: what follows may be, too."""
    z = x * x
    near = x + x * z * ((((_T4 * z + _T3) * z + _T2) * z + _T1) * z + _T0)
    y = f32(-20.0) if x < f32(-20.0) else x  # it is -1 or 1 there
    y = f32(20.0) if y > f32(20.0) else y
    far = f32(1.0) - f32(2.0) / (f32(1.0) + exp_of(y + y))
    return near if z < f32(0.390625) else far


# One plain loop for each thing that is written, in place or to a place of its own: only so does LLVM make vectors.


@loop(INT, INT)
def _to_sigmoids(values: Any, count: Any) -> None:
    x = carray(pointer(values), (count,), f32)
    for j in range(count):
        x[j] = _sigmoid(x[j])


@loop(INT, INT)
def _to_tanhs(values: Any, count: Any) -> None:
    x = carray(pointer(values), (count,), f32)
    for j in range(count):
        x[j] = _tanh(x[j])


@loop(*[INT] * 4)
def _cells(out: Any, before: Any, gates: Any, n: Any) -> None:
    c, b = carray(pointer(out), (n,), f32), carray(pointer(before), (n,), f32)
    i, f = carray(pointer(gates), (n,), f32), carray(pointer(gates + 4 * n), (n,), f32)
    g = carray(pointer(gates + 8 * n), (n,), f32)
    for j in range(n):
        c[j] = f[j] * b[j] + i[j] * g[j]


@loop(*[INT] * 4)
def _outputs(out: Any, cells: Any, o: Any, n: Any) -> None:
    h, c, opened = (carray(pointer(out), (n,), f32), carray(pointer(cells), (n,), f32), carray(pointer(o), (n,), f32))
    for j in range(n):
        h[j] = opened[j] * _tanh(c[j])


@loop(WORDS)
def _forward(p: Any) -> None:
    n = p[SIZE]
    while True:
        first = take(p.ctypes.data, _ROWS)
        if first >= p[ROWS]:
            break
        for row in range(first, min(first + _ROWS, p[ROWS])):
            source = p[SOURCE] + 4 * (row // p[OF_SAMPLE] * p[APART] + row % p[OF_SAMPLE] * 4 * n)
            gates, at = p[GATES] + 16 * row * n, 4 * row * n
            if source != gates:
                copy(gates, source, 4 * n)
            _to_sigmoids(gates, 2 * n)
            _to_tanhs(gates + 8 * n, n)
            _to_sigmoids(gates + 12 * n, n)
            _cells(p[CELLS] + at, p[BEFORE] + at, gates, n)
            _outputs(p[OUTPUTS] + at, p[CELLS] + at, gates + 12 * n, n)


@loop(*[INT] * 6)
def _into_cells(of_cells: Any, of_o: Any, of_h: Any, cells: Any, o: Any, n: Any) -> None:
    """The gradient of the outputs goes on into the cells and the gate o."""
    s, t = carray(pointer(of_cells), (n,), f32), carray(pointer(of_o), (n,), f32)
    h, c, opened = carray(pointer(of_h), (n,), f32), carray(pointer(cells), (n,), f32), carray(pointer(o), (n,), f32)
    for j in range(n):
        squashed = _tanh(c[j])
        x = h[j] * opened[j]
        t[j] = x * squashed * (f32(1.0) - opened[j])
        s[j] += x * (f32(1.0) - squashed * squashed)


@loop(*[INT] * 5)
def _into_sigmoid(out: Any, of_cells: Any, other: Any, gate: Any, n: Any) -> None:
    t, s = carray(pointer(out), (n,), f32), carray(pointer(of_cells), (n,), f32)
    x, y = carray(pointer(other), (n,), f32), carray(pointer(gate), (n,), f32)
    for j in range(n):
        t[j] = s[j] * x[j] * (y[j] * (f32(1.0) - y[j]))


@loop(*[INT] * 5)
def _into_tanh(out: Any, of_cells: Any, other: Any, gate: Any, n: Any) -> None:
    t, s = carray(pointer(out), (n,), f32), carray(pointer(of_cells), (n,), f32)
    x, y = carray(pointer(other), (n,), f32), carray(pointer(gate), (n,), f32)
    for j in range(n):
        t[j] = s[j] * x[j] * (f32(1.0) - y[j] * y[j])


@loop(*[INT] * 4)
def _sum(out: Any, one: Any, other: Any, n: Any) -> None:
    t, x, y = carray(pointer(out), (n,), f32), carray(pointer(one), (n,), f32), carray(pointer(other), (n,), f32)
    for j in range(n):
        t[j] = x[j] + y[j]


@loop(*[INT] * 3)
def _scale(out: Any, factor: Any, n: Any) -> None:
    t, x = carray(pointer(out), (n,), f32), carray(pointer(factor), (n,), f32)
    for j in range(n):
        t[j] *= x[j]


@loop(WORDS)
def _backward(p: Any) -> None:
    n = p[SIZE]
    while True:
        first = take(p.ctypes.data, _ROWS)
        if first >= p[ROWS]:
            break
        for row in range(first, min(first + _ROWS, p[ROWS])):
            at = 4 * row * n
            of_h = p[OF_OUTPUTS] + 4 * (row // p[OF_SAMPLE] * p[APART] + row % p[OF_SAMPLE] * n)
            gates, of_gates, of_cells = p[GATES] + 4 * at, p[OF_GATES] + 4 * at, p[OF_CELLS] + at
            if p[OF_HIDDEN] != 0:
                _sum(of_gates, of_h, p[OF_HIDDEN] + at, n)  # in a place that is written below
                of_h = of_gates
            _into_cells(of_cells, of_gates + 12 * n, of_h, p[CELLS] + at, gates + 12 * n, n)
            _into_sigmoid(of_gates, of_cells, gates + 8 * n, gates, n)
            _into_sigmoid(of_gates + 4 * n, of_cells, p[BEFORE] + at, gates + 4 * n, n)
            _into_tanh(of_gates + 8 * n, of_cells, gates, gates + 8 * n, n)
            _scale(of_cells, gates + 4 * n, n)


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def forward(address: Any) -> None:
    """GATES, CELLS and OUTPUTS of a step. On many threads at once."""
    _forward(carray(address, (CELL_FIELDS,), i64))


@cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", cache=True)
def backward(address: Any) -> None:
    """OF_GATES, the gradient of what went into the gates, and OF_CELLS, that of BEFORE. On many threads at once."""
    _backward(carray(address, (CELL_FIELDS,), i64))
