"""Attention of short sequences under autocast to bfloat16 is computed in float32, wherever a network asks for it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sublens.kernels import short_attention
from sublens.masked_network import MaskedNetwork

BFLOAT16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def heads(tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(tokens)
    return [torch.randn(3, 2, tokens, 8).to(dtype).requires_grad_() for _ in range(3)]


def masks(tokens: int) -> list[Tensor | None]:
    allowed = torch.rand(3, 1, tokens, tokens) < 0.7
    allowed |= torch.eye(tokens, dtype=torch.bool)
    return [None, allowed, torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))]


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("tokens", [1, 5, 128])
@pytest.mark.parametrize("mask", range(3))
def test_values_and_gradients_are_at_least_as_exact(tokens: int, mask: int) -> None:
    given, of_output = masks(tokens)[mask], torch.randn(3, 2, tokens, 8)
    exact_inputs = [x.detach().double().requires_grad_() for x in heads(tokens)]
    as_double = given.double() if given is not None and given.is_floating_point() else given
    exact = F.scaled_dot_product_attention(*exact_inputs, attn_mask=as_double)
    exact.backward(of_output.double())
    errors = []
    for function in (F.scaled_dot_product_attention, short_attention.attention):
        inputs = heads(tokens)
        with torch.autocast(**BFLOAT16):
            found = function(*inputs, attn_mask=given)
        assert found.dtype == torch.bfloat16
        found.backward(of_output.to(torch.bfloat16))
        gradients = [off(x.grad, e.grad) for x, e in zip(inputs, exact_inputs, strict=True) if e.grad.norm() > 1e-6]
        errors.append([off(found, exact.detach()), *gradients])
        assert [x.grad.dtype for x in inputs] == [torch.bfloat16] * 3
    # Rounded once to 8 bits: 2**-9 of each number, and gradients start from an output gradient that is rounded too.
    assert all(error < 2**-7 for error in errors[1])
    assert all(ours < 1.05 * theirs + 1e-4 for theirs, ours in zip(*errors, strict=True))


@pytest.mark.parametrize(
    ("tokens", "autocast"), [(129, BFLOAT16), (5, {"device_type": "cpu", "dtype": torch.float16}), (5, None)]
)
def test_anything_else_is_pytorchs_own(tokens: int, autocast: Any) -> None:
    inputs = heads(tokens, torch.float32)
    with torch.autocast(**(autocast or {"device_type": "cpu", "enabled": False})):
        one = short_attention.attention(*inputs, is_causal=True)
        other = F.scaled_dot_product_attention(*inputs, is_causal=True)
        assert isinstance(short_attention.replaced(), short_attention._Replacing) == (autocast is BFLOAT16)
    assert one.dtype == other.dtype
    assert torch.equal(one, other)


class Asks(nn.Module):
    """As networks of Hugging Face ask for attention."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("make", [Asks, encoder])
@pytest.mark.parametrize("tokens", [5, 130])
def test_a_masked_network_asks_for_it(make: Any, samples: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    masked, x = MaskedNetwork(make(), samples=samples, seed=1).train(), torch.randn(8, tokens, 16)
    plain, seen = short_attention.attention, list[torch.dtype]()

    def watched(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(query.dtype)
        return plain(query, *args, **kwargs)

    monkeypatch.setattr(short_attention, "attention", watched)
    expected = masked(x)
    assert make is encoder or not seen  # nothing comes between where there is no autocast
    masked.step = 0
    with torch.autocast(**BFLOAT16):
        found = masked(x)
    assert torch.bfloat16 in seen
    found.float().square().mean().backward()
    # Two or three layers and attention, each rounded to 8 bits (2**-9 of a number) along with its weights.
    assert off(found.float(), expected.detach().double()) < 0.03
    assert all(bool(logit.grad.abs().sum() > 0) for logit in masked.logits.values())


class Again(Asks):
    """Its forward pass is run again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return found


class AgainWithin(Asks):
    """Likewise, and the network itself turns autocast on."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(**BFLOAT16):
            found: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return found


@pytest.mark.parametrize("samples", [1, 4])
def test_what_turns_autocast_on_within_can_be_run_again(samples: int) -> None:
    masked, x = MaskedNetwork(AgainWithin(), samples=samples, seed=1).train(), torch.randn(8, 5, 16)
    masked(x).float().square().mean().backward()
    assert all(bool(logit.grad.abs().sum() > 0) for logit in masked.logits.values())


def test_float64_is_left_alone() -> None:
    inputs = [x.detach().double() for x in heads(5)]
    with torch.autocast(**BFLOAT16):
        assert short_attention.attention(*inputs).dtype == torch.float64
        asks = MaskedNetwork(Asks().double(), samples=1).train()
        assert asks(torch.randn(2, 5, 16, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("samples", [1, 4])
def test_what_is_run_again_by_a_checkpoint_chooses_as_before(samples: int) -> None:
    gradients = []
    for make in (Asks, Again):
        torch.manual_seed(0)
        masked, x = MaskedNetwork(make(), samples=samples, seed=1).train(), torch.randn(8, 5, 16)
        with torch.autocast(**BFLOAT16):
            found = masked(x)
        found.float().square().mean().backward()
        gradients.append([logit.grad for logit in masked.logits.values()])
    for one, other in zip(*gradients, strict=True):
        # One goes the linear route and one the general route, which round to bfloat16 in other places.
        assert off(one, other.double()) < 0.1
