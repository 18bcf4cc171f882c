"""Vector code for products in bfloat16: rounding to it, masking in it, and sums of its products in float32.

A word of 32 bits holds two bfloat16 numbers that follow each other along what a product sums over, the first one low.
Addresses are int64, in bytes, as in :mod:`sublens.kernels.vector`.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sublens.kernels.tiles import USED
from sublens.kernels.vector import (
    CPU,
    F32,
    FEATURES,
    FUSE,
    GROUP,
    I16,
    I32,
    LONG_FLOATS,
    LONG_WORDS,
    REGISTER,
    WIDTH,
    in_steps,
    integer,
    load,
    spread,
    store,
)

FAST = USED or ("+avx512bf16" in FEATURES and CPU.startswith("znver"))
"""Whether products in bfloat16 are faster here than in float32. AMD's processors with the instruction do twice as many
of them, Intel's half as many, but those with a matrix unit do eight times as many by that."""
_DOTS = "+avx512bf16" in FEATURES and REGISTER == 16


class _BFloat(ir.types.Type):
    """LLVM's type, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 2 * REGISTER)
_HIGH = 0xFFFF0000 - 2**32  # as a signed number
_NAN = 0x7FC00000
_ALL = ir.VectorType(I16, GROUP)


def summed(b: Any, x: Any, y: Any, total: Any) -> Any:
    """A vector of float32 sums, plus for each word of x and y the products of their high, then of their low numbers.

    The instruction does that too, rounding each sum. It takes numbers below 1e-38 for zero; the others do not.
    """
    if _DOTS:
        shape = ir.FunctionType(LONG_FLOATS, [LONG_FLOATS, _PAIRS, _PAIRS])
        dots = b.module.declare_intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", (), shape)
        return b.call(dots, [total, b.bitcast(x, _PAIRS), b.bitcast(y, _PAIRS)])
    x, y = b.bitcast(x, LONG_WORDS), b.bitcast(y, LONG_WORDS)
    high, bits = ir.Constant(LONG_WORDS, [_HIGH] * REGISTER), ir.Constant(LONG_WORDS, [16] * REGISTER)
    for part in (lambda words: b.and_(words, high), lambda words: b.shl(words, bits)):
        one, other = (b.bitcast(part(words), LONG_FLOATS) for words in (x, y))
        total = b.fadd(b.fmul(one, other, flags=FUSE), total, flags=FUSE)
    return total


def _rounded(b: Any, address: Any) -> Any:
    """Eight float32 numbers as words whose high halves are the nearest bfloat16 numbers, ties to even."""

    def all_of(value: int) -> Any:
        return ir.Constant(ir.VectorType(I32, WIDTH), [value] * WIDTH)

    x = load(b, ir.VectorType(F32, WIDTH), address)
    words = b.bitcast(x, ir.VectorType(I32, WIDTH))
    odd = b.and_(b.lshr(words, all_of(16)), all_of(1))
    # A NaN's bits would run over.
    return b.select(b.fcmp_unordered("uno", x, x), all_of(_NAN), b.add(words, b.add(odd, all_of(0x7FFF))))


@intrinsic
def rounded_of(typingctx: Any, out: Any, numbers: Any, count: Any) -> Any:
    """Write ``count`` float32 numbers, a multiple of WIDTH, as bfloat16 numbers that follow each other."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        out, numbers, count = args
        bits = ir.Constant(ir.VectorType(I32, WIDTH), [16] * WIDTH)

        def work(j: Any) -> None:
            words = b.lshr(_rounded(b, b.add(numbers, b.mul(j, integer(4)))), bits)
            store(b, b.trunc(words, ir.VectorType(I16, WIDTH)), b.add(out, b.mul(j, integer(2))), align=2)

        in_steps(b, WIDTH, integer(0), count, work)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def paired_of(typingctx: Any, out: Any, low: Any, high: Any, count: Any) -> Any:
    """Write ``count`` words, a multiple of WIDTH, of two float32 numbers each, rounded to bfloat16."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        out, low, high, count = args
        vector = ir.VectorType(I32, WIDTH)
        bits, upper = ir.Constant(vector, [16] * WIDTH), ir.Constant(vector, [_HIGH] * WIDTH)

        def work(j: Any) -> None:
            at = b.mul(j, integer(4))
            one, other = _rounded(b, b.add(low, at)), _rounded(b, b.add(high, at))
            store(b, b.or_(b.lshr(one, bits), b.and_(other, upper)), b.add(out, at))

        in_steps(b, WIDTH, integer(0), count, work)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _masked(b: Any, halves: Any, drawn: Any, limits: Any, pattern: Any, j: Any) -> Any:
    """GROUP bfloat16 weights where their draws are not below their thresholds, or 0."""
    at = b.mul(j, integer(2))
    x, k, t = (load(b, _ALL, b.add(address, at), align=2) for address in (halves, drawn, limits))
    is_open = b.icmp_unsigned(">=", b.xor(k, pattern), t)
    return b.select(is_open, x, ir.Constant(_ALL, [0] * GROUP))


@intrinsic
def masked_halves_of(typingctx: Any, out: Any, halves: Any, drawn: Any, limits: Any, pattern: Any, count: Any) -> Any:
    """Write ``count`` masked bfloat16 weights, a multiple of GROUP: words of neighbours in a row."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        out, halves, drawn, limits, pattern, count = args
        pattern = spread(b, _ALL, b.trunc(pattern, I16))

        def work(j: Any) -> None:
            store(b, _masked(b, halves, drawn, limits, pattern, j), b.add(out, b.mul(j, integer(2))), align=2)

        in_steps(b, GROUP, integer(0), count, work)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def masked_rows_of(
    typingctx: Any, out: Any, halves: Any, apart: Any, drawn: Any, drawn_2: Any, limits: Any, pattern: Any, count: Any
) -> Any:
    """Write ``count`` words, a multiple of GROUP, of masked bfloat16 weights: words of neighbours in a column.

    The second row's weights and thresholds stand ``apart`` bytes after the first one's.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        out, halves, apart, drawn, drawn_2, limits, pattern, count = args
        pattern = spread(b, _ALL, b.trunc(pattern, I16))

        def work(j: Any) -> None:
            low = _masked(b, halves, drawn, limits, pattern, j)
            high = _masked(b, b.add(halves, apart), drawn_2, b.add(limits, apart), pattern, j)
            both = [place for i in range(GROUP) for place in (i, GROUP + i)]
            words = b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, 2 * GROUP), both))
            store(b, words, b.add(out, b.mul(j, integer(4))), align=2)

        in_steps(b, GROUP, integer(0), count, work)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen
