"""Parts of a masked network may be checkpointed: gradients are those without checkpoints. Around it that is refused."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import sublens as sl
from sublens import recomputation

Way = Callable[..., Tensor]  # (function, *tensors) -> its result, perhaps by a checkpoint


def directly(function: Any, *args: Any) -> Any:
    return function(*args)


def once(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


def reentrant(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=True)


def nested(function: Any, *args: Any) -> Any:
    return checkpoint(lambda *inner: once(function, *inner), *args, use_reentrant=False)


class Parts(nn.Module):
    """Convolution, norm, dropout, an LSTM, one weight under two names, and a weight used without its module."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way = way
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.convolution, self.norm, self.drop = nn.Conv1d(1, 1, 3, padding=1), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.recurrent = nn.LSTM(3, 6, batch_first=True)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.alone = nn.Parameter(torch.randn(6, 6))

    def part(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(torch.tanh(self.convolution(x[:, None])[:, 0])))
        x = self.recurrent(x.view(-1, 2, 3))[0][:, -1]
        return functional.linear(torch.tanh(self.tied(x)), self.alone)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(self.way(self.part, x) + self.way(self.tied, x))


class Linears(nn.Module):
    """What the linear route would take if nothing were checkpointed."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way = way
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(self.way(lambda y: torch.tanh(self.middle(y)), x))


def made(kind: Any, way: Way) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = kind(way)
    with torch.no_grad():
        network(torch.randn(20, 6))  # so that the norm has met something
    return network


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def gradients(kind: Any, way: Way, rounds: int = 2, **settings: Any) -> list[Tensor]:
    """Of two training calls, the second after a step of the optimizer."""
    masked = sl.MaskedNetwork(made(kind, way), keep=0.6, **settings)
    optimizer = torch.optim.SGD(masked.parameters(), lr=1e-2)
    found = []
    for _ in range(rounds):
        optimizer.zero_grad()
        masked(X).square().sum().backward()
        found += [logits.grad.clone() for logits in masked.parameters()]
        optimizer.step()
    return found


@pytest.mark.parametrize("groups", ["weight", "row", (2, None)])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("way", [once, reentrant, nested])
@pytest.mark.parametrize("kind", [Parts, Linears])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, where the batch is looked for
def test_gradients_are_those_without_a_checkpoint(kind: Any, way: Way, samples: int, groups: Any) -> None:
    expected = gradients(kind, directly, samples=samples, groups=groups)
    assert all(bool(gradient.any()) for gradient in expected[: len(expected) // 2])
    for one, other in zip(gradients(kind, way, samples=samples, groups=groups), expected, strict=True):
        # The linear route, which is not taken here, adds in another order.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


def test_a_checkpoint_that_is_not_known_is_refused() -> None:
    """It would see whole weights in its second run."""
    original = getattr(checkpoints, recomputation._GENERATOR)

    def unknown(function: Any, *args: Any) -> Any:
        if recomputation._GENERATOR.endswith("_impl"):
            steps = original(function, args, {})
        else:
            steps = original(function, True, checkpoints.noop_context_fn, "default", False, True, *args)
        next(steps)
        result = function(*args)
        next(steps, None)
        return result

    masked = sl.MaskedNetwork(made(Linears, unknown), keep=0.6, groups=(2, None))
    with pytest.raises(sl.SettingError, match="a checkpoint of another kind"):
        masked(X)


def test_backward_twice() -> None:
    masked = sl.MaskedNetwork(made(Parts, once), keep=0.6)
    loss = masked(X).square().sum()
    loss.backward(retain_graph=True)
    first = [logits.grad.clone() for logits in masked.parameters()]
    loss.backward()
    for one, logits in zip(first, masked.parameters(), strict=True):
        assert torch.equal(2 * one, logits.grad)


def test_the_network_is_as_it_was_after_the_second_run() -> None:
    network = made(Parts, once)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weights = dict(network.named_parameters(remove_duplicate=False))
    masked = sl.MaskedNetwork(network)
    masked(X).sum().backward()
    assert all(network.get_parameter(name) is weight for name, weight in weights.items())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in weights.values())
    assert all(module.training for module in network.modules())


def test_a_failing_second_run_leaves_the_network_as_it_was() -> None:
    network = made(Linears, once)
    calls: list[int] = []

    def fails(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the second time")

    masked = sl.MaskedNetwork(network, samples=1)
    weights = dict(network.named_parameters())
    output = masked(X)
    network.middle.register_forward_hook(fails)
    calls.append(1)
    with pytest.raises(RuntimeError, match="the second time"):
        output.sum().backward()
    assert all(network.get_parameter(name) is weight for name, weight in weights.items())


def test_parts_are_run_again_and_not_kept() -> None:
    """With the weights of each chunk, in the order of the backward pass."""
    network, calls = made(Linears, once), []
    masked = sl.MaskedNetwork(network, samples=2)
    network.middle.register_forward_hook(lambda module, args, output: calls.append(module.weight.detach().clone()))
    output = masked(X)
    first = calls[-2:]  # before them, the calls that find out where the batch is
    del calls[:]
    output.sum().backward()
    assert not torch.equal(*first)
    assert [[torch.equal(one, other) for other in first] for one in calls] == [[False, True], [True, False]]


def test_in_sequence() -> None:
    class Sequence(nn.Module):
        def __init__(self, way: Way) -> None:
            super().__init__()
            self.way = way
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            if self.way is directly:
                return self.layers(x)
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)

    for one, other in zip(gradients(Sequence, once), gradients(Sequence, directly), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


def test_around_the_network_it_is_refused() -> None:
    masked = sl.MaskedNetwork(made(Parts, directly))
    with pytest.raises(sl.SettingError, match=r"inside torch\.utils\.checkpoint"):
        once(masked, X)


def test_evaluation_is_not_concerned() -> None:
    masked = sl.MaskedNetwork(made(Parts, once)).eval()
    assert masked(X).shape == (8, 3)


def test_other_hooks_on_saved_tensors_are_left_alone() -> None:
    masked = sl.MaskedNetwork(made(Parts, directly))
    with torch.autograd.graph.save_on_cpu():
        masked(X).sum().backward()
    assert all(bool(logits.grad.any()) for logits in masked.parameters())


def test_nothing_of_ours_stays_behind() -> None:
    originals = getattr(checkpoints, recomputation._GENERATOR), checkpoints.CheckpointFunction
    masked = sl.MaskedNetwork(made(Parts, once))
    with pytest.raises(sl.SettingError):
        once(masked, X)
    masked(X).sum().backward()
    assert (getattr(checkpoints, recomputation._GENERATOR), checkpoints.CheckpointFunction) == originals
    assert not torch.nn.modules.module._global_forward_pre_hooks
    plain = made(Parts, once)
    plain(X).sum().backward()
    assert plain.first.weight.grad is not None


@pytest.mark.parametrize("kind", [once, reentrant])
def test_other_threads_go_on_with_checkpoints_of_their_own(kind: Way) -> None:
    """A masked network is called in this thread while another one runs a checkpoint of a plain network."""
    weight = torch.randn(6, 6, requires_grad=True)
    found: list[Tensor] = []

    def elsewhere() -> None:
        x = X.clone().requires_grad_()
        kind(lambda y: y @ weight, x).sum().backward()
        found.append(x.grad)

    def meanwhile(function: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        return once(function, *args)

    expected = gradients(Parts, once)
    for one, other in zip(gradients(Parts, meanwhile), expected, strict=True):
        assert torch.equal(one, other)
    assert found
    assert torch.allclose(found[0], weight.detach().sum(1).expand(8, 6))


def test_logits_that_do_not_train_take_no_part() -> None:
    """The second run keeps for its backward pass what the first one kept: shapes alone would not tell them apart."""

    class Square(nn.Module):
        def __init__(self, way: Way) -> None:
            super().__init__()
            self.way = way
            self.a, self.b = (nn.Linear(8, 8, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.way(lambda y: self.b(torch.tanh(self.a(y))), x)

    found = []
    for way in (once, directly):
        masked = sl.MaskedNetwork(made_square(Square, way), keep=0.6, samples=1)
        masked.logits["a.weight"].requires_grad_(False)
        masked(torch.randn(8, 8, generator=torch.Generator().manual_seed(2))).square().sum().backward()
        found.append(masked.logits["b.weight"].grad)
    torch.testing.assert_close(*found)


def made_square(kind: Any, way: Way) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = kind(way)
    return network


@pytest.mark.parametrize("board", [False, True])
def test_gradients_of_inputs_under_a_mask(board: bool) -> None:
    """In evaluation and on a Switchboard too the second run sees the masked weights."""
    found = []
    for way in (once, directly):
        network = made(Parts, way)
        x = X.clone().requires_grad_()
        if board:
            mask = sl.random_mask(network, 0.5)
            output = sl.Switchboard(network, {"half": mask})("half", x)
        else:
            masked = sl.MaskedNetwork(network).eval()
            with torch.no_grad():
                for i, logits in enumerate(masked.parameters()):
                    logits.copy_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(i)))
            output = masked(x)
        output.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_a_first_call_leaves_the_checkpoints_of_other_threads_alone() -> None:
    failed: list[BaseException] = []

    def elsewhere() -> None:
        try:
            once(nn.Linear(6, 6), X.clone().requires_grad_()).sum().backward()
        except BaseException as error:
            failed.append(error)

    def meanwhile(function: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        return function(*args)

    sl.MaskedNetwork(made(Parts, meanwhile))(X).sum().backward()
    assert not failed
