"""The fused step of an LSTM against PyTorch's, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sublens.kernels import cells


def reference(source: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Cells and outputs, as the documentation of ``torch.nn.LSTM`` has them."""
    i, f, g, o = source.chunk(4, -1)
    after = f.sigmoid() * before + i.sigmoid() * g.tanh()
    return after, o.sigmoid() * after.tanh()


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(source: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, cells and outputs."""
    gates, after, outputs = torch.empty(source.shape), torch.empty(before.shape), torch.empty(before.shape)
    cells.forward(source, gates, before, after, outputs)
    return gates, after, outputs


@settings(deadline=None, max_examples=40)
@given(
    samples=st.integers(1, 4), m=st.integers(1, 19), size=st.integers(1, 70), scale=st.sampled_from([0.1, 3.0, 40.0]),
    continued=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_a_step_and_its_gradient_are_those_of_float64(
    samples: int, m: int, size: int, scale: float, continued: bool, seed: int
) -> None:
    # Samples are apart, as those of a time step are within all steps.
    source = numbers(samples, 3, m, 4 * size, seed=seed, scale=scale)[:, 1]
    before = numbers(samples, m, size, seed=seed + 1)
    of_outputs = numbers(samples, 2, m, size, seed=seed + 2)[:, 1]
    of_hidden = numbers(samples, m, size, seed=seed + 3) if continued else None
    of_cells = numbers(samples, m, size, seed=seed + 4)

    x, c = source.double().requires_grad_(), before.double().requires_grad_()
    after, outputs = reference(x, c)
    coming = of_outputs.double() + (of_hidden.double() if of_hidden is not None else 0.0)
    torch.autograd.backward([after, outputs], [of_cells.double(), coming])
    assert x.grad is not None and c.grad is not None

    gates, found_after, found_outputs = step(source, before)
    # Numbers up to 5, in float32: a few roundings of 6e-8 of that each.
    torch.testing.assert_close(found_after.double(), after.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found_outputs.double(), outputs.detach(), rtol=1e-6, atol=1e-6)
    in_place, again = source.clone(memory_format=torch.contiguous_format), torch.empty_like(before)
    cells.forward(in_place, in_place, before, again, torch.empty_like(before))
    assert torch.equal(in_place, gates) and torch.equal(again, found_after)
    of_gates, of_before = torch.empty(samples, m, 4 * size), of_cells.clone()
    cells.backward(of_outputs, of_hidden, gates, before, found_after, of_before, of_gates)
    torch.testing.assert_close(of_gates.double(), x.grad, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(of_before.double(), c.grad, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e-3, 0.1, 1.0, 3.0])
def test_small_numbers_are_as_precise_as_large_ones(scale: float) -> None:
    x = scale * torch.linspace(-1, 1, 999)
    # With f shut, and i and o open, a cell is tanh of what goes into g, and an output is tanh of that.
    source = torch.cat([torch.full_like(x, 80.0), torch.full_like(x, -80.0), x, torch.full_like(x, 80.0)])
    before = torch.zeros(1, 1, 999)
    gates, after, outputs = step(source.view(1, 1, -1), before)
    torch.testing.assert_close(after.flatten().double(), x.double().tanh(), rtol=4e-7, atol=0)
    torch.testing.assert_close(outputs.flatten().double(), x.double().tanh().tanh(), rtol=8e-7, atol=0)
    of_cells, of_gates = torch.zeros(1, 1, 999), torch.empty(1, 1, 4 * 999)
    cells.backward(torch.full_like(before, scale), None, gates, before, after, of_cells, of_gates)
    slope = scale * (1 - x.double().tanh() ** 2) * (1 - x.double().tanh().tanh() ** 2)
    torch.testing.assert_close(of_gates[0, 0, 2 * 999 : 3 * 999].double(), slope, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("size", [1, 64])
def test_what_is_far_out_is_at_its_limit_and_nan_stays_nan(size: int) -> None:
    for value in (-1e30, -100.0, 100.0, float("inf"), float("nan")):
        source, before = torch.full((1, 2, 4 * size), value), torch.full((1, 2, size), 0.5)
        after, outputs = reference(source, before)
        _, found_after, found_outputs = step(source, before)
        torch.testing.assert_close(found_after, after, equal_nan=True, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found_outputs, outputs, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_many_threads_give_the_bits_of_one(request: pytest.FixtureRequest) -> None:
    source, before = numbers(4, 50, 4 * 64, seed=1), numbers(4, 50, 64, seed=2)
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(step(source, before))
    assert all(map(torch.equal, *found))
