"""Which networks take the fast route for linear layers, and that it gives what the general route gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sublens as sl
from sublens import linear_route
from sublens.linear_route import per_example
from sublens.noise import parameter_id


def chain(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), *between, nn.Linear(12, 4))


class Own(nn.Sequential):
    """Not a plain Sequential: its forward may do anything."""


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + torch.tanh(self.first(x)))  # type: ignore[no-any-return]


class Mixing(nn.Module):
    """Subtracts the batch's mean: a chunk gives other outputs than the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y - y.mean(0)  # type: ignore[no-any-return]


def hooked() -> nn.Module:
    network = chain(nn.ReLU())
    network[1].register_forward_hook(lambda module, args, output: output - output.mean(0))
    return network


def patched() -> nn.Module:
    network = chain(nn.ReLU())
    network[1].forward = lambda x: x - x.mean(0)  # type: ignore[method-assign]
    return network


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: chain(nn.ReLU()), True),
        (lambda: chain(nn.Dropout(), nn.GELU(), nn.LayerNorm(12)), True),
        (lambda: chain(nn.Sequential(nn.Tanh(), nn.Identity())), True),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), True),
        (lambda: nn.Sequential(nn.Flatten(0), nn.Linear(6, 4)), False),
        (lambda: chain(nn.BatchNorm1d(12)), False),
        (lambda: chain(nn.Softmax(0)), False),
        (lambda: chain(nn.LayerNorm((8, 12))), False),
        (lambda: chain(Mixing()), False),
        (lambda: Own(nn.Linear(6, 4)), False),
        (Residual, False),
        (hooked, False),
        (patched, False),
        (lambda: nn.Linear(6, 4), False),
    ],
)
def test_per_example(make: Callable[[], nn.Module], expected: bool) -> None:
    assert per_example(make()) is expected


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: chain(nn.ReLU()),
    "in place": lambda: chain(nn.ELU(inplace=True)),
    "norm": lambda: chain(nn.LayerNorm(12), nn.Dropout(0.5)),
    "residual": Residual,
    "mixing": Mixing,
    "hooked": hooked,
}


def run(masked: sl.MaskedNetwork, x: Tensor) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
    x = x.clone().requires_grad_()
    output = masked(x * 1.0)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return output.detach(), [logits.grad for logits in masked.logits.values()], x.grad


@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_gives_what_the_general_route_gives(name: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    network = NETWORKS[name]()
    taken = []
    plain = linear_route._linear
    monkeypatch.setattr(linear_route, "_linear", lambda *args: (taken.append(args[1].chunks), plain(*args))[1])
    fast = [run(sl.MaskedNetwork(network, samples=samples), x) for _ in range(2)]
    expects_vmap = samples > 1 and not per_example(network)
    assert set(taken) == {0 if expects_vmap else samples}
    before = len(taken)
    monkeypatch.setattr(linear_route, "applies", lambda *args: False)
    general = run(sl.MaskedNetwork(network, samples=samples), x)
    assert len(taken) == before  # nothing more went by linear layers
    for one in fast:
        torch.testing.assert_close(one[0], general[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one[1], general[1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one[2], general[2], rtol=1e-4, atol=1e-6)


def test_inputs_of_many_dimensions_and_of_one() -> None:
    network = chain(nn.ReLU())
    for shape, samples in (((8, 3, 5, 6), 4), ((6,), 1), ((8, 3, 6), 1)):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
        fast = sl.MaskedNetwork(network, samples=samples)(x)
        general = sl.MaskedNetwork(network.double(), samples=samples)(x.double())  # no fast route for float64
        network.float()
        torch.testing.assert_close(fast.double(), general, rtol=1e-5, atol=1e-6)


def test_a_network_that_writes_into_its_input_does_so_once() -> None:
    x = torch.full((8, 6), -1.0)
    once = nn.functional.elu(x)
    sl.MaskedNetwork(nn.Sequential(nn.ELU(inplace=True), nn.Linear(6, 4)), samples=4)(x)
    assert torch.equal(x, torch.full((8, 6), -1.0)) or torch.equal(x, once)


# The compiler remarks on much of what it traces.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("samples", [1, 4])
def test_a_compiled_network_takes_the_general_route(samples: int) -> None:
    network = chain(nn.ReLU())
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    expected = run(sl.MaskedNetwork(network, samples=samples), x)
    compiled = torch.compile(network, backend="eager")
    assert linear_route.is_compiled(nn.Sequential(compiled))  # type: ignore[arg-type]
    assert not linear_route.is_compiled(network)
    masked = sl.MaskedNetwork(compiled, samples=samples)  # type: ignore[arg-type]
    # The noise is named by the parameter, and a compiled network's parameters have other names.
    masked._ids = {name: parameter_id(name.removeprefix("_orig_mod.")) for name in masked._ids}
    for one, other in zip(run(masked, x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def compiled_part(x: Tensor) -> Tensor:
    return torch.tanh(x) * 2


class CallsCompiled(nn.Module):
    """Calls a compiled function, with a graph break in it, between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)
        self.part = torch.compile(self.broken, backend="eager")

    def broken(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return compiled_part(self.second(y))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)  # type: ignore[no-any-return]


# The compiler remarks on much of what it traces.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("samples", [1, 4])
def test_code_that_is_compiled_on_the_way_does_not_reach_our_loops(samples: int) -> None:
    torch.manual_seed(0)
    network = CallsCompiled()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    found = run(sl.MaskedNetwork(network, samples=samples), x)
    network.part = network.broken
    for one, other in zip(found, run(sl.MaskedNetwork(network, samples=samples), x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
