"""The route for chains of linear layers and ReLUs gives the bits of the route layer by layer, or steps aside."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import sublens as sl
from sublens.kernels import blocked
from sublens.routes import chain_route


def chain(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(*layers)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: chain(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 70), nn.ReLU(), nn.Linear(70, 4)),
    "one layer": lambda: chain(nn.Linear(6, 4)),
    "ends in a ReLU": lambda: chain(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4), nn.ReLU(inplace=True)),
    "no ReLU": lambda: chain(nn.Linear(6, 12), nn.Linear(12, 4)),
    "no biases": lambda: chain(nn.Linear(6, 12, bias=False), nn.ReLU(), nn.Linear(12, 4, bias=False)),
    "nested": lambda: chain(
        chain(nn.Linear(6, 12), nn.ReLU()), nn.Dropout(0.5), chain(nn.Identity(), nn.Linear(12, 4))
    ),
    "twice the same ReLU": lambda: chain(nn.Linear(6, 12), relu := nn.ReLU(), nn.Linear(12, 9), relu, nn.Linear(9, 4)),
}


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each call by the chain route."""
    made: list[int] = []
    plain = chain_route.call

    def call(*args: object) -> Tensor:
        made.append(1)
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(chain_route, "call", call)
    return made


def after_the_first_call(network: nn.Module, **settings: object) -> tuple[sl.MaskedNetwork, Tensor]:
    """A masked network and a batch. The first call goes another way, since checkpoints are looked for by hooks."""
    masked = sl.MaskedNetwork(network, samples=2, **settings)  # type: ignore[arg-type]
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    masked(x)
    return masked, x


def run(masked: sl.MaskedNetwork, x: Tensor) -> list[Tensor]:
    """Outputs and gradients of three training calls, the first of which is watched."""
    found = []
    for _ in range(3):
        inputs = x.clone().requires_grad_()
        output = masked(inputs * 1.0)
        found.append(output.detach().clone())
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        assert inputs.grad is not None
        found.append(inputs.grad)
    for logits in masked.logits.values():
        assert logits.grad is not None
        found.append(logits.grad)
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16, products too"])
@pytest.mark.parametrize("rows", [8, 300, 1040])  # of the last, 260 to a sample: a long chunk
@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_gives_the_bits_of_the_route_layer_by_layer(
    name: str, samples: int, rows: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "multiplies_bfloat16", lambda: "products" in precision)
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(3))
    made = calls(monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "float32"):
        found = run(sl.MaskedNetwork(NETWORKS[name](), samples=samples, seed=5), x)
        assert len(made) == 2
        monkeypatch.setattr(chain_route, "layers", lambda *args: None)
        expected = run(sl.MaskedNetwork(NETWORKS[name](), samples=samples, seed=5), x)
        assert len(made) == 2
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(bool((each != 0).any()) for each in found)


def test_steps_aside_for_other_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    masked, x = after_the_first_call(NETWORKS["plain"]())
    made = calls(monkeypatch)
    with torch.autocast("cpu", dtype=torch.float16):
        assert masked(x).dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert masked(x.bfloat16()).dtype == torch.bfloat16
    assert made == []


def test_takes_inputs_that_are_not_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(3)).t()
    made = calls(monkeypatch)
    found, expected = (run(sl.MaskedNetwork(NETWORKS["plain"](), seed=5), each) for each in (x, x.contiguous()))
    assert len(made) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def hooked(network: nn.Sequential) -> nn.Module:
    network[1].register_forward_hook(lambda module, args, output: 2 * output)
    return network


def hooked_backward(network: nn.Sequential) -> nn.Module:
    network[1].register_full_backward_hook(lambda module, of_inputs, of_outputs: (2 * of_inputs[0],))
    return network


def with_a_bias_that_is_no_parameter(network: nn.Sequential) -> nn.Module:
    bias = torch.ones(12)
    del network[0].bias
    network[0].register_buffer("bias", bias)
    return network


def with_an_empty_sequential(network: nn.Sequential) -> nn.Module:
    network[1] = last = nn.Sequential()
    last.register_forward_hook(lambda module, args, output: 2 * output)
    return network


def patched(network: nn.Sequential) -> nn.Module:
    network[1].forward = lambda x: 2 * x  # type: ignore[method-assign]
    return network


def tied(network: nn.Sequential) -> nn.Module:
    return chain(nn.Linear(6, 6), nn.ReLU(), layer := nn.Linear(6, 6), nn.ReLU(), layer)


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (hooked, {}),
        (hooked_backward, {}),
        (with_a_bias_that_is_no_parameter, {}),
        (with_an_empty_sequential, {}),
        (patched, {}),
        (tied, {}),
        (lambda network: nn.Sequential(nn.ReLU(), *network), {}),
        (lambda network: nn.Sequential(*network, nn.GELU()), {}),
        (lambda network: nn.Sequential(*network, nn.BatchNorm1d(4)), {}),
        (lambda network: network, {"where": "0.*"}),
        (lambda network: network, {"biases": True}),
        (lambda network: network, {"groups": "row"}),
        (lambda network: network, {"gate": sl.HardConcrete()}),
        (lambda network: network, {"frozen": False}),
    ],
)
def test_steps_aside_for(
    change: Callable[[nn.Sequential], nn.Module], settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = calls(monkeypatch)
    network = change(chain(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)))
    masked, x = after_the_first_call(network, **settings)
    masked.step = 0
    y = masked(x)
    assert made == []
    monkeypatch.setenv("SUBLENS_KERNELS", "reference")
    other = sl.MaskedNetwork(network, samples=2, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(y, other(x), rtol=1e-4, atol=1e-5)


class Watching(TorchFunctionMode):
    """Sees the calls of PyTorch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[object] = set()

    def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[override,type-arg]
        self.seen.add(func)
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_whoever_watches_functions_or_all_modules_sees_those_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls(monkeypatch)
    masked, x = after_the_first_call(NETWORKS["plain"]())
    masked(x)
    assert made == [1]
    with Watching() as watching:
        masked(x)
    assert nn.functional.relu in watching.seen or torch.relu in watching.seen
    modules: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: modules.append(module))
    try:
        masked(x)
    finally:
        handle.remove()
    assert any(isinstance(module, nn.Linear) for module in modules)
    assert made == [1]


def test_a_mistake_in_the_input_is_the_networks_own_error() -> None:
    masked, _ = after_the_first_call(NETWORKS["plain"]())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        masked(torch.ones(4, 7))
    with pytest.raises(RuntimeError, match="dtype"):
        masked(torch.ones(4, 6, dtype=torch.float64))
    masked(torch.ones(4, 6))


def test_inputs_that_change_before_the_backward_pass_are_noticed() -> None:
    masked, x = after_the_first_call(NETWORKS["plain"]())
    output = masked(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_layer_that_is_replaced_by_another_one_goes_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls(monkeypatch)
    network = NETWORKS["plain"]()
    masked, x = after_the_first_call(network)
    masked(x)
    network[1] = nn.Tanh()  # type: ignore[operator]
    masked.step = 0
    y = masked(x)
    assert made == [1]
    monkeypatch.setenv("SUBLENS_KERNELS", "reference")
    torch.testing.assert_close(y, sl.MaskedNetwork(network, samples=2)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own, the first time
def test_forward_derivatives_go_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls(monkeypatch)
    network = NETWORKS["plain"]()
    masked, x = after_the_first_call(network)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))

    def derivative(masked: sl.MaskedNetwork) -> Tensor:
        masked.step = 0
        with forward_ad.dual_level():
            dual = masked(forward_ad.make_dual(x, direction))
            tangent: Tensor = forward_ad.unpack_dual(dual).tangent.clone()
        return tangent

    of_chain = derivative(masked)
    assert made == []
    monkeypatch.setenv("SUBLENS_KERNELS", "reference")
    torch.testing.assert_close(of_chain, derivative(sl.MaskedNetwork(network, samples=2)), rtol=1e-4, atol=1e-4)
