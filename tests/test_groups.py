"""Granularity: what shares a logit, in every kind of module and under every gate.

The oracle knows nothing of groupings: for each granularity and module, the group of every element is written down here
by hand (``number``), logits are expanded to full size by it, and values and gradients come from float64 autograd.
"""

import importlib.util
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import sublens as sl
from sublens import kernels
from sublens.errors import SelectionError, SettingError
from sublens.groups.grouping import Blocks, GroupedGate, Labels
from sublens.noise import Draw, parameter_id, uniform

if TYPE_CHECKING:
    from conftest import Case

# The gates' own equations, in float64, stand beside the gates' own tests.
_spec = importlib.util.spec_from_file_location("gate_kinds", Path(__file__).with_name("test_gate_kinds.py"))
assert _spec is not None
assert _spec.loader is not None
_kinds = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_kinds)
GATES = _kinds.GATES

Number = Callable[[str, tuple[int, ...]], Tensor]  # (parameter, its shape) -> the group of each element


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def index(shape: tuple[int, ...], dim: int) -> Tensor:
    """The index along a dimension, at every element."""
    view = [1] * len(shape)
    view[dim] = shape[dim]
    return torch.arange(shape[dim]).view(view).expand(shape)


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]  # type: ignore[no-any-return]


class GroupedQuery(nn.Module):
    """Four query heads of 3 features, two of which share each of two key-value heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = 4, 2
        self.q_proj, self.o_proj = nn.Linear(5, 12), nn.Linear(12, 5)
        self.k_proj, self.v_proj = nn.Linear(5, 6), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (4, 3)).transpose(1, 2)
        k, v = (p(x).unflatten(-1, (2, 3)).transpose(1, 2).repeat_interleave(2, 1) for p in (self.k_proj, self.v_proj))
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(6, 3, 8, dropout=0.1, batch_first=True)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(5, 4), (6, 5)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3), (6, 2, 5, 5)),
    "LSTM": (LastState, (6, 4, 3)),
    "MultiheadAttention": (Attention, (6, 4, 6)),
    "Transformer layer": (layer, (6, 4, 6)),
}


def head(name: str, shape: tuple[int, ...]) -> Tensor:
    """Three heads of two features; queries, keys and values are packed one after the other."""
    return index(shape, 1) // 2 if "out_proj" in name else index(shape, 0) % 6 // 2


def irregular(name: str, shape: tuple[int, ...]) -> Tensor:
    return (7 * index(shape, 0) + 3 * index(shape, 1)).remainder(5) - 2


def _block(rows: int, columns: int) -> Number:
    return lambda name, shape: 1000 * (index(shape, 0) // rows) + index(shape, 1) // columns


GROUPS: dict[str, tuple[Any, Number, dict[str, Any]]] = {
    "weight": ("weight", lambda name, shape: torch.arange(math.prod(shape)).view(shape), {}),
    "row": ("row", lambda name, shape: index(shape, 0), {}),
    "column": ("column", lambda name, shape: index(shape, 1), {}),
    "channel": ("channel", lambda name, shape: index(shape, 0), {}),
    "kernel": ("kernel", lambda name, shape: 1000 * index(shape, 0) + index(shape, 1), {}),
    "layer": ("layer", lambda name, shape: torch.zeros(shape, dtype=torch.long), {}),
    "block": ("3x2", _block(3, 2), {}),
    "lengths": ((2, None), lambda name, shape: index(shape, 0) // 2, {}),
    "irregular": (lambda name, parameter, module: irregular(name, tuple(parameter.shape)), irregular, {}),
    "head": ("head", head, {"where": nn.MultiheadAttention}),
}

TABLE = [
    pytest.param(gate, groups, module, id=f"{gate}-{groups}-{module}")
    for gate in GATES
    for groups in GROUPS
    for module in MODULES
    if groups != "head" or module in ("MultiheadAttention", "Transformer layer")
]


def spread(logits: dict[str, Tensor], numbers: Tensor, owner: str) -> Tensor:
    """The logits at full size: groups in the order of their numbers, except that heads and rows come in their own."""
    order = torch.unique(numbers).tolist()
    values = logits[owner].flatten()
    assert len(values) == len(order)
    return values[torch.tensor([[*order].index(int(n)) for n in numbers.flatten()])].view(numbers.shape)


@pytest.mark.parametrize(("gate", "groups", "module"), TABLE)
def test_values_and_gradients_are_those_of_expanded_logits(gate: str, groups: str, module: str) -> None:
    estimator, oracle = GATES[gate]
    make, shape = MODULES[module]
    granularity, number, more = GROUPS[groups]
    torch.manual_seed(0)
    network, x = make(), normal(*shape)
    masked = sl.MaskedNetwork(network, keep=0.7, samples=3, seed=7, gate=estimator, groups=granularity, **more)
    with torch.no_grad():
        for i, logits in enumerate(masked.logits.values()):
            logits.add_(normal(*logits.shape, seed=i))
    masked.step = 4
    output = masked(x)
    direction = normal(*output.shape, seed=9)
    (output * direction).sum().backward()

    exact = {key: logits.detach().double().requires_grad_() for key, logits in masked.logits.items()}
    parameters = dict(network.named_parameters())
    # All projections of one attention share the logits that stand under the first one's name.
    owners = {key: next(iter(exact)) if groups == "head" else key for key in masked.groupings}
    multipliers = []
    for k in range(3):
        drawn: dict[str, Tensor] = {}
        for key, logits in exact.items():
            u = uniform(Draw(7, 4, k, parameter_id(key)), logits.numel()).double().view(logits.shape)
            drawn[key] = oracle(logits, u, 4)
        multipliers.append(drawn)
    parts = []
    for drawn, (start, stop) in zip(multipliers, pairwise((0, 2, 4, 6)), strict=True):
        weights = {key: value.detach().double() for key, value in parameters.items()}
        for key, owner in owners.items():
            weights[key] = weights[key] * spread(drawn, number(key, tuple(weights[key].shape)), owner)
        parts.append(functional_call(network.eval(), weights, (x[start:stop].double(),)))
    expected = torch.cat(parts)
    (expected * direction.double()).sum().backward()
    torch.testing.assert_close(output.detach().double(), expected.detach(), rtol=1e-4, atol=1e-5)
    for key, logits in masked.logits.items():
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad.double(), exact[key].grad, rtol=2e-4, atol=1e-5)

    masked.eval()
    decided = {key: (estimator.decision(logits.detach()) > 0) for key, logits in masked.logits.items()}
    mask = masked.mask()
    kept = 0
    for key, owner in owners.items():
        numbers = number(key, tuple(parameters[key].shape))
        assert torch.equal(mask[key], spread(decided, numbers, owner))
        kept += int(mask[key].sum())
    assert masked.kept == mask.kept == kept / mask.size
    with torch.no_grad():
        torch.testing.assert_close(masked(x), mask.apply(network)(x))


def test_one_logit_for_each_group_and_the_task_reaches_them() -> None:
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    masked = sl.MaskedNetwork(network, groups="row", samples=2)
    assert {name: tuple(logits.shape) for name, logits in masked.logits.items()} == {
        "0.weight": (5, 1),
        "2.weight": (3, 1),
    }
    masked(normal(8, 6)).square().sum().backward()
    assert all(logits.grad is not None and float(logits.grad.norm()) > 0 for logits in masked.logits.values())


# --- where the outputs and inputs are


def grouped() -> nn.Module:
    return nn.Conv2d(4, 6, 3, groups=2)


def transposed() -> nn.Module:
    return nn.ConvTranspose2d(4, 6, 3)


def transposed_grouped() -> nn.Module:
    return nn.ConvTranspose2d(4, 6, 3, groups=2)


@pytest.mark.parametrize("make", [grouped, transposed, transposed_grouped])
@pytest.mark.parametrize("kind", ["row", "column"])
def test_closing_a_channel_closes_what_it_feeds(make: Callable[[], nn.Module], kind: str) -> None:
    # Measured on the module itself: a closed row makes one output channel the bias alone, and leaves the others as they
    # are; with a closed column the output no longer depends on one input channel.
    torch.manual_seed(0)
    network = make()
    x = normal(1, 4, 5, 5)
    masked = sl.MaskedNetwork(network, groups=kind).eval()
    (logits,) = masked.logits.values()
    assert logits.numel() == {"row": 6, "column": 4}[kind]
    for closed in range(logits.numel()):
        with torch.no_grad():
            logits.fill_(1.0).view(-1)[closed] = -1.0
            if kind == "row":
                out, plain, bias = masked(x), network(x), network.bias
                assert torch.equal(out[:, closed], bias[closed].expand_as(out[:, closed]))
                others = [c for c in range(6) if c != closed]
                torch.testing.assert_close(out[:, others], plain[:, others])
            else:
                without = x.clone()
                without[:, closed] = 0
                torch.testing.assert_close(masked(x), network(without))


@pytest.mark.parametrize("make", [grouped, transposed, transposed_grouped, lambda: nn.Linear(4, 6)])
def test_a_bias_goes_with_its_row(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = make()
    x = normal(2, 4) if isinstance(network, nn.Linear) else normal(2, 4, 5, 5)
    masked = sl.MaskedNetwork(network, groups="row", biases=True, samples=2)
    assert list(masked.logits) == ["weight"]
    assert list(masked.groupings) == ["weight", "bias"]
    for k in range(2):  # in one sample, outputs are 0 where the row is shut, and as ever elsewhere
        with torch.no_grad():
            masked.step = 0
            masked._seen_a_gradient = True
            out = masked(x)[k]
            plain = network(x)[k]
        for c in range(6):
            assert torch.equal(out[c], torch.zeros_like(out[c])) or torch.allclose(out[c], plain[c], atol=1e-6)
    mask = masked.mask()
    assert mask.names == ("weight", "bias")
    assert masked.kept == mask.kept == 1.0


def test_gradients_of_shared_logits_add_up() -> None:
    torch.manual_seed(0)
    network, x = nn.Linear(4, 3), normal(5, 4)
    masked = sl.MaskedNetwork(network, groups="row", biases=True, samples=1, gate=sl.Threshold(), keep=0.6)
    masked(x).square().sum().backward()
    (logits,) = masked.logits.values()
    # The output of a row is m (w x + b), so d loss / dm = sum of 2 (w x + b)^2 for m = 1.
    torch.testing.assert_close(logits.grad, 2 * network(x).detach().square().sum(0, keepdim=True).T)


def test_a_bias_without_a_group_of_its_own_is_left_alone() -> None:
    network = nn.Linear(4, 3)
    assert sl.MaskedNetwork(network, groups="column", biases=True).mask().names == ("weight",)
    assert sl.MaskedNetwork(network, groups="layer", biases=True).mask().names == ("weight", "bias")
    assert sl.MaskedNetwork(network, groups="2x4", biases=True).mask().names == ("weight", "bias")
    assert sl.MaskedNetwork(network, groups="2x2", biases=True).mask().names == ("weight",)
    assert len(sl.MaskedNetwork(network, groups="weight", biases=True).logits) == 2


# --- heads


def test_heads_of_packed_attention_share_one_logit_with_the_output() -> None:
    torch.manual_seed(0)
    network, x = Attention(), normal(2, 4, 6)
    masked = sl.MaskedNetwork(network, groups="head", biases=True, where=nn.MultiheadAttention).eval()
    assert list(masked.logits) == ["attention.in_proj_weight"]
    assert set(masked.groupings) == {"attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight"}
    (logits,) = masked.logits.values()
    assert logits.numel() == 3
    with torch.no_grad():
        logits.view(-1)[1] = -1.0
        # The head's share of the output, and that of its output projection's columns: the same, for nothing of it is
        # left on the way there.
        reference = Attention()
        reference.load_state_dict(network.state_dict())
        reference.attention.out_proj.weight[:, 2:4] = 0
        torch.testing.assert_close(masked(x), reference(x))


def test_grouped_query_heads_have_logits_of_their_own() -> None:
    torch.manual_seed(0)
    network, x = GroupedQuery(), normal(2, 4, 5)
    masked = sl.MaskedNetwork(network, groups="head").eval()
    assert {name: logits.numel() for name, logits in masked.logits.items()} == {"q_proj.weight": 4, "k_proj.weight": 2}
    assert {name: each.owner for name, each in masked.groupings.items()} == {
        "q_proj.weight": "q_proj.weight", "o_proj.weight": "q_proj.weight",
        "k_proj.weight": "k_proj.weight", "v_proj.weight": "k_proj.weight",
    }  # fmt: skip
    with torch.no_grad():
        masked.logits["q_proj.weight"].view(-1)[2] = -1.0
        mask = masked.mask()
        assert not mask["q_proj.weight"][6:9].any()
        assert not mask["o_proj.weight"][:, 6:9].any()
        assert mask.kept_count == mask.size - 2 * 15
        masked.logits["k_proj.weight"].view(-1)[0] = -1.0
        mask = masked.mask()
        assert not mask["k_proj.weight"][:3].any()
        assert not mask["v_proj.weight"][:3].any()
        torch.testing.assert_close(masked(x), mask.apply(network)(x))


class Packed(nn.Module):
    """Attention as in GPT-2: one projection for queries, keys and values, stored as (inputs, outputs)."""

    class Conv1D(nn.Module):
        def __init__(self, outputs: int, inputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(normal(inputs, outputs))
            self.bias = nn.Parameter(normal(outputs))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.c_attn, self.c_proj = self.Conv1D(18, 6), self.Conv1D(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in self.c_attn(x).split(6, -1))
        return self.c_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_heads_of_weights_stored_as_inputs_by_outputs() -> None:
    network = Packed()
    masked = sl.MaskedNetwork(network, groups="head", biases=True).eval()
    assert list(masked.logits) == ["c_attn.weight"]
    with torch.no_grad():
        masked.logits["c_attn.weight"].view(-1)[1] = -1.0
        mask = masked.mask()
        assert set(mask.names) == {"c_attn.weight", "c_attn.bias", "c_proj.weight"}
        assert not mask["c_attn.weight"].view(6, 3, 2, 3)[:, :, 1].any()
        assert not mask["c_attn.bias"].view(3, 2, 3)[:, 1].any()
        assert not mask["c_proj.weight"].view(2, 3, 6)[1].any()
        assert mask.kept_count == mask.size // 2
    rows = sl.MaskedNetwork(network, groups="row", biases=True)
    assert rows.logits["c_attn.weight"].shape == (1, 18)
    assert "c_attn.bias" in rows.groupings


def test_every_projection_of_a_transformer_can_have_its_own_granularity() -> None:
    network = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)

    def groups(name: str, parameter: nn.Parameter, module: nn.Module) -> Any:
        return "head" if "attn" in name else (4, None) if "linear1" in name else "column"

    masked = sl.MaskedNetwork(network, groups=groups)
    assert {name: logits.numel() for name, logits in masked.logits.items()} == {
        f"layers.{i}.{name}": count
        for i in range(2)
        for name, count in (("self_attn.in_proj_weight", 3), ("linear1.weight", 2), ("linear2.weight", 8))
    }


@pytest.mark.parametrize(
    ("model", "config", "counts"),
    [
        ("BertModel", {}, {"query": 4}),
        ("GPT2Model", {"n_embd": 16, "n_layer": 1, "n_head": 4}, {"c_attn": 4}),
        ("LlamaModel", {"num_key_value_heads": 2}, {"q_proj": 4, "k_proj": 2}),
        ("T5EncoderModel", {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}, {"q": 4}),
        ("DistilBertModel", {"dim": 16, "n_layers": 1, "n_heads": 4, "hidden_dim": 32}, {"q_lin": 4}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_heads_of_networks_of_transformers(model: str, config: dict[str, Any], counts: dict[str, int]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    own = config if "num_key_value_heads" not in config and config else sizes | config
    kind = getattr(transformers, model)
    network = kind(kind.config_class(vocab_size=50, **own))

    def projections(name: str, parameter: nn.Parameter, module: nn.Module) -> bool:
        return parameter.dim() == 2 and "att" in name.lower() and "embed" not in name and "bias" not in name

    masked = sl.MaskedNetwork(network, groups="head", where=projections, samples=2)
    assert {name.split(".")[-2]: logits.numel() for name, logits in masked.logits.items()} == counts
    masked(input_ids=torch.randint(0, 50, (4, 6))).last_hidden_state.square().sum().backward()
    assert all(logits.grad is not None and float(logits.grad.norm()) > 0 for logits in masked.logits.values())
    # Every projection is divided among the heads, the last one by its inputs.
    owners = [each.owner for each in masked.groupings.values()]
    assert len(owners) == (2 if model == "GPT2Model" else 4)
    with torch.no_grad():
        for logits in masked.logits.values():
            logits.view(-1)[1:] = -1.0
    mask = masked.mask()
    for name, each in masked.groupings.items():
        assert mask.kept_per_layer()[name] == 1 / masked.logits[each.owner].numel()


# --- errors


@pytest.mark.parametrize("groups", ["rows", "0x4", "4x", (0, 1), (), (1.5,), (True,), 3, None, [2, 2]])
def test_what_is_no_grouping_is_refused(groups: Any) -> None:
    with pytest.raises(SettingError, match=r"is no grouping\. There are 'weight', 'row'"):
        sl.MaskedNetwork(nn.Linear(3, 2), groups=groups)


def test_a_function_that_returns_no_grouping_is_refused() -> None:
    network = nn.Linear(3, 2)
    with pytest.raises(SettingError, match=r"returned this for 'weight'.*'rows' is no grouping"):
        sl.MaskedNetwork(network, groups=lambda name, parameter, module: "rows")
    with pytest.raises(SettingError, match="integers, shape"):
        sl.MaskedNetwork(network, groups=lambda name, parameter, module: torch.zeros(3, dtype=torch.long))
    with pytest.raises(SettingError, match="integers, shape"):
        sl.MaskedNetwork(network, groups=lambda name, parameter, module: torch.zeros(2, 3))


def test_a_parameter_without_such_groups_is_refused() -> None:
    with pytest.raises(SelectionError, match="'weight' is no projection of an attention module"):
        sl.MaskedNetwork(nn.Linear(3, 2), groups="head")
    with pytest.raises(SelectionError, match=r"has 3 lengths, but 'weight' has shape \(2, 3\)"):
        sl.MaskedNetwork(nn.Linear(3, 2), groups=(1, 1, 1))
    with pytest.raises(SelectionError, match="no columns"):
        sl.MaskedNetwork(nn.Linear(3, 2), groups="column", where="bias")
    broken = GroupedQuery()
    broken.num_heads = 5
    with pytest.raises(SelectionError, match="does not divide into the 5 heads"):
        sl.MaskedNetwork(broken, groups="head")


# --- the arithmetic


@st.composite
def blocks(draw: st.DrawFn) -> Blocks:
    view = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    block = tuple(draw(st.integers(1, size)) for size in view)
    shape = view if len(view) == 1 or draw(st.booleans()) else (view[0] * view[1], *view[2:])
    return Blocks("w", shape, view, block)


@given(blocks(), st.integers(0, 100))
@settings(max_examples=150, deadline=None)
def test_blocks_do_as_the_index_of_their_elements(grouping: Blocks, seed: int) -> None:
    grids = [torch.arange(size) // length for size, length in zip(grouping.view, grouping.block, strict=True)]
    number = torch.zeros(grouping.view, dtype=torch.long)
    for d, (along, count) in enumerate(zip(grids, grouping.grid, strict=True)):
        number = number * count + along.view([-1 if e == d else 1 for e in range(len(grids))])
    labels = Labels("w", number.view(grouping.shape), int(number.max()) + 1)
    assert labels.groups == math.prod(grouping.grid)
    weight, gradient = normal(*grouping.shape, seed=seed), normal(*grouping.shape, seed=seed + 1)
    values = normal(*grouping.grid, seed=seed + 2)
    for chosen in (values, values > 0):
        assert torch.equal(grouping.masked(weight, chosen), labels.masked(weight, chosen))
        assert torch.equal(grouping.spread(chosen), labels.spread(chosen))
    assert grouping.count(values > 0) == labels.count(values > 0) == int(grouping.spread(values > 0).sum())
    assert grouping.size == labels.size == weight.numel()
    torch.testing.assert_close(grouping.total(gradient, weight).flatten(), labels.total(gradient, weight))
    expected = torch.zeros(labels.groups, dtype=torch.float64)
    for n, product in zip(
        labels.index.flatten().tolist(), (weight.double() * gradient.double()).flatten(), strict=True
    ):
        expected[n] += product
    torch.testing.assert_close(labels.total(gradient, weight).double(), expected, rtol=1e-5, atol=1e-5)


def test_other_layouts_and_dtypes_of_a_weight() -> None:
    grouping = Blocks("w", (6, 4, 3, 3), (6, 4, 3, 3), (1, 4, 3, 3))
    weight, values = normal(6, 4, 3, 3), normal(6, 1, 1, 1)
    strided = weight.to(memory_format=torch.channels_last)
    assert torch.equal(grouping.masked(strided, values), grouping.masked(weight, values))
    torch.testing.assert_close(grouping.total(strided, weight), grouping.total(weight, weight))
    half = grouping.masked(weight.bfloat16(), values)
    assert half.dtype == torch.bfloat16
    assert grouping.total(half, weight.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("kind", "count"), [("row", 64), ("16x16", 16)])
def test_no_full_sized_logits_exist_in_a_step(kind: str, count: int) -> None:
    # What autograd keeps, and the logits' gradients and optimizer state, are one number for each group.
    network = nn.Linear(64, 64)
    masked = sl.MaskedNetwork(network, groups=kind, samples=1)
    optimizer = torch.optim.Adam(masked.parameters())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = masked(normal(2, 64)).sum()
    loss.backward()
    optimizer.step()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in kept}
    large = [address for address, size in storages.items() if size >= 64 * 64]
    assert set(large) <= {network.weight.data_ptr()}
    logits = masked.logits["weight"]
    assert logits.numel() == count
    assert logits.grad is not None
    assert logits.grad.numel() == count
    assert all(t.numel() <= count for t in optimizer.state[logits].values())


def test_a_grouped_gate_reads_no_more_noise_than_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = kernels.scaled
    monkeypatch.setattr(kernels, "scaled", lambda weight, *of: asked.append(of[0].numel()) or original(weight, *of))
    grouped_gate = GroupedGate(sl.HardConcrete(), Blocks("w", (8, 6), (8, 6), (1, 6)))
    grouped_gate.masked(normal(8, 6), torch.zeros(8, 1), Draw(0, 0, 0, 0))
    assert asked == [8]


# --- without a pass over the weight


@pytest.mark.parametrize("kind", ["row", "column", (2, None), (None, 3)])
def test_layers_that_take_the_numbers_instead_of_masked_weights(case: "Case", kind: Any) -> None:
    # In every network of the table, beside the same call with every weight masked.
    network, settings = case.made(), {key: value for key, value in case.settings.items() if key != "biases"}
    args, kwargs = case.inputs(6)
    found = []
    for factored in (True, False):
        masked = sl.MaskedNetwork(network, groups=kind, samples=3, keep=0.6, **settings)
        if not factored:
            masked._routes.factors = {}
        outputs = [leaf for leaf in tree_leaves(masked(*args, **kwargs)) if isinstance(leaf, Tensor)]
        loss = sum((out.float() * normal(*out.shape, seed=i)).sum() for i, out in enumerate(outputs))
        assert isinstance(loss, Tensor)
        loss.backward()
        found.append(([out.detach() for out in outputs], [logits.grad for logits in masked.logits.values()]))
    rough = case.dtype == torch.bfloat16
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=5e-2 if rough else 1e-4, atol=5e-2 if rough else 1e-5)
    if not rough:
        for one, other in zip(found[0][1], found[1][1], strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_rows_and_columns_of_plain_layers_are_not_masked_weights() -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 3))
    for kind, there in (
        ("row", True),
        ("column", True),
        ("layer", True),
        ("kernel", False),
        ("1x2", False),
        ("weight", False),
    ):
        masked = sl.MaskedNetwork(network, groups=kind, samples=2)
        assert (set(masked._routes.factors) == {"0.weight", "2.weight"}) == there, kind
    masked = sl.MaskedNetwork(network, groups="row", samples=2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        masked(normal(4, 2, 5, 5)).sum().backward()
    mine = {network[0].weight.data_ptr(), network[2].weight.data_ptr()}
    assert all(t.data_ptr() in mine for t in kept if t.shape in (network[0].weight.shape, network[2].weight.shape))
    attention = sl.MaskedNetwork(Attention(), groups="column")
    assert not attention._routes.factors
    tied = nn.Sequential(nn.Linear(3, 3), nn.Embedding(3, 3))
    tied[1].weight = tied[0].weight
    assert not sl.MaskedNetwork(tied, groups="row", where="0.weight")._routes.factors


def test_autocast_gives_the_dtypes_of_the_plain_network() -> None:
    network, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), normal(4, 6)
    for kind in ("row", "column"):
        masked = sl.MaskedNetwork(network, groups=kind, samples=2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert masked(x).dtype == network(x).dtype == torch.bfloat16


# --- the whole way: fit, checkpoints, files, diagnosis


@pytest.mark.parametrize("groups", ["row", "column", "layer", "2x2", (None, 3), "irregular"])
def test_fit_trains_resumes_stores_and_is_found_sound(groups: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    x = normal(8, 6)
    granularity = GROUPS["irregular"][0] if groups == "irregular" else groups

    def run(steps: int, folder: Path) -> sl.Run:
        return sl.fit(
            network, lambda step: x, lambda net, batch: net(batch).square().mean(), steps=steps, alpha=1e-3,
            samples=2, lr=0.3, folder=folder, resume=True, progress=False, groups=granularity, biases=True,
        )  # fmt: skip

    whole = run(6, tmp_path / "whole")
    run(3, tmp_path / "parts")
    parts = run(6, tmp_path / "parts")
    assert all(torch.equal(whole.logits[name], parts.logits[name]) for name in whole.logits)
    assert whole.mask == parts.mask
    assert whole.history[-1]["kept"] == whole.mask.kept
    whole.mask.save(tmp_path / "mask.safetensors")
    assert sl.Mask.load(tmp_path / "mask.safetensors", network) == whole.mask

    masked = sl.MaskedNetwork(network, samples=2, groups=granularity, biases=True)
    masked.load_state_dict({f"logits_tree.{name}": logits for name, logits in whole.logits.items()})
    assert masked.mask() == whole.mask
    assert sl.Mask.from_logits(whole.logits, masked.fingerprint, masked.groupings) == whole.mask
    optimizer = torch.optim.Adam(masked.parameters(), lr=1e-2)
    diagnosis = sl.diagnose(masked(x).square().mean() + masked.penalty(1e-3), masked, optimizer)
    assert diagnosis.findings == ()


def test_a_run_is_not_resumed_with_other_groups_of_equal_number(tmp_path: Path) -> None:
    network, x = nn.Linear(4, 4), normal(8, 4)

    def run(numbers: Tensor, steps: int) -> sl.Run:
        return sl.fit(
            network, lambda step: x, lambda net, batch: net(batch).square().mean(), steps=steps, samples=2,
            folder=tmp_path, resume=True, progress=False, groups=lambda name, parameter, module: numbers,
        )  # fmt: skip

    rows, columns = index((4, 4), 0), index((4, 4), 1)
    run(rows, 2)
    with pytest.raises(sl.MismatchError, match="another groups"):
        run(columns, 3)
    run(rows, 3)


def test_the_penalty_counts_groups() -> None:
    network = nn.Linear(6, 5)
    masked = sl.MaskedNetwork(network, groups="row", keep=0.9, biases=True)
    torch.testing.assert_close(masked.penalty(2.0), torch.tensor(2.0 * 5 * math.log(9)))
    torch.testing.assert_close(masked.penalty(1.0, "expected"), torch.tensor(5 * 0.9))


def test_rows_that_a_task_does_not_need_are_shut(tmp_path: Path) -> None:
    # Hidden unit 3 does not reach the output, so under a penalty its row closes; unit 0 alone makes the output.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        network[2].weight.copy_(torch.tensor([[3.0, 0.0, 0.0, 0.0]]))
    x = normal(256, 4)
    target = network(x).detach()
    run = sl.fit(
        network, lambda step: x, lambda net, batch: (net(batch) - target).square().mean(), steps=150, alpha=2e-2,
        lr=0.1, groups="row", where="0", progress=False,
    )  # fmt: skip
    rows = run.mask.by_group(run.groupings)
    assert rows.size == len(run.logits["0.weight"].flatten())
    assert run.mask["0.weight"].all(1).tolist() == [True, False, False, False]
    assert run.mask["0.weight"].any(1).tolist() == [True, False, False, False]


# --- baselines, and a study


def test_random_masks_keep_as_many_whole_groups() -> None:
    network = nn.Linear(4, 40)
    masked = sl.MaskedNetwork(network, groups="row", biases=True)
    with torch.no_grad():
        masked.logits["weight"].copy_(torch.where(torch.arange(40)[:, None] < 9, 1.0, -1.0))
    mask = masked.mask()
    assert mask.by_group(masked.groupings).kept_counts() == {"weight": 9}
    drawn = [sl.Mask.random_like(mask, seed, masked.groupings) for seed in range(30)]
    often = torch.zeros(40)
    for one in drawn:
        assert torch.equal(one["weight"].all(1), one["weight"].any(1))
        assert torch.equal(one["weight"].all(1), one["bias"])
        assert one.kept_counts() == mask.kept_counts() == {"weight": 36, "bias": 9}
        often += one["bias"]
    # 40 rows, each in a mask with probability 9/40, 30 masks: a row is in 17 or more with probability 1.1e-4 at most
    # (binomial), so in any with 0.5 % at most; and in none of them with 4.8e-4, so more than two never are with 1e-5.
    assert int(often.max()) <= 16
    assert int((often == 0).sum()) <= 2
    assert drawn[0] == sl.Mask.random_like(mask, 0, masked.groupings)
    with pytest.raises(sl.MismatchError, match="a part of a group"):
        sl.Mask.random_like(mask, 0).by_group(masked.groupings)
    with pytest.raises(sl.MismatchError, match="groupings are for"):
        mask.by_group({"weight": masked.groupings["weight"]})


def test_a_study_in_rows_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.py").write_text(
        """
import torch, sublens as sl
from torch import nn
def batches(step):
    x = torch.randn(16, 4)
    return x, (x[:, :2].sum(1) > 0).long()
def loss(net, batch):
    return nn.functional.cross_entropy(net(batch[0]), batch[1])
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
def metric(net):
    return float((net(X).argmax(1) == (X[:, :2].sum(1) > 0).long()).float().mean())
def study():
    task = [sl.Task(name=n, batches=batches, loss=loss, metric=metric) for n in ("all", "a", "b")]
    return sl.Study(name="rows", network=lambda seed: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        control=task[0], tasks=task[1:], batch_size=16, network_steps=20, mask_steps=20, alpha=0.2, mask_lr=0.3,
        evaluate_every=20, random_masks=2)
"""
    )
    from sublens import cli

    out = tmp_path / "run"
    arguments = ["inspect", str(tmp_path / "study.py"), "--out", str(out), "--groups"]
    assert cli.run([*arguments, "row"]) == 0
    mask = sl.Mask.load(out / "masks" / "a.safetensors")
    assert torch.equal(mask["0.weight"].all(1), mask["0.weight"].any(1))
    found = json.loads((out / "result.json").read_text())
    assert found["settings"]["groups"] == "row"
    assert found["overlap"]["sizes"]["total"] == 10  # rows, not weights
    assert cli.run([*arguments, "column", "--resume"]) == 2
    assert "settings.groups was" in capsys.readouterr().err
    assert cli.run([*arguments, "rows", "--resume"]) == 2
    assert "is no grouping" in capsys.readouterr().err
