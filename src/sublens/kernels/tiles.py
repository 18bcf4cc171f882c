"""Products in bfloat16 by a processor's matrix unit (Intel's AMX), where there is one and the system lets it be used.

The unit multiplies tiles: 16 rows of 16 words, of two bfloat16 numbers each, with 16 words in each of 16 columns, to
256 sums in float32. Addresses are int64, in bytes; strides are int64, in words.
"""

import ctypes
import sys
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from sublens.kernels.vector import FEATURES, integer

_HAS = "+amx-tile" in FEATURES and "+amx-bf16" in FEATURES


def _granted() -> bool:
    """Ask Linux for the unit, whose registers a process gets on demand only: arch_prctl(ARCH_REQ_XCOMP_PERM, 18)."""
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


USED = _HAS and _granted()
"""Whether products in bfloat16 are made by the matrix unit, eight to ten times as fast as others in float32."""

SIDE = 32
"""What a product takes at a time: rows, columns, and bfloat16 numbers that it sums over."""

_I8 = ir.IntType(8)
_SUMS, _LEFT, _RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)
_WIDTH = 64  # bytes of a tile's row
# Palette 1, then each tile's bytes in a row from byte 16 on, in two bytes each, and its rows from byte 48 on.
_SHAPES = bytes([1] + [0] * 15 + [_WIDTH, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8)


def _call(b: Any, name: str, *args: Any) -> None:
    """An instruction of the unit; without one there is nothing to call, and nobody calls what it stands in."""
    if _HAS:
        shape = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
        b.call(b.module.declare_intrinsic(f"llvm.x86.{name}", (), shape), args)


def _number(tile: int) -> Any:
    return ir.Constant(_I8, tile)


@intrinsic
def open_tiles(typingctx: Any) -> Any:
    """Make this thread's registers tiles, until :func:`close_tiles`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        shapes = ir.Constant(ir.ArrayType(_I8, len(_SHAPES)), bytearray(_SHAPES))
        _call(b, "ldtilecfg", b.bitcast(cgutils.global_constant(b, "tiles", shapes), _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def close_tiles(typingctx: Any) -> Any:
    """Give the registers back, which the system then need not keep for the thread."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _call(b, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _clear(typingctx: Any) -> Any:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        for tile in _SUMS:
            _call(b, "tilezero", _number(tile))
        return context.get_dummy_value()

    return types.void(), codegen


def _moving(name: str) -> Any:
    """Move SIDE x SIDE sums between memory, in rows that are ``apart``, and the tiles."""

    @intrinsic
    def move(typingctx: Any, address: Any, apart: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            bytes_apart = b.mul(args[1], integer(4))
            for tile in _SUMS:
                down = b.mul(bytes_apart, integer(16 * (tile // 2)))
                place = b.add(b.add(args[0], down), integer(_WIDTH * (tile % 2)))
                _call(b, name, _number(tile), b.inttoptr(place, _I8.as_pointer()), bytes_apart)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 2), codegen

    return move


_read, _write = _moving("tileloadd64"), _moving("tilestored64")


@intrinsic
def _multiply(typingctx: Any, a: Any, a_apart: Any, b: Any, b_apart: Any) -> Any:
    """Add a product of SIDE x SIDE numbers to the sums: words at ``a`` follow each other, those at ``b`` are apart."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, (left, left_apart, right, right_apart) = builder, args
        left_apart, right_apart = b.mul(left_apart, integer(4)), b.mul(right_apart, integer(4))
        for j, tile in enumerate(_RIGHT):
            place = b.inttoptr(b.add(right, integer(_WIDTH * j)), _I8.as_pointer())
            _call(b, "tileloadd64", _number(tile), place, right_apart)
        for i, tile in enumerate(_LEFT):
            place = b.inttoptr(b.add(left, b.mul(left_apart, integer(16 * i))), _I8.as_pointer())
            _call(b, "tileloadd64", _number(tile), place, left_apart)
            for j, other in enumerate(_RIGHT):
                _call(b, "tdpbf16ps", _number(_SUMS[2 * i + j]), _number(tile), _number(other))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@njit(error_model="numpy", nogil=True)
def tile_product(
    rows: Any, columns: Any, a: Any, a_r: Any, a_o: Any, b: Any, b_t: Any, b_o: Any, c: Any, c_r: Any, n: Any, m: Any,
    fresh: Any,
) -> None:  # fmt: skip
    """C[r] += sum over o < m and t of A[o, r, t] B[o, t], as :func:`sublens.kernels.product.product` with words of two.

    A, B and C are addresses, ``a_r`` the stride of A along r, and so on; along t the words of A follow each other.
    ``rows``, ``columns`` and ``n``, the numbers that t's words hold, are taken SIDE at a time: what is there up to the
    next multiple is read and, of C, written. If ``fresh`` is not 0, what C held before does not count.
    """
    for r in range(0, rows, SIDE):
        for j in range(0, columns, SIDE):
            sums = c + 4 * (r * c_r + j)
            if fresh != 0:
                _clear()
            else:
                _read(sums, c_r)
            for o in range(m):
                left, right = a + 4 * (o * a_o + r * a_r), b + 4 * (o * b_o + j)
                for t in range(0, n, SIDE):
                    _multiply(left + 2 * t, a_r, right + 2 * t * b_t, b_t)
            _write(sums, c_r)
