"""Vector code that Numba does not write by itself, as LLVM instructions: noise, gates, a product in registers.

Vectors are eight numbers wide. LLVM makes of them what the processor has: one AVX register, two of SSE or NEON. The
product's and the gates' are sixteen wide where there is AVX-512, which has twice as many registers too. Each of their
numbers is one of a vector, computed in the same order, so that results do not depend on it.
Addresses are int64, in bytes; strides are int64, in elements.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from sublens.kernels.reference import LOG2_E, LOGIT_BOUND, POLYNOMIAL, ROUNDER
from sublens.noise import LANES, LEVELS, PARITY, ROTATIONS, ROUNDS

WIDTH = 8
_LINE = 64  # bytes that a cache moves at a time
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(_F32, WIDTH), ir.VectorType(_I32, WIDTH)
# What is compiled for, which Numba's environment variables may change: (triple, name, features).
_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
REGISTER = 16 if "+avx512f" in _FEATURES else 8
"""Numbers in a vector of the product and of the gates."""
_LONG_FLOATS, _LONG_WORDS = ir.VectorType(_F32, REGISTER), ir.VectorType(_I32, REGISTER)
# A product and the sum it goes into may be one instruction (fused multiply-add) where the processor has it.
_FUSE = ("contract",)


def _int(value: int) -> Any:
    return ir.Constant(_I64, value)


def _all(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * WIDTH)


def _spread(b: Any, vector: Any, scalar: Any) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    first = ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
    return b.shuffle_vector(b.insert_element(undefined, scalar, ir.Constant(_I32, 0)), undefined, first)


def _load(b: Any, vector: Any, address: Any) -> Any:
    value = b.load(b.inttoptr(address, vector.as_pointer()))
    value.align = 4
    return value


def _store(b: Any, value: Any, address: Any) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 4


@intrinsic
def take(typingctx: Any, address: Any, amount: Any) -> Any:
    """Atomically add to the int64 at an address and give its former value."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], _I64.as_pointer()), args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


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
        return b.bitcast(args[0], _F32)

    return types.float32(types.int32), codegen


@intrinsic
def as_word(typingctx: Any, number: Any) -> Any:
    """The 32 bits of a float32, as an int32."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], _I32)

    return types.int32(types.float32), codegen


@intrinsic
def fetch(typingctx: Any, address: Any, count: Any) -> Any:
    """Ask for ``count`` float32 numbers to be brought into the second-level cache, without waiting for them."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        address, count = args
        byte = ir.IntType(8).as_pointer()
        arguments = [byte, _I32, _I32, _I32]
        prefetch = b.module.declare_intrinsic("llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), arguments))
        end = b.add(address, b.mul(count, _int(4)))
        before, loop, after = b.block, b.append_basic_block("fetch"), b.append_basic_block("fetched")
        b.cbranch(b.icmp_signed("<", address, end), loop, after)
        b.position_at_end(loop)
        at = b.phi(_I64)
        at.add_incoming(address, before)
        kind = [ir.Constant(_I32, n) for n in (0, 2, 1)]  # to read; kept in the second level; data
        b.call(prefetch, [b.inttoptr(at, byte), *kind])
        following = b.add(at, _int(_LINE))
        at.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, end), loop, after)
        b.position_at_end(after)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def draw(
    typingctx: Any, out: Any, tile: Any, tiles: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any, k2: Any, k3: Any
) -> Any:
    """Write the 16-bit draws of ``tiles`` tiles from number ``tile`` on: :func:`sublens.noise.threefry`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        out, tile, tiles, *words = args
        c1, c2, c3, *key = (_spread(b, _WORDS, b.trunc(word, _I32)) for word in words)
        parity = b.xor(b.xor(b.xor(key[0], key[1]), b.xor(key[2], key[3])), _all(PARITY))
        keys = (*key, parity)
        first = _spread(b, _WORDS, b.trunc(b.mul(tile, _int(LANES)), _I32))
        first = b.add(first, ir.Constant(_WORDS, list(range(LANES))))
        start = [b.add(c, k) for c, k in zip((c1, c2, c3), key[1:], strict=True)]
        before, loop, after = b.block, b.append_basic_block("draw"), b.append_basic_block("drawn")
        b.cbranch(b.icmp_signed(">", tiles, _int(0)), loop, after)
        b.position_at_end(loop)
        done, block = b.phi(_I64), b.phi(_WORDS)
        done.add_incoming(_int(0), before)
        block.add_incoming(first, before)
        x = [b.add(block, key[0]), *start]
        for r in range(ROUNDS):
            pairs = ((0, 1), (2, 3)) if r % 2 == 0 else ((0, 3), (2, 1))
            for (i, j), bits in zip(pairs, ROTATIONS[r % 8], strict=True):
                x[i] = b.add(x[i], x[j])
                x[j] = b.xor(b.or_(b.shl(x[j], _all(bits)), b.lshr(x[j], _all(32 - bits))), x[i])
            if r % 4 == 3:
                s = (r + 1) // 4
                x = [b.add(x[i], keys[(s + i) % 5]) for i in range(4)]
                x[3] = b.add(x[3], _all(s))
        address = b.add(out, b.mul(done, _int(4 * 4 * LANES)))
        for w in range(4):
            _store(b, x[w], b.add(address, _int(4 * LANES * w)))
        more = b.add(done, _int(1))
        done.add_incoming(more, loop)
        block.add_incoming(b.add(block, _all(LANES)), loop)
        b.cbranch(b.icmp_signed("<", more, tiles), loop, after)
        b.position_at_end(after)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), codegen


def _emit_panel(b: Any, rows: int, vectors: int, apart: int, args: Sequence[Any]) -> None:
    """C[r] += sum over o and t of A[o, t, r] B[o, t], for ``rows`` rows r of ``vectors`` vectors, kept in registers."""
    a, b_, c = args[0], args[4], args[7]
    a_t, a_r, a_o, b_t, b_o, c_r = (b.mul(stride, _int(4)) for stride in (*args[1:4], *args[5:7], args[8]))
    count, outer_count, fresh = args[9], args[10], args[11]
    places = [(r, v) for r in range(rows) for v in range(vectors)]
    if apart:
        a_r = _int(4 * apart)
    targets = [b.add(b.add(c, b.mul(c_r, _int(r))), _int(4 * REGISTER * v)) for r, v in places]
    nothing, fresh = ir.Constant(_LONG_FLOATS, [0.0] * REGISTER), b.icmp_signed("!=", fresh, _int(0))
    at_first = [b.select(fresh, nothing, _load(b, _LONG_FLOATS, target)) for target in targets]
    before = b.block
    outer, inner, latch, after = (b.append_basic_block(name) for name in ("outer", "inner", "latch", "after"))
    b.branch(outer)

    b.position_at_end(outer)
    o, a_outer, b_outer = b.phi(_I64), b.phi(_I64), b.phi(_I64)
    sums_outer = [b.phi(_LONG_FLOATS) for _ in places]
    for phi, value in zip((o, a_outer, b_outer, *sums_outer), (_int(0), a, b_, *at_first), strict=True):
        phi.add_incoming(value, before)
    b.branch(inner)

    b.position_at_end(inner)
    t, a_inner, b_inner = b.phi(_I64), b.phi(_I64), b.phi(_I64)
    sums = [b.phi(_LONG_FLOATS) for _ in places]
    for phi, value in zip((t, a_inner, b_inner, *sums), (_int(0), a_outer, b_outer, *sums_outer), strict=True):
        phi.add_incoming(value, outer)

    def one(r: int) -> Any:
        address = b.add(a_inner, b.mul(a_r, _int(r)))
        return _spread(b, _LONG_FLOATS, b.load(b.inttoptr(address, _F32.as_pointer())))

    def many(v: int) -> Any:
        return _load(b, _LONG_FLOATS, b.add(b_inner, _int(4 * REGISTER * v)))

    def step(x: Any, y: Any, place: tuple[int, int]) -> Any:
        return b.fadd(b.fmul(x, y, flags=_FUSE), sums[places.index(place)], flags=_FUSE)

    # Whichever side needs fewer registers is held, the other comes one by one: 12 sums, 3 held, 1 passing make 16;
    # 24 sums, 4 held, 1 passing make 29 of 32.
    new: dict[tuple[int, int], Any] = {}
    if rows <= vectors:
        held = [one(r) for r in range(rows)]
        for v in range(vectors):
            y = many(v)
            new |= {(r, v): step(held[r], y, (r, v)) for r in range(rows)}
    else:
        held = [many(v) for v in range(vectors)]
        for r in range(rows):
            x = one(r)
            new |= {(r, v): step(x, held[v], (r, v)) for v in range(vectors)}
    results = [new[place] for place in places]
    next_t = b.add(t, _int(1))
    following = (next_t, b.add(a_inner, a_t), b.add(b_inner, b_t), *results)
    for phi, value in zip((t, a_inner, b_inner, *sums), following, strict=True):
        phi.add_incoming(value, inner)
    b.cbranch(b.icmp_signed("<", next_t, count), inner, latch)

    b.position_at_end(latch)
    next_o = b.add(o, _int(1))
    following = (next_o, b.add(a_outer, a_o), b.add(b_outer, b_o), *results)
    for phi, value in zip((o, a_outer, b_outer, *sums_outer), following, strict=True):
        phi.add_incoming(value, latch)
    b.cbranch(b.icmp_signed("<", next_o, outer_count), outer, after)

    b.position_at_end(after)
    for value, target in zip(results, targets, strict=True):
        _store(b, value, target)


def _panel(rows: int, vectors: int, apart: int) -> Any:
    @intrinsic
    def panel(
        typingctx: Any, a: Any, a_t: Any, a_r: Any, a_o: Any, b: Any, b_t: Any, b_o: Any, c: Any, c_r: Any, n: Any,
        m: Any, fresh: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_panel(builder, rows, vectors, apart, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), codegen

    return panel


def _by(vectors: int, apart: int) -> Any:
    """C[r] for all rows: as many as registers allow at a time, then a few, then one by one."""
    many, few = _ROWS[vectors]
    of_many, of_few, of_one = (_panel(rows, vectors, apart) for rows in (many, few, 1))

    @njit(error_model="numpy", nogil=True)
    def run(
        rows: Any, a: Any, a_t: Any, a_r: Any, a_o: Any, b: Any, b_t: Any, b_o: Any, c: Any, c_r: Any, n: Any, m: Any,
        fresh: Any,
    ) -> None:  # fmt: skip
        r = 0
        while r + many <= rows:
            of_many(a + 4 * a_r * r, a_t, a_r, a_o, b, b_t, b_o, c + 4 * c_r * r, c_r, n, m, fresh)
            r += many
        while r + few <= rows:
            of_few(a + 4 * a_r * r, a_t, a_r, a_o, b, b_t, b_o, c + 4 * c_r * r, c_r, n, m, fresh)
            r += few
        while r < rows:
            of_one(a + 4 * a_r * r, a_t, a_r, a_o, b, b_t, b_o, c + 4 * c_r * r, c_r, n, m, fresh)
            r += 1

    return run


_ROWS = (
    {4: (6, 2), 3: (8, 4), 2: (12, 4), 1: (24, 8)} if REGISTER == 16 else {4: (3, 2), 3: (4, 2), 2: (6, 2), 1: (8, 4)}
)
"""Rows of a product that are summed at once, by their number of vectors."""


def product(apart: int = 0) -> Any:
    """A function for Numba: C[r] += sum over o < m and t < n of A[o, t, r] B[o, t], for rows of 1 to 4 vectors.

    It takes ``(vectors, rows, a, a_t, a_r, a_o, b, b_t, b_o, c, c_r, n, m, fresh)``: A, B and C are addresses of
    float32 data; ``a_t`` is the stride of A along t, and so on; vectors are contiguous; n and m are at least 1. If
    ``fresh`` is not 0, what C held before does not count.

    Args:
        apart: the stride of A along r, if it is always the same. It is then part of the instructions. Otherwise one
            row's address is computed from the last one's, and many rows of few vectors wait for that.
    """
    by_1, by_2, by_3, by_4 = (_by(vectors, apart) for vectors in (1, 2, 3, 4))

    @njit(error_model="numpy", nogil=True)
    def run(
        vectors: Any, rows: Any, a: Any, a_t: Any, a_r: Any, a_o: Any, b: Any, b_t: Any, b_o: Any, c: Any, c_r: Any,
        n: Any, m: Any, fresh: Any,
    ) -> None:  # fmt: skip
        if vectors == 4:
            by_4(rows, a, a_t, a_r, a_o, b, b_t, b_o, c, c_r, n, m, fresh)
        elif vectors == 3:
            by_3(rows, a, a_t, a_r, a_o, b, b_t, b_o, c, c_r, n, m, fresh)
        elif vectors == 2:
            by_2(rows, a, a_t, a_r, a_o, b, b_t, b_o, c, c_r, n, m, fresh)
        else:
            by_1(rows, a, a_t, a_r, a_o, b, b_t, b_o, c, c_r, n, m, fresh)

    return run


GROUP = 32
"""Numbers whose gates, or squares, are computed side by side: two vectors or four. A processor's scheduler holds about
two chains of such length, so that one after the other they would wait for each other's last steps."""


def _gates(with_odds: bool) -> Any:
    @intrinsic
    def gates(typingctx: Any, limits: Any, odds: Any, logits: Any, count: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            _emit_gates(b, with_odds, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return gates


def _emit_gates(b: Any, with_odds: bool, args: Sequence[Any]) -> None:
    """:func:`sublens.kernels.reference.odds` and ``thresholds``, operation by operation, none of them fused."""

    def numbers(value: float) -> Any:
        return ir.Constant(_LONG_FLOATS, [value] * REGISTER)

    limits, odds, logits, count = args
    before, loop, after = b.block, b.append_basic_block("gates"), b.append_basic_block("gated")
    b.cbranch(b.icmp_signed(">", count, _int(0)), loop, after)
    b.position_at_end(loop)
    j = b.phi(_I64)
    j.add_incoming(_int(0), before)
    chains = range(GROUP // REGISTER)
    places = [b.add(j, _int(REGISTER * i)) for i in chains]
    bound, least = numbers(LOGIT_BOUND), numbers(-LOGIT_BOUND)
    x = [_load(b, _LONG_FLOATS, b.add(logits, b.mul(places[i], _int(4)))) for i in chains]
    # In this form a NaN stays one.
    x = [b.select(b.fcmp_ordered(">", x[i], bound), bound, x[i]) for i in chains]
    x = [b.select(b.fcmp_ordered("<", x[i], least), least, x[i]) for i in chains]
    y = [b.fmul(x[i], numbers(LOG2_E)) for i in chains]
    z = [b.fadd(y[i], numbers(ROUNDER)) for i in chains]
    f = [b.fsub(z[i], numbers(ROUNDER)) for i in chains]
    f = [b.fsub(y[i], f[i]) for i in chains]
    z = [b.shl(b.bitcast(z[i], _LONG_WORDS), ir.Constant(_LONG_WORDS, [23] * REGISTER)) for i in chains]
    p = [numbers(POLYNOMIAL[0]) for i in chains]
    for coefficient in POLYNOMIAL[1:]:
        p = [b.fmul(p[i], f[i]) for i in chains]
        p = [b.fadd(p[i], numbers(coefficient)) for i in chains]
    o = [b.bitcast(b.add(b.bitcast(p[i], _LONG_WORDS), z[i]), _LONG_FLOATS) for i in chains]
    if with_odds:
        for i in chains:
            _store(b, o[i], b.add(odds, b.mul(places[i], _int(4))))
    t = [b.fadd(numbers(1.0), o[i]) for i in chains]
    t = [b.fdiv(numbers(float(LEVELS)), t[i]) for i in chains]
    t = [b.fadd(t[i], numbers(0.5)) for i in chains]
    t = [b.fptosi(t[i], _LONG_WORDS) for i in chains]
    halves = ir.VectorType(ir.IntType(16), REGISTER)
    for i in chains:
        _store(b, b.trunc(t[i], halves), b.add(limits, b.mul(places[i], _int(2))))
    following = b.add(j, _int(GROUP))
    j.add_incoming(following, loop)
    b.cbranch(b.icmp_signed("<", following, count), loop, after)
    b.position_at_end(after)


limits_of, limits_and_odds_of = _gates(False), _gates(True)


@intrinsic
def squares_of(typingctx: Any, address: Any, count: Any, constant: Any) -> Any:
    """Sum of the squares of ``count`` float32 numbers, a multiple of GROUP, each with the constant added."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        constant = _spread(b, _FLOATS, args[2])

        def add(x: Any, total: Any) -> Any:
            x = b.fadd(x, constant)
            return b.fadd(b.fmul(x, x, flags=_FUSE), total, flags=_FUSE)

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
    nothing = ir.Constant(_FLOATS, [0.0] * WIDTH)
    before, loop, after = b.block, b.append_basic_block("summing"), b.append_basic_block("summed")
    b.cbranch(b.icmp_signed(">", count, _int(0)), loop, after)
    b.position_at_end(loop)
    j, sums = b.phi(_I64), [b.phi(_FLOATS) for _ in range(GROUP // WIDTH)]
    j.add_incoming(_int(0), before)
    new = []
    for i, total in enumerate(sums):
        total.add_incoming(nothing, before)
        x = _load(b, _FLOATS, b.add(address, b.mul(b.add(j, _int(WIDTH * i)), _int(4))))
        new.append(add(x, total))
        total.add_incoming(new[-1], loop)
    following = b.add(j, _int(GROUP))
    j.add_incoming(following, loop)
    b.cbranch(b.icmp_signed("<", following, count), loop, after)
    b.position_at_end(after)
    finals = [b.phi(_FLOATS) for _ in new]
    for final, value in zip(finals, new, strict=True):
        final.add_incoming(nothing, before)
        final.add_incoming(value, loop)
    whole = ir.Constant(_F32, 0.0)
    for final in finals:
        for lane in range(WIDTH):
            whole = b.fadd(whole, b.extract_element(final, ir.Constant(_I32, lane)))
    return whole


@intrinsic
def transpose(typingctx: Any, source: Any, source_r: Any, target: Any, target_r: Any) -> Any:
    """Write the transpose of an 8 x 8 block of float32; rows are contiguous in both."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, source_r, target, target_r = args
        source_r, target_r = b.mul(source_r, _int(4)), b.mul(target_r, _int(4))
        rows = [_load(b, _FLOATS, b.add(source, b.mul(source_r, _int(r)))) for r in range(WIDTH)]
        # Three rounds, each of which exchanges halves at distance 4, 2 and 1 between rows at that distance.
        for distance in (4, 2, 1):
            low = [i if not i & distance else i - distance + WIDTH for i in range(WIDTH)]
            high = [i + distance if not i & distance else i + WIDTH for i in range(WIDTH)]
            for r in range(WIDTH):
                if not r & distance:
                    x, y = rows[r], rows[r + distance]
                    rows[r] = b.shuffle_vector(x, y, ir.Constant(_WORDS, low))
                    rows[r + distance] = b.shuffle_vector(x, y, ir.Constant(_WORDS, high))
        for r in range(WIDTH):
            _store(b, rows[r], b.add(target, b.mul(target_r, _int(r))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen
