"""A product of matrices that stays in registers, as LLVM instructions, for blocks that lie in the cache.

Vectors are as wide as a register (:data:`sublens.kernels.vector.REGISTER`): eight numbers, or sixteen where there is
AVX-512, which has twice as many registers too. Addresses are int64, in bytes; strides are int64, in elements.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from sublens.kernels.halves import summed
from sublens.kernels.vector import (
    CPU,
    F32,
    FUSE,
    I64,
    LINE,
    LONG_FLOATS,
    REGISTER,
    integer,
    load,
    pointer,
    prefetch,
    spread,
    store,
)

OUTRUNS = CPU == "znver5" and REGISTER == 16
"""Whether this product does twice the library's work in the same time here. AMD's processors since Zen 5 have full
units for registers of sixteen numbers, which PyTorch's product in float32 leaves half empty (2.13, measured)."""
KEEPS_UP = CPU == "znver4" and REGISTER == 16
"""Whether this product in float32, which copies no weight, is as fast as the library's below 512 rows (measured)."""
KEEPS_UP_WITH_FEW = CPU in ("sapphirerapids", "emeraldrapids") and REGISTER == 16
"""Whether it is so with one sample and with two: up to a third faster for large weights. With more, sizes decide."""


LEFT, COLUMN, PER_ROW, JUMP, EVERY, ONE, OTHER, EACH = range(8)
AHEAD = 8
"""Lines of the cache that products fetch as they go, as AHEAD int64 in memory: LEFT lines of each of two arrays of the
same layout, from the addresses ONE and OTHER on. A row has PER_ROW of them, of which COLUMN are done, and the next
row's first line is JUMP bytes after a row's last one. One of each array is fetched in steps 0, EVERY, 2 EVERY, ... of a
product; EVERY is a power of two. Where products are too short for that, other loops fetch EACH of them at a time. Many
at once would fill the buffers that the product's own operands need, too."""


def _emit_ahead(b: Any, state: Any, t: Any) -> None:
    """Fetch a line of each array, if this is a step to do that in and one is left."""
    step, fetching, after = (b.append_basic_block(name) for name in ("step", "fetching", "fetched"))
    places = [b.inttoptr(b.add(state, integer(8 * field)), I64.as_pointer()) for field in range(AHEAD)]
    b.cbranch(b.icmp_signed("==", b.and_(t, b.sub(b.load(places[EVERY]), integer(1))), integer(0)), step, after)
    b.position_at_end(step)
    left = b.load(places[LEFT])
    b.cbranch(b.icmp_signed(">", left, integer(0)), fetching, after)
    b.position_at_end(fetching)
    b.store(b.sub(left, integer(1)), places[LEFT])
    column = b.add(b.load(places[COLUMN]), integer(1))
    ended = b.icmp_signed("==", column, b.load(places[PER_ROW]))
    b.store(b.select(ended, integer(0), column), places[COLUMN])
    forth = b.select(ended, b.load(places[JUMP]), integer(LINE))
    for place in (places[ONE], places[OTHER]):
        address = b.load(place)
        prefetch(b, address)
        b.store(b.add(address, forth), place)
    b.branch(after)
    b.position_at_end(after)


@intrinsic
def _fetch(typingctx: Any, state: Any) -> Any:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _emit_ahead(b, args[0], integer(0))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@njit(error_model="numpy", nogil=True)
def fetch_some(state: Any) -> None:
    """Fetch EACH lines of each array, or what is left."""
    ahead = carray(pointer(state), (AHEAD,), types.int64)
    for _ in range(min(ahead[EACH], ahead[LEFT])):
        _fetch(state)


@njit(error_model="numpy", nogil=True)
def fetch_rest(state: Any) -> None:
    """Fetch what is left, at once."""
    for _ in range(carray(pointer(state), (AHEAD,), types.int64)[LEFT]):
        _fetch(state)


def _emit_panel(b: Any, rows: int, vectors: int, apart: int, reduced: bool, args: Sequence[Any]) -> None:
    """C[r] += sum over o and t of A[o, t, r] B[o, t], for ``rows`` rows r of ``vectors`` vectors, kept in registers."""
    a, b_, c = args[0], args[4], args[7]
    a_t, a_r, a_o, b_t, b_o, c_r = (b.mul(stride, integer(4)) for stride in (*args[1:4], *args[5:7], args[8]))
    count, outer_count, fresh, ahead = args[9:13]
    places = [(r, v) for r in range(rows) for v in range(vectors)]
    if apart:
        a_r = integer(4 * apart)
    targets = [b.add(b.add(c, b.mul(c_r, integer(r))), integer(4 * REGISTER * v)) for r, v in places]
    nothing, fresh = ir.Constant(LONG_FLOATS, [0.0] * REGISTER), b.icmp_signed("!=", fresh, integer(0))
    at_first = [b.select(fresh, nothing, load(b, LONG_FLOATS, target)) for target in targets]
    before = b.block
    outer, inner, latch, after = (b.append_basic_block(name) for name in ("outer", "inner", "latch", "after"))
    b.branch(outer)

    b.position_at_end(outer)
    o, a_outer, b_outer = b.phi(I64), b.phi(I64), b.phi(I64)
    sums_outer = [b.phi(LONG_FLOATS) for _ in places]
    for phi, value in zip((o, a_outer, b_outer, *sums_outer), (integer(0), a, b_, *at_first), strict=True):
        phi.add_incoming(value, before)
    b.branch(inner)

    b.position_at_end(inner)
    t, a_inner, b_inner = b.phi(I64), b.phi(I64), b.phi(I64)
    sums = [b.phi(LONG_FLOATS) for _ in places]
    for phi, value in zip((t, a_inner, b_inner, *sums), (integer(0), a_outer, b_outer, *sums_outer), strict=True):
        phi.add_incoming(value, outer)
    _emit_ahead(b, ahead, t)
    last = b.block

    def one(r: int) -> Any:
        address = b.add(a_inner, b.mul(a_r, integer(r)))
        return spread(b, LONG_FLOATS, b.load(b.inttoptr(address, F32.as_pointer())))

    def many(v: int) -> Any:
        return load(b, LONG_FLOATS, b.add(b_inner, integer(4 * REGISTER * v)))

    def step(x: Any, y: Any, place: tuple[int, int]) -> Any:
        total = sums[places.index(place)]
        return summed(b, x, y, total) if reduced else b.fadd(b.fmul(x, y, flags=FUSE), total, flags=FUSE)

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
    next_t = b.add(t, integer(1))
    following = (next_t, b.add(a_inner, a_t), b.add(b_inner, b_t), *results)
    for phi, value in zip((t, a_inner, b_inner, *sums), following, strict=True):
        phi.add_incoming(value, last)
    b.cbranch(b.icmp_signed("<", next_t, count), inner, latch)

    b.position_at_end(latch)
    next_o = b.add(o, integer(1))
    following = (next_o, b.add(a_outer, a_o), b.add(b_outer, b_o), *results)
    for phi, value in zip((o, a_outer, b_outer, *sums_outer), following, strict=True):
        phi.add_incoming(value, latch)
    b.cbranch(b.icmp_signed("<", next_o, outer_count), outer, after)

    b.position_at_end(after)
    for value, target in zip(results, targets, strict=True):
        store(b, value, target)


def _panel(rows: int, vectors: int, apart: int, reduced: bool) -> Any:
    @intrinsic
    def panel(
        typingctx: Any, a: Any, a_t: Any, a_r: Any, a_o: Any, b: Any, b_t: Any, b_o: Any, c: Any, c_r: Any, n: Any,
        m: Any, fresh: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_panel(builder, rows, vectors, apart, reduced, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 13), codegen

    return panel


def product_of(vectors: int, apart: int = 0, reduced: bool = False) -> Any:
    """The function of :func:`product` for rows of so many vectors only; it is not given their number.

    Rows are taken as many as registers allow at a time, then a few, then one by one.
    """
    many, few = _ROWS[vectors]
    of_many, of_few, of_one = (_panel(rows, vectors, apart, reduced) for rows in (many, few, 1))

    @njit(error_model="numpy", nogil=True)
    def run(
        rows: Any, a: Any, a_t: Any, a_r: Any, a_o: Any, b: Any, b_t: Any, b_o: Any, c: Any, c_r: Any, n: Any, m: Any,
        fresh: Any, ahead: Any,
    ) -> None:  # fmt: skip
        r = 0
        while r + many <= rows:
            of_many(a + 4 * a_r * r, a_t, a_r, a_o, b, b_t, b_o, c + 4 * c_r * r, c_r, n, m, fresh, ahead)
            r += many
        while r + few <= rows:
            of_few(a + 4 * a_r * r, a_t, a_r, a_o, b, b_t, b_o, c + 4 * c_r * r, c_r, n, m, fresh, ahead)
            r += few
        while r < rows:
            of_one(a + 4 * a_r * r, a_t, a_r, a_o, b, b_t, b_o, c + 4 * c_r * r, c_r, n, m, fresh, ahead)
            r += 1

    return run


_ROWS = (
    {4: (6, 2), 3: (8, 4), 2: (12, 4), 1: (24, 8)} if REGISTER == 16 else {4: (3, 2), 3: (4, 2), 2: (6, 2), 1: (8, 4)}
)
"""Rows of a product that are summed at once, by their number of vectors."""
AT_ONCE = 2 * _ROWS[2][0] * REGISTER
"""Numbers of C that are summed at once, where there are rows enough."""


def product(apart: int = 0, reduced: bool = False) -> Any:
    """A function for Numba: C[r] += sum over o < m and t < n of A[o, t, r] B[o, t], for rows of 1 to 4 vectors.

    It takes ``(vectors, rows, a, a_t, a_r, a_o, b, b_t, b_o, c, c_r, n, m, fresh, ahead)``: A, B and
    C are addresses of float32 data; ``a_t`` is the stride of A along t, and so on; vectors are contiguous; n and m are
    at least 1. If ``fresh`` is not 0, what C held before does not count. ``ahead`` is the address of what is fetched
    meanwhile (:data:`AHEAD`).

    Args:
        apart: the stride of A along r, if it is always the same. It is then part of the instructions. Otherwise one
            row's address is computed from the last one's, and many rows of few vectors wait for that.
        reduced: A and B are words of two bfloat16 numbers, that follow each other along t. C stays float32.
    """
    by_1, by_2, by_3, by_4 = (product_of(vectors, apart, reduced) for vectors in (1, 2, 3, 4))

    @njit(error_model="numpy", nogil=True)
    def run(
        vectors: Any, rows: Any, a: Any, a_t: Any, a_r: Any, a_o: Any, b: Any, b_t: Any, b_o: Any, c: Any, c_r: Any,
        n: Any, m: Any, fresh: Any, ahead: Any,
    ) -> None:  # fmt: skip
        if vectors == 4:
            by_4(rows, a, a_t, a_r, a_o, b, b_t, b_o, c, c_r, n, m, fresh, ahead)
        elif vectors == 3:
            by_3(rows, a, a_t, a_r, a_o, b, b_t, b_o, c, c_r, n, m, fresh, ahead)
        elif vectors == 2:
            by_2(rows, a, a_t, a_r, a_o, b, b_t, b_o, c, c_r, n, m, fresh, ahead)
        else:
            by_1(rows, a, a_t, a_r, a_o, b, b_t, b_o, c, c_r, n, m, fresh, ahead)

    return run
