"""The fused CPU kernels against the reference, which defines them: the same samples, gradients within rounding.

Tolerance of gradients: each is a product of the incoming gradient, the weight and a slope that takes ten float32
operations; fused and reference round them in another order (the fused one folds samples before it multiplies by the
weight). One rounding is 2**-24 relative, so 16 of them, 2**-20, bound a single sample; sums over samples are compared
with the sum of magnitudes.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sublens import kernels
from sublens.errors import SettingError
from sublens.kernels import LOGIT_BOUND, SIGMOID, Curve, blocked, cpu, reference, threads
from sublens.noise import Draw, uniform

DRAW = Draw(seed=3, step=11, sample=2, parameter=0x0123456789ABCDEF)
ROUNDING = 2.0**-20
SIZES = sorted(
    {n for tiles in (0, 1, 2, 8, 9) for d in (-65, -1, 0, 1, 63) if (n := 512 * tiles + d) > 0} | {1, 3, 100}
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, logits over and beyond the bound, gradient."""
    return normal(*shape, seed=seed), 5 * normal(*shape, seed=seed + 1), normal(*shape, seed=seed + 2)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.int32), other.view(torch.int32))


def sample_of(draw: Draw, number: int) -> Draw:
    return Draw(draw.seed, draw.step, draw.sample + number, draw.parameter)


def assert_agrees(weight: Tensor, logits: Tensor, gradient: Tensor, draw: Draw = DRAW) -> None:
    fused = cpu.masked(weight, logits, draw)
    assert fused.shape == weight.shape
    assert same_bits(fused, reference.masked(weight, logits, draw))
    of_logits = cpu.logit_gradient(gradient, weight, logits, draw)
    expected = reference.logit_gradient(gradient, weight, logits, draw)
    assert of_logits.shape == logits.shape
    torch.testing.assert_close(of_logits, expected, rtol=ROUNDING, atol=1e-37)


# --- fused against reference ---


@pytest.mark.parametrize("size", SIZES)
def test_agrees_at_every_size(size: int) -> None:
    assert_agrees(*problem(size, seed=size))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
)
@example(shape=[512], seed=2**64 - 1, step=2**64 - 1, sample=2**32 - 1, parameter=2**64 - 1)
def test_agrees_for_every_name_of_a_draw(shape: list[int], seed: int, step: int, sample: int, parameter: int) -> None:
    assert_agrees(*problem(*shape), Draw(seed, step, sample, parameter))


@pytest.mark.parametrize("first", [2, 3])
@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_walk_begins_at_either_sample_of_a_pair(first: int, samples: int) -> None:
    weight, logits, _ = problem(1100)
    masked = torch.full((samples, 1100), torch.nan)
    draw = Draw(3, 11, first, DRAW.parameter)
    cpu.walk(weight, logits, draw, masked=masked, begin=0, samples=samples)
    for k in range(samples):
        assert torch.equal(masked[k], reference.masked(weight, logits, sample_of(draw, k)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1500), st.integers(1, 1500), st.integers(1, 4), st.integers(0, 5))
@example(begin=512, count=512, samples=4, seed=0)
@example(begin=511, count=1, samples=2, seed=0)
@example(begin=0, count=600, samples=3, seed=0)
def test_walk_over_a_run_is_that_run_of_the_whole(begin: int, count: int, samples: int, seed: int) -> None:
    weight, logits, _ = problem(begin + count + 7, seed=seed)
    gradient = normal(samples, count, seed=seed + 9)
    masked, result = torch.full((samples, count), torch.nan), torch.full((count,), torch.nan)
    cpu.walk(weight, logits, DRAW, masked=masked, begin=begin, samples=samples)
    cpu.walk(weight, logits, DRAW, gradient=gradient, result=result, begin=begin, samples=samples)
    run = slice(begin, begin + count)
    expected, magnitude = torch.zeros(count), torch.zeros(count)
    for k in range(samples):
        draw = sample_of(DRAW, k)
        assert same_bits(masked[k], reference.masked(weight, logits, draw)[run])
        term = gradient[k] * (weight * reference.slope(logits, draw))[run]
        expected, magnitude = expected + term, magnitude + term.abs()
    assert bool(((result - expected).abs() <= ROUNDING * magnitude + 1e-37).all())


@pytest.mark.parametrize("offset", range(17))
def test_a_gradient_may_begin_anywhere_in_memory(offset: int) -> None:
    """Whole lines of the cache are written past it, what lies before and after them is not, and neighbours stay."""
    for size in (1, 15, 31, 64, 100, 515):
        weight, logits, gradient = problem(size, seed=size)
        around = torch.full((offset + size + 40,), torch.nan)
        result = around[offset : offset + size]
        cpu.walk(weight, logits, DRAW, gradient=gradient, result=result)
        assert same_bits(result, cpu.logit_gradient(gradient, weight, logits, DRAW))
        assert int(around.isnan().sum()) == offset + 40


def test_walk_with_nothing_to_do_says_so() -> None:
    weight, logits, _ = problem(5)
    with pytest.raises(ValueError, match="nothing to do"):
        cpu.walk(weight, logits, DRAW)


def test_agrees_for_tensors_that_are_not_contiguous() -> None:
    weight, logits, gradient = problem(60, 70)
    assert_agrees(weight.T, logits.T, gradient.T)
    assert_agrees(weight[:, ::2], logits[:, ::2], gradient[:, 1::2])
    assert_agrees(weight, logits, torch.ones(()).expand(60, 70))
    assert_agrees(weight, logits, torch.complex(weight, gradient).conj().imag)


def test_agrees_for_a_lazily_negated_gradient() -> None:
    weight, logits, gradient = problem(60)
    assert_agrees(weight, logits, gradient._neg_view())


def test_agrees_at_special_values() -> None:
    one, bound, inf = torch.finfo(torch.float32).eps, LOGIT_BOUND, float("inf")
    values = [0.0, -0.0, one, -one, 1e-38, 1e-45, bound, -bound, bound + 1e-6, 1e4, -1e4, 3e38, -3e38, inf, -inf]
    logits = torch.tensor(values).repeat_interleave(400)
    weights = torch.tensor([-0.0, 0.0, 1e-45, -1e-38, 3e38, inf, -inf, 1.0]).repeat(logits.numel() // 8)
    assert same_bits(cpu.masked(weights, logits, DRAW), reference.masked(weights, logits, DRAW))
    assert_agrees(normal(logits.numel()), logits, normal(logits.numel(), seed=1))


def test_agrees_on_the_edge_of_a_gate() -> None:
    # An element is open from k = T on. With ordinary logits one gate in 65,536 is that close.
    k = reference.bits(DRAW, 2**17).double().clamp(8, 65528)
    edge = (65536 / k - 1).log().float()
    weight = torch.ones(k.numel())
    just_open, just_shut = edge, (65536 / (k + 1) - 1).log().float()
    inside = reference.bits(DRAW, k.numel()) == k
    assert bool((cpu.masked(weight, just_open, DRAW) == 1)[inside].all())
    assert bool((cpu.masked(weight, just_shut, DRAW) == 0)[inside].all())
    # Between the two, the last bit of the odds decides.
    between = (65536 / (k - 0.5) - 1).log().float()
    for _ in range(3):
        assert same_bits(cpu.masked(weight, between, DRAW), reference.masked(weight, between, DRAW))
        between = between.nextafter(torch.tensor(torch.inf))


def test_a_closed_element_is_plus_zero_and_an_open_one_keeps_its_bits() -> None:
    weight = torch.tensor([-0.0, float("nan"), float("inf"), -1.5]).repeat(200)
    logits = torch.zeros(800)
    is_open = reference.is_open(logits, DRAW)
    for masked in (cpu.masked(weight, logits, DRAW), reference.masked(weight, logits, DRAW)):
        assert same_bits(masked[is_open], weight[is_open])
        assert same_bits(masked[~is_open], torch.zeros(int((~is_open).sum())))


def test_a_logit_that_is_not_a_number_gives_a_gradient_that_is_not_a_number() -> None:
    weight, logits, gradient = problem(100)
    logits[::2] = torch.nan
    for result in (
        reference.logit_gradient(gradient, weight, logits, DRAW),
        cpu.logit_gradient(gradient, weight, logits, DRAW),
    ):
        assert bool(result[::2].isnan().all())
        assert bool(result[1::2].isfinite().all())
    assert same_bits(cpu.masked(weight, logits, DRAW), reference.masked(weight, logits, DRAW))


# --- relaxed samples and noise ---

CURVES = [SIGMOID, Curve(2 / 3, -0.1, 1.1), Curve(0.25), Curve(5.0), Curve(0.1, -0.5, 1.2)]


def assert_soft(curve: Curve, draw: Draw | None, size: int) -> None:
    """Fused and reference against float64.

    The argument of the sigmoid is rounded a few times at up to 22 / tau and then held within 80; where that matters the
    sigmoid is flat, so 2**-19 of the largest value and of the steepest slope bounds what comes out. Where z is about to
    be cut, the slope may be either's.
    """
    weight, logits, gradient = problem(size, seed=size)
    held = logits.double().clamp(-LOGIT_BOUND, LOGIT_BOUND)
    noise = torch.zeros(size).double()
    if draw is not None:
        u = uniform(draw, size).double()
        noise = u.log() - torch.log1p(-u)
    s = torch.sigmoid((held + noise) / curve.tau)
    width = curve.high - curve.low
    z = s * width + curve.low
    inside = (z > 0) & (z < 1)
    slope = torch.where(inside, s * (1 - s) * width / curve.tau, 0)
    sure = ((z.abs() > 1e-5) & ((z - 1).abs() > 1e-5)) | (s * (1 - s) < 1e-6)
    for path in (cpu, reference):
        back = path.logit_gradient(gradient, weight, logits, draw, curve)
        assert back.dtype == torch.float32
        error = (back - gradient.double() * weight.double() * slope).abs()
        limit = 2.0**-19 * width / curve.tau * (gradient * weight).abs() + 1e-37
        assert bool((error <= limit)[sure].all())
        if draw is not None:
            scaled = path.scaled(weight, logits, draw, curve)
            assert bool(((scaled - weight * z.clamp(0, 1)).abs() <= 2.0**-19 * width * weight.abs()).all())


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("size", SIZES)
def test_relaxed_samples_agree_at_every_size(curve: Curve, size: int) -> None:
    assert_soft(curve, DRAW, size)


@pytest.mark.parametrize("curve", CURVES)
def test_a_slope_without_noise_agrees(curve: Curve) -> None:
    assert_soft(curve, None, 5000)


@pytest.mark.parametrize("size", [*SIZES, 2047, 2048, 2049, 100_000])
@pytest.mark.parametrize("sample", [2, 3])
def test_fast_noise_has_the_bits_of_its_definition(size: int, sample: int) -> None:
    draw = sample_of(DRAW, sample)
    assert same_bits(kernels.uniform(draw, size), uniform(draw, size))


@settings(max_examples=30, deadline=None)
@given(*[st.integers(0, 2**64 - 1)] * 2, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_fast_noise_has_its_bits_for_every_name_of_a_draw(seed: int, step: int, sample: int, parameter: int) -> None:
    draw = Draw(seed, step, sample, parameter)
    assert same_bits(kernels.uniform(draw, 100), uniform(draw, 100))


def test_noise_on_other_devices_and_none_at_all() -> None:
    assert kernels.uniform(DRAW, 0).shape == (0,)
    assert kernels.uniform(DRAW, 5, device="meta").device.type == "meta"


@pytest.mark.parametrize("curve", CURVES)
def test_a_relaxed_sample_of_a_logit_that_is_not_a_number_is_not_one(curve: Curve) -> None:
    one, logits = torch.ones(600), torch.full((600,), torch.nan)
    assert bool(cpu.scaled(one, logits, DRAW, curve).isnan().all())
    assert bool(cpu.logit_gradient(one, one, logits, DRAW, curve).isnan().all())
    assert bool(reference.logit_gradient(one, one, logits, DRAW, curve).isnan().all())


def test_loops_use_no_memory_that_was_given_back() -> None:
    """With a C library that overwrites what is freed, as glibc does when it is asked to."""
    program = """
import torch
from sublens.kernels import Curve, cpu, reference
from sublens.noise import Draw
draw, g = Draw(1, 2, 3, 4), torch.Generator().manual_seed(0)
w, x, y = (torch.randn(5000, generator=g) for _ in range(3))
assert torch.equal(cpu.masked(w, x, draw), reference.masked(w, x, draw))
for curve, of in ((Curve(), draw), (Curve(), None), (Curve(0.5, -0.1, 1.1), draw)):
    torch.testing.assert_close(
        cpu.logit_gradient(y, w, x, of, curve), reference.logit_gradient(y, w, x, of, curve), rtol=1e-3, atol=1e-5
    )
torch.testing.assert_close(cpu.scaled(w, x, draw, curve), reference.scaled(w, x, draw, curve), rtol=1e-3, atol=1e-5)
"""
    environment = {**os.environ, "MALLOC_PERTURB_": "65", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("device", ["meta"])
def test_another_default_device_changes_nothing(device: str) -> None:
    weight, logits, gradient = problem(50, 60)
    x = normal(2, 8, 60)
    expected = [kernels.masked(weight, logits, DRAW), kernels.logit_gradient(gradient, weight, logits, DRAW)]
    expected += [kernels.scaled(weight, logits, DRAW, CURVES[1]), blocked.forward(x, weight, logits, DRAW)]
    with torch.device(device):
        found = [kernels.masked(weight, logits, DRAW), kernels.logit_gradient(gradient, weight, logits, DRAW)]
        found += [kernels.scaled(weight, logits, DRAW, CURVES[1]), blocked.forward(x, weight, logits, DRAW)]
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == "cpu"
        assert torch.equal(one, other)


def test_many_threads_soften_as_one_does(three_threads: None) -> None:
    weight, logits, gradient = problem(200_001)
    found = [cpu.scaled(weight, logits, DRAW, CURVES[1]), cpu.logit_gradient(gradient, weight, logits, DRAW, CURVES[1])]
    torch.set_num_threads(1)
    assert torch.equal(found[0], cpu.scaled(weight, logits, DRAW, CURVES[1]))
    assert torch.equal(found[1], cpu.logit_gradient(gradient, weight, logits, DRAW, CURVES[1]))


# --- threads ---


@pytest.fixture
def three_threads():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def _both(weight: Tensor, logits: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return cpu.masked(weight, logits, DRAW), cpu.logit_gradient(gradient, weight, logits, DRAW)


@pytest.mark.parametrize("openmp", [True, False], ids=["OpenMP", "Python threads"])
def test_many_threads_do_what_one_does(openmp: bool, three_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, logits, gradient = problem(100_003)
    torch.set_num_threads(1)
    alone = _both(weight, logits, gradient)
    torch.set_num_threads(3)
    if not openmp:
        monkeypatch.setattr(threads, "_gomp_parallel", lambda: None)
    for _ in range(3):
        together = _both(weight, logits, gradient)
        assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))


# --- the definition itself ---


def test_odds_are_exponentials() -> None:
    logits = torch.cat([torch.linspace(-LOGIT_BOUND, LOGIT_BOUND, 200_001), torch.tensor([0.0, -0.0])])
    exact = logits.double().exp()
    assert float(((reference.odds(logits).double() - exact) / exact).abs().max()) < 7e-7
    assert reference.odds(torch.zeros(1)) == 1.0


def test_logits_are_held_within_the_bound() -> None:
    far = torch.tensor([float("inf"), 1e30, 11.0, -11.0, -1e30, -float("inf")])
    at = LOGIT_BOUND * far.sign()
    assert torch.equal(reference.odds(far), reference.odds(at))
    assert torch.equal(reference.thresholds(far), reference.thresholds(at))


def test_an_element_is_open_with_its_keep_probability() -> None:
    logits = torch.linspace(-LOGIT_BOUND, LOGIT_BOUND, 100_001)
    exact = (65536 - reference.thresholds(logits).double()) / 65536
    # Half a level, and the rounding of a float32 threshold of up to 65,536: 2**-7 of a level.
    assert float((exact - logits.double().sigmoid()).abs().max()) <= 2.0**-17 * (1 + 2 * 2.0**-7)
    assert bool(((exact > 0) & (exact < 1)).all())


def test_slope_is_the_derivative_of_the_relaxed_sample() -> None:
    logits = (4 * normal(4000)).clamp(-LOGIT_BOUND, LOGIT_BOUND)
    for tau in (0.25, 0.5, 1.0, 2.0, 100.0):
        exact = logits.double().requires_grad_()
        u = (reference.bits(DRAW, 4000).double() + 0.5) / 65536
        torch.sigmoid((exact + u.log() - torch.log1p(-u)) / tau).sum().backward()
        assert exact.grad is not None
        # 1 - s loses what s lacks to 1: absolute, in units of the largest slope.
        limit = {"rtol": 2e-6, "atol": 4e-7 / tau} if tau != 1.0 else {"rtol": 2e-6, "atol": 0.0}
        torch.testing.assert_close(reference.slope(logits, DRAW, Curve(tau)).double(), exact.grad, **limit)


# --- which path is taken ---


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    ("weight", "logits", "expected"),
    [
        (torch.zeros(3), torch.zeros(3), True),
        (torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(3, 4)), True),
        (torch.zeros(4, 3).T, torch.zeros(3, 4), True),
        (torch.zeros(3).double(), torch.zeros(3), False),
        (torch.zeros(3).bfloat16(), torch.zeros(3), False),
        (torch.zeros(3), torch.zeros(3).double(), False),
        (torch.zeros(0), torch.zeros(0), False),
        (torch.zeros(3, device="meta"), torch.zeros(3, device="meta"), False),
        (torch.zeros(3, device="meta"), torch.zeros(3), False),
        (torch.zeros(3), torch.zeros(3, device="meta"), False),
        (torch.zeros(3).as_subclass(Subclass), torch.zeros(3), False),
    ],
)
def test_where_the_fused_path_applies(weight: Tensor, logits: Tensor, expected: bool) -> None:
    assert cpu.applies(weight, logits) is expected


def test_under_function_transforms_the_reference_is_used() -> None:
    _, logits, _ = problem(30)
    weights = normal(4, 30)
    together = torch.func.vmap(lambda w: kernels.masked(w, logits, DRAW))(weights)
    assert torch.equal(together, torch.stack([reference.masked(w, logits, DRAW) for w in weights]))


def test_every_kind_of_tensor_gets_a_result() -> None:
    weight, logits, gradient = problem(12, 13)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        of_dtype = weight.to(dtype)
        masked = kernels.masked(of_dtype, logits, DRAW)
        assert masked.dtype == dtype
        assert torch.equal(masked, of_dtype * reference.is_open(logits, DRAW))
        of_logits = kernels.logit_gradient(gradient.to(dtype), of_dtype, logits, DRAW)
        expected = gradient.to(dtype).double() * of_dtype.double() * reference.slope(logits, DRAW)
        assert of_logits.dtype == torch.float32
        torch.testing.assert_close(of_logits.double(), expected, rtol=ROUNDING, atol=1e-37)
    on_meta = kernels.masked(weight.to("meta"), logits.to("meta"), DRAW)
    assert (on_meta.shape, on_meta.device.type) == (weight.shape, "meta")


def test_a_sparse_gradient_is_taken() -> None:
    weight, logits, gradient = problem(12, 13)
    expected = reference.logit_gradient(gradient, weight, logits, DRAW)
    result = kernels.logit_gradient(gradient.to_sparse(), weight, logits, DRAW)
    torch.testing.assert_close(result.to_dense(), expected, rtol=ROUNDING, atol=1e-37)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_both_choices_give_the_same(tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, logits, gradient = problem(2000)
    results = []
    for choice in ("auto", "reference"):
        monkeypatch.setenv("SUBLENS_KERNELS", choice)
        of_logits = kernels.logit_gradient(gradient, weight, logits, DRAW, Curve(tau))
        results.append((kernels.masked(weight, logits, DRAW), of_logits))
    (masked, of_logits), (masked_too, of_logits_too) = results
    assert same_bits(masked, masked_too)
    # With another temperature 1 - s is rounded where s is nearly 1; see assert_soft.
    limit = {"rtol": ROUNDING, "atol": 1e-37} if tau == 1.0 else {"rtol": 2.0**-15, "atol": 2.0**-19}
    torch.testing.assert_close(of_logits, of_logits_too, **limit)


def test_the_environment_can_forbid_the_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the fused path was taken")

    monkeypatch.setattr(cpu, "walk", forbidden)
    monkeypatch.setenv("SUBLENS_KERNELS", "reference")
    weight, logits, gradient = problem(5)
    kernels.masked(weight, logits, DRAW)
    kernels.logit_gradient(gradient, weight, logits, DRAW)
    monkeypatch.setenv("SUBLENS_KERNELS", "auto")
    with pytest.raises(AssertionError, match="fused path"):
        kernels.masked(weight, logits, DRAW)


def test_a_wrong_choice_in_the_environment_names_the_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBLENS_KERNELS", "fast")
    weight, logits, gradient = problem(5)
    with pytest.raises(SettingError, match=r"SUBLENS_KERNELS is 'fast'.*auto, reference"):
        kernels.masked(weight, logits, DRAW)
    with pytest.raises(SettingError, match="auto, reference"):
        kernels.logit_gradient(gradient, weight, logits, DRAW)


def test_the_draws_of_one_step_are_all_different() -> None:
    weight = torch.ones(4096)
    logits = torch.zeros(4096)
    names = [
        DRAW,
        sample_of(DRAW, 2),  # the second of DRAW's own antithetic pair has a test of its own
        Draw(3, 12, 2, DRAW.parameter),
        Draw(4, 11, 2, DRAW.parameter),
        Draw(3, 11, 2, 1),
    ]
    for one, other in itertools.combinations([cpu.masked(weight, logits, name) for name in names], 2):
        # 4096 fair coins: 2048 differ, give or take 32; six times that has probability 2e-9.
        assert abs(int((one != other).sum()) - 2048) < 192


def test_the_reference_is_traced_whole_and_keeps_its_bits() -> None:
    # As torch.compile sees it on other devices: no graph break, and the step is no constant of the compiled code.
    weight, logits, gradient = problem(30, 70)

    def masked(weight: Tensor, logits: Tensor, step: int) -> Tensor:
        return kernels.masked(weight, logits, Draw(3, step, 1, 7))

    def back(gradient: Tensor, weight: Tensor, logits: Tensor, step: int) -> Tensor:
        return kernels.logit_gradient(gradient, weight, logits, Draw(3, step, 1, 7))

    torch._dynamo.reset()
    compiled = [torch.compile(function, backend="aot_eager", fullgraph=True) for function in (masked, back)]
    for step in (0, 1, 2, 2**40):
        draw = Draw(3, step, 1, 7)
        assert same_bits(compiled[0](weight, logits, step), reference.masked(weight, logits, draw))
        expected = reference.logit_gradient(gradient, weight, logits, draw)
        assert same_bits(compiled[1](gradient, weight, logits, step), expected)
