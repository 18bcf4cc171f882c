"""Vector code that Numba does not write by itself, as LLVM instructions: its words, sums, a transpose.

The noise and the gates (:mod:`sublens.kernels.gate_vectors`), the product (:mod:`sublens.kernels.product`) and bfloat16
(:mod:`sublens.kernels.halves`) are written with it.

Vectors are eight numbers wide. LLVM makes of them what the processor has: one AVX register, two of SSE or NEON. The
gates' and the product's are sixteen wide where there is AVX-512. Each of their numbers is one of a vector, computed in
the same order, so that results do not depend on it.
Addresses are int64, in bytes; strides are int64, in elements.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

WIDTH = 8
LINE = 64  # bytes that a cache moves at a time
F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, WORDS = ir.VectorType(F32, WIDTH), ir.VectorType(I32, WIDTH)
# What is compiled for, which Numba's environment variables may change: (triple, name, features).
_TRIPLE, CPU, _LISTED = cpu_target.target_context.codegen().magic_tuple()
FEATURES = _LISTED.split(",")
REGISTER = 16 if "+avx512f" in FEATURES else 8
"""Numbers in a vector of the product, and of the gates."""
LONG_FLOATS, LONG_WORDS = ir.VectorType(F32, REGISTER), ir.VectorType(I32, REGISTER)
LONG_HALVES = ir.VectorType(I16, REGISTER)
# A product and the sum it goes into may be one instruction (fused multiply-add) where the processor has it.
FUSE = ("contract",)


def integer(value: int) -> Any:
    """An int64 that is known when code is made."""
    return ir.Constant(I64, value)


def spread(b: Any, vector: Any, scalar: Any) -> Any:
    """A vector of that type which is the same number everywhere."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    return b.shuffle_vector(b.insert_element(undefined, scalar, ir.Constant(I32, 0)), undefined, first)


def load(b: Any, vector: Any, address: Any, align: int = 4) -> Any:
    """The vector at an address, which need be a multiple of the size of its numbers only."""
    value = b.load(b.inttoptr(address, vector.as_pointer()))
    value.align = align
    return value


def store(b: Any, value: Any, address: Any, align: int = 4) -> None:
    """Write a vector to such an address."""
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = align


@intrinsic
def take(typingctx: Any, address: Any, amount: Any) -> Any:
    """Atomically add to the int64 at an address and give its former value."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def wait(typingctx: Any, address: Any, amount: Any) -> Any:
    """Return when the int64 at an address, to which others :func:`take`, has reached an amount; see what they wrote."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        address, amount = args
        loop, after = b.append_basic_block("wait"), b.append_basic_block("waited")
        b.branch(loop)
        b.position_at_end(loop)
        if _TRIPLE.startswith(("x86", "i686")):  # the processor need not race ahead of a loop that waits
            b.call(b.module.declare_intrinsic("llvm.x86.sse2.pause", (), ir.FunctionType(ir.VoidType(), [])), [])
        reached = b.load_atomic(b.inttoptr(address, I64.as_pointer()), "acquire", 8)
        b.cbranch(b.icmp_signed("<", reached, amount), loop, after)
        b.position_at_end(after)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """An address as a pointer."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@intrinsic
def as_float(typingctx: Any, word: Any) -> Any:
    """The float32 that has these 32 bits."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], F32)

    return types.float32(types.int32), codegen


@intrinsic
def as_word(typingctx: Any, number: Any) -> Any:
    """The 32 bits of a float32, as an int32."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], I32)

    return types.int32(types.float32), codegen


def prefetch(b: Any, address: Any) -> None:
    """Ask for the line of an address to be brought into the second-level cache, without waiting for it."""
    byte = ir.IntType(8).as_pointer()
    function = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    kind = [ir.Constant(I32, n) for n in (0, 2, 1)]  # to read; kept in the second level; data
    b.call(b.module.declare_intrinsic("llvm.prefetch.p0", (), function), [b.inttoptr(address, byte), *kind])


GROUP = 32
"""Numbers whose gates, or squares, are computed side by side: two vectors or four. A processor's scheduler holds about
two chains of such length, so that one after the other they would wait for each other's last steps."""


def in_steps(b: Any, step: int, begin: Any, end: Any, work: Callable[[Any], None]) -> None:
    """Do some work for every ``step`` numbers from ``begin`` to ``end``, a multiple: it is given the first's place."""
    before, loop, after = b.block, b.append_basic_block("steps"), b.append_basic_block("stepped")
    b.cbranch(b.icmp_signed("<", begin, end), loop, after)
    b.position_at_end(loop)
    j = b.phi(I64)
    j.add_incoming(begin, before)
    work(j)
    following = b.add(j, integer(step))
    j.add_incoming(following, loop)
    b.cbranch(b.icmp_signed("<", following, end), loop, after)
    b.position_at_end(after)


@intrinsic
def written(typingctx: Any) -> Any:
    """Let all that this thread has written stand in memory before anything it does next."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def squares_of(typingctx: Any, address: Any, count: Any, constant: Any) -> Any:
    """Sum of the squares of ``count`` float32 numbers, a multiple of GROUP, each with the constant added."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        constant = spread(b, FLOATS, args[2])

        def add(x: Any, total: Any) -> Any:
            x = b.fadd(x, constant)
            return b.fadd(b.fmul(x, x, flags=FUSE), total, flags=FUSE)

        return _emit_sum(b, add, args)

    return types.float32(types.int64, types.int64, types.float32), codegen


@intrinsic
def sum_of(typingctx: Any, address: Any, count: Any) -> Any:
    """Sum of ``count`` float32 numbers, a multiple of GROUP."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _emit_sum(b, b.fadd, args)

    return types.float32(types.int64, types.int64), codegen


def _emit_sum(b: Any, add: Callable[[Any, Any], Any], args: Sequence[Any]) -> Any:
    """Run ``add`` over vectors of numbers and of what was summed so far; add up what comes out."""
    address, count = args[:2]
    nothing = ir.Constant(FLOATS, [0.0] * WIDTH)
    before, loop, after = b.block, b.append_basic_block("summing"), b.append_basic_block("summed")
    b.cbranch(b.icmp_signed(">", count, integer(0)), loop, after)
    b.position_at_end(loop)
    j, sums = b.phi(I64), [b.phi(FLOATS) for _ in range(GROUP // WIDTH)]
    j.add_incoming(integer(0), before)
    new = []
    for i, total in enumerate(sums):
        total.add_incoming(nothing, before)
        x = load(b, FLOATS, b.add(address, b.mul(b.add(j, integer(WIDTH * i)), integer(4))))
        new.append(add(x, total))
        total.add_incoming(new[-1], loop)
    following = b.add(j, integer(GROUP))
    j.add_incoming(following, loop)
    b.cbranch(b.icmp_signed("<", following, count), loop, after)
    b.position_at_end(after)
    finals = [b.phi(FLOATS) for _ in new]
    for final, value in zip(finals, new, strict=True):
        final.add_incoming(nothing, before)
        final.add_incoming(value, loop)
    whole = ir.Constant(F32, 0.0)
    for final in finals:
        for lane in range(WIDTH):
            whole = b.fadd(whole, b.extract_element(final, ir.Constant(I32, lane)))
    return whole


@intrinsic
def transpose(typingctx: Any, source: Any, source_r: Any, target: Any, target_r: Any) -> Any:
    """Write the transpose of an 8 x 8 block of float32; rows are contiguous in both."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, source_r, target, target_r = args
        source_r, target_r = b.mul(source_r, integer(4)), b.mul(target_r, integer(4))
        rows = [load(b, FLOATS, b.add(source, b.mul(source_r, integer(r)))) for r in range(WIDTH)]
        # Three rounds, each of which exchanges halves at distance 4, 2 and 1 between rows at that distance.
        for distance in (4, 2, 1):
            low = [i if not i & distance else i - distance + WIDTH for i in range(WIDTH)]
            high = [i + distance if not i & distance else i + WIDTH for i in range(WIDTH)]
            for r in range(WIDTH):
                if not r & distance:
                    x, y = rows[r], rows[r + distance]
                    rows[r] = b.shuffle_vector(x, y, ir.Constant(WORDS, low))
                    rows[r + distance] = b.shuffle_vector(x, y, ir.Constant(WORDS, high))
        for r in range(WIDTH):
            store(b, rows[r], b.add(target, b.mul(target_r, integer(r))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen
