"""Counter-based noise: ``(seed, step, sample, parameter, element) -> u``, a pure function.

The generator is Threefry-4x32 with 13 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011): a reduced-round Threefish block cipher which that paper reports to pass TestU01's BigCrush, counters
and keys with little structure of their own included. It needs additions, rotations and exclusive-ors of 32-bit words
only, so the same bits come out on every device, and nothing has to be stored to draw a number again.

Antithetic pairs. Samples 2 p and 2 p + 1 share their noise: where the first has u, the second has 1 - u (Hammersley and
Morton, "A new Monte Carlo technique: antithetic variates", 1956). Each sample alone is distributed as without pairs;
what a gate draws high in one it draws low in the other, so the mean over a pair varies less, and half the numbers do.
(More samples from one draw, by adding 1/2 or 1/4 to u, would not do: at a keep probability of 1/2 all gates of the
third sample would agree with those of the second.)

Layout. The key is ``(seed, parameter)``, 64 bits each; the counter is ``(block, pair, step)``. One block gives four
32-bit words, that is eight 16-bit draws, low half first. Elements are numbered in row-major order and come in tiles of
64; element ``64 t + 16 w + 2 j + h`` is half ``h`` of word ``w`` of block ``8 t + j``, an order in which word ``w`` of
eight neighbouring blocks is one vector, stored as it is.

Resolution. A draw is one of 65,536 equally likely values, ``u = (k + 1/2) / 65536``, never 0 or 1. A keep probability
is thereby met to within about ``2**-17``; the bound on logits (:data:`sublens.kernels.reference.LOGIT_BOUND`) keeps
every probability well above that.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 64
"""Elements that share one run of blocks."""
LANES = 8
"""Blocks of a tile."""
LEVELS = 65536
"""Number of equally likely values of one draw."""
PATTERNS = (0x0000, 0xFFFF)
"""What the pair's draw is combined with (exclusive or) to give that of its first and of its second sample."""
ROUNDS = 13
ROTATIONS = ((10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20))
PARITY = 0x1BD11BDA
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Draw:
    """What names one draw of all gates of one parameter.

    Attributes:
        seed: the run's seed; any integer, used modulo 2**64.
        step: number of the training forward, 0 or more, used modulo 2**64.
        sample: number of the sample within the step, from 0.
        parameter: :func:`parameter_id` of the masked parameter.
    """

    seed: int
    step: int
    sample: int
    parameter: int

    def key(self) -> tuple[int, int, int, int]:
        """The four 32-bit words of the Threefry key."""
        return self.seed & _WORD, self.seed >> 32 & _WORD, self.parameter & _WORD, self.parameter >> 32 & _WORD

    def counter(self) -> tuple[int, int, int]:
        """The three 32-bit words of the counter that stand behind the block number: pair, step low, step high."""
        return self.sample // len(PATTERNS) & _WORD, self.step & _WORD, self.step >> 32 & _WORD

    @property
    def pattern(self) -> int:
        """What the pair's draw is combined with to give this sample's: all bits turned over is 1 - u for u."""
        return PATTERNS[self.sample % len(PATTERNS)]


def parameter_id(name: str) -> int:
    """64-bit number of a parameter, from its dotted name alone.

    Hence the noise of one parameter does not change when others join the selection or leave it.
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def threefry(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int, int, int]) -> tuple[Tensor, ...]:
    """Threefry-4x32-13 of many counters under one key.

    Args:
        counter: four int64 tensors of one shape, values 0 to 2**32 - 1. (int64, because unsigned 32-bit arithmetic is
            not available on every device; no intermediate value leaves the range 0 to 2**63 - 1.)
        key: four words, 0 to 2**32 - 1.

    Returns:
        Four int64 tensors of that shape, values 0 to 2**32 - 1.
    """
    keys = (*key, key[0] ^ key[1] ^ key[2] ^ key[3] ^ PARITY)
    x = [(c + k) & _WORD for c, k in zip(counter, keys, strict=False)]
    for r in range(ROUNDS):
        pairs = ((0, 1), (2, 3)) if r % 2 == 0 else ((0, 3), (2, 1))
        for (a, b), bits in zip(pairs, ROTATIONS[r % 8], strict=True):
            x[a] = (x[a] + x[b]) & _WORD
            x[b] = ((x[b] << bits | x[b] >> 32 - bits) & _WORD) ^ x[a]
        if r % 4 == 3:
            s = (r + 1) // 4
            x = [(x[i] + keys[(s + i) % 5] + (s if i == 3 else 0)) & _WORD for i in range(4)]
    return tuple(x)


def bits(draw: Draw, count: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The 16-bit draws of elements 0 to ``count - 1``.

    Returns:
        int32 tensor of shape (count,), values 0 to 65535.
    """
    # Inside torch.compile one call of an operator: the generator taken apart makes Inductor's work double each round.
    make = _opaque if torch.compiler.is_compiling() else _pairs
    return make([*draw.key(), *draw.counter()], count, torch.device(device)) ^ draw.pattern


def _pairs(words: list[int], count: int, device: torch.device) -> Tensor:
    """The draws of the first sample of a pair, from the four words of a key and three of a counter."""
    tiles = -(-count // TILE)
    block = torch.arange(tiles * LANES, dtype=torch.int64, device=device)
    rest = [torch.full_like(block, word) for word in words[4:]]
    found = threefry((block, rest[0], rest[1], rest[2]), (words[0], words[1], words[2], words[3]))
    halves = torch.stack([half for word in found for half in (word & 0xFFFF, word >> 16)])
    # (word, half, tile, block) to the order of the layout: tile, word, block, half.
    ordered = halves.view(4, 2, tiles, LANES).permute(2, 0, 3, 1)
    return ordered.reshape(-1)[:count].to(torch.int32)


_opaque = torch.library.custom_op("sublens::pairs", _pairs, mutates_args=())


@_opaque.register_fake
def _(words: list[int], count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.int32, device=device)


def uniform(draw: Draw, count: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Uniform noise of elements 0 to ``count - 1``.

    Returns:
        float32 tensor of shape (count,), values (k + 1/2) / 65536 with k from 0 to 65535.
    """
    return (bits(draw, count, device=device).to(torch.float32) + 0.5) / LEVELS
