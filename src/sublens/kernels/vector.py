"""Vector code that Numba does not write by itself, as LLVM instructions: noise, gates, a product in registers.

Vectors are eight numbers wide. LLVM makes of them what the processor has: one AVX register, two of SSE or NEON.
Addresses are int64, in bytes; strides are int64, in elements.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from sublens.kernels.reference import LOG2_E, LOGIT_BOUND, POLYNOMIAL, ROUNDER
from sublens.noise import LANES, LEVELS, PARITY, ROTATIONS, ROUNDS

WIDTH = 8
_LINE = 64  # bytes that a cache moves at a time
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(_F32, WIDTH), ir.VectorType(_I32, WIDTH)
# A product and the sum it goes into may be one instruction (fused multiply-add) where the processor has it.
_FUSE = ("contract",)


def _int(value: int) -> Any:
    return ir.Constant(_I64, value)


def _all(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * WIDTH)


def _spread(b: Any, vector: Any, scalar: Any) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, scalar, ir.Constant(_I32, 0)), undefined, _all(0))


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


def _emit_panel(b: Any, rows: int, vectors: int, args: Sequence[Any]) -> None:
    """C[r] += sum over o and t of A[o, t, r] B[o, t], for ``rows`` rows r of ``vectors`` vectors, kept in registers."""
    a, b_, c = args[0], args[4], args[7]
    a_t, a_r, a_o, b_t, b_o, c_r = (b.mul(stride, _int(4)) for stride in (*args[1:4], *args[5:7], args[8]))
    count, outer_count, fresh = args[9], args[10], args[11]
    places = [(r, v) for r in range(rows) for v in range(vectors)]
    targets = [b.add(b.add(c, b.mul(c_r, _int(r))), _int(4 * WIDTH * v)) for r, v in places]
    nothing, fresh = ir.Constant(_FLOATS, [0.0] * WIDTH), b.icmp_signed("!=", fresh, _int(0))
    at_first = [b.select(fresh, nothing, _load(b, _FLOATS, target)) for target in targets]
    before = b.block
    outer, inner, latch, after = (b.append_basic_block(name) for name in ("outer", "inner", "latch", "after"))
    b.branch(outer)

    b.position_at_end(outer)
    o, a_outer, b_outer = b.phi(_I64), b.phi(_I64), b.phi(_I64)
    sums_outer = [b.phi(_FLOATS) for _ in places]
    for phi, value in zip((o, a_outer, b_outer, *sums_outer), (_int(0), a, b_, *at_first), strict=True):
        phi.add_incoming(value, before)
    b.branch(inner)

    b.position_at_end(inner)
    t, a_inner, b_inner = b.phi(_I64), b.phi(_I64), b.phi(_I64)
    sums = [b.phi(_FLOATS) for _ in places]
    for phi, value in zip((t, a_inner, b_inner, *sums), (_int(0), a_outer, b_outer, *sums_outer), strict=True):
        phi.add_incoming(value, outer)

    def one(r: int) -> Any:
        address = b.add(a_inner, b.mul(a_r, _int(r)))
        return _spread(b, _FLOATS, b.load(b.inttoptr(address, _F32.as_pointer())))

    def many(v: int) -> Any:
        return _load(b, _FLOATS, b.add(b_inner, _int(4 * WIDTH * v)))

    def step(x: Any, y: Any, place: tuple[int, int]) -> Any:
        return b.fadd(b.fmul(x, y, flags=_FUSE), sums[places.index(place)], flags=_FUSE)

    # Whichever side needs fewer registers is held, the other comes one by one: 12 sums, 3 held, 1 passing make 16.
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


def _panel(rows: int, vectors: int) -> Any:
    @intrinsic
    def panel(
        typingctx: Any, a: Any, a_t: Any, a_r: Any, a_o: Any, b: Any, b_t: Any, b_o: Any, c: Any, c_r: Any, n: Any,
        m: Any, fresh: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_panel(builder, rows, vectors, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), codegen

    return panel


_of_4, _of_3, _of_2, _of_1 = _panel(3, 4), _panel(4, 3), _panel(6, 2), _panel(8, 1)
_one_of_4, _one_of_3, _one_of_2, _one_of_1 = _panel(1, 4), _panel(1, 3), _panel(1, 2), _panel(1, 1)


@njit(types.void(*[types.int64] * 14), error_model="numpy", cache=True, nogil=True)
def product(
    vectors: Any,
    rows: Any,
    a: Any,
    a_t: Any,
    a_r: Any,
    a_o: Any,
    b: Any,
    b_t: Any,
    b_o: Any,
    c: Any,
    c_r: Any,
    n: Any,
    m: Any,
    fresh: Any,
) -> None:
    """C[r] += sum over o < m and t < n of A[o, t, r] B[o, t]: rows of ``vectors`` (1 to 4) vectors; n and m at least 1.

    If ``fresh`` is not 0, what C held before does not count. A, B and C are addresses of float32 data; ``a_t`` is the
    stride of A along t, and so on; vectors are contiguous.
    """
    r = 0
    if vectors == 4:
        while r + 3 <= rows:
            _of_4(a + 4 * a_r * r, a_t, a_r, a_o, b, b_t, b_o, c + 4 * c_r * r, c_r, n, m, fresh)
            r += 3
        while r < rows:
            _one_of_4(a + 4 * a_r * r, a_t, a_r, a_o, b, b_t, b_o, c + 4 * c_r * r, c_r, n, m, fresh)
            r += 1
    elif vectors == 3:
        while r + 4 <= rows:
            _of_3(a + 4 * a_r * r, a_t, a_r, a_o, b, b_t, b_o, c + 4 * c_r * r, c_r, n, m, fresh)
            r += 4
        while r < rows:
            _one_of_3(a + 4 * a_r * r, a_t, a_r, a_o, b, b_t, b_o, c + 4 * c_r * r, c_r, n, m, fresh)
            r += 1
    elif vectors == 2:
        while r + 6 <= rows:
            _of_2(a + 4 * a_r * r, a_t, a_r, a_o, b, b_t, b_o, c + 4 * c_r * r, c_r, n, m, fresh)
            r += 6
        while r < rows:
            _one_of_2(a + 4 * a_r * r, a_t, a_r, a_o, b, b_t, b_o, c + 4 * c_r * r, c_r, n, m, fresh)
            r += 1
    else:
        while r + 8 <= rows:
            _of_1(a + 4 * a_r * r, a_t, a_r, a_o, b, b_t, b_o, c + 4 * c_r * r, c_r, n, m, fresh)
            r += 8
        while r < rows:
            _one_of_1(a + 4 * a_r * r, a_t, a_r, a_o, b, b_t, b_o, c + 4 * c_r * r, c_r, n, m, fresh)
            r += 1


CHAINS = 4
"""Vectors whose gates are computed side by side: a processor's scheduler holds about two chains of such length, so that
one after the other they would wait for each other's last steps."""


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
        return ir.Constant(_FLOATS, [value] * WIDTH)

    limits, odds, logits, count = args
    before, loop, after = b.block, b.append_basic_block("gates"), b.append_basic_block("gated")
    b.cbranch(b.icmp_signed(">", count, _int(0)), loop, after)
    b.position_at_end(loop)
    j = b.phi(_I64)
    j.add_incoming(_int(0), before)
    chains = range(CHAINS)
    places = [b.add(j, _int(WIDTH * i)) for i in chains]
    bound, least = numbers(LOGIT_BOUND), numbers(-LOGIT_BOUND)
    x = [_load(b, _FLOATS, b.add(logits, b.mul(places[i], _int(4)))) for i in chains]
    # In this form a NaN stays one.
    x = [b.select(b.fcmp_ordered(">", x[i], bound), bound, x[i]) for i in chains]
    x = [b.select(b.fcmp_ordered("<", x[i], least), least, x[i]) for i in chains]
    y = [b.fmul(x[i], numbers(LOG2_E)) for i in chains]
    z = [b.fadd(y[i], numbers(ROUNDER)) for i in chains]
    f = [b.fsub(z[i], numbers(ROUNDER)) for i in chains]
    f = [b.fsub(y[i], f[i]) for i in chains]
    z = [b.shl(b.bitcast(z[i], _WORDS), _all(23)) for i in chains]
    p = [numbers(POLYNOMIAL[0]) for i in chains]
    for coefficient in POLYNOMIAL[1:]:
        p = [b.fmul(p[i], f[i]) for i in chains]
        p = [b.fadd(p[i], numbers(coefficient)) for i in chains]
    o = [b.bitcast(b.add(b.bitcast(p[i], _WORDS), z[i]), _FLOATS) for i in chains]
    if with_odds:
        for i in chains:
            _store(b, o[i], b.add(odds, b.mul(places[i], _int(4))))
    t = [b.fadd(numbers(1.0), o[i]) for i in chains]
    t = [b.fdiv(numbers(float(LEVELS)), t[i]) for i in chains]
    t = [b.fadd(t[i], numbers(0.5)) for i in chains]
    t = [b.fptosi(t[i], _WORDS) for i in chains]
    halves = ir.VectorType(ir.IntType(16), WIDTH)
    for i in chains:
        _store(b, b.trunc(t[i], halves), b.add(limits, b.mul(places[i], _int(2))))
    following = b.add(j, _int(CHAINS * WIDTH))
    j.add_incoming(following, loop)
    b.cbranch(b.icmp_signed("<", following, count), loop, after)
    b.position_at_end(after)


limits_of, limits_and_odds_of = _gates(False), _gates(True)


@intrinsic
def squares_of(typingctx: Any, address: Any, count: Any, constant: Any) -> Any:
    """Sum of the squares of ``count`` float32 numbers, a multiple of CHAINS * WIDTH, each with the constant added."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        address, count, constant = args
        constant = _spread(b, _FLOATS, constant)
        nothing = ir.Constant(_FLOATS, [0.0] * WIDTH)
        before, loop, after = b.block, b.append_basic_block("squares"), b.append_basic_block("squared")
        b.cbranch(b.icmp_signed(">", count, _int(0)), loop, after)
        b.position_at_end(loop)
        j, sums = b.phi(_I64), [b.phi(_FLOATS) for _ in range(CHAINS)]
        j.add_incoming(_int(0), before)
        new = []
        for i, total in enumerate(sums):
            total.add_incoming(nothing, before)
            x = _load(b, _FLOATS, b.add(address, b.mul(b.add(j, _int(WIDTH * i)), _int(4))))
            x = b.fadd(x, constant)
            new.append(b.fadd(b.fmul(x, x, flags=_FUSE), total, flags=_FUSE))
            total.add_incoming(new[-1], loop)
        following = b.add(j, _int(CHAINS * WIDTH))
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

    return types.float32(types.int64, types.int64, types.float32), codegen


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
