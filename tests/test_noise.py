"""The noise: known answers, what names a draw, and statistics.

Seeds are fixed, so every test gives the same verdict each time. A statistical test of a perfect generator would have
failed when its seed was chosen with the probability that stands beside its limit: 2e-6 for a correlation, 2e-5 for a
chi-square; below 1 in 300 for all of them together.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sublens import noise
from sublens.kernels import cpu
from sublens.noise import Draw, bits, parameter_id, uniform

BASE = Draw(seed=20, step=7, sample=1, parameter=parameter_id("layers.0.weight"))
COUNT = 2**20
WORD = 2**32 - 1

# From kat_vectors of Random123, the generator's own distribution.
KNOWN = [
    ((0, 0, 0, 0), (0, 0, 0, 0), (0x531C7E4F, 0x39491EE5, 0x2C855A92, 0x3D6ABF9A)),
    ((WORD,) * 4, (WORD,) * 4, (0xC4189358, 0x1C9CC83A, 0xD5881C67, 0x6A0A89E0)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0, 0x082EFA98, 0xEC4E6C89),
        (0x4AA71D8F, 0x734738C2, 0x431FC6A8, 0xAE6DEBF1),
    ),
]


def threefry_of_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Threefry-4x32-13 once more, on Python's integers and written from the paper's description."""
    keys = [*key, key[0] ^ key[1] ^ key[2] ^ key[3] ^ 0x1BD11BDA]
    rotations = [(10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20)]
    x = [(c + k) % 2**32 for c, k in zip(counter, key, strict=True)]
    for r in range(13):
        for lane, (a, b) in enumerate([(0, 1), (2, 3)] if r % 2 == 0 else [(0, 3), (2, 1)]):
            by = rotations[r % 8][lane]
            x[a] = (x[a] + x[b]) % 2**32
            x[b] = ((x[b] << by | x[b] >> (32 - by)) % 2**32) ^ x[a]
        if r % 4 == 3:
            turn = r // 4 + 1
            x = [(word + keys[(turn + i) % 5] + (turn if i == 3 else 0)) % 2**32 for i, word in enumerate(x)]
    return x


# --- known answers ---


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    reference = noise.threefry(tuple(torch.tensor([c]) for c in counter), key)
    assert [int(word) for word in reference] == list(expected)
    assert threefry_of_integers(counter, key) == list(expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, WORD), min_size=8, max_size=8))
def test_the_generator_is_that_of_whole_numbers(words: list[int]) -> None:
    counter, key = tuple(words[:4]), tuple(words[4:])
    reference = noise.threefry(tuple(torch.tensor([c]) for c in counter), key)
    assert [int(word) for word in reference] == threefry_of_integers(counter, key)


@pytest.mark.parametrize(
    "draw",
    [
        BASE,
        Draw(seed=2**63 + 5, step=2**40 + 3, sample=2**31, parameter=2**64 - 1),
        Draw(seed=-1, step=0, sample=0, parameter=0),
    ],
)
def test_layout_is_the_documented_one(draw: Draw) -> None:
    drawn = bits(draw, 3 * 512)
    key = (draw.seed % 2**32, draw.seed // 2**32 % 2**32, draw.parameter % 2**32, draw.parameter // 2**32)
    # What the compiled loops draw: an element is open iff its draw is at least 32,768, for a logit of 0.
    is_open = cpu.masked(torch.ones(1536), torch.zeros(1536), draw) == 1
    for element in (0, 1, 15, 16, 17, 47, 48, 63, 64, 127, 320, 511, 512, 577, 1024, 1535):
        tile, within = divmod(element, 64)
        word, lane = divmod(within, 16)
        counter = (8 * tile + lane // 2, draw.sample // 2, draw.step % 2**32, draw.step // 2**32)
        first = threefry_of_integers(counter, key)[word] >> 16 * (lane % 2) & 0xFFFF
        assert drawn[element] == (0xFFFF - first if draw.sample % 2 else first), element
        assert is_open[element] == (drawn[element] >= 32768), element


# --- a pure function of its names ---


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2000), st.integers(0, 2000))
def test_count_does_not_change_earlier_elements(one: int, other: int) -> None:
    short, long = sorted((one, other))
    assert torch.equal(bits(BASE, short), bits(BASE, long)[:short])


def test_numbers_are_taken_modulo_two_to_the_64() -> None:
    for field in ("seed", "step"):
        same = dataclasses.replace(BASE, **{field: getattr(BASE, field) + 2**64})
        assert torch.equal(bits(same, 512), bits(BASE, 512))
    assert torch.equal(bits(dataclasses.replace(BASE, seed=-1), 9), bits(dataclasses.replace(BASE, seed=2**64 - 1), 9))


def test_uniforms_are_the_midpoints_of_65536_intervals() -> None:
    k, u = bits(BASE, 4 * 65536), uniform(BASE, 4 * 65536)
    assert k.dtype == torch.int32
    assert u.dtype == torch.float32
    assert torch.equal(u.double(), (k.double() + 0.5) / 65536)
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1


def test_is_the_same_under_any_default_and_leaves_the_global_generator_alone() -> None:
    expected, state = uniform(BASE, 1000), torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(uniform(BASE, 1000), expected)
        with torch.inference_mode():
            assert torch.equal(uniform(BASE, 1000), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


def test_runs_through_on_a_device_without_data() -> None:
    drawn = uniform(BASE, 1000, device="meta")
    assert (drawn.device.type, tuple(drawn.shape), drawn.dtype) == ("meta", (1000,), torch.float32)


def test_parameters_are_told_apart_by_their_whole_name() -> None:
    names = ["a.b_w", "a_b.w", "a.b.w", "a", "b", "weight", "0.weight", "1.weight", "10.weight"]
    assert len({parameter_id(name) for name in names}) == len(names)
    assert parameter_id("0.weight") == 0xC65551011EE078E6  # stored runs depend on it
    assert all(0 <= parameter_id(name) < 2**64 for name in names)


# --- statistics ---


def chi_square_p(counts: Tensor) -> float:
    """P(a chi-square variable is larger), for counts that should be equal."""
    counts = counts.double().flatten()
    expected = counts.sum() / counts.numel()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((counts.numel() - 1) / 2.0).double(), statistic / 2))


def assert_like_chance(p: float) -> None:
    """Fails with probability 2e-5: too uneven, or too even to be random."""
    assert 1e-5 < p < 1 - 1e-5


def test_draws_are_uniform() -> None:
    k = bits(BASE, 8 * COUNT)
    assert_like_chance(chi_square_p(torch.bincount(k, minlength=65536)))


@pytest.mark.parametrize("bit", range(16))
def test_each_bit_is_a_fair_coin(bit: int) -> None:
    ones = int((bits(BASE, COUNT) >> bit & 1).sum())
    assert_like_chance(chi_square_p(torch.tensor([ones, COUNT - ones])))


def _with(**changes: int) -> Draw:
    return dataclasses.replace(BASE, **changes)


NEIGHBOURS = {
    "next pair": _with(sample=BASE.sample + 1),
    "fourth sample": _with(sample=BASE.sample + 4),
    "next step": _with(step=BASE.step + 1),
    "step, high word": _with(step=BASE.step + 2**32),
    "sample and step exchanged": _with(sample=BASE.step, step=BASE.sample),
    "next seed": _with(seed=BASE.seed + 1),
    "seed, high word": _with(seed=BASE.seed + 2**32),
    "opposite seed": _with(seed=-BASE.seed),
    "next parameter number": _with(parameter=BASE.parameter + 1),
    "parameter number, high word": _with(parameter=BASE.parameter ^ 2**32),
    "other parameter": _with(parameter=parameter_id("layers.1.weight")),
}


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 128, 511, 512, 513])
def test_neighbouring_elements_are_independent(lag: int) -> None:
    k = bits(BASE, COUNT + lag)
    assert_independent(k[:-lag], k[lag:])


@pytest.mark.parametrize("other", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_neighbouring_draws_are_independent(other: Draw) -> None:
    assert_independent(bits(BASE, COUNT), bits(other, COUNT))


@pytest.mark.parametrize("pair", [0, 1, 2**30])
def test_the_two_samples_of_a_pair_are_antithetic(pair: int) -> None:
    first, second = (bits(_with(sample=sample), COUNT) for sample in (2 * pair, 2 * pair + 1))
    assert torch.equal(first + second, torch.full_like(first, 0xFFFF))


def assert_independent(x: Tensor, y: Tensor) -> None:
    correlation = float(torch.corrcoef(torch.stack([x, y]).double())[0, 1])
    assert abs(correlation) * math.sqrt(x.numel()) < 4.75  # 2e-6
    for shift in (12, 0):  # the highest four bits, and the lowest
        cells = (x >> shift & 15) * 16 + (y >> shift & 15)
        assert_like_chance(chi_square_p(torch.bincount(cells, minlength=256)))
    assert_like_chance(chi_square_p(torch.bincount(x ^ y, minlength=65536)))
