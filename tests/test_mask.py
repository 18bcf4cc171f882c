"""Masks: their algebra against Python's sets, their numbers, putting them on a network, and their files."""

import copy
import importlib
import itertools
import json
import math
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sublens.errors import FileError, MismatchError, NonFiniteError, SelectionError, SettingError
from sublens.mask import Mask, binarise, fingerprint
from sublens.selection import select
from sublens.storage import hash_tensors, pack_bits, save_tensors

NET = "0" * 64


def bools(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def random_mask(network: nn.Module, seed: int = 0, share: float = 0.5) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    kept = {name: torch.rand(p.shape, generator=generator) < share for name, p in select(network).items()}
    return Mask(kept, fingerprint(network))


def bits_of(tensor: Tensor) -> bytes:
    return tensor.detach().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


class Tied(nn.Module):
    """Two layers with one weight, two whose weights merely share memory, and a buffer that is a view of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.c = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.b.weight = self.a.weight
        self.c.weight = nn.Parameter(self.a.weight.detach())
        self.register_buffer("row", self.a.weight.detach()[1], persistent=False)


# --- algebra: a mask is a set of elements

SHAPES: dict[str, tuple[int, ...]] = {"a.weight": (3, 3), "b.weight": (2, 4), "c": (), "d": (0, 2), "e": (17,)}
ELEMENTS = [(name, i) for name, shape in SHAPES.items() for i in range(math.prod(shape))]
SETS = st.sets(st.sampled_from(ELEMENTS)) | st.just(set(ELEMENTS))


def of_set(elements: set[tuple[str, int]], network: str = NET) -> Mask:
    kept = {
        name: torch.tensor([(name, i) in elements for i in range(math.prod(shape))], dtype=torch.bool).reshape(shape)
        for name, shape in SHAPES.items()
    }
    return Mask(kept, network)


def to_set(mask: Mask) -> set[tuple[str, int]]:
    return {(name, i) for name in mask for i in mask[name].flatten().nonzero().flatten().tolist()}


@settings(deadline=None)
@given(SETS, SETS)
def test_algebra_is_that_of_sets(a: set[tuple[str, int]], b: set[tuple[str, int]]) -> None:
    x, y = of_set(a), of_set(b)
    assert to_set(x & y) == a & b
    assert to_set(x | y) == a | b
    assert to_set(x - y) == a - b
    assert to_set(x ^ y) == a ^ b
    assert to_set(~x) == set(ELEMENTS) - a
    assert (x == y) == (a == b)
    assert (x != y) == (a != b)
    # equal however it was made, padding included
    assert ~~x == x and hash(~~x) == hash(x)
    assert ~(x & y) == ~x | ~y and hash(~(x & y)) == hash(~x | ~y)
    assert x - y == x & ~y
    assert x ^ y == (x | y) - (x & y)
    assert (to_set(x), to_set(y)) == (a, b)


@settings(deadline=None)
@given(SETS, SETS)
def test_numbers_are_those_of_sets(a: set[tuple[str, int]], b: set[tuple[str, int]]) -> None:
    x, y = of_set(a), of_set(b)

    def share(part: int, whole: int) -> float:
        return part / whole if whole else 1.0

    assert (x.kept_count, x.size, x.kept) == (len(a), len(ELEMENTS), len(a) / len(ELEMENTS))
    assert x.iou(y) == y.iou(x) == share(len(a & b), len(a | b))
    assert x.iomin(y) == y.iomin(x) == share(len(a & b), min(len(a), len(b)))
    assert x.shared(y) == share(len(a & b), len(a))
    for name, shape in SHAPES.items():
        in_a, in_b = ({element for element in elements if element[0] == name} for elements in (a, b))
        assert x.kept_counts()[name] == len(in_a)
        assert x.kept_per_layer()[name] == share(len(in_a), math.prod(shape))
        assert x.iou_per_layer(y)[name] == share(len(in_a & in_b), len(in_a | in_b))
        assert x.iomin_per_layer(y)[name] == share(len(in_a & in_b), min(len(in_a), len(in_b)))


def test_nothing_over_nothing_is_one() -> None:
    empty, some = Mask({"w": bools(0, 0, 0)}, NET), Mask({"w": bools(1, 0, 0)}, NET)
    assert empty.iou(empty) == empty.iomin(empty) == empty.shared(empty) == 1.0
    assert (empty.iou(some), some.iou(empty)) == (0.0, 0.0)
    assert (empty.iomin(some), empty.shared(some), some.shared(empty)) == (1.0, 1.0, 0.0)
    assert empty.iou_per_layer(empty) == empty.iomin_per_layer(empty) == {"w": 1.0}


def test_looking_at_a_mask() -> None:
    mask = Mask({"b": bools(1, 0, 1), "a": bools(0)}, NET)
    assert mask.names == ("b", "a") == tuple(mask) and len(mask) == 2
    assert "a" in mask and "c" not in mask
    assert mask["b"].tolist() == [True, False, True] and mask["b"].dtype == torch.bool
    assert (mask.kept, mask.kept_count, mask.size, mask.network) == (0.5, 2, 4, NET)
    assert mask.kept_per_layer() == {"b": 2 / 3, "a": 0.0}
    assert mask.kept_counts() == {"b": 2, "a": 0}
    assert mask.sizes() == {"b": 3, "a": 1}
    assert repr(mask) == "Mask(2 layers, 2 of 4 kept, network 000000000000)"
    with pytest.raises(KeyError, match="the mask has no layer 'c'; it has b, a"):
        mask["c"]


def test_masks_are_immutable() -> None:
    tensor = bools(1, 0)
    mask = Mask({"w": tensor}, NET)
    before = hash(mask)
    tensor[1] = True
    mask["w"][1] = True
    mask.kept_counts()["w"] = 7
    mask.sizes().clear()
    for name in ("kept", "network", "names", "anything"):
        with pytest.raises(AttributeError):
            setattr(mask, name, 1)
    assert mask["w"].tolist() == [True, False] and hash(mask) == before


def test_copies_of_a_mask() -> None:
    mask = of_set(set(ELEMENTS[::2]))
    for other in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert other == mask and other.names == mask.names


def test_order_of_layers_makes_no_difference() -> None:
    one = Mask({"a": bools(1), "b": bools(0, 1)}, NET)
    two = Mask({"b": bools(0, 1), "a": bools(1)}, NET)
    assert one == two and hash(one) == hash(two)
    assert one & two == one | two == one


BASE = {"w": torch.ones(2, 3, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Mask(BASE, "1" * 64), "the masks belong to different networks (000000000000 and 111111111111)"),
        (Mask({"v": BASE["w"]}, NET), "only one of the masks has the layer 'v'"),
        (Mask(BASE | {"x": bools(1)}, NET), "only one of the masks has the layer 'x'"),
        (Mask({"w": BASE["w"].t()}, NET), "'w' has shape (2, 3) in one mask and (3, 2) in the other"),
    ],
)
def test_masks_that_do_not_belong_together(other: Mask, message: str) -> None:
    mask = Mask(BASE, NET)
    operations: list[Callable[[], object]] = [
        lambda: mask & other,
        lambda: other | mask,
        lambda: mask ^ other,
        lambda: mask - other,
        lambda: mask.iou(other),
        lambda: mask.iomin(other),
        lambda: mask.shared(other),
        lambda: mask.iou_per_layer(other),
        lambda: mask.iomin_per_layer(other),
        lambda: mask.replace(other, "w"),
    ]
    for operation in operations:
        with pytest.raises(MismatchError):
            operation()
    with pytest.raises(MismatchError, match=re.escape(message)):
        mask & other
    assert mask != other


def test_other_things_are_no_masks() -> None:
    mask = Mask(BASE, NET)
    assert mask != 3 and mask != BASE
    with pytest.raises(TypeError, match="a Mask combines with a Mask, not with dict"):
        mask & BASE


@pytest.mark.parametrize(
    ("kept", "network", "message"),
    [
        ({}, NET, "at least one layer"),
        ({"w": torch.ones(2)}, NET, "'w' must be a bool tensor, not torch.float32; logits go through Mask.from_logits"),
        ({"w": torch.ones(2, dtype=torch.uint8)}, NET, "not torch.uint8"),
        ({"w": np.ones(2, bool)}, NET, "not ndarray"),
        (BASE, "", "needs its network, or the network's fingerprint"),
        (BASE, 3, "needs its network, or the network's fingerprint"),
    ],
)
def test_impossible_masks_are_refused(kept: dict[str, Tensor], network: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Mask(kept, network)


def test_a_mask_takes_the_network_itself() -> None:
    network = nn.Linear(3, 2)
    kept = {"weight": torch.rand(2, 3) > 0.5}
    mask = Mask(kept, network)
    assert mask == Mask(kept, fingerprint(network))
    assert Mask.from_logits({"weight": kept["weight"].float() - 0.5}, network) == mask


def test_a_mask_is_neither_true_nor_false() -> None:
    one, other = Mask(BASE, NET), ~Mask(BASE, NET)
    with pytest.raises(TypeError, match=r"'a & b'.*combine masks"):
        assert (one and other) is None
    with pytest.raises(TypeError, match=r"mask\.kept_count > 0"):
        assert not one


def test_a_mask_is_put_in_also_where_autocast_keeps_copies_of_the_weights() -> None:
    network = nn.Linear(8, 4)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    nothing = Mask({"weight": torch.zeros(4, 8, dtype=torch.bool), "bias": torch.zeros(4, dtype=torch.bool)}, network)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = network(x)
        with nothing.applied(network):
            assert not bool(network(x).any())
        assert torch.equal(network(x), whole)


# --- making masks


def test_kept_iff_the_logit_is_above_zero() -> None:
    tiny = 1e-45
    logit = torch.tensor([0.0, -0.0, tiny, -tiny, 1.0, -1.0, math.inf, -math.inf, math.nan], requires_grad=True)
    expected = [False, False, True, False, True, False, True, False, False]
    assert binarise(logit).tolist() == expected and not binarise(logit).requires_grad
    assert Mask.from_logits({"w": logit[:-1]}, NET)["w"].tolist() == expected[:-1]
    with pytest.raises(NonFiniteError, match="the logits of 'w' contain NaN") as caught:
        Mask.from_logits({"v": logit[:2], "w": logit}, NET)
    assert caught.value.parameter == "w"


def test_full() -> None:
    network = Tied()
    mask = Mask.full(network)
    assert mask.names == ("a.weight",) and mask.kept == 1.0 and mask.network == fingerprint(network)
    assert Mask.full(network, "*.bias").names == ("a.bias", "b.bias", "c.bias", "norm.bias")
    assert "a.bias" in Mask.full(network, biases=True)


@settings(deadline=None)
@given(SETS, st.integers(-5, 2**70))
def test_random_masks_keep_as_many_in_each_layer(a: set[tuple[str, int]], seed: int) -> None:
    mask = of_set(a)
    random = Mask.random_like(mask, seed)
    assert random.kept_counts() == mask.kept_counts()
    assert random.names == mask.names and random.network == mask.network
    assert random == Mask.random_like(mask, seed)
    assert ~~random == random  # no padding bit is set


def test_random_masks_are_uniform_and_independent() -> None:
    mask = Mask({"v": bools(1, 1, 0, 0), "w": bools(1, 1, 0, 0)}, NET)
    draws = [Mask.random_like(mask, seed) for seed in range(2400)]
    counts: dict[object, int] = {}
    for draw in draws:
        key = (tuple(draw["v"].tolist()), tuple(draw["w"].tolist()))
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 36
    # chi-squared with 35 degrees of freedom: above 66.6 once in a thousand
    assert sum((count - 2400 / 36) ** 2 / (2400 / 36) for count in counts.values()) < 66.6


def test_random_masks_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 3 * 2**12 + 5
    kept = torch.zeros(size, dtype=torch.bool)
    kept[:5000] = True
    mask = Mask({"w": kept}, NET)
    whole = Mask.random_like(mask, 1)
    # By its path: the package has a function of the same name.
    monkeypatch.setattr(importlib.import_module("sublens.mask.random_bits"), "_CHUNK", 2**10)
    assert Mask.random_like(mask, 1) == whole and whole.kept_count == 5000
    # the 5000 smallest of as many numbers
    quarters = [int(part.sum()) for part in whole["w"][: 4 * (size // 4)].chunk(4)]
    assert all(abs(quarter - 1250) < 150 for quarter in quarters)


def test_random_masks_are_the_same_everywhere() -> None:
    mask = Mask({"w": torch.arange(40) < 20}, NET)
    assert pack_bits(Mask.random_like(mask, 7)["w"]).tolist() == [179, 142, 154, 7, 204]


def test_only_and_replace() -> None:
    mask = Mask({"enc.0.weight": bools(0, 1), "enc.1.weight": bools(0, 0), "head.weight": bools(1, 0)}, NET)
    assert [mask.only("enc")[name].tolist() for name in mask] == [[False, True], [False, False], [True, True]]
    assert mask.only(["*"]) == mask and mask.only([]) == mask | ~mask
    other = ~mask
    mixed = mask.replace(other, ["head.weight", "enc.0.*"])
    assert [mixed[name].tolist() for name in mask] == [[True, False], [False, False], [False, True]]
    for use in (mask.only, lambda layers: mask.replace(other, layers)):
        with pytest.raises(SelectionError, match=r"'haed' matches no name\. Did you mean 'head'"):
            use(["enc", "haed"])


# --- fingerprint


def test_fingerprint_is_the_hash_of_the_state() -> None:
    network = Tied()
    assert fingerprint(network) == hash_tensors(network.state_dict())
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(network))


def test_fingerprint_sees_what_matters_and_nothing_else() -> None:
    def change(action: Callable[[nn.Module], object]) -> str:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        with torch.no_grad():
            action(network)
        return fingerprint(network)

    def flip(network: nn.Module) -> None:
        network[0].weight.view(torch.int32)[1, 2] ^= 1

    base = change(lambda network: None)
    assert change(lambda network: network.eval().requires_grad_(False)) == base
    assert change(lambda network: setattr(network[0].weight, "data", network[0].weight.t().contiguous().t())) == base
    different = [
        change(flip),
        change(lambda network: network[1].running_mean.add_(1)),
        change(lambda network: network[1].num_batches_tracked.add_(1)),
        change(lambda network: network.double()),
        change(lambda network: network.add_module("2", nn.Linear(1, 1))),
        change(lambda network: network.add_module("2", network._modules.pop("1"))),
        change(lambda network: setattr(network[0].weight, "data", network[0].weight.data.reshape(2, 3).flatten())),
    ]
    assert len({base, *different}) == 1 + len(different)


def test_fingerprint_refuses_what_has_no_bytes() -> None:
    with pytest.raises(SettingError, match="'weight' has no shape yet; run one batch"):
        fingerprint(nn.LazyLinear(2))
    with pytest.raises(SettingError, match="make it a dense tensor on a real device"):
        fingerprint(nn.Linear(2, 2, device="meta"))


# --- on the network


def odd_network() -> nn.Sequential:
    """Weights that break arithmetic: NaN with a payload, infinities, -0.0, subnormals."""
    network = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    odd = torch.tensor([0x7FC12345, -0x3FEDCC, 0x7F800000, -0x800000, -0x80000000, 1, 0x3F800000, 0], dtype=torch.int32)
    with torch.no_grad():
        network[0].weight.copy_(odd.view(torch.float32).repeat(4, 1))
        network[0].weight.view(torch.int32).copy_(odd.repeat(4, 1))
    return network


def state(network: nn.Module) -> dict[str, object]:
    """Everything that must be the same afterwards."""
    tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    return {
        "names": [name for name, _ in tensors],
        "bytes": [bits_of(tensor) for _, tensor in tensors],
        "objects": [id(tensor) for _, tensor in tensors],
        "memory": [tensor.data_ptr() for _, tensor in tensors],
        "layouts": [(tensor.dtype, tensor.shape, tensor.stride()) for _, tensor in tensors],
        "flags": [(tensor.requires_grad, tensor.is_leaf) for _, tensor in tensors],
        "modules": [(name, type(module), module.training) for name, module in network.named_modules()],
    }


def test_removed_elements_are_zero_and_kept_ones_untouched() -> None:
    network = odd_network()
    mask = random_mask(network)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    with mask.applied(network) as inside:
        assert inside is network
        masked = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    pruned = dict(mask.apply(network).named_parameters())
    for name, original in before.items():
        expected = original.masked_fill(~mask[name], 0.0) if name in mask else original
        assert bits_of(masked[name]) == bits_of(pruned[name]) == bits_of(expected)


def do_nothing(network: nn.Module) -> None:
    pass


def train(network: nn.Module) -> None:
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    network.train()(torch.randn(5, 8)).sum().backward()
    optimizer.step()


def overwrite(network: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.fill_(7)


def point_elsewhere(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.data = torch.zeros(3)


def convert(network: nn.Module) -> None:
    network.half()


def load(network: nn.Module) -> None:
    network.load_state_dict(
        {name: torch.zeros_like(value) for name, value in network.state_dict().items()}, assign=True
    )


def replace_parameters(network: nn.Module) -> None:
    del network[0].weight
    network[0].weight = nn.Parameter(torch.zeros(1))
    network[0].register_parameter("extra", nn.Parameter(torch.zeros(1)))
    network[1].running_mean = None


def replace_modules(network: nn.Module) -> None:
    network[2] = nn.Identity()
    network.add_module("new", nn.Linear(1, 1))
    del network[0]


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize(
    "action",
    [do_nothing, train, overwrite, point_elsewhere, convert, load, replace_parameters, replace_modules],
)
def test_everything_comes_back(action: Callable[[nn.Module], None], failure: type[BaseException] | None) -> None:
    network = odd_network()
    mask = random_mask(network)
    before = state(network)

    def use() -> None:
        with mask.applied(network):
            action(network)
            if failure is not None:
                raise failure("inside")

    training = [module.training for module in network.modules()]
    if failure is None:
        use()
    else:
        with pytest.raises(failure, match="inside"):
            use()
    assert [module.training for module in network.modules()] == training
    assert state(network) == before


def test_a_recurrent_network_sees_the_mask_and_recovers_from_replaced_weights() -> None:
    network = nn.LSTM(3, 4)
    mask = random_mask(network)
    x = torch.randn(2, 1, 3)
    before, output = state(network), network(x)[0]
    expected = mask.apply(network)(x)[0]
    with mask.applied(network):
        assert torch.equal(network(x)[0], expected) and not torch.equal(expected, output)
        network.weight_ih_l0 = nn.Parameter(torch.zeros(16, 3))
        assert not torch.equal(network(x)[0], expected)
    assert torch.equal(network(x)[0], output)
    assert state(network) == before


def test_tied_weights_stay_tied_and_are_masked_once() -> None:
    network = Tied()
    mask = random_mask(network)
    before = state(network)
    with mask.applied(network):
        masked = network.a.weight.detach().clone()
        assert torch.equal(masked == 0, ~mask["a.weight"])
        assert all(torch.equal(layer.weight, masked) for layer in (network.b, network.c))
        assert torch.equal(network.row, masked[1])
        assert network.b.weight is network.a.weight
    assert state(network) == before
    pruned = mask.apply(network)
    assert isinstance(pruned, Tied) and pruned.b.weight is pruned.a.weight
    assert all(torch.equal(layer.weight, masked) for layer in (pruned.a, pruned.b, pruned.c))


def test_applied_leaves_earlier_graphs_usable() -> None:
    network = nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    loss = network(x).square().sum()
    with random_mask(network).applied(network):
        pass
    loss.backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * (x @ network.weight.t() + network.bias) @ network.weight)


def test_apply_gives_a_plain_module_of_its_own() -> None:
    network = odd_network()
    before = state(network)
    pruned = random_mask(network).apply(network)
    assert type(pruned) is type(network) and list(pruned.state_dict()) == list(network.state_dict())
    memory = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
    assert not memory & {tensor.untyped_storage().data_ptr() for tensor in pruned.state_dict().values()}
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in pruned.modules())
    again = pickle.loads(pickle.dumps(pruned))
    assert fingerprint(again) == fingerprint(pruned)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert state(network) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_floating_dtype(dtype: torch.dtype) -> None:
    network = nn.Linear(5, 3).to(dtype)
    mask = random_mask(network)
    with mask.applied(network):
        assert torch.equal(network.weight != 0, mask["weight"])
    assert fingerprint(network) == mask.network


def test_inference_tensors_frozen_weights_and_no_grad() -> None:
    with torch.inference_mode():
        network = nn.Linear(5, 3)
    mask = random_mask(network)
    weight = network.weight.clone()
    with torch.no_grad(), mask.applied(network):
        assert torch.equal(network.weight != 0, mask["weight"])
    assert torch.equal(network.weight, weight)
    frozen = nn.Linear(5, 3).requires_grad_(False)
    with random_mask(frozen).applied(frozen):
        assert not frozen.weight.requires_grad
    assert not random_mask(frozen).apply(frozen).weight.requires_grad


def test_a_mask_for_another_network_changes_nothing() -> None:
    torch.manual_seed(0)
    network, other_weights = nn.Linear(3, 2), nn.Linear(3, 2)
    mask = random_mask(other_weights)
    cases = [
        (network, "names and shapes fit, but weights or buffers differ"),
        (nn.Linear(4, 2), r"'weight' has shape \(2, 4\) in the network and \(2, 3\) in the mask"),
        (nn.Sequential(network), "the network has no parameter 'weight'"),
        (mask.apply(other_weights), "weights or buffers differ"),
    ]
    for wrong, message in cases:
        before = state(wrong)
        for use in (lambda net: mask.applied(net).__enter__(), mask.apply):
            with pytest.raises(MismatchError, match=message):
                use(wrong)
        assert state(wrong) == before
    with mask.applied(other_weights), pytest.raises(MismatchError), mask.applied(other_weights):
        pass


def test_two_layers_on_one_tensor_are_refused() -> None:
    network = Tied()
    kept = torch.ones(4, 4, dtype=torch.bool)
    mask = Mask({"a.weight": kept, "c.weight": ~kept}, fingerprint(network))
    with pytest.raises(MismatchError, match=r"a.weight and c.weight are one tensor in the network, but two layers"):
        mask.apply(network)


def test_bind_transfers_on_purpose() -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    mask = random_mask(source)
    moved = mask.bind(target)
    assert moved.network == fingerprint(target) and torch.equal(moved["weight"], mask["weight"])
    assert moved != mask
    moved.apply(target)
    with pytest.raises(MismatchError, match="in the network and"):
        mask.bind(nn.Linear(4, 2))
    with pytest.raises(MismatchError, match="no parameter 'weight'"):
        mask.bind(nn.Sequential(target))


# --- on disk


@settings(deadline=None, max_examples=40)
@given(SETS, st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, a: set[tuple[str, int]], network: str) -> None:
    path = tmp_path_factory.mktemp("masks") / "mask.safetensors"
    mask = of_set(a, network)
    mask.save(path)
    again = Mask.load(path)
    assert again == mask and again.names == mask.names
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


def example() -> Mask:
    kept = torch.zeros(2, 5, dtype=torch.bool)
    kept.view(-1)[[0, 3, 9]] = True
    return Mask({"w": kept}, NET)


def test_golden_bytes(tmp_path: Path) -> None:
    """The example of the specification, byte for byte, in both directions."""
    page = (Path(__file__).parent.parent / "docs" / "file-format.md").read_text(encoding="utf-8")
    header = re.search(r"```json\n(.*)\n```", page)
    assert header is not None
    golden = bytes.fromhex("48 01 00 00 00 00 00 00") + header[1].encode() + bytes.fromhex("09 02")
    assert len(golden) == 338
    example().save(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == golden
    (tmp_path / "g").write_bytes(golden)
    assert Mask.load(tmp_path / "g") == example()


def test_one_bit_a_weight(tmp_path: Path) -> None:
    Mask({"w": torch.ones(1000, 1000, dtype=torch.bool)}, NET).save(tmp_path / "f")
    assert (tmp_path / "f").stat().st_size < 1_000_000 / 8 + 600


def test_every_flipped_bit_of_a_mask_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    example().save(path)
    whole = path.read_bytes()
    for position in range(0, len(whole) * 8, 3):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(FileError):
            Mask.load(path)
    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError):
            Mask.load(path)


def byte_row(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("content", "change", "message"),
    [
        ({"w": byte_row(1, 2)}, {"shapes": {"w": [3]}}, "'w': shape (3,) needs 1 bytes of packed bits, but"),
        ({"w": byte_row(1)}, {"shapes": {"w": [3, 3]}}, "needs 2 bytes"),
        ({"w": byte_row(8)}, {"shapes": {"w": [3]}}, "padding bits after the last of 3 elements are set"),
        ({"w": torch.ones(1)}, {"shapes": {"w": [3]}}, "packed bits must be one row of uint8, not torch.float32"),
        ({"w": torch.ones(1, dtype=torch.bool)}, {"shapes": {"w": [3]}}, "not torch.bool"),
        ({"w": byte_row(1)[None]}, {"shapes": {"w": [3]}}, "of shape (1, 1)"),
        ({"w": byte_row()}, {"shapes": {"w": [0, 2**62, 2**62]}}, "is no possible shape for 'w'"),
        ({"w": byte_row(1)}, {"shapes": {"w": [2**63]}}, "is no possible shape"),
        ({"w": byte_row(1)}, {"shapes": {"w": [2**40, 2**40]}}, "is no possible shape"),
        ({"w": byte_row(1)}, {"shapes": {"w": [2**60]}}, "needs 144115188075855872 bytes"),
        ({"w": byte_row(1)}, {"shapes": {"w": [-3, -1]}}, "is no possible shape"),
        ({"w": byte_row(1)}, {"shapes": {"w": [3.0]}}, "is no possible shape"),
        ({"w": byte_row(1)}, {"shapes": {"w": [True]}}, "is no possible shape"),
        ({"w": byte_row(1)}, {"shapes": {"w": ["3"]}}, "is no possible shape"),
        ({"w": byte_row(1)}, {"shapes": {"w": 3}}, "is no possible shape"),
        ({"w": byte_row(1)}, {"shapes": {"w": {"0": 3}}}, "is no possible shape"),
        ({"w": byte_row(1)}, {"shapes": {"w": [1] * 65}}, "is no possible shape"),
        ({"w": byte_row(1)}, {"shapes": {"v": [3]}}, "its shapes do not have the names of its tensors"),
        ({"w": byte_row(1)}, {"shapes": {"w": [3], "v": [3]}}, "its shapes do not have the names"),
        ({"w": byte_row(1)}, {"shapes": [["w", [3]]]}, "its shapes do not have the names"),
        ({"w": byte_row(1)}, {"shapes": None}, "its shapes do not have the names"),
        ({}, {"shapes": {}}, "is no mask"),
        ({"w": byte_row(1)}, {"shapes": {"w": [3]}, "network": ""}, "does not say to which network"),
        ({"w": byte_row(1)}, {"shapes": {"w": [3]}, "network": 7}, "does not say to which network"),
        ({"w": byte_row(1)}, {"shapes": {"w": [3]}, "kind": "logits"}, "holds 'logits', not 'mask'"),
        ({"w": byte_row(1)}, {"shapes": {"w": [3]}, "kind": None}, "holds None, not 'mask'"),
        ({"w\x1b\n": byte_row(1)}, {"shapes": {"w\x1b\n": [99]}}, r"'w\x1b\n': shape (99,) needs 13 bytes"),
    ],
)  # fmt: skip
def test_hostile_masks(tmp_path: Path, content: dict[str, Tensor], change: dict[str, object], message: str) -> None:
    """Files with a right checksum that are no masks all the same."""
    save_tensors(tmp_path / "f", content, {"kind": "mask", "network": NET} | change)
    with pytest.raises(FileError, match=re.escape(message)) as caught:
        Mask.load(tmp_path / "f")
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


def test_other_files_are_no_masks(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "theirs")
    with pytest.raises(FileError, match="not one of sublens"):
        Mask.load(tmp_path / "theirs")
    (tmp_path / "pickle").write_bytes(pickle.dumps(example()))
    with pytest.raises(FileError, match="not a whole safetensors file"):
        Mask.load(tmp_path / "pickle")
    torch.save({"w": torch.ones(2, dtype=torch.bool)}, tmp_path / "w.pt")
    with pytest.raises(FileError):
        Mask.load(tmp_path / "w.pt")
    with pytest.raises(FileError, match="does not exist"):
        Mask.load(tmp_path / "missing")
    with pytest.raises(FileError, match="is a folder"):
        Mask.load(tmp_path)
    header = json.dumps({"w": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}).encode()
    (tmp_path / "huge").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(FileError):
        Mask.load(tmp_path / "huge")


def test_loading_for_a_network(tmp_path: Path) -> None:
    network = Tied()
    mask = random_mask(network)
    mask.save(tmp_path / "f")
    assert Mask.load(tmp_path / "f", network) == mask
    for wrong in (Tied(), nn.Linear(4, 4)):
        with pytest.raises(MismatchError):
            Mask.load(tmp_path / "f", wrong)


def test_masks_are_read_the_same_after_every_operation(tmp_path: Path) -> None:
    masks = [of_set(set(ELEMENTS[start::3])) for start in range(2)]
    results = [operation(*masks) for operation in (Mask.__and__, Mask.__or__, Mask.__xor__, Mask.__sub__)]
    results += [~masks[0], Mask.random_like(masks[0], 3), masks[0].only("e"), masks[0].replace(masks[1], "a.*")]
    for number, mask in enumerate(itertools.chain(masks, results)):
        mask.save(tmp_path / str(number))
        assert Mask.load(tmp_path / str(number)) == mask
