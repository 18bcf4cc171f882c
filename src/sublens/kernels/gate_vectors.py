"""The noise and the gates, vector by vector, as LLVM instructions: draws, thresholds, masked weights, folds.

Addresses are int64, in bytes.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sublens.kernels.reference import LOG2_E, LOGIT_BOUND, POLYNOMIAL, ROUNDER
from sublens.kernels.vector import (
    FUSE,
    GROUP,
    I16,
    I32,
    I64,
    LONG_FLOATS,
    LONG_HALVES,
    LONG_WORDS,
    REGISTER,
    WORDS,
    in_steps,
    integer,
    load,
    spread,
    store,
)
from sublens.noise import LANES, LEVELS, PARITY, ROTATIONS, ROUNDS, TILE


def _in_groups(b: Any, count: Any, work: Callable[[list[Any]], None]) -> None:
    """Do some work for ``count`` numbers, a multiple of REGISTER: it is given the first of each vector.

    That is a GROUP of them at a time, and then one vector after the other.
    """
    whole = b.and_(count, integer(-GROUP))
    vectors = [integer(REGISTER * i) for i in range(GROUP // REGISTER)]
    in_steps(b, GROUP, integer(0), whole, lambda j: work([b.add(j, vector) for vector in vectors]))
    in_steps(b, REGISTER, whole, count, lambda j: work([j]))


def _numbers(b: Any, address: Any, places: list[Any]) -> list[Any]:
    return [load(b, LONG_FLOATS, b.add(address, b.mul(place, integer(4)))) for place in places]


def _halves(b: Any, address: Any, places: list[Any]) -> list[Any]:
    return [load(b, LONG_HALVES, b.add(address, b.mul(place, integer(2))), align=2) for place in places]


def _put(b: Any, values: list[Any], address: Any, places: list[Any]) -> None:
    for value, place in zip(values, places, strict=True):
        store(b, value, b.add(address, b.mul(place, integer(4))))


@intrinsic
def draw(
    typingctx: Any, out: Any, tile: Any, tiles: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any, k2: Any, k3: Any
) -> Any:
    """Write the 16-bit draws of ``tiles`` tiles from number ``tile`` on: :func:`sublens.noise.threefry`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        out, tile, tiles, *words = args
        words = [b.trunc(word, I32) for word in words]
        # As many tiles at a time as a register holds, then what is left.
        together = REGISTER // LANES
        done = b.mul(b.sdiv(tiles, integer(together)), integer(together))
        _emit_draws(b, together, out, tile, done, words)
        if together > 1:
            rest = b.add(out, b.mul(done, integer(2 * TILE)))
            _emit_draws(b, 1, rest, b.add(tile, done), b.sub(tiles, done), words)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), codegen


@intrinsic
def draw_two(
    typingctx: Any, out: Any, tile: Any, other: Any, second: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any, k2: Any,
    k3: Any,
) -> Any:  # fmt: skip
    """Write the draws of number ``tile`` to ``out`` and those of ``second`` to ``other``, in one register if it can."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        out, tile, other, second, *words = args
        words = [b.trunc(word, I32) for word in words]
        if REGISTER == 2 * LANES:
            start, keys = _begin(b, REGISTER, words)
            blocks = [_blocks(b, LANES, each) for each in (tile, second)]
            both = b.shuffle_vector(*blocks, ir.Constant(LONG_WORDS, list(range(REGISTER))))
            _put_draws(b, _threefry(b, both, start, keys), [out, other])
        else:
            for target, each in ((out, tile), (other, second)):
                start, keys = _begin(b, LANES, words)
                _put_draws(b, _threefry(b, _blocks(b, LANES, each), start, keys), [target])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), codegen


def _emit_draws(b: Any, together: int, out: Any, tile: Any, tiles: Any, words: Sequence[Any]) -> None:
    """The draws of ``tiles`` tiles, a multiple of ``together``. Blocks of neighbouring tiles are numbered through."""
    lanes = together * LANES
    vector = ir.VectorType(I32, lanes)
    start, keys = _begin(b, lanes, words)
    first = _blocks(b, lanes, tile)
    before, loop, after = b.block, b.append_basic_block("draw"), b.append_basic_block("drawn")
    b.cbranch(b.icmp_signed(">", tiles, integer(0)), loop, after)
    b.position_at_end(loop)
    done, block = b.phi(I64), b.phi(vector)
    done.add_incoming(integer(0), before)
    block.add_incoming(first, before)
    of_tile = [b.add(out, b.mul(b.add(done, integer(t)), integer(2 * TILE))) for t in range(together)]
    _put_draws(b, _threefry(b, block, start, keys), of_tile)
    more = b.add(done, integer(together))
    done.add_incoming(more, loop)
    block.add_incoming(b.add(block, _all(lanes, lanes)), loop)
    b.cbranch(b.icmp_signed("<", more, tiles), loop, after)
    b.position_at_end(after)


def _all(lanes: int, value: int) -> Any:
    return ir.Constant(ir.VectorType(I32, lanes), [value] * lanes)


def _blocks(b: Any, lanes: int, tile: Any) -> Any:
    """Numbers of the blocks of a tile, and of those that follow if there are more lanes."""
    first = spread(b, ir.VectorType(I32, lanes), b.trunc(b.mul(tile, integer(LANES)), I32))
    return b.add(first, ir.Constant(first.type, list(range(lanes))))


def _begin(b: Any, lanes: int, words: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What the counter's words 1 to 3 are at first, and the five words of the key."""
    c1, c2, c3, *key = (spread(b, ir.VectorType(I32, lanes), word) for word in words)
    parity = b.xor(b.xor(b.xor(key[0], key[1]), b.xor(key[2], key[3])), _all(lanes, PARITY))
    return [b.add(c, k) for c, k in zip((c1, c2, c3), key[1:], strict=True)], [*key, parity]


def _threefry(b: Any, block: Any, start: Sequence[Any], keys: Sequence[Any]) -> list[Any]:
    lanes = block.type.count
    x = [b.add(block, keys[0]), *start]
    for r in range(ROUNDS):
        pairs = ((0, 1), (2, 3)) if r % 2 == 0 else ((0, 3), (2, 1))
        for (i, j), bits in zip(pairs, ROTATIONS[r % 8], strict=True):
            x[i] = b.add(x[i], x[j])
            x[j] = b.xor(b.or_(b.shl(x[j], _all(lanes, bits)), b.lshr(x[j], _all(lanes, 32 - bits))), x[i])
        if r % 4 == 3:
            s = (r + 1) // 4
            x = [b.add(x[i], keys[(s + i) % 5]) for i in range(4)]
            x[3] = b.add(x[3], _all(lanes, s))
    return x


def _put_draws(b: Any, x: Sequence[Any], of_tile: Sequence[Any]) -> None:
    for t, address in enumerate(of_tile):
        lanes = ir.Constant(WORDS, list(range(t * LANES, (t + 1) * LANES)))
        for w in range(4):
            store(b, b.shuffle_vector(x[w], x[w], lanes), b.add(address, integer(4 * LANES * w)))


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
        return ir.Constant(LONG_FLOATS, [value] * REGISTER)

    limits, odds, logits, count = args
    bound, least = numbers(LOGIT_BOUND), numbers(-LOGIT_BOUND)

    def work(places: list[Any]) -> None:
        x = _numbers(b, logits, places)
        chains = range(len(x))
        # In this form a NaN stays one.
        x = [b.select(b.fcmp_ordered(">", x[i], bound), bound, x[i]) for i in chains]
        x = [b.select(b.fcmp_ordered("<", x[i], least), least, x[i]) for i in chains]
        y = [b.fmul(x[i], numbers(LOG2_E)) for i in chains]
        z = [b.fadd(y[i], numbers(ROUNDER)) for i in chains]
        f = [b.fsub(z[i], numbers(ROUNDER)) for i in chains]
        f = [b.fsub(y[i], f[i]) for i in chains]
        z = [b.shl(b.bitcast(z[i], LONG_WORDS), ir.Constant(LONG_WORDS, [23] * REGISTER)) for i in chains]
        p = [numbers(POLYNOMIAL[0]) for i in chains]
        for coefficient in POLYNOMIAL[1:]:
            p = [b.fmul(p[i], f[i]) for i in chains]
            p = [b.fadd(p[i], numbers(coefficient)) for i in chains]
        o = [b.bitcast(b.add(b.bitcast(p[i], LONG_WORDS), z[i]), LONG_FLOATS) for i in chains]
        if with_odds:
            _put(b, o, odds, places)
        t = [b.fadd(numbers(1.0), o[i]) for i in chains]
        t = [b.fdiv(numbers(float(LEVELS)), t[i]) for i in chains]
        t = [b.fadd(t[i], numbers(0.5)) for i in chains]
        t = [b.fptosi(t[i], LONG_WORDS) for i in chains]
        for i in chains:
            store(b, b.trunc(t[i], LONG_HALVES), b.add(limits, b.mul(places[i], integer(2))))

    _in_groups(b, count, work)


limits_of, limits_and_odds_of = _gates(False), _gates(True)


@intrinsic
def masked_of(typingctx: Any, out: Any, weight: Any, drawn: Any, limits: Any, pattern: Any, count: Any) -> Any:
    """Write ``count`` masked weights, a multiple of REGISTER: 0 where a draw is below its threshold."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        out, weight, drawn, limits, pattern, count = args
        pattern = spread(b, LONG_HALVES, b.trunc(pattern, I16))
        nothing = ir.Constant(LONG_FLOATS, [0.0] * REGISTER)

        def work(places: list[Any]) -> None:
            x = _numbers(b, weight, places)
            k, t = _halves(b, drawn, places), _halves(b, limits, places)
            is_open = [b.icmp_unsigned(">=", b.xor(a, pattern), limit) for a, limit in zip(k, t, strict=True)]
            _put(b, [b.select(o, one, nothing) for o, one in zip(is_open, x, strict=True)], out, places)

        _in_groups(b, count, work)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def masked_pair_of(
    typingctx: Any, out: Any, other: Any, weight: Any, drawn: Any, limits: Any, pattern: Any, second: Any, count: Any
) -> Any:
    """The same for two samples of one draw, each with a pattern of its own, to ``out`` and ``other``."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        out, other, weight, drawn, limits, pattern, second, count = args
        pattern, second = (spread(b, LONG_HALVES, b.trunc(each, I16)) for each in (pattern, second))
        nothing = ir.Constant(LONG_FLOATS, [0.0] * REGISTER)

        def work(places: list[Any]) -> None:
            x = _numbers(b, weight, places)
            k, t = _halves(b, drawn, places), _halves(b, limits, places)
            for target, turned in ((out, pattern), (other, second)):
                is_open = [b.icmp_unsigned(">=", b.xor(a, turned), limit) for a, limit in zip(k, t, strict=True)]
                _put(b, [b.select(o, one, nothing) for o, one in zip(is_open, x, strict=True)], target, places)

        _in_groups(b, count, work)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


@intrinsic
def fold_of(typingctx: Any, total: Any, gradient: Any, drawn: Any, odds: Any, pattern: Any, count: Any) -> Any:
    """Add a sample's gradient of ``count`` masked weights, a multiple of REGISTER, times ds/dlogit.

    With u = a / (a + b) and odds o, s is a o / (a o + b), and ds/dlogit is s (1 - s) = a o b / (a o + b)^2.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        total, gradient, drawn, odds, pattern, count = args

        def work(places: list[Any]) -> None:
            s, g, o = (_numbers(b, address, places) for address in (total, gradient, odds))
            x, y = _uniform(b, drawn, pattern, places)
            x = _each(b.fmul, x, o)
            d = _each(b.fadd, x, y)
            slope = _each(b.fdiv, _each(b.fmul, x, y), _each(b.fmul, d, d))
            _put(b, _fused(b, g, slope, s), total, places)

        _in_groups(b, count, work)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def fold_pair_of(
    typingctx: Any, total: Any, gradient: Any, other: Any, drawn: Any, odds: Any, pattern: Any, count: Any
) -> Any:
    """The same for two antithetic samples, with one division: where the first has a and b, the second has b and a."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        total, gradient, other, drawn, odds, pattern, count = args

        def work(places: list[Any]) -> None:
            s, g, h, o = (_numbers(b, address, places) for address in (total, gradient, other, odds))
            x, y = _uniform(b, drawn, pattern, places)
            d, e = _fused(b, x, o, y), _fused(b, y, o, x)
            both = _each(b.fmul, d, e)
            # At the bound of the logits, both^2 is 4e36, and still a float32.
            slope = _each(b.fdiv, _each(b.fmul, _each(b.fmul, x, y), o), _each(b.fmul, both, both))
            of_both = _fused(b, h, _each(b.fmul, d, d), _each(b.fmul, g, _each(b.fmul, e, e)))
            _put(b, _fused(b, of_both, slope, s), total, places)

        _in_groups(b, count, work)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def times_of(typingctx: Any, out: Any, total: Any, weight: Any, count: Any) -> Any:
    """Write ``count`` products, a multiple of REGISTER, past the caches; ``out`` is a multiple of a vector's bytes.

    An ordinary store first reads what it overwrites: where nothing of it is read again soon, a third of the traffic.
    Other threads see the numbers after :func:`written`.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        out, total, weight, count = args
        past = b.module.add_metadata([ir.Constant(I32, 1)])

        def work(places: list[Any]) -> None:
            s, w = _numbers(b, total, places), _numbers(b, weight, places)
            for value, place in zip(_each(b.fmul, s, w), places, strict=True):
                put = b.store(value, b.inttoptr(b.add(out, b.mul(place, integer(4))), value.type.as_pointer()))
                put.align = 4 * REGISTER
                put.set_metadata("nontemporal", past)

        _in_groups(b, count, work)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _each(operation: Callable[[Any, Any], Any], x: list[Any], y: list[Any]) -> list[Any]:
    return [operation(one, other) for one, other in zip(x, y, strict=True)]


def _fused(b: Any, x: list[Any], y: list[Any], z: list[Any]) -> list[Any]:
    """x y + z"""
    products = [b.fmul(one, other, flags=FUSE) for one, other in zip(x, y, strict=True)]
    return [b.fadd(one, other, flags=FUSE) for one, other in zip(products, z, strict=True)]


def _uniform(b: Any, drawn: Any, pattern: Any, places: list[Any]) -> tuple[list[Any], list[Any]]:
    """2 k + 1 and 2 LEVELS less that, whose quotient is u / (1 - u), as float32 numbers; both are exact."""
    pattern = spread(b, LONG_HALVES, b.trunc(pattern, I16))
    one, levels = ir.Constant(LONG_WORDS, [1] * REGISTER), ir.Constant(LONG_FLOATS, [2.0 * LEVELS] * REGISTER)
    k = [b.zext(b.xor(draws, pattern), LONG_WORDS) for draws in _halves(b, drawn, places)]
    x = [b.sitofp(b.or_(b.shl(words, one), one), LONG_FLOATS) for words in k]
    return x, [b.fsub(levels, each) for each in x]
