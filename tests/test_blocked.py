"""Linear layers under K samples at once, against masked weights of the reference and float64 products.

Tolerance: a sum of n products in float32 is off by at most n roundings of the sum of their magnitudes, and typically by
the square root of n; 2**-24 sqrt(n) times 16, taken of that sum, leaves room for every case here. Gradients of logits
have some ten operations more.
"""

import gc
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sublens.kernels import blocked, cpu, reference
from sublens.noise import Draw

DRAW = Draw(seed=3, step=11, sample=0, parameter=0x0123456789ABCDEF)
ROUNDING = 16 * 2.0**-24


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(samples: int, m: int, width: int, height: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, weight, logits over and beyond the bound, gradient of the outputs."""
    weight, logits = normal(height, width, seed=1), 4 * normal(height, width, seed=2)
    return normal(samples, m, width), weight, logits, normal(samples, m, height, seed=3)


def sample_of(draw: Draw, number: int) -> Draw:
    return Draw(draw.seed, draw.step, draw.sample + number, draw.parameter)


def assert_transposed_agrees(samples: int, m: int, width: int, height: int, draw: Draw, *, reduced: bool) -> None:
    """Check a product with a weight that is stored as inputs (``height``) by outputs."""
    _, weight, logits, x = problem(samples, m, width, height)
    coarse = 2.0**-8 if reduced and m >= blocked._long(samples, reduced) else 0.0
    bias = normal(width, seed=7)
    y = blocked.forward_transposed(x, weight, logits, draw, bias=bias, reduced=reduced)
    if reduced:
        x, weight = x.bfloat16().float(), weight.bfloat16().float()
    for k in range(samples):
        masked, inputs = reference.masked(weight, logits, sample_of(draw, k)).double(), x[k].double()
        magnitude = inputs.abs() @ masked.abs() + bias.abs()
        assert_near(y[k], inputs @ masked + bias.double(), magnitude, height, coarse)


def assert_near(found: Tensor, expected: Tensor, magnitude: Tensor, terms: int, coarse: float = 0.0) -> None:
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    limit = (ROUNDING * math.sqrt(terms) + coarse) * magnitude + 1e-30
    assert bool(((found.double() - expected).abs() <= limit).all())


def assert_agrees(
    samples: int, m: int, width: int, height: int, draw: Draw = DRAW, *, reduced: bool | None = None
) -> None:
    """Check one precision, or both.

    In bfloat16 inputs, weights and gradients are rounded first. Sums are the same, but those of long chunks are rounded
    to 8 bits at the end, each by at most 2 ** -9 of it. Where there is a matrix unit, products without it are checked
    too.
    """
    if reduced is None:
        assert_agrees(samples, m, width, height, draw, reduced=True)
        if blocked.by_tiles():
            with mock.patch.object(blocked, "by_tiles", lambda: False):
                assert_agrees(samples, m, width, height, draw, reduced=True)
    coarse = 2.0**-8 if reduced and m >= blocked._long(samples, reduced) else 0.0
    assert_transposed_agrees(samples, m, width, height, draw, reduced=bool(reduced))
    x, weight, logits, gradient = problem(samples, m, width, height)
    y = blocked.forward(x, weight, logits, draw, reduced=bool(reduced))
    of_x, of_logits = blocked.backward(gradient, x, weight, logits, draw, wants_x=True, reduced=bool(reduced))
    nothing, alone = blocked.backward(gradient, x, weight, logits, draw, wants_x=False, reduced=bool(reduced))
    assert of_x is not None
    assert nothing is None
    assert torch.equal(alone, of_logits)
    expected_of_weight, magnitude_of_weight = torch.zeros(2, height, width).double()
    of_weight = torch.empty(height, width)
    options = {"reduced": bool(reduced), "of_weight": of_weight}
    same = blocked.backward(gradient, x, weight, logits, draw, wants_x=True, **options)  # type: ignore[arg-type]
    assert same[0] is not None and torch.equal(same[0], of_x) and torch.equal(same[1], of_logits)
    total, magnitude = torch.zeros(height, width).double(), torch.zeros(height, width).double()
    whole = weight
    if reduced:
        x, weight, gradient = (tensor.bfloat16().float() for tensor in (x, weight, gradient))
    for k in range(samples):
        masked = reference.masked(weight, logits, sample_of(draw, k)).double()
        inputs, grad = x[k].double(), gradient[k].double()
        assert_near(y[k], inputs @ masked.T, inputs.abs() @ masked.abs().T, width, coarse)
        assert_near(of_x[k], grad @ masked, grad.abs() @ masked.abs(), height, coarse)
        slope = whole.double() * reference.slope(logits, sample_of(draw, k)).double()
        total += grad.T @ inputs * slope
        magnitude += grad.abs().T @ inputs.abs() * slope.abs()
        is_open = reference.masked(torch.ones(height, width), logits, sample_of(draw, k)).double()
        expected_of_weight += grad.T @ inputs * is_open
        magnitude_of_weight += grad.abs().T @ inputs.abs() * is_open
    assert_near(of_weight, expected_of_weight, magnitude_of_weight, samples * (m + 10), coarse)
    assert_near(of_logits, total, magnitude, samples * (m + 10), coarse)


@pytest.mark.parametrize("m", [1, 8, 16, 24, 31, 32, 33, 40, 72, 128])
@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_agrees_for_every_size_of_a_chunk(samples: int, m: int) -> None:
    assert_agrees(samples, m, 70, 53)


@pytest.mark.parametrize(
    ("width", "height"),
    [(1, 1), (1, 100), (100, 1), (31, 48), (32, 47), (33, 49), (63, 64), (256, 96), (257, 97), (289, 129), (600, 20)],
)
def test_agrees_around_the_edges_of_blocks(width: int, height: int) -> None:
    assert_agrees(4, 9, width, height)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(("width", "height"), [(3, 5), (70, 53), (300, 130)])
def test_one_example_without_numbers_leaves_the_others_theirs(width: int, height: int, reduced: bool) -> None:
    """Loops fill rows and columns up to whole vectors and tiles, and 0 times infinity would be no number."""
    x, weight, logits, gradient = problem(2, 5, width, height)
    y = blocked.forward(x, weight, logits, DRAW, reduced=reduced)
    of_x, _ = blocked.backward(gradient, x, weight, logits, DRAW, wants_x=True, reduced=reduced)
    x[0, 4], gradient[0, 4] = math.inf, math.nan
    y_beside = blocked.forward(x, weight, logits, DRAW, reduced=reduced)
    of_x_beside, _ = blocked.backward(gradient, x, weight, logits, DRAW, wants_x=True, reduced=reduced)
    assert of_x is not None and of_x_beside is not None
    others = torch.tensor([True] * 4 + [False] + [True] * 5)
    assert torch.equal(y_beside.view(10, -1)[others], y.view(10, -1)[others])
    assert torch.equal(of_x_beside.view(10, -1)[others], of_x.view(10, -1)[others])
    assert not bool(y_beside[0, 4].isfinite().any()) and bool(of_x_beside[0, 4].isnan().all())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 300), st.integers(1, 110), st.integers(0, 5))
@example(samples=3, m=2, width=64, height=3, first=1)
def test_agrees_for_any_sizes_and_first_sample(samples: int, m: int, width: int, height: int, first: int) -> None:
    assert_agrees(samples, m, width, height, sample_of(DRAW, first))


@pytest.mark.parametrize(("samples", "width", "height"), [(1, 70, 53), (3, 1024, 400), (2, 3, 2**19 + 5)])
def test_agrees_for_long_chunks(samples: int, width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_long", lambda samples, reduced: 12)
    assert_agrees(samples, 13, width, height)


@pytest.mark.parametrize(("samples", "m"), [(1, 2049), (3, 700), (9, 256)])
def test_agrees_for_long_chunks_whichever_product_takes_them(samples: int, m: int) -> None:
    # By the library or by the loops, as the processor decides; and by the other one.
    assert_agrees(samples, m, 300, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "_long", lambda samples, reduced: 4096)
        assert_agrees(samples, m, 300, 100)


@pytest.mark.parametrize("long", [12, 256])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (70, 53), (300, 100)])
def test_rectifies_and_rounds_as_torch_does_beside_the_layer(
    width: int, height: int, reduced: bool, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "_long", lambda samples, reduced: long)
    x, weight, logits, gradient = problem(3, 13, width, height)
    x.relu_()
    bias = normal(height, seed=7)
    y = blocked.forward(x, weight, logits, DRAW, bias=bias, reduced=reduced)
    assert torch.equal(blocked.forward(x, weight, logits, DRAW, bias=bias, reduced=reduced, rectified=True), y.relu())
    of_x, of_logits = blocked.backward(gradient, x, weight, logits, DRAW, wants_x=True, reduced=reduced)
    assert of_x is not None
    found, same = blocked.backward(gradient, x, weight, logits, DRAW, wants_x=True, reduced=reduced, rectified=True)
    assert found is not None
    assert torch.equal(found, torch.where(x > 0, of_x, 0))
    assert torch.equal(same, of_logits)
    for rounded, whole in (
        (blocked.forward(x, weight, logits, DRAW, bias=bias, reduced=reduced, rounded=True), y),
        (blocked.backward(gradient, x, weight, logits, DRAW, wants_x=True, reduced=reduced, rounded=True)[0], of_x),
    ):
        assert rounded is not None
        assert torch.equal(rounded, whole.bfloat16().float())
    if width > 1:
        assert not torch.equal(y, y.bfloat16().float())
        assert bool((found != of_x).any())
        assert bool((y < 0).any())


@pytest.mark.parametrize(
    "value", [math.nan, -math.nan, math.inf, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20]
)
def test_rounds_to_bfloat16_as_torch_does(value: float) -> None:
    # One open gate, so that the weight comes out as it was multiplied; as a number of its own, and of a pair.
    logits, one = torch.full((1, 1), 10.0), torch.ones(1, 1, 1)
    weight = torch.full((1, 1), value)
    y = blocked.forward(one, weight, logits, DRAW, reduced=True)
    torch.testing.assert_close(y.view(1, 1), weight.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    y = blocked.forward(weight.view(1, 1, 1), one.view(1, 1), logits, DRAW, reduced=True)
    torch.testing.assert_close(y.view(1, 1), weight.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("long", [12, 256])
@pytest.mark.parametrize("width", [64, 65, 130])
def test_some_rows_have_the_samples_that_they_have_in_the_whole(
    long: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "_long", lambda samples, reduced: long)
    x, weight, logits, gradient = problem(3, 13, width, 150)
    rows = slice(47, 119)
    y = blocked.forward(x, weight, logits, DRAW)
    _, of_logits = blocked.backward(gradient, x, weight, logits, DRAW, wants_x=False)
    part = blocked.forward(x, weight[rows], logits[rows], DRAW, 47)
    _, of_part = blocked.backward(
        gradient[:, :, rows].contiguous(), x, weight[rows], logits[rows], DRAW, 47, wants_x=False
    )
    torch.testing.assert_close(part, y[:, :, rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_part, of_logits[rows], rtol=1e-5, atol=1e-5)


def test_antithetic_pairs_fold_as_single_samples_do_at_the_bound_of_logits() -> None:
    x, weight, _, gradient = problem(2, 8, 96, 40)
    for logit in (-50.0, -10.0, 10.0, 50.0):
        logits = torch.full_like(weight, logit)
        _, of_logits = blocked.backward(gradient, x, weight, logits, DRAW, wants_x=False)
        expected, magnitude = torch.zeros(40, 96).double(), torch.zeros(40, 96).double()
        for k in range(2):
            term = weight.double() * reference.slope(logits, sample_of(DRAW, k)).double()
            expected += gradient[k].double().T @ x[k].double() * term
            magnitude += gradient[k].abs().double().T @ x[k].abs().double() * term.abs()
        assert_near(of_logits, expected, magnitude, 20)
        assert bool(of_logits.isfinite().all())
        assert bool((of_logits != 0).any())


@pytest.mark.parametrize("reduced", [False, True])
def test_the_number_of_threads_changes_no_bit(reduced: bool) -> None:
    before = torch.get_num_threads()
    x, weight, logits, gradient = problem(4, 32, 700, 500)
    found = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            y = blocked.forward(x, weight, logits, DRAW, reduced=reduced)
            of_x, of_logits = blocked.backward(gradient, x, weight, logits, DRAW, wants_x=True, reduced=reduced)
            assert of_x is not None
            found.append((y, of_x, of_logits))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_what_is_not_a_number_in_one_place_stays_there() -> None:
    x, weight, logits, gradient = problem(2, 8, 40, 30)
    weight[3, 5] = torch.nan
    logits[:] = 40.0  # open
    _, of_logits = blocked.backward(gradient, x, weight, logits, DRAW, wants_x=True)
    assert bool(of_logits[3, 5].isnan())
    assert int(of_logits.isnan().sum()) == 1
    for rectified in (False, True):
        y = blocked.forward(x, weight, logits, DRAW, rectified=rectified)
        assert bool(y[:, :, 3].isnan().all())
        assert int(y.isnan().sum()) == y[:, :, 3].numel()
    assert bool(blocked.forward(x, weight, logits, DRAW, rounded=True)[:, :, 3].isnan().all())


def packed(x: Tensor, filler: float) -> blocked.Packed:
    """Rows in the order of the loops; what fills a piece up must never be seen."""
    samples, rows, columns = x.shape
    count, length = blocked.pieces(rows)
    whole = torch.full((samples, count * length, columns), filler)
    whole[:, :rows] = x
    return blocked.Packed(whole.view(samples, count, length, columns).transpose(2, 3).contiguous(), rows)


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 5), m=st.integers(1, 140), width=st.integers(1, 300), height=st.integers(1, 110),
    comes=st.booleans(), goes=st.booleans(), rectified=st.booleans(), rounded=st.booleans(),
)  # fmt: skip
@example(samples=1, m=128, width=300, height=97, comes=True, goes=True, rectified=True, rounded=False)
def test_packed_rows_give_the_bits_of_plain_ones(
    samples: int, m: int, width: int, height: int, comes: bool, goes: bool, rectified: bool, rounded: bool
) -> None:
    x, weight, logits, gradient = problem(samples, m, width, height)
    x, bias = x.relu(), normal(height, seed=4)
    options = {"rectified": rectified, "rounded": rounded}
    expected = blocked.forward(x, weight, logits, DRAW, bias=bias, **options)  # type: ignore[arg-type]
    came = packed(x, 7.0) if comes else x
    out = packed(torch.empty_like(gradient), 0.0) if goes else None
    y = blocked.forward(came, weight, logits, DRAW, bias=bias, out=out, **options)  # type: ignore[arg-type]
    assert torch.equal(y.plain() if goes else y, expected)
    of_x, of_logits = blocked.backward(gradient, x, weight, logits, DRAW, wants_x=True, **options)  # type: ignore[arg-type]
    arrives = packed(gradient, 0.0) if goes else gradient
    found = blocked.backward(arrives, came, weight, logits, DRAW, wants_x=True, **options)  # type: ignore[arg-type]
    assert torch.equal(found[0].plain() if comes else found[0], of_x)
    assert torch.equal(found[1], of_logits)
    of_weight = torch.empty(2, height, width)
    blocked.backward(gradient, x, weight, logits, DRAW, wants_x=False, of_weight=of_weight[0])
    nothing, alone = blocked.backward(arrives, came, weight, logits, DRAW, wants_x=False, of_weight=of_weight[1])
    assert nothing is None
    assert torch.equal(alone, of_logits)
    assert torch.equal(of_weight[0], of_weight[1])


@pytest.mark.parametrize("rows", [*range(1, 70), 128, 1000])
def test_pieces_hold_all_rows_and_waste_few(rows: int) -> None:
    count, length = blocked.pieces(rows)
    register = cpu.compiled("linear_loops").REGISTER
    assert length % register == 0
    assert register <= length <= 4 * register
    assert 0 <= count * length - rows < register * count


def test_memory_of_a_gradient_is_used_again_only_when_nobody_holds_it() -> None:
    weight, x, draw = normal(512, 512, seed=1), normal(1, 8, 512, seed=2), Draw(1, 0, 0, 1)
    logits = nn.Parameter(torch.zeros(512, 512))

    def gradient(of: float) -> Tensor:
        return blocked.backward(torch.full((1, 8, 512), of), x, weight, logits, draw, wants_x=False)[1]

    first = gradient(1.0)
    kept, part = first.clone(), first[3:]  # a view holds the memory too
    where = first.data_ptr()
    del first
    second = gradient(2.0)
    assert torch.equal(part, kept[3:])
    assert torch.equal(second, 2 * kept)  # powers of two are exact
    del part
    third = gradient(4.0)
    assert third.data_ptr() == where
    assert torch.equal(second, 2 * kept)
    assert torch.equal(third, 4 * kept)


def test_memory_of_gradients_is_held_up_to_a_limit_and_goes_with_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    before, size = blocked._held_bytes[0], 4 * 512 * 512
    monkeypatch.setattr(blocked, "_MOST_HELD", before + size)
    one, other = (nn.Parameter(torch.zeros(512, 512)) for _ in range(2))
    first = blocked._for_gradient(one)
    assert blocked._held_bytes[0] == before + size
    second = blocked._for_gradient(other)
    assert second.shape == other.shape
    assert not len(blocked._memory_of[other])
    assert blocked._held_bytes[0] == before + size
    first.fill_(1.0)
    assert blocked._for_gradient(one).data_ptr() != first.data_ptr()  # in use, and no more may be held
    where = first.data_ptr()
    del first
    assert blocked._for_gradient(one).data_ptr() == where
    del one
    gc.collect()
    assert blocked._held_bytes[0] == before
    held = blocked._for_gradient(other)
    assert blocked._held_bytes[0] == before + size
    assert len(blocked._memory_of[other]) == 1
    assert held.shape == other.shape


def test_fused_loops_are_trusted_only_where_they_give_the_reference() -> None:
    assert cpu.agrees()
    assert blocked.agrees()


OF_THE_LOOPS = """
import hashlib, torch
from sublens.kernels import blocked, cpu
from sublens.noise import Draw
found, draw = hashlib.sha256(), Draw(5, 3, 1, 7)
generator = torch.Generator().manual_seed(0)
for samples, m, width, height in ((1, 128, 70, 53), (4, 32, 300, 77), (8, 16, 33, 100), (3, 50, 64, 48)):
    x, weight, logits, gradient = (
        torch.randn(*shape, generator=generator)
        for shape in ((samples, m, width), (height, width), (height, width), (samples, m, height))
    )
    y = blocked.forward(x, weight, logits, draw)
    for result in (y, *blocked.backward(gradient, x, weight, logits, draw, wants_x=True)):
        found.update(result.numpy().tobytes())
for count in range(1, 70):
    weight, logits = torch.randn(2, count, generator=generator)
    of_masked, masked, result = torch.randn(2, count, generator=generator), torch.empty(2, count), torch.empty(count)
    cpu.walk(weight, logits, draw, masked=masked, gradient=of_masked, result=result, samples=2)
    for each in (masked, result):
        found.update(each.numpy().tobytes())
print(cpu.compiled("linear_loops").REGISTER, found.hexdigest())
"""


def test_wide_vectors_give_the_bits_of_narrow_ones(tmp_path: Path) -> None:
    if cpu.compiled("linear_loops").REGISTER != 16:
        pytest.skip("this processor has no AVX-512")
    narrow = {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi2,+popcnt,+sse4.2",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    lines = [
        subprocess.run(
            [sys.executable, "-c", OF_THE_LOOPS], env=os.environ | more, check=True, capture_output=True, text=True
        )
        for more in ({}, narrow)
    ]
    (wide, bits), (eight, same) = (line.stdout.split()[-2:] for line in lines)
    assert (wide, eight) == ("16", "8")
    assert bits == same


def test_squares_and_adam_are_the_same_on_many_threads_and_near_float64() -> None:
    before = torch.get_num_threads()
    sizes = (5, 16_384, 83_614)  # less than a chunk, just one, and several
    gradient, found = normal(100_003, seed=5), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            values, mean, mean_square = normal(100_003), 0.1 * normal(100_003, seed=1), normal(100_003, seed=2) ** 2
            state = [tensor.double().numpy() for tensor in (values, mean, mean_square)]
            parts = [tensor.split(sizes) for tensor in (values, gradient, mean, mean_square)]
            totals = cpu.adam(*parts, steps=[7, 7, 7], lr=0.02, betas=(0.9, 0.99), epsilon=1e-8,
                              constants=[0.125] * 3, factor=0.5)  # fmt: skip
            expected = [part.double().sum().item() for part in parts[0]]
            assert totals == cpu.totals(parts[0]) == pytest.approx(expected, abs=1e-5 * 100_003)
            found.append((values, mean, mean_square, cpu.squares(parts[1], [0.125] * 3)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(found[0][:3], found[1][:3], strict=True))
    squares = [(part.double() + 0.125).square().sum().item() for part in gradient.split(sizes)]
    assert found[0][3] == found[1][3] == pytest.approx(squares, rel=1e-5)
    slope = (gradient.double().numpy() + 0.125) * 0.5
    mean64, square64 = 0.9 * state[1] + 0.1 * slope, 0.99 * state[2] + 0.01 * slope**2
    step = 0.02 * mean64 / (1 - 0.9**7) / ((square64 / (1 - 0.99**7)) ** 0.5 + 1e-8)
    # A step is off by some ten roundings of itself, the value by one of its own.
    error = abs(found[0][0].double().numpy() - (state[0] - step))
    assert bool((error <= 2e-6 * abs(step) + 2.0**-23 * abs(state[0]) + 1e-9).all())
