"""Which networks take the fast route for linear layers, and that it gives what the general route gives."""

import warnings
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sublens as sl
from sublens.kernels import blocked
from sublens.noise import parameter_id
from sublens.routes import Routes, Sampling, eligibility, linear_route, recurrent_route
from sublens.routes.eligibility import per_example


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


class OwnBias(nn.Module):
    """Has a bias that a chunk makes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight, x.mean(0)[:4])


class Inner(nn.Module):
    """Has a transform within."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(self.layer)(x)  # type: ignore[no-any-return]


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
    "own bias": OwnBias,
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
    of_vmap, outside = [], linear_route._outside_vmap
    monkeypatch.setattr(linear_route, "_outside_vmap", lambda *args: (of_vmap.append(1), outside(*args))[1])
    fast = [run(sl.MaskedNetwork(network, samples=samples), x) for _ in range(2)]
    assert bool(of_vmap) is (samples > 1 and not per_example(network))
    assert set(taken) == {samples}
    before = len(taken)
    monkeypatch.setattr(eligibility, "applies", lambda *args: False)
    general = run(sl.MaskedNetwork(network, samples=samples), x)
    assert len(taken) == before  # nothing more went by linear layers
    for one in fast:
        torch.testing.assert_close(one[0], general[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one[1], general[1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one[2], general[2], rtol=1e-4, atol=1e-6)


def run_all(masked: sl.MaskedNetwork, xs: list[Tensor]) -> list[Any]:
    """What :func:`run` gives for each batch, and the gradients of the weights in the end."""
    masked.network.zero_grad()
    found: list[Any] = [run(masked, x) for x in xs]
    return [*found, {name: parameter.grad for name, parameter in masked.network.named_parameters()}]


def assert_biases_and_weights_as_by_the_general_route(
    network: nn.Module, xs: list[Tensor], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    masked = sl.MaskedNetwork(network, keep=0.6, **settings)
    found = run_all(masked, xs)
    assert list(masked._routes.general.values()) == [False]
    monkeypatch.setattr(eligibility, "applies", lambda *args: False)
    expected = run_all(sl.MaskedNetwork(network, keep=0.6, **settings), xs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if not settings["frozen"]:
        # All that is masked is trained (weights always are here), and nothing else.
        own = {name for name, gradient in found[-1].items() if gradient is not None}
        assert own and own <= masked.logits.keys()


@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize(("biases", "frozen"), [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("name", NETWORKS)
def test_biases_are_masked_and_weights_trained_as_by_the_general_route(
    name: str, biases: bool, frozen: bool, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    # Of the longer batch a sample has more rows than the loops take, on most processors: there PyTorch multiplies.
    monkeypatch.setattr(blocked, "_long", lambda samples, reduced: 256)
    rows = 1040 if name == "chain" else 8
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(3))
    settings = {"samples": samples, "biases": biases, "frozen": frozen}
    assert_biases_and_weights_as_by_the_general_route(NETWORKS[name](), [x, x], settings, monkeypatch)


@pytest.mark.parametrize("samples", [1, 2])
def test_a_transform_within_the_network_is_left_to_the_general_route(samples: int) -> None:
    network, x = Inner(), torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    masked = sl.MaskedNetwork(network, samples=samples)
    for step in range(2):
        found = run(masked, x)
        general = sl.MaskedNetwork(network.double(), samples=samples)
        general.step = step
        expected = general(x.double())
        network.float()
        torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-6)


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
    assert eligibility.is_compiled(nn.Sequential(compiled))  # type: ignore[arg-type]
    assert not eligibility.is_compiled(network)
    masked = sl.MaskedNetwork(compiled, samples=samples)  # type: ignore[arg-type]
    # The noise is named by the parameter, and a compiled network's parameters have other names.
    masked._routes.ids = {name: parameter_id(name.removeprefix("_orig_mod.")) for name in masked._routes.ids}
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


# --- networks that vmap does not take


class Looks(nn.Module):
    """Looks at its values, which vmap does not allow; each example goes its own way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 4)

    def mixed(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 100).any()):
            x = x.clamp(max=100)
        return self.mixed(x, self.second(torch.tanh(self.first(x))))


class LooksAndMixes(Looks):
    def mixed(self, x: Tensor, y: Tensor) -> Tensor:
        return y - y.mean(0)


class MixesLater(Looks):
    """As long as no input is above 3."""

    def mixed(self, x: Tensor, y: Tensor) -> Tensor:
        return y - y.mean(0) if bool((x > 3).any()) else y


class Turned(Looks):
    """Its layers see the batch last but one, so rows of different chunks lie beside each other."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 100).any()):
            return x
        x = torch.stack([x, x.flip(-1)])
        return self.second(torch.tanh(self.first(x))).sum(0)


class WithAnObject(Looks):
    def mixed(self, x: Tensor, y: Tensor) -> Any:
        return y, object()


WHOLE = "whole batch"


def routes(masked: sl.MaskedNetwork) -> list[bool]:
    """Of each kind of call that was on trial, whether it has to go the general route."""
    return [general for kind, general in masked._routes.general.items() if isinstance(kind, tuple) and kind[0] == WHOLE]


def calls(network: nn.Module, xs: list[Tensor], monkeypatch: pytest.MonkeyPatch, *, general: bool) -> Any:
    with monkeypatch.context() as patch:
        if general:
            patch.setattr(Routes, "_on_trial", lambda *_: None)
        masked = sl.MaskedNetwork(network, keep=0.6, samples=2, seed=5)
        return [run(masked, x) for x in xs], masked


def inputs(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 6, generator=generator).clamp(max=3) for _ in range(count)]


@pytest.mark.parametrize(
    ("make", "general"), [(Looks, False), (LooksAndMixes, True), (Turned, True), (MixesLater, False)]
)
def test_on_trial_a_network_gives_what_the_general_route_gives(
    make: Callable[[], nn.Module], general: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, masked = calls(make(), inputs(6), monkeypatch, general=False)
    expected, _ = calls(make(), inputs(6), monkeypatch, general=True)
    assert routes(masked) == [general]
    for (output, logits, of_x), (output_too, logits_too, of_x_too) in zip(found, expected, strict=True):
        torch.testing.assert_close(output, output_too)
        torch.testing.assert_close(logits, logits_too)
        torch.testing.assert_close(of_x, of_x_too)


class Attending(nn.Module):
    """Attention to itself, to another sequence, or to two of them."""

    def __init__(self, what: str, batch_first: bool = True, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.what, self.batch_first = what, batch_first
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **settings)
        self.output = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        own = x.shape[-1] == 8
        key = x if self.what == "itself" else x.flip(-1) if own else x
        value = key if self.what != "two others" else torch.tanh(x)
        y, weights = self.attention(x, key, value, need_weights=self.what == "two others")
        y = y if self.batch_first else y.transpose(0, 1)
        return self.output(y).sum(2) + (0 if weights is None else weights.square().sum(2))  # type: ignore[no-any-return]


def decoding() -> nn.Module:
    class Decoding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.transformer = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(3)
            return self.transformer(x, x[:, 1:4], tgt_mask=mask, tgt_is_causal=True)  # type: ignore[no-any-return]

    return Decoding()


ATTENDING: dict[str, Callable[[], nn.Module]] = {
    "itself": lambda: Attending("itself"),
    "itself, batch second": lambda: Attending("itself", batch_first=False, bias=False),
    "another": lambda: Attending("another", add_bias_kv=True),
    "two others": lambda: Attending("two others", batch_first=False),
    "weights apart": lambda: Attending("two others", kdim=8, vdim=8, add_zero_attn=True),
    "Transformer": decoding,
}


@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("name", ATTENDING)
def test_attention_goes_the_linear_route_and_gives_what_the_general_one_gives(
    name: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = ATTENDING[name]().eval()
    if name == "weights apart":  # equal sizes would pack them
        attention = network.attention
        assert isinstance(attention, nn.MultiheadAttention)
        attention._qkv_same_embed_dim = False
        for part, rows in zip(("q", "k", "v"), attention.in_proj_weight.detach().chunk(3), strict=True):
            attention.register_parameter(f"{part}_proj_weight", nn.Parameter(rows.clone()))
        attention.register_parameter("in_proj_weight", None)
    xs = [torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    taken = []
    plain = linear_route._linear
    monkeypatch.setattr(linear_route, "_linear", lambda *args: (taken.append(args[1].chunks), plain(*args))[1])
    masked = sl.MaskedNetwork(network, keep=0.6, samples=samples)
    found = [run(masked, x) for x in xs]
    assert set(taken) == {samples, 1}  # the whole batch, and in looks after the first call single chunks
    assert not any(masked._routes.general.values())
    monkeypatch.setattr(eligibility, "applies", lambda *args: False)
    before = len(taken)
    masked = sl.MaskedNetwork(network, keep=0.6, samples=samples)
    for one, general in zip(found, [run(masked, x) for x in xs], strict=True):
        torch.testing.assert_close(one[0], general[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one[1], general[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one[2], general[2], rtol=1e-4, atol=1e-5)
    assert len(taken) == before


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize(("biases", "frozen"), [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("name", ["itself", "another", "two others", "Transformer"])
def test_biases_of_attention_are_masked_and_weights_trained_as_by_the_general_route(
    name: str, biases: bool, frozen: bool, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not with biases that are more keys and values: those are no linear layer's.
    network = (Attending(name) if name == "another" else ATTENDING[name]()).eval()
    for own, parameter in network.named_parameters():
        if own.endswith("bias"):  # attention starts with zeros
            nn.init.normal_(parameter)
    xs = [torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    settings = {"samples": samples, "biases": biases, "frozen": frozen}
    assert_biases_and_weights_as_by_the_general_route(network, xs, settings, monkeypatch)


class Recurrent(nn.Module):
    """All that an LSTM gives, made into one output for each example."""

    def __init__(self, given: bool = False, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.given = given
        self.rnn = nn.LSTM(6, 10, **settings)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        count = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1)
        first = torch.tanh(x.sum(0 if not self.rnn.batch_first else 1)[:, :1]).expand(-1, 10).repeat(count, 1, 1)
        y, (h, c) = self.rnn(x, (first, 2 * first)) if self.given else self.rnn(x)
        y = y if self.rnn.batch_first else y.transpose(0, 1)
        return torch.cat([y.flatten(1), h.transpose(0, 1).flatten(1), c.transpose(0, 1).flatten(1)], 1)


def under_autocast_or_skipped(network: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """PyTorch's LSTM wants AVX-512 for bfloat16, and for float16 AVX512-FP16, or none of AVX-512."""
    try:
        with torch.autocast("cpu", dtype=dtype):
            network(x)
    except RuntimeError as error:
        pytest.skip(f"PyTorch itself cannot do this on this processor: {error}")


class OneStep(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :1])


class TrainedState(nn.Module):
    """Begins with zeros that are trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.rnn = nn.Linear(6, 10), nn.LSTM(6, 10, batch_first=True)
        nn.init.zeros_(self.before.bias)

    def forward(self, x: Tensor) -> Tensor:
        first = self.before(0 * x[:, 0]).unsqueeze(0)
        return self.rnn(x, (first, first))[0].flatten(1) + self.before(x[:, 0]).sum(1, keepdim=True)  # type: ignore[no-any-return]


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "one step": lambda: OneStep(batch_first=True),
    "one step, given state": lambda: OneStep(batch_first=True, given=True),
    "trained state": TrainedState,
    "batch first": lambda: Recurrent(batch_first=True),
    "two layers, given state": lambda: Recurrent(num_layers=2, given=True, dropout=0.5),
    "two ways": lambda: Recurrent(num_layers=2, bidirectional=True, batch_first=True, given=True),
    "without biases": lambda: Recurrent(bias=False),
}


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("name", RECURRENT)
def test_lstms_go_the_linear_route_and_give_what_the_general_one_gives(
    name: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if samples > 2:  # of 3 samples two are taken together, of 4 each by itself
        monkeypatch.setattr(recurrent_route, "_AT_ONCE", 40 * 10 * (5 - samples))
    network = RECURRENT[name]()
    xs = [torch.randn(2 * samples, 5, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    masked = sl.MaskedNetwork(network, keep=0.6, samples=samples)
    found = [run(masked, x) for x in xs]
    assert list(masked._routes.general.values()) == [False]
    monkeypatch.setattr(eligibility, "applies", lambda *args: False)
    masked = sl.MaskedNetwork(network, keep=0.6, samples=samples)
    for one, general in zip(found, [run(masked, x) for x in xs], strict=True):
        torch.testing.assert_close(one[0], general[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one[1], general[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one[2], general[2], rtol=1e-4, atol=1e-5)


def packed(network: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        return network(nn.utils.rnn.pack_padded_sequence(x, [5, 5, 4, 3], batch_first=True))[0].data  # type: ignore[no-any-return]

    return call


@pytest.mark.parametrize(
    ("settings", "where", "what"),
    [
        ({"proj_size": 4}, None, "projected"),
        ({}, ["weight_hh_l0"], "masked in part"),
        ({}, None, "packed"),
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_other_lstms_take_the_general_route(settings: dict[str, Any], where: Any, what: str) -> None:
    torch.manual_seed(0)
    network = nn.LSTM(6, 10, batch_first=True, **settings)
    masked = sl.MaskedNetwork(network, samples=1, keep=0.6, **({} if where is None else {"where": where}))
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))
    output = packed(masked)(x) if what == "packed" else masked(x)[0]
    output.sum().backward()
    assert all(masked._routes.general.values())
    assert all(logits.grad is not None and bool(logits.grad.any()) for logits in masked.logits.values())


def test_attention_without_a_batch_takes_the_general_route() -> None:
    masked = sl.MaskedNetwork(Attending("itself").attention, samples=1)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert masked(x, x, x)[0].shape == (5, 8)
    assert all(masked._routes.general.values())


def test_a_network_that_begins_to_mix_its_examples_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    xs = inputs(8)
    for x in xs[6:]:
        x[0, 0] = 4.0
    masked = sl.MaskedNetwork(MixesLater(), keep=0.6, samples=2, seed=5)
    for x in xs[:7]:
        run(masked, x)
    assert routes(masked) == [False]  # nobody has looked at call 7
    with pytest.warns(UserWarning, match=r"In training call 8 the network does not treat the examples .* by itself"):
        found = run(masked, xs[7])
    assert routes(masked) == [True]
    expected, _ = calls(MixesLater(), xs, monkeypatch, general=True)
    torch.testing.assert_close(found[0], expected[7][0])


def test_it_is_looked_at_ever_more_rarely_and_first_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: dict[str, list[int]] = {"_by_chunk": [], "_chunk_by_linear_layers": []}
    for name, steps in looks.items():

        def counted(self: Routes, sampling: Sampling, *rest: Any, how: Any, steps: list[int]) -> Any:
            steps.append(sampling.step + 1)
            return how(self, sampling, *rest)

        how = getattr(Routes, name)
        monkeypatch.setattr(Routes, name, partialmethod(counted, how=how, steps=steps))
    masked = sl.MaskedNetwork(Looks(), samples=2)
    for x in inputs(20):
        masked(x)
    # Whole masked weights stand in memory in the first look only, when gradients and an optimizer's state do not yet.
    assert looks == {"_by_chunk": [1, 1], "_chunk_by_linear_layers": [2, 2, 4, 4, 8, 8, 16, 16]}
    for steps in looks.values():
        steps.clear()
    resumed = sl.MaskedNetwork(Looks(), samples=2)
    resumed.step = 20
    for x in inputs(14):
        resumed(x)
    assert looks == {"_by_chunk": [21, 21], "_chunk_by_linear_layers": [32, 32]}


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"samples": 2, "progress": False, "lr": 0.1}

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).square().mean()

    whole = sl.fit(Looks(), inputs(11), loss, steps=11, **settings)
    sl.fit(Looks(), inputs(11), loss, steps=5, folder=tmp_path, **settings)
    resumed = sl.fit(Looks(), inputs(11), loss, steps=11, folder=tmp_path, resume=True, **settings)
    for name, logits in whole.logits.items():
        assert torch.equal(logits, resumed.logits[name])


def test_an_object_in_the_output_that_nothing_is_known_of_is_that_of_the_whole_batch() -> None:
    masked = sl.MaskedNetwork(WithAnObject(), samples=2)
    for _ in range(3):
        output, found = masked(inputs(1)[0])
        assert output.shape == (8, 4)
        assert type(found) is object
    assert routes(masked) == [False]


@pytest.mark.parametrize("samples", [2, 3])
def test_what_is_not_on_trial(samples: int) -> None:
    """Hooks, and a batch that K does not divide."""
    network = Looks()
    network.first.register_forward_hook(lambda module, args, output: None)
    hooked = sl.MaskedNetwork(network, samples=samples)
    assert hooked(inputs(1)[0]).shape == (8, 4)
    assert routes(hooked) == ([True] if samples == 2 else [])


@pytest.mark.parametrize("base", [Looks, LooksAndMixes, MixesLater])
def test_inputs_that_are_written_into_are_written_into_once(base: type[Looks], monkeypatch: pytest.MonkeyPatch) -> None:
    class Writes(base):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    results = []
    for general in (False, True):
        xs = inputs(4)
        xs[3][0, 0] = 3.5
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MixesLater is found out in the fourth call
            if general:
                patch.setattr(Routes, "_on_trial", lambda *_: None)
            masked = sl.MaskedNetwork(Writes(), samples=2)
            results.append(([masked(x).detach() for x in xs], xs[1:] if base is Looks else xs))
    torch.testing.assert_close(*results)


def test_numbers_of_another_kind_in_the_output() -> None:
    class WithNumbers(Looks):
        def mixed(self, x: Tensor, y: Tensor) -> Any:
            return y, np.arange(3), "text", None

    masked = sl.MaskedNetwork(WithNumbers(), samples=2)
    assert masked(inputs(1)[0])[0].shape == (8, 4)
    assert routes(masked) == [False]


def test_strides_do_not_make_a_resumed_run_another(tmp_path: Path) -> None:
    class Sums(Looks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True))

    data = torch.randn(8, 6, 33, generator=torch.Generator().manual_seed(1)) * 100
    settings: dict[str, Any] = {"samples": 2, "progress": False, "lr": 0.1}

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).square().mean()

    def batches(step: int) -> Tensor:
        return data[:, :, step]

    whole = sl.fit(Sums(), batches, loss, steps=12, **settings)
    sl.fit(Sums(), batches, loss, steps=5, folder=tmp_path, **settings)
    resumed = sl.fit(Sums(), batches, loss, steps=12, folder=tmp_path, resume=True, **settings)
    for name, logits in whole.logits.items():
        assert torch.equal(logits, resumed.logits[name])


def test_random_numbers_of_the_network_are_the_same_in_a_resumed_run(tmp_path: Path) -> None:
    class Noisy(Looks):
        def mixed(self, x: Tensor, y: Tensor) -> Tensor:
            return y + torch.randn(y.shape[1:])  # the same for all examples, so that the routes differ by chunks

    settings: dict[str, Any] = {"samples": 2, "progress": False, "lr": 0.1}

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).square().mean()

    whole = sl.fit(Noisy(), inputs(11), loss, steps=11, **settings)
    sl.fit(Noisy(), inputs(11), loss, steps=5, folder=tmp_path, **settings)
    resumed = sl.fit(Noisy(), inputs(11), loss, steps=11, folder=tmp_path, resume=True, **settings)
    for name, logits in whole.logits.items():
        assert torch.equal(logits, resumed.logits[name])


def test_a_look_that_is_interrupted_is_no_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = sl.MaskedNetwork(LooksAndMixes(), samples=2)
    with monkeypatch.context() as patch:
        patch.setattr(Routes, "_by_chunk", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            masked(inputs(1)[0])
    assert routes(masked) == [True]


class WritesBack(nn.Module):
    """Changes what a layer was given, transposed, after the layer has taken it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.output = nn.Linear(6, 6), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.first(x.transpose(1, 2))
        x.add_(1.0)
        return self.output(y.transpose(1, 2) + x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("samples", [1, 2])
def test_a_network_may_write_into_what_a_layer_was_given(samples: int) -> None:
    masked = sl.MaskedNetwork(WritesBack(), samples=samples)
    for _ in range(2):
        masked(torch.randn(4, 6, 5)).sum().backward()
    assert all(bool(logits.grad.any()) for logits in masked.logits.values() if logits.grad is not None)


@pytest.mark.parametrize("rows", [20, 300])
def test_a_gradient_is_found_also_where_a_graph_of_it_is_asked_for(rows: int) -> None:
    masked = sl.MaskedNetwork(chain(nn.Tanh()), samples=1)
    x = torch.randn(rows, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(masked(x).sum(), x, create_graph=True)
    assert bool(gradient.any())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_scripted_dropout_is_off() -> None:
    network = nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Dropout(0.5)), nn.Linear(6, 3))
    masked = sl.MaskedNetwork(network, samples=1).eval()
    x = torch.randn(8, 6)
    assert torch.equal(masked(x), masked(x))
    assert network[1].training


class TwoNames(nn.Module):
    """Its layers are modules under two names each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.again, self.norm_again = self.first, self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_again(self.again(self.norm(self.first(x))))  # type: ignore[no-any-return]


def test_a_module_with_two_names_keeps_what_it_has() -> None:
    network = TwoNames()
    before = dict([*network.named_parameters(), *network.named_buffers()])
    masked = sl.MaskedNetwork(network, samples=2)
    for _ in range(3):
        masked(torch.randn(4, 6)).sum().backward()
    masked.eval()(torch.randn(4, 6))
    after = dict([*network.named_parameters(), *network.named_buffers()])
    assert before.keys() == after.keys()
    assert all(after[name] is tensor for name, tensor in before.items())
    assert all(logits.grad is not None and bool(logits.grad.any()) for logits in masked.logits.values())


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("make", [lambda: chain(nn.ReLU()), Residual], ids=["chain", "residual"])
@pytest.mark.parametrize("width", [5, 7])
def test_an_input_of_another_width_is_an_error_and_changes_nothing(
    make: Callable[[], nn.Module], samples: int, width: int
) -> None:
    torch.manual_seed(0)
    masked, right, wrong = sl.MaskedNetwork(make(), samples=samples), torch.randn(8, 6), torch.randn(8, width)
    for attempt in range(2):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            masked(wrong)
        masked(right)
        fast = masked._routes._chained or list(masked._routes.general.values()) == [False]
        assert fast, f"call {attempt} sent later calls the slow way"


class Biased(nn.Module):
    """A linear layer whose bias is what a test says."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4, bias=False)
        self.layer.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize(
    "bias", [torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 8)[::2], torch.ones(1), torch.ones(1, 4)], ids=str
)
def test_a_bias_of_any_form_is_added_as_by_the_general_route(
    bias: Tensor, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network, x = Biased(bias), torch.randn(8, 6)
    fast = sl.MaskedNetwork(network, samples=samples)
    y = fast(x)
    assert list(fast._routes.general.values()) == [False]
    monkeypatch.setattr(eligibility, "applies", lambda *args: False)
    torch.testing.assert_close(y, sl.MaskedNetwork(network, samples=samples)(x), rtol=1e-5, atol=1e-5)


def stored() -> nn.Module:
    """A layer that stores its weight as inputs by outputs, as GPT-2's do, and another one."""
    layers = pytest.importorskip("transformers.pytorch_utils")
    return nn.Sequential(layers.Conv1D(16, 6), nn.Tanh(), nn.Linear(16, 3))


@pytest.mark.parametrize("long", [256, 2], ids=["in-loops", "by-the-library"])
@pytest.mark.parametrize("gains", [True, False], ids=["reduced-products", "whole-products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("make", [lambda: chain(nn.ReLU()), Residual, stored], ids=["chain", "residual", "stored"])
def test_under_autocast_layers_give_what_was_asked_for(
    make: Callable[[], nn.Module],
    samples: int,
    dtype: torch.dtype,
    gains: bool,
    long: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of both kinds of processor, whichever this one is.
    monkeypatch.setattr(blocked, "multiplies_bfloat16", lambda: gains)
    monkeypatch.setattr(blocked, "_long", lambda samples, reduced: long)
    seen: list[bool] = []
    backward = blocked.backward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["reduced"])
        return backward(*args, **kwargs)

    monkeypatch.setattr(blocked, "backward", watched)
    network, x = make(), torch.randn(8, 6, generator=torch.Generator().manual_seed(3))

    def gradients(masked: sl.MaskedNetwork, enabled: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            output = masked(x)
        output.float().square().sum().backward()
        return output, torch.cat([logits.grad.flatten() for logits in masked.logits.values()])

    fast = sl.MaskedNetwork(network, samples=samples)
    output, gradient = gradients(fast, True)
    assert output.dtype == dtype
    assert set(seen) == {gains and dtype == torch.bfloat16}
    assert list(fast._routes.general.values()) == [False]
    seen.clear()
    whole = gradients(sl.MaskedNetwork(network, samples=samples), False)
    assert set(seen) == {False}
    monkeypatch.setattr(eligibility, "applies", lambda *args: False)
    general = gradients(sl.MaskedNetwork(network, samples=samples), True)
    for found in ((output, gradient), general):
        for rounded, exact in zip(found, whole, strict=True):
            # Outputs and gradients are rounded once a layer; weights are too by reduced products and by the general
            # route, which also rounds biases.
            assert 0 < (rounded.float() - exact).norm() / exact.norm() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("make", [Residual, stored])
def test_long_chunks_stay_in_bfloat16_and_their_gradient_has_one(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(blocked, "_long", lambda samples, reduced: 2 if reduced else 256)
    network = make()
    kept: list[torch.dtype] = []

    def penalised(enabled: bool) -> list[Tensor]:
        masked = sl.MaskedNetwork(network, samples=4)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
        noted = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.dtype), t)[1], lambda t: t)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), noted:
            output = masked(x)
        (slope,) = torch.autograd.grad(output.float().square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        return [output, slope, x.grad]

    exact = penalised(False)
    assert set(kept) == {torch.float32}
    found = penalised(True)
    assert torch.bfloat16 in kept
    for rounded, whole in zip(found, exact, strict=True):
        assert 0 < (rounded.float() - whole).norm() / whole.norm() < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("gains", [True, False], ids=["reduced-products", "whole-products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("make", "samples", "alone"),
    [
        (lambda: Recurrent(batch_first=True), 1, False),
        (lambda: Recurrent(num_layers=2, given=True), 4, False),
        (lambda: Looks(), 2, False),
        (lambda: LooksAndMixes(), 2, True),
    ],
    ids=["one sample of an LSTM", "four samples of an LSTM", "on trial", "chunks for themselves"],
)
def test_under_autocast_whole_batches_give_what_was_asked_for(
    make: Callable[[], nn.Module],
    samples: int,
    alone: bool,
    dtype: torch.dtype,
    gains: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocked, "multiplies_bfloat16", lambda: gains)
    network = make()
    shape = (8, 5, 6) if isinstance(network, Recurrent) else (8, 6)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    under_autocast_or_skipped(network, x, dtype)
    chunks: list[int] = []
    by_chunk = Routes._by_chunk
    monkeypatch.setattr(Routes, "_by_chunk", lambda *args: (chunks.append(args[1].step), by_chunk(*args))[1])
    seen: list[bool] = []
    for name in ("forward", "backward"):
        original = getattr(blocked, name)

        def watched(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            seen.append(kwargs.get("reduced", False))
            return original(*args, **kwargs)

        monkeypatch.setattr(blocked, name, watched)

    def twice(masked: sl.MaskedNetwork, enabled: bool) -> list[Tensor]:
        """Outputs of a call that is looked at and of one that is not, and the gradient of both."""
        found = []
        for masked.step in (1, 4):
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                found.append(masked(x))
            found[-1].float().square().sum().backward()
        return [*found, torch.cat([logits.grad.flatten() for logits in masked.logits.values()])]

    found = twice(sl.MaskedNetwork(network, samples=samples, keep=0.6), True)
    assert {output.dtype for output in found[:2]} == {dtype}
    # PyTorch's own layer is faster for one sample of an LSTM where it gains by bfloat16.
    assert (4 in chunks) is (alone or (samples == 1 and gains and dtype == torch.bfloat16))
    if isinstance(network, Recurrent) and samples > 1:
        assert (True in seen) is (gains and dtype == torch.bfloat16)
    whole = twice(sl.MaskedNetwork(network, samples=samples, keep=0.6), False)
    for rounded, exact in zip(found, whole, strict=True):
        # Rounded in each of five time steps at most.
        assert 0 < (rounded.float() - exact).norm() / exact.norm() < 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: Recurrent(batch_first=True), (4, 5, 6)), (Residual, (4, 6))],
    ids=["LSTM", "own forward"],
)
def test_autocast_and_calls_without_it_are_told_apart(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    masked, x = sl.MaskedNetwork(make(), samples=2), torch.randn(*shape)
    under_autocast_or_skipped(masked.network, x, torch.bfloat16)
    masked(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert masked(x).dtype == masked.network(x).dtype
    masked(x)
    assert {torch.bfloat16 in decision for decision in masked._routes.general} == {False, True}
    assert not any(masked._routes.general.values())


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer.weight.square().sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "samples", "rows", "why"),
    [
        (Squared, 1, 8, "NotLinearError: square"),
        (Squared, 2, 8, "NotLinearError: square"),
        (lambda: nn.Conv1d(6, 4, 1), 1, 8, "not all that is masked"),
        (lambda: Looks(), 2, 9, "not a multiple"),
        (lambda: LooksAndMixes(), 2, 8, "each by itself"),
    ],
)
def test_why_a_network_goes_the_general_route_can_be_read(
    make: Callable[[], nn.Module], samples: int, rows: int, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    masked = sl.MaskedNetwork(make(), samples=samples)
    x = torch.ones(rows, 6, 1) if isinstance(masked.network, nn.Conv1d) else torch.ones(rows, 6)
    with caplog.at_level("INFO", "sublens"):
        for _ in range(2):
            masked(x)
    told = [record.getMessage() for record in caplog.records if "general route" in record.getMessage()]
    assert len(told) == 1 and why in told[0]


def test_of_a_network_that_goes_a_fast_route_in_the_end_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    masked = sl.MaskedNetwork(Looks(), samples=2)  # not by vmap, but on trial
    with caplog.at_level("INFO", "sublens"):
        for _ in range(2):
            masked(torch.randn(8, 6))
    assert routes(masked) == [False]
    assert not [record for record in caplog.records if "general route" in record.getMessage()]


def test_after_a_mistake_in_one_call_the_next_goes_the_fast_route() -> None:
    masked = sl.MaskedNetwork(chain(nn.Tanh()), samples=2)
    with pytest.raises(RuntimeError):
        masked(torch.ones(8, 6, dtype=torch.float64))
    masked(torch.ones(8, 6))
    assert set(masked._routes.general.values()) == {False}


def swapped(name: str, masked: sl.MaskedNetwork, x: Tensor) -> Tensor:
    """Output and with weights or logits in another order."""
    turned = {key: logits.detach().t().contiguous().t() for key, logits in masked.logits.items()}
    if name == "functional_call":
        return torch.func.functional_call(masked, {f"logits_tree.{key}": t for key, t in turned.items()}, (x,))
    if name == "assign":
        masked.load_state_dict({f"logits_tree.{key}": t for key, t in turned.items()}, assign=True)
    else:
        weight = masked.network.get_parameter("0.weight")
        weight.data = weight.detach().t().contiguous().t()
    return masked(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["functional_call", "assign", "data"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_weights_and_logits_that_come_to_lie_in_another_order(activation: type[nn.Module], name: str) -> None:
    network = nn.Sequential(nn.Linear(6, 6), activation(), nn.Linear(6, 6))
    masked, x = sl.MaskedNetwork(network, samples=2), torch.randn(8, 6)
    with torch.no_grad():
        for logits in masked.logits.values():
            logits.normal_()
    expected = masked(x)
    masked(x)
    masked.step = 0
    torch.testing.assert_close(swapped(name, masked, x), expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_network_that_was_cast_behind_our_back_is_an_error(frozen: bool) -> None:
    network = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    masked = sl.MaskedNetwork(network, samples=2, frozen=frozen)
    masked(torch.ones(8, 6))
    network.double()
    with pytest.raises(RuntimeError, match="dtype"):
        masked(torch.ones(8, 6))


def test_a_bias_of_another_kind_in_an_lstm_is_pytorchs_error() -> None:
    network = nn.LSTM(6, 5, batch_first=True)
    network.bias_ih_l0.data = network.bias_ih_l0.data.double()
    with pytest.raises((RuntimeError, ValueError)):
        sl.MaskedNetwork(network, samples=1)(torch.ones(8, 3, 6))


@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_a_gradient_may_be_penalised(
    activation: type[nn.Module], frozen: bool, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 12), activation(), nn.Linear(12, 9), activation(), nn.Linear(9, 3))
    x = torch.randn(48, 6)

    def gradients() -> list[Tensor | None]:
        network.zero_grad()
        masked = sl.MaskedNetwork(network, samples=samples, keep=0.6, frozen=frozen)
        masked(x)
        y = masked(at := x.clone().requires_grad_())
        (of_x,) = torch.autograd.grad(y.square().sum(), at, create_graph=True)
        (y.square().sum() + of_x.square().sum()).backward()
        return [logits.grad for logits in masked.logits.values()] + [weight.grad for weight in network.parameters()]

    found = gradients()
    monkeypatch.setattr(eligibility, "applies", lambda *args: False)
    torch.testing.assert_close(found, gradients(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples", [2, 4])
def test_whoever_watches_backward_passes_sees_chunks(samples: int) -> None:
    network, seen = chain(nn.Tanh()), []
    network[1].register_full_backward_hook(lambda module, of_inputs, of_outputs: seen.append(of_inputs[0].shape))
    run(sl.MaskedNetwork(network, samples=samples), torch.randn(8, 6))
    assert seen == [(8 // samples, 12)] * samples


def test_a_weight_that_the_network_asks_about_learns() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * (2 if self.layer.weight.requires_grad else 1)  # type: ignore[no-any-return]

    masked = sl.MaskedNetwork(Asks(), samples=1)
    x = torch.randn(8, 6)
    learning = masked(x)
    masked.step = 0
    with torch.no_grad():
        torch.testing.assert_close(learning.detach(), 2 * masked(x))


def test_what_an_lstm_of_one_step_gives_may_be_changed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = nn.LSTM(6, 5, batch_first=True), torch.randn(4, 1, 6)
    found = []
    for general in (False, True):
        with monkeypatch.context() as patch:
            if general:
                patch.setattr(eligibility, "applies", lambda *args: False)
            masked = sl.MaskedNetwork(network, samples=2)
            y = masked(x)[0].mul_(2)
            y.square().sum().backward()
            found.append([y.detach(), *(logits.grad for logits in masked.logits.values())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_an_infinite_gradient_does_not_reach_a_bias_that_is_closed() -> None:
    torch.manual_seed(0)
    masked = sl.MaskedNetwork(nn.Linear(6, 4), samples=1, keep=0.5, biases=True, frozen=False)
    for _ in range(4):  # among 16 gates some are closed
        masked(torch.ones(2, 6)).sum().mul(float("inf")).backward()
        gradient = masked.network.bias.grad
        assert isinstance(gradient, Tensor) and not gradient.isnan().any()
        masked.network.zero_grad()


def test_a_weight_of_an_lstm_that_changes_before_the_backward_pass_is_noticed() -> None:
    network = nn.LSTM(6, 5, batch_first=True)
    y = sl.MaskedNetwork(network, samples=1)(torch.randn(8, 3, 6))[0]
    with torch.no_grad():
        network.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_number_of_another_kind_under_autocast_is_the_networks_own_error() -> None:
    masked, x = sl.MaskedNetwork(chain(nn.ReLU()), samples=1), torch.randn(8, 6, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="dtype"):
        masked(x)


class InPlace(nn.Module):
    """Changes what its layers give."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=bias), nn.Linear(6, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += x
        return self.second(y.relu_()).mul_(2.0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("rows", [8, 1200])  # the longer ones are multiplied by PyTorch
@pytest.mark.parametrize("shape", [(6,), (3, 6)], ids=str)
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_what_layers_give_may_be_changed_in_place(
    own: bool, bias: bool, samples: int, shape: tuple[int, ...], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(6, 12, bias=bias), nn.ReLU(inplace=True), nn.Linear(12, 4, bias=bias)
    network, x = InPlace(bias) if own else nn.Sequential(*layers), torch.randn(rows, *shape)
    masked = sl.MaskedNetwork(network, samples=samples)
    found = run(masked, x)
    assert list(masked._routes.general.values()) == [False]
    monkeypatch.setattr(eligibility, "applies", lambda *args: False)
    for one, other in zip(found, run(sl.MaskedNetwork(network, samples=samples), x), strict=True):
        # Gradients are sums over some 1,000 rows, rounded in another order.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
