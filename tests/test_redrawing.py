"""Masked weights are not kept for the backward pass but drawn again, and nothing else changes by that."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sublens as sl
from sublens import kernels
from sublens.redrawing import Redrawing
from sublens.routes import eligibility


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].mean(1)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = kind(8, 10, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.tanh(self.layer(x)))) @ self.layer.weight[:, 2:5]


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, (5, 8)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "lstm": Recurrent,
    "gru": lambda: Recurrent(nn.GRU),
    "convolution": convolutional,
    "tied": Tied,
}


@pytest.fixture(autouse=True)
def general_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it attention would go the linear route."""
    monkeypatch.setattr(eligibility, "applies", lambda *args: False)


def inputs() -> Tensor:
    return torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(1))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def gradients(masked: sl.MaskedNetwork) -> dict[str, Tensor]:
    masked.zero_grad()
    output = masked(inputs())
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {name: logits.grad.clone() for name, logits in masked.logits.items() if logits.grad is not None}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_kept_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gradients(sl.MaskedNetwork(made(name), samples=2))
    monkeypatch.setattr(Redrawing, "add", lambda self, name, masked, make: None)
    kept = gradients(sl.MaskedNetwork(made(name), samples=2))
    assert found.keys() == kept.keys() != set()
    for parameter in found:
        assert torch.equal(found[parameter], kept[parameter]), parameter


@pytest.mark.parametrize("name", NETWORKS)
def test_no_masked_weight_lives_from_forward_to_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    plain = kernels.masked

    def watched(weight: Tensor, logits: Tensor, draw: object) -> Tensor:
        result = plain(weight, logits, draw)  # type: ignore[arg-type]
        alive.append(weakref.ref(result.untyped_storage()))  # type: ignore[arg-type]
        return result

    monkeypatch.setattr(kernels, "masked", watched)
    masked = sl.MaskedNetwork(made(name), samples=2)
    for _ in range(2):  # the first call also looks for the batch in the outputs
        alive.clear()
        output = masked(inputs())
        gc.collect()
        assert len(alive) == 2 * len(masked.logits)
        assert [reference() for reference in alive] == [None] * len(alive)
    before = len(alive)
    output.sum().backward()
    gc.collect()
    assert before < len(alive) <= 2 * before  # each was drawn again at most once
    assert [reference() for reference in alive] == [None] * len(alive)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_was_drawn_again_goes_with_its_last_use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Redrawing] = []
    start = Redrawing.__init__
    monkeypatch.setattr(Redrawing, "__init__", lambda self: (made.append(self), start(self))[1])
    held = []
    monkeypatch.setattr(
        "sublens.routes.choosing._Gated.backward",
        staticmethod(lambda ctx, gradient: (held.extend(name for one in made for name in one._made), (None,) * 6)[1]),
    )
    sl.MaskedNetwork(NETWORKS[name](), samples=2)(inputs()).sum().backward()
    assert made
    # By the time its gradient is complete, nothing holds a masked weight but those who asked for it.
    assert held == []


def test_backward_can_be_run_twice() -> None:
    masked = sl.MaskedNetwork(made("lstm"), samples=2)
    output = masked(inputs()).square().sum()
    output.backward(retain_graph=True)
    once = {name: logits.grad.clone() for name, logits in masked.logits.items() if logits.grad is not None}
    output.backward()
    for name, logits in masked.logits.items():
        assert torch.equal(logits.grad, 2 * once[name])  # type: ignore[arg-type]


def test_logits_changed_before_the_backward_pass_are_noticed() -> None:
    masked = sl.MaskedNetwork(made("lstm"), samples=2)
    output = masked(inputs()).square().sum()
    with torch.no_grad():
        for logits in masked.logits.values():
            logits.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


class Overwriting(nn.Module):
    """Overwrites what the backward pass of its sigmoid needs, as a faulty network would."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.conv(x))
        z = y * 2
        y.add_(1)
        return z.flatten(1)


def test_a_tensor_overwritten_in_place_is_still_noticed() -> None:
    masked = sl.MaskedNetwork(Overwriting(), samples=2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        masked(inputs()).sum().backward()


def test_of_many_calls_each_has_its_own_draws() -> None:
    masked = sl.MaskedNetwork(made("lstm"), samples=2)
    first, second = masked(inputs()), masked(inputs())
    assert not torch.equal(first, second)
    masked.zero_grad()
    (first + second).sum().backward()
    together = {name: logits.grad.clone() for name, logits in masked.logits.items() if logits.grad is not None}
    masked.zero_grad()
    masked.step = 0
    for _ in range(2):
        masked(inputs()).sum().backward()
    for name, logits in masked.logits.items():
        torch.testing.assert_close(together[name], logits.grad, rtol=1e-5, atol=1e-6)
