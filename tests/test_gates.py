"""``GumbelSigmoid``: its samples are open with their keep probability, its gradient is the relaxed sample's."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import sublens as sl
from sublens.errors import SettingError
from sublens.noise import Draw, parameter_id, uniform

DRAW = Draw(seed=5, step=0, sample=0, parameter=parameter_id("weight"))
COUNT = 2**18
LOGITS = [-10.0, -6.0, -2.197, -0.5, 0.0, 0.1, 2.0, 2.197, 5.0, 10.0]


def sample(logit: float, tau: float, draw: Draw = DRAW) -> Tensor:
    return sl.GumbelSigmoid(tau).masked(torch.ones(COUNT), torch.full((COUNT,), logit), draw)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("logit", LOGITS)
def test_gates_are_open_with_their_keep_probability(logit: float, tau: float) -> None:
    p = 1 / (1 + math.exp(-logit))
    frequency = float(sample(logit, tau).double().mean())
    # Five standard errors (probability 6e-7, the seed is fixed), and the resolution of the noise.
    assert abs(frequency - p) < 5 * math.sqrt(p * (1 - p) / COUNT) + 2.0**-17


def test_a_gate_opens_with_its_logit_and_does_not_close_again() -> None:
    samples = torch.stack([sample(logit, 1.0) for logit in LOGITS])
    assert bool((samples.diff(dim=0) >= 0).all())


def test_a_sample_does_not_depend_on_the_temperature() -> None:
    assert torch.equal(sample(0.3, 1.0), sample(0.3, 0.25))
    assert torch.equal(sample(0.3, 1.0), sample(0.3, 7.0))


def relaxed(logits: Tensor, draw: Draw, tau: float) -> Tensor:
    """The relaxed sample as the paper writes it, in float64."""
    u = uniform(draw, logits.numel()).double().view(logits.shape)
    return torch.sigmoid((logits + u.log() - (1 - u).log()) / tau)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.25, 0.5, 1.0, 2.0, 10.0])
def test_gradient_is_that_of_the_relaxed_sample(tau: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, gradient = (torch.randn(37, 41, generator=generator).to(dtype) for _ in range(2))
    logits = 4 * torch.randn(37, 41, generator=generator)
    exact = logits.double().clamp(-10, 10).requires_grad_()
    soft = relaxed(exact, DRAW, tau)
    (soft * weight.double() * gradient.double()).sum().backward()
    assert exact.grad is not None
    result = sl.GumbelSigmoid(tau).logit_gradient(gradient, weight, logits, DRAW)
    assert result.dtype == torch.float32
    assert result.shape == logits.shape
    # Beside tau = 1, 1 - s is computed from s: an error of a few float32 roundings of 1.
    torch.testing.assert_close(result.double(), exact.grad, rtol=3e-6, atol=0.0 if tau == 1.0 else 1e-5)
    # The hard sample is the relaxed one, rounded.
    hard = sl.GumbelSigmoid(tau).masked(torch.ones(37, 41), logits, DRAW)
    assert torch.equal(hard, (relaxed(logits.double().clamp(-10, 10), DRAW, tau) > 0.5).float())


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("logit", [-3.0, 0.0, 1.0])
def test_mean_gradient_is_the_integral_over_the_noise(logit: float, tau: float) -> None:
    u = (torch.arange(10**6).double() + 0.5) / 10**6
    s = torch.sigmoid((logit + u.log() - (1 - u).log()) / tau)
    slopes = s * (1 - s) / tau
    ones = torch.ones(COUNT)
    result = sl.GumbelSigmoid(tau).logit_gradient(ones, ones, torch.full((COUNT,), logit), DRAW)
    assert abs(float(result.double().mean() - slopes.mean())) < 5 * float(slopes.std()) / math.sqrt(COUNT) + 1e-7
    if (logit, tau) == (0.0, 1.0):
        assert abs(float(slopes.mean()) - 1 / 6) < 1e-9  # integral of u (1 - u)


def test_every_gate_has_its_own_noise() -> None:
    # Neighbouring gates agree as often as two fair coins do: 5 standard errors.
    gates = sample(0.0, 1.0)
    for lag in (1, 2, 64, 512):
        agree = float((gates[lag:] == gates[:-lag]).double().mean())
        assert abs(agree - 0.5) < 5 * 0.5 / math.sqrt(COUNT)


@pytest.mark.parametrize("tau", [0.0, -1.0, 0.2, float("nan"), float("inf")])
def test_an_impossible_temperature_is_refused(tau: float) -> None:
    with pytest.raises(SettingError, match=r"tau is .* at least 0\.25"):
        sl.GumbelSigmoid(tau)


def test_gate_is_a_value() -> None:
    assert sl.GumbelSigmoid() == sl.GumbelSigmoid(1.0) != sl.GumbelSigmoid(0.5)
    assert isinstance(sl.GumbelSigmoid(), sl.Gate)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sl.GumbelSigmoid().tau = 2.0  # type: ignore[misc]


def test_a_gate_needs_both_of_its_directions() -> None:
    class Half(sl.Gate):
        def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
            return weight

    with pytest.raises(TypeError, match="logit_gradient"):
        Half()  # type: ignore[abstract]
