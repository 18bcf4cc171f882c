"""``MaskedNetwork``: what it computes, for the table of networks in conftest, and what it leaves alone."""

import copy
import dataclasses
import io
import math
import pickle
import warnings
from collections import OrderedDict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import sublens as sl
from sublens.errors import BatchError, CutGraphError, MismatchError, SelectionError, SettingError
from sublens.kernels import LOGIT_BOUND, reference
from sublens.noise import Draw, parameter_id, uniform

if TYPE_CHECKING:
    from conftest import Case

K = 4
STEP = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def spread_logits(masked: sl.MaskedNetwork) -> None:
    """Other logits than the first ones: open, shut and undecided, some at and beyond the bound."""
    with torch.no_grad():
        for i, logits in enumerate(masked.logits.values()):
            logits.copy_(4 * normal(*logits.shape, seed=i) + 1)


def sizes_of_chunks(batch: int) -> list[int]:
    return [len(chunk) for chunk in torch.arange(batch).tensor_split(K)]


def cotangents(outputs: list[Tensor]) -> list[Tensor]:
    return [normal(*tensor.shape, seed=50 + i).to(tensor.dtype) for i, tensor in enumerate(outputs)]


def loss_of(outputs: list[Tensor]) -> Tensor:
    return torch.stack([(t * c).sum().double() for t, c in zip(outputs, cotangents(outputs), strict=True)]).sum()


def straight_through(logits: Tensor, draw: Draw) -> Tensor:
    """ds/dlogit of the relaxed sample as the paper writes it, by autograd, in float64."""
    exact = logits.detach().double().clamp(-LOGIT_BOUND, LOGIT_BOUND).requires_grad_()
    u = uniform(draw, exact.numel()).double().view(exact.shape)
    torch.sigmoid(exact + u.log() - torch.log1p(-u)).sum().backward()
    assert exact.grad is not None
    return exact.grad


def by_hand(
    case: "Case", network: nn.Module, logits: dict[str, Tensor], batch: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and logit gradients from four calls of a copy of the network, one for each chunk and draw."""
    network = copy.deepcopy(network).eval()
    inputs = case.inputs(batch)
    outputs, leaves, start = [], [], 0
    for sample, size in enumerate(sizes_of_chunks(batch)):
        weights = {name: p.detach() for name, p in network.named_parameters()}
        for name in logits:
            is_open = reference.is_open(logits[name].detach(), Draw(9, STEP, sample, parameter_id(name)))
            weights[name] = (weights[name] * is_open).requires_grad_()
        args, kwargs = case.part(inputs, start, start + size)
        outputs.append(tensors_of(functional_call(network, weights, args, kwargs)))
        leaves.append(weights)
        start += size
    joined = [torch.cat(parts, dim=axis) for parts, axis in zip(zip(*outputs, strict=True), case.axes, strict=True)]
    loss_of(joined).backward()
    gradients = {}
    for name in logits:
        total = torch.zeros(logits[name].shape, dtype=torch.float64)
        for sample, weights in enumerate(leaves):
            gradient = weights[name].grad
            if gradient is not None:
                slope = straight_through(logits[name], Draw(9, STEP, sample, parameter_id(name)))
                total += gradient.double() * network.get_parameter(name).detach().double() * slope
        gradients[name] = total
    return joined, gradients


def masked_for(case: "Case", network: nn.Module, **settings: Any) -> sl.MaskedNetwork:
    masked = sl.MaskedNetwork(network, **({"samples": K, "seed": 9} | case.settings | settings))
    spread_logits(masked)
    masked.step = STEP
    return masked


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Rounding errors of sums of some hundred terms; bfloat16 has 8 bits, and rounds gradients at every layer."""
    return {
        torch.float64: {"rtol": 1e-6, "atol": 1e-6},  # the logits' gradients are float32
        torch.float32: {"rtol": 2e-5, "atol": 2e-5},
        torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
    }[dtype]


# --- what it computes ---


@pytest.mark.parametrize("batch", [16, 4, 7])
def test_four_samples_are_four_passes_over_the_four_chunks(case: "Case", batch: int) -> None:
    network = case.made()
    masked = masked_for(case, network)
    args, kwargs = case.inputs(batch)
    output = masked(*args, **kwargs)
    outputs = tensors_of(output)
    expected, gradients = by_hand(case, network, masked.logits, batch)
    assert len(outputs) == len(expected)
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), **tolerance(case.dtype))
    loss_of(outputs).backward()
    assert masked.logits.keys() == gradients.keys()
    for name, logits in masked.logits.items():
        assert logits.grad is not None
        assert logits.grad.dtype == torch.float32
        assert bool(logits.grad.any()), f"no gradient reaches {name}"
        scale = float(gradients[name].abs().max())
        limit = tolerance(case.dtype)
        torch.testing.assert_close(
            logits.grad.double(), gradients[name], rtol=limit["rtol"], atol=limit["atol"] * max(scale, 1e-3)
        )
    structure = network.eval()(*args, **kwargs)
    assert type(output) is type(structure)
    assert [t.shape for t in outputs] == [t.shape for t in tensors_of(structure)]


@dataclasses.dataclass(frozen=True)
class OtherSample(sl.Gate):
    """The gate of the paper with another number for its sample."""

    number: int

    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        return sl.GumbelSigmoid().masked(weight, logits, dataclasses.replace(draw, sample=self.number))

    def logit_gradient(self, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        draw = dataclasses.replace(draw, sample=self.number)
        return sl.GumbelSigmoid().logit_gradient(gradient, weight, logits, draw)


def test_four_samples_are_four_masked_networks_of_one_sample(case: "Case") -> None:
    network = case.made()
    inputs, batch = case.inputs(10), 10
    together = tensors_of(masked_for(case, network)(*inputs[0], **inputs[1]))
    start, parts = 0, []
    for sample, size in enumerate(sizes_of_chunks(batch)):
        args, kwargs = case.part(inputs, start, start + size)
        alone = masked_for(case, network, samples=1, gate=OtherSample(sample))
        parts.append(tensors_of(alone(*args, **kwargs)))
        start += size
    for i, (axis, tensor) in enumerate(zip(case.axes, together, strict=True)):
        torch.testing.assert_close(tensor, torch.cat([p[i] for p in parts], axis), **tolerance(case.dtype))


def assert_same_results(case: "Case", network: nn.Module, results: list[Tensor], expected: list[Tensor]) -> None:
    """Bit-equal; but recurrent layers choose their kernel by where in memory their weights are."""
    if any(isinstance(module, nn.RNNBase) for module in network.modules()):
        for one, other in zip(results, expected, strict=True):
            torch.testing.assert_close(one, other)
    else:
        assert all(map(torch.equal, results, expected))


def test_evaluation_is_the_masked_copy(case: "Case") -> None:
    network = case.made()
    masked = masked_for(case, network).eval()
    plain = masked.mask().apply(network).eval()
    args, kwargs = case.inputs(9)
    with torch.no_grad():
        expected = tensors_of(plain(*args, **kwargs))
        assert_same_results(case, masked.network, tensors_of(masked(*args, **kwargs)), expected)
    # With gradients, though none are wanted; the plain network's own would let some layers take other kernels.
    assert_same_results(case, masked.network, tensors_of(masked(*args, **kwargs)), expected)


def test_a_full_mask_is_the_network_itself(case: "Case") -> None:
    network = case.made()
    masked = sl.MaskedNetwork(network, **case.settings).eval()  # all logits start above 0
    args, kwargs = case.inputs(9)
    with torch.no_grad():
        expected = tensors_of(copy.deepcopy(network).eval()(*args, **kwargs))
    assert_same_results(case, network, tensors_of(masked(*args, **kwargs)), expected)


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_other_temperatures_give_the_same_output_and_other_gradients(tau: float) -> None:
    x, network = normal(8, 6), mlp()
    warm, plain = sl.MaskedNetwork(network, gate=sl.GumbelSigmoid(tau)), sl.MaskedNetwork(network)
    one, other = warm(x), plain(x)
    torch.testing.assert_close(one, other)
    one.square().sum().backward()
    other.square().sum().backward()
    for name in plain.logits:
        assert not torch.allclose(warm.logits[name].grad, plain.logits[name].grad)  # type: ignore[arg-type]


def test_reference_kernels_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, results = normal(12, 6), []
    for choice in ("auto", "reference"):
        monkeypatch.setenv("SUBLENS_KERNELS", choice)
        masked = sl.MaskedNetwork(mlp(), seed=3)
        y = masked(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in masked.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("batch", [4, 9, 10, 11])
def test_a_mean_over_an_uneven_batch_weighs_every_example_alike(batch: int) -> None:
    x, y = normal(batch, 6), torch.arange(batch) % 3
    masked = sl.MaskedNetwork(mlp())
    loss = F.cross_entropy(masked(x), y)
    loss.backward()
    twin = sl.MaskedNetwork(mlp())
    each = F.cross_entropy(twin(x), y, reduction="none")
    assert each.shape == (batch,)
    (each * (1 / batch)).sum().backward()
    torch.testing.assert_close(loss, each.mean())
    for one, other in zip(masked.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


class WithLoss(nn.Module):
    """Gives its loss itself, as many language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, y: Tensor) -> OrderedDict[str, Tensor]:
        out = self.net(x) / self.temperature
        return OrderedDict(loss=F.cross_entropy(out, y), out=out, temperature=self.temperature)


@pytest.mark.parametrize("batch", [8, 9, 11])
def test_a_loss_computed_in_the_network_is_weighted_exactly(batch: int) -> None:
    x, y = normal(batch, 6), torch.arange(batch) % 3
    masked = sl.MaskedNetwork(WithLoss())
    output = masked(x, y)
    assert isinstance(output, OrderedDict)
    assert list(output) == ["loss", "out", "temperature"]
    torch.testing.assert_close(output["loss"], F.cross_entropy(output["out"], y))
    torch.testing.assert_close(output["temperature"], torch.tensor(0.7))
    own = torch.autograd.grad(output["loss"], list(masked.parameters()), retain_graph=True)
    outer = torch.autograd.grad(F.cross_entropy(output["out"], y), list(masked.parameters()))
    torch.testing.assert_close(own, outer)


def test_dropout_and_running_statistics_are_at_rest() -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 3)).train()
    masked = sl.MaskedNetwork(network)
    x = normal(8, 6)
    first = masked(x)
    masked.step = 0
    assert torch.equal(first, masked(x))
    assert network.training
    assert int(network[1].num_batches_tracked) == 0


class Switch(nn.Module):
    """A flag decides where the batch is in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, x: Tensor, turned: bool = False) -> Tensor:
        y = self.net(x)
        return y.movedim(0, 1) if turned else y


def test_a_flag_may_move_the_batch_in_the_output() -> None:
    masked = sl.MaskedNetwork(Switch())
    x = normal(8, 5, 6)
    plain = masked(x, False)
    masked.step = 0
    torch.testing.assert_close(masked(x, True), plain.movedim(0, 1))


# --- draws ---


class Reveal(nn.Module):
    """Gives its weights away."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a * 1.0, self.b * 1.0


def revealed(step: int = 0, **settings: Any) -> tuple[Tensor, Tensor]:
    masked = sl.MaskedNetwork(Reveal(), **({"samples": 1, "keep": 0.5} | settings))
    masked.step = step
    a, b = masked(torch.zeros(1))
    return a.detach(), b.detach()


def assert_independent(a: Tensor, b: Tensor) -> None:
    """4096 pairs of fair coins: 2048 agree, give or take 32; six times that has probability 2e-9."""
    assert abs(int((a == b).sum()) - 2048) < 192


def test_draws_follow_from_seed_and_step_alone() -> None:
    a, b = revealed(seed=1, step=5)
    torch.manual_seed(999)
    again, _ = revealed(seed=1, step=5)
    assert torch.equal(a, again)
    assert_independent(a, b)
    assert_independent(a, revealed(seed=1, step=6)[0])
    assert_independent(a, revealed(seed=2, step=5)[0])


def test_each_call_is_a_step() -> None:
    masked = sl.MaskedNetwork(Reveal(), samples=1, keep=0.5)
    assert masked.step == 0
    draws = [masked(torch.zeros(1))[0] for _ in range(3)]
    assert masked.step == 3
    assert torch.equal(draws[2], revealed(step=2)[0])
    assert_independent(draws[0], draws[1])
    masked.eval()(torch.zeros(1))
    assert masked.step == 3


def test_draws_of_a_parameter_do_not_depend_on_the_rest_of_the_selection() -> None:
    a, b = revealed()
    alone, rest = revealed(where="a")
    assert torch.equal(a, alone)
    assert bool((rest == 1).all())
    assert torch.equal(b, revealed(where="b")[1])


def test_gates_are_open_with_the_keep_probability() -> None:
    for keep in (0.1, 0.5, 0.9):
        drawn = torch.stack([revealed(keep=keep, step=s)[0] for s in range(8)])
        assert abs(float(drawn.mean()) - keep) < 5 * math.sqrt(keep * (1 - keep) / drawn.numel())


def test_every_chunk_has_its_own_draw() -> None:
    masked = sl.MaskedNetwork(mlp(), keep=0.5)
    rows = masked(normal(1, 6).expand(8, 6)).detach()
    assert torch.allclose(rows[0::2], rows[1::2])
    assert all(not torch.allclose(rows[2 * i], rows[2 * j]) for i in range(4) for j in range(i))


# --- what it leaves alone ---


def everything(network: nn.Module) -> list[Any]:
    """All that there is to a network, by identity and by value."""
    seen: list[Any] = []
    for name, module in network.named_modules():
        seen.append((name, id(module), type(module), module.training))
        for key, value in vars(module).items():
            parts = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else []
            parts = [id(v) for v in value] if isinstance(value, list) else parts
            seen.append((name, key, None if isinstance(value, bool) else id(value), parts))
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        seen.append((name, id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.grad is None))
        seen.append(tensor.detach().clone().view(torch.uint8).flatten().tolist() if tensor.dim() else tensor.item())
    return seen


def test_the_network_is_untouched(case: "Case") -> None:
    network = case.made()
    handles = [network.register_forward_hook(lambda *_: None), network.register_forward_pre_hook(lambda *_: None)]
    before = everything(network)
    masked = masked_for(case, network)
    args, kwargs = case.inputs(9)
    optimizer = torch.optim.Adam(masked.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (loss_of(tensors_of(masked(*args, **kwargs))) + masked.penalty(1e-3)).backward()
        optimizer.step()
    masked.eval()(*args, **kwargs)
    masked.train()
    masked.mask()
    assert everything(network) == before
    for handle in handles:
        handle.remove()
    expected = tensors_of(copy.deepcopy(network).eval()(*args, **kwargs))
    if not any("parametrizations" in name for name, _ in network.named_modules()):  # torch pickles none of these
        thawed = pickle.loads(pickle.dumps(network)).eval()
        assert all(map(torch.equal, tensors_of(thawed(*args, **kwargs)), expected))
    assert all(map(torch.equal, tensors_of(network.eval()(*args, **kwargs)), expected))


class Fragile(nn.Module):
    """Fails in its forward when the box holds an error: before the end, after some layers ran."""

    def __init__(self, box: list[BaseException | None], recurrent: bool) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.rnn: nn.Module = nn.LSTM(8, 8, batch_first=True) if recurrent else nn.Identity()
        self.b = nn.Linear(8, 3)
        self.box = box

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        x = self.rnn(x[:, None])[0][:, 0] if isinstance(self.rnn, nn.LSTM) else x
        if self.box and self.box[0] is not None:
            raise self.box[0]
        return self.b(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_the_network_is_untouched_after_an_error(error: BaseException, recurrent: bool, training: bool) -> None:
    box: list[BaseException | None] = [error]
    network = Fragile(box, recurrent).train()
    network.norm.eval()  # a mixture, to be put back as it was
    masked = sl.MaskedNetwork(network).train(training)
    box[0] = None
    before = everything(network)
    box[0] = error
    with pytest.raises(type(error)):
        masked(normal(8, 6))
    box[0] = None
    assert everything(network) == before
    assert masked(normal(8, 6)).shape == (8, 3)
    assert everything(network) == before


class Counting(nn.Module):
    """Writes to its buffer in every forward, in training mode and in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(2))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.hidden[0] += 1
        return self.net(x) + self.calls[0] + self.hidden[0]


def test_buffers_that_a_network_writes_are_untouched() -> None:
    network = Counting()
    before = everything(network)
    masked = sl.MaskedNetwork(network)
    masked(normal(8, 6)).sum().backward()
    masked.eval()(normal(8, 6))
    assert everything(network) == before
    assert masked.mask().network == sl.fingerprint(network)


def test_hooks_of_the_network_run() -> None:
    network, x = mlp(), normal(8, 6)
    plain = sl.MaskedNetwork(network)(x)
    network[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    network.register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(sl.MaskedNetwork(network)(x / 2), plain + 1)


def test_only_logits_are_trained_and_stored() -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    masked = sl.MaskedNetwork(network)
    assert list(masked.logits) == ["0.weight", "2.weight"]
    assert [id(p) for p in masked.parameters()] == [id(p) for p in masked.logits.values()]
    assert sum(t.numel() for t in masked.state_dict().values()) == 6 * 8 + 8 * 3
    assert list(masked.buffers()) == []
    optimizer = torch.optim.Adam(masked.parameters(), lr=0.1)
    start = {name: logits.detach().clone() for name, logits in masked.logits.items()}
    masked(normal(8, 6)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(start[name], masked.logits[name]) for name in start)
    assert all(p.grad is None for p in network.parameters())


def test_state_can_be_stored_and_loaded() -> None:
    masked, twin = sl.MaskedNetwork(mlp()), sl.MaskedNetwork(mlp())
    spread_logits(masked)
    file = io.BytesIO()
    torch.save(masked.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert twin.mask() == masked.mask()


@pytest.mark.parametrize("make", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_a_copy_stands_on_its_own(make: Any) -> None:
    masked = sl.MaskedNetwork(mlp(), seed=4)
    x, before = normal(8, 6), masked.mask()
    twin = make(masked)
    assert torch.equal(twin(x), masked(x))
    with torch.no_grad():
        for logits in twin.parameters():
            logits.fill_(-1)
    assert masked.mask() == before
    assert twin.mask().kept_count == 0
    assert twin.network is not masked.network


@pytest.mark.parametrize("make", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_a_copy_may_be_made_after_a_step(make: Any) -> None:
    masked, x = sl.MaskedNetwork(mlp(), seed=4), normal(8, 6)
    for _ in range(2):
        (masked(x).sum() + masked.penalty(0.1)).backward()
        masked(x).sum()  # the sums of the logits are in the graph of a call whose penalty was not asked for
    twin = make(masked)
    torch.testing.assert_close(twin.penalty(0.1), masked.penalty(0.1))
    assert torch.equal(twin(x), masked(x))


class Awkward(nn.Module):
    """Names that collide when they are joined, and that a module of ours might want for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_b = nn.Module(), nn.Module()
        self.a.b_w = nn.Parameter(torch.randn(2, 3))
        self.a_b.w = nn.Parameter(torch.randn(2, 3))
        self.put, self.logits, self.network = (nn.Linear(2, 2, bias=False) for _ in range(3))
        self.step = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.network(self.logits(self.put(x @ self.step)))
        return torch.cat([x @ self.a.b_w, x @ self.a_b.w], -1)


def test_any_name_is_possible() -> None:
    masked = sl.MaskedNetwork(Awkward())
    names = ["step", "a.b_w", "a_b.w", "put.weight", "logits.weight", "network.weight"]
    assert list(masked.logits) == names
    assert list(masked.mask()) == names
    masked(normal(8, 2)).sum().backward()
    gradients = [logits.grad for logits in masked.parameters()]
    assert all(g is not None and bool(g.any()) for g in gradients)


def test_names_do_not_collide() -> None:
    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.a_b = nn.Module(), nn.Module()
            self.a.b_w = nn.Parameter(torch.ones(64, 64))
            self.a_b.w = nn.Parameter(torch.ones(64, 64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a.b_w * 1, self.a_b.w * 1

    masked = sl.MaskedNetwork(TwoNames(), samples=1, keep=0.5)
    assert list(masked.logits) == ["a.b_w", "a_b.w"]
    assert_independent(*masked(torch.zeros(1)))


# --- the penalty ---


def test_penalty_of_logits_is_their_sum() -> None:
    masked = sl.MaskedNetwork(mlp())
    spread_logits(masked)
    penalty = masked.penalty(1e-3)
    exact = 1e-3 * sum(float(t.detach().double().sum()) for t in masked.parameters())
    assert (penalty.dtype, penalty.dim()) == (torch.float32, 0)
    assert float(penalty.detach()) == pytest.approx(exact, rel=1e-5)
    penalty.backward()
    for logits in masked.parameters():
        torch.testing.assert_close(logits.grad, torch.full_like(logits, 1e-3))


def test_penalty_of_logits_cannot_run_away() -> None:
    masked = sl.MaskedNetwork(mlp())
    optimizer = torch.optim.SGD(masked.parameters(), lr=1.0)
    for _ in range(30):
        optimizer.zero_grad()
        loss = masked(normal(8, 6)).sum() * 0 + masked.penalty(1.0)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) == -LOGIT_BOUND * (6 * 8 + 8 * 3)


def test_a_fused_optimizer_which_counts_no_versions_is_noticed() -> None:
    masked = sl.MaskedNetwork(mlp())
    optimizer = torch.optim.Adam(masked.parameters(), lr=4.0, fused=True)
    for _ in range(6):
        optimizer.zero_grad()
        loss = masked(normal(8, 6)).sum() * 0 + masked.penalty(1.0)
        assert all(bool((logits.detach().abs() <= LOGIT_BOUND).all()) for logits in masked.parameters())
        loss.backward()
        optimizer.step()
        exact = sum(float(logits.detach().double().sum()) for logits in masked.parameters())
        assert float(masked.penalty(1.0).detach()) == pytest.approx(exact, rel=1e-5)


def test_expected_penalty_is_the_sum_of_keep_probabilities() -> None:
    masked = sl.MaskedNetwork(mlp())
    spread_logits(masked)
    penalty = masked.penalty(1e-3, "expected")
    p = torch.cat([t.detach().double().sigmoid().flatten() for t in masked.parameters()])
    assert float(penalty.detach()) == pytest.approx(1e-3 * float(p.sum()), rel=1e-5)
    penalty.backward()
    gradient = torch.cat([t.grad.flatten() for t in masked.parameters()])  # type: ignore[union-attr]
    torch.testing.assert_close(gradient.double(), 1e-3 * p * (1 - p), rtol=1e-4, atol=1e-9)


def test_penalty_of_nothing_is_nothing() -> None:
    masked = sl.MaskedNetwork(mlp())
    assert float(masked.penalty(0).detach()) == 0
    start = sl.MaskedNetwork(mlp(), keep=0.9).penalty(1.0, "expected")
    assert float(start.detach()) == pytest.approx(0.9 * (6 * 8 + 8 * 3), rel=1e-5)


@pytest.mark.parametrize("alpha", [-1e-9, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["logits", "expected"])
def test_an_impossible_alpha_is_refused(alpha: float, kind: Any) -> None:
    with pytest.raises(SettingError, match=r"alpha is .*0 or more"):
        sl.MaskedNetwork(mlp()).penalty(alpha, kind)


def test_an_unknown_penalty_names_the_known_ones() -> None:
    with pytest.raises(SettingError, match=r"'l1'.*'logits'.*'expected'"):
        sl.MaskedNetwork(mlp()).penalty(1.0, "l1")  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", [1, -1])
def test_logits_that_ran_away_are_held_and_can_come_back(direction: int) -> None:
    masked = sl.MaskedNetwork(mlp())
    with torch.no_grad():
        for logits in masked.parameters():
            logits.fill_(direction * 1e6)
    before = masked.mask()
    masked(normal(8, 6)).square().sum().backward()
    assert masked.mask() == before
    for logits in masked.parameters():
        assert bool((logits.detach() == direction * LOGIT_BOUND).all())
    gradients = [logits.grad for logits in masked.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    if direction > 0:
        assert all(bool(g.any()) for g in gradients)  # type: ignore[union-attr]


def test_the_bound_does_not_spoil_an_earlier_graph() -> None:
    masked = sl.MaskedNetwork(mlp())
    loss = masked(normal(8, 6)).sum() + masked.penalty(1e-3)
    masked(normal(8, 6))
    loss.backward()


# --- settings and failures ---


@pytest.mark.parametrize("keep", [2.0, 1.0, 0.0, -0.1, float("nan"), float("inf")])
def test_an_impossible_keep_probability_is_refused(keep: float) -> None:
    with pytest.raises(SettingError, match=f"keep is {keep:g}; it is a probability, strictly between 0 and 1"):
        sl.MaskedNetwork(mlp(), keep=keep)


def test_a_logit_given_for_a_probability_is_recognised() -> None:
    with pytest.raises(SettingError, match=r"a logit of 2 is keep=0\.881"):
        sl.MaskedNetwork(mlp(), keep=2.0)
    with pytest.raises(SettingError, match=r"must be between 0\.000045 and 0\.999955"):
        sl.MaskedNetwork(mlp(), keep=1 - 1e-9)


@pytest.mark.parametrize("samples", [0, -1, 2.0, "4", True, None])
def test_an_impossible_number_of_samples_is_refused(samples: Any) -> None:
    with pytest.raises(SettingError, match=r"samples is .* whole number of 1 or more"):
        sl.MaskedNetwork(mlp(), samples=samples)


def test_logits_start_at_the_keep_probability() -> None:
    for keep in (0.5, 0.881, 0.9):
        for logits in sl.MaskedNetwork(mlp(), keep=keep).parameters():
            torch.testing.assert_close(logits.detach().sigmoid(), torch.full_like(logits, keep))


@pytest.mark.parametrize(("name", "value"), [("gate", sl.HardConcrete()), ("batch_dim", 1), ("frozen", False)])
def test_what_routes_rest_on_is_settled(name: str, value: Any) -> None:
    masked = sl.MaskedNetwork(nn.Linear(3, 2))
    before = getattr(masked, name)
    with pytest.raises(SettingError, match=f"{name} is .* Make another one"):
        setattr(masked, name, value)
    assert getattr(masked, name) is before


def test_masking_twice_is_refused() -> None:
    with pytest.raises(SettingError, match="MaskedNetwork already"):
        sl.MaskedNetwork(sl.MaskedNetwork(mlp()))


def test_nothing_selected_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"0\.weight"):
        sl.MaskedNetwork(mlp(), where="0.weigth")


def test_a_batch_smaller_than_the_samples_is_refused() -> None:
    masked = sl.MaskedNetwork(mlp(), samples=4)
    with pytest.raises(BatchError, match=r"batch of 3 .* 4 samples.*samples=3 or fewer"):
        masked(normal(3, 6))
    assert masked(normal(4, 6)).shape == (4, 3)
    assert masked.eval()(normal(1, 6)).shape == (1, 3)


class Cut(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = mlp(), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                return self.net(x)
        return self.net(x).detach() if self.how == "detach" else self.net(x).argmax(-1)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("how", ["no_grad", "detach", "argmax"])
def test_a_network_that_cuts_the_graph_is_told(how: str, samples: int) -> None:
    masked = sl.MaskedNetwork(Cut(how), samples=samples)
    with pytest.raises(CutGraphError, match=r"does not depend on the logits.*net\.0\.weight"):
        masked(normal(8, 6))
    masked.eval()(normal(8, 6))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_warns(context: Any) -> None:
    masked = sl.MaskedNetwork(mlp())
    with context(), pytest.warns(UserWarning, match=r"no gradient can reach the logits.*masked\.eval\(\)"):
        masked(normal(8, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masked(normal(8, 6)).sum().backward()
        with context():
            masked.eval()(normal(8, 6))


def test_the_warning_points_at_the_call() -> None:
    with torch.no_grad(), pytest.warns(UserWarning, match="no gradient") as caught:
        sl.MaskedNetwork(mlp())(normal(8, 6))
    assert caught[0].filename == __file__


def _edit_in_place(network: nn.Module) -> None:
    with torch.no_grad():
        network[0].weight.add_(1)  # type: ignore[index]


def _edit_data(network: nn.Module) -> None:
    network[0].bias.data.add_(1)  # type: ignore[index]


def _replace(network: nn.Module) -> None:
    network[0].weight = nn.Parameter(network[0].weight.detach() + 1)  # type: ignore[index]


def _load(network: nn.Module) -> None:
    network.load_state_dict({name: tensor + 1 for name, tensor in network.state_dict().items()})


def _run(network: nn.Module) -> None:
    network.train()(normal(8, 6))  # moves the statistics of a BatchNorm


def _cast(network: nn.Module) -> None:
    network.double()


@pytest.mark.parametrize(
    "change",
    [_edit_in_place, _edit_data, _replace, _load, _run, _cast],
)
def test_a_network_that_changed_gives_no_mask(change: Any) -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    masked = sl.MaskedNetwork(network)
    assert masked.mask().network == masked.fingerprint == sl.fingerprint(network)
    change(network)
    with pytest.raises(MismatchError, match="weights have changed since it was masked"):
        masked.mask()


def test_a_change_that_is_taken_back_is_none() -> None:
    network = mlp()
    masked = sl.MaskedNetwork(network)
    with torch.no_grad():
        network[0].weight.mul_(2)
        network[0].weight.mul_(0.5)
    assert masked.mask().network == sl.fingerprint(network)


def test_parameters_that_share_memory_are_masked_as_one() -> None:
    network = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    network[2].weight = nn.Parameter(network[0].weight.detach())  # the same memory in another Parameter
    masked = sl.MaskedNetwork(network)
    spread_logits(masked)
    assert list(masked.logits) == ["0.weight"]
    x = normal(8, 6)
    torch.testing.assert_close(masked.eval()(x), masked.mask().apply(network).eval()(x))


# --- moving ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_stay_float32(dtype: torch.dtype) -> None:
    masked = sl.MaskedNetwork(mlp()).to(dtype)
    assert {p.dtype for p in masked.parameters()} == {torch.float32}
    output = masked(normal(8, 6).to(dtype))
    assert output.dtype == dtype
    output.sum().backward()
    assert {p.grad.dtype for p in masked.parameters()} == {torch.float32}  # type: ignore[union-attr]


def test_to_moves_network_and_logits() -> None:
    masked = sl.MaskedNetwork(mlp()).to("meta")
    assert {p.device.type for p in [*masked.parameters(), *masked.network.parameters()]} == {"meta"}
    output = masked(torch.zeros(8, 6, device="meta"))
    assert (output.device.type, output.shape) == ("meta", (8, 3))


def test_its_text_says_what_it_is() -> None:
    text = repr(sl.MaskedNetwork(mlp(), samples=8))
    assert "72 logits of Sequential" in text
    assert "samples=8" in text
    assert "GumbelSigmoid(tau=1.0)" in text
    assert "\n" not in text


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mul_(2.0))


def test_a_network_that_writes_into_its_input_does_so_once() -> None:
    masked, x = sl.MaskedNetwork(WritesIntoItsInput()), normal(8, 6)
    first = masked(x.clone())  # the call that also looks where the batch is, and which route applies
    masked.step = 0
    assert torch.equal(masked(x.clone()), first)


def test_a_cast_through_the_masked_network_keeps_the_mask() -> None:
    network = mlp()
    masked = sl.MaskedNetwork(network).to(torch.float64)
    assert next(network.parameters()).dtype == torch.float64
    assert all(logits.dtype == torch.float32 for logits in masked.parameters())
    assert masked.mask().apply(network) is not network


def test_autocast_is_followed() -> None:
    network, x = mlp(), normal(8, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sl.MaskedNetwork(network)(x).dtype == network(x).dtype == torch.bfloat16


class NeedsNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, numbers: bool) -> torch.Tensor:
        scale = float(x.abs().max().item()) if numbers else 1.0
        return self.linear(x) * scale


def test_a_later_call_that_vmap_does_not_take_falls_back() -> None:
    masked, x = sl.MaskedNetwork(NeedsNumbers()), normal(8, 6)
    plain = masked(x, False)
    masked.step = 0
    scales = torch.stack([part.abs().max() for part in x.chunk(4)]).repeat_interleave(2)[:, None]
    torch.testing.assert_close(masked(x, True), plain * scales)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gate": sl.TopK}, "is no gate; it must be an object such as"),
        ({"gate": "TopK"}, "gate='TopK' is no gate"),
        ({"keep": "much"}, "keep='much' is no number"),
        ({"keep": True}, "keep=True is no number"),
        ({"seed": "one"}, "seed='one' is not a whole number"),
        ({"seed": 2**70}, r"must be a whole number from 0 to 2\*\*63-1"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
    ],
)
def test_a_thing_of_another_kind_is_refused_when_the_network_is_made(settings: Any, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        sl.MaskedNetwork(mlp(), **settings)
    number = torch.tensor(0.75)
    for keep in (number, number.numpy()[()]):
        assert sl.MaskedNetwork(mlp(), keep=keep, seed=torch.tensor(3).numpy()[()]).kept == 1.0  # type: ignore[arg-type]


def test_the_module_in_a_data_parallel_one_is_asked_for() -> None:
    with pytest.raises(SettingError, match=r"network\.module"):
        sl.MaskedNetwork(nn.DataParallel(mlp()))


def test_what_is_no_module_is_refused() -> None:
    for network, kind in ((None, "NoneType"), (3, "int"), (lambda x: x, "function")):
        with pytest.raises(SettingError, match=f"The network is a {kind}; it must be a torch.nn.Module"):
            sl.MaskedNetwork(network)  # type: ignore[arg-type]


def test_what_only_the_network_has_is_said_to_be_there() -> None:
    network = mlp()
    network.embed = nn.Linear(2, 2)
    masked = sl.MaskedNetwork(network)
    with pytest.raises(
        AttributeError, match=r"no 'embed'; its network has.*network\.embed is that of the unmasked network"
    ):
        _ = masked.embed
    with pytest.raises(AttributeError, match="object has no attribute 'nothing'"):
        _ = masked.nothing
    assert not hasattr(masked, "embed")
    assert copy.deepcopy(masked).samples == masked.samples


def test_torchscript_is_refused_by_the_name_of_its_part() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(nn.Linear(4, 2), torch.randn(3, 4))
    with pytest.raises(SettingError, match="The network is a TorchScript module"):
        sl.MaskedNetwork(scripted)
    with pytest.raises(SettingError, match=r"^1 is a TorchScript module"):
        sl.MaskedNetwork(nn.Sequential(nn.Linear(4, 4), scripted))


@pytest.mark.parametrize(
    "make",
    [
        lambda first: nn.GRU(6, 8, batch_first=first),
        lambda first: nn.MultiheadAttention(8, 2, batch_first=first),
        lambda first: nn.TransformerEncoderLayer(8, 2, 16, batch_first=first),
        lambda first: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=first), 1, enable_nested_tensor=False
        ),
        lambda first: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=first), 1),
    ],
)
def test_a_network_that_takes_the_sequence_first_is_told(make: Any) -> None:
    with pytest.warns(UserWarning, match=r"takes the sequence first .* Give batch_dim=1") as told:
        sl.MaskedNetwork(make(False))
    assert told[0].filename == __file__
    for silent in ({"network": make(True)}, {"network": make(False), "batch_dim": 1}):
        sl.MaskedNetwork(**silent)
    sl.MaskedNetwork(make(False), samples=1)  # nothing is split
    sl.MaskedNetwork(make(False), gate=sl.TopK())  # nor here, where all samples are alike


# The compiler remarks on much of what it traces.
@pytest.mark.filterwarnings("ignore")
def test_a_masked_network_that_is_compiled_draws_anew_in_every_call() -> None:
    plain, inner, x = sl.MaskedNetwork(mlp(), seed=1), sl.MaskedNetwork(mlp(), seed=1), normal(8, 6)
    compiled = torch.compile(inner, backend="eager")
    for call in range(5):
        assert torch.equal(compiled(x), plain(x)), call
    assert inner.step == plain.step == 5


def test_a_masked_network_can_be_exported() -> None:
    masked, x = sl.MaskedNetwork(mlp()).eval(), normal(8, 6)
    exported = torch.export.export(masked, (x,))
    torch.testing.assert_close(exported.module()(x), masked(x))


def test_a_penalty_of_evaluation_mode_that_is_trained_on_is_told() -> None:
    masked = sl.MaskedNetwork(nn.Linear(4, 2)).eval()
    value = masked.penalty(1.0)  # to look at it is fine
    with pytest.warns(UserWarning, match="evaluation mode is trained on"):
        value.backward()
    masked.train().penalty(1.0).backward()


def test_an_output_without_tensors_is_named() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.layer(x))

    with pytest.raises(CutGraphError, match="a SimpleNamespace, in which no tensor is found"):
        sl.MaskedNetwork(Wrapped(), samples=1)(torch.ones(8, 4))


def test_rows_that_do_not_follow_the_batch_are_not_averaged_in_silence() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.layer(x).cumsum(0)[-1])

    x = torch.randn(12, 5, 4)  # 12 steps of 5 sequences
    with pytest.warns(UserWarning, match=r"shape \(5, 6\).*give batch_dim=1"):
        sl.MaskedNetwork(Last(), samples=2)(x)
    assert sl.MaskedNetwork(Last(), samples=2, batch_dim=1)(x).shape == (5, 6)


class Reader(nn.Module):
    """A recurrent layer or attention between others, which gives one output for each place."""

    def __init__(self, layer: nn.Module, *, turned: bool = False) -> None:
        super().__init__()
        self.embed, self.layer, self.out = nn.Linear(4, 8), layer, nn.Linear(8, 3)
        self.turned = turned

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x.transpose(0, 1) if self.turned else x
        found = self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)[0]
        y: Tensor = self.out(found.transpose(0, 1) if self.turned else found)
        return y


LAYERS = [
    lambda first: nn.GRU(8, 8, batch_first=first),
    lambda first: nn.LSTM(8, 8, batch_first=first),
    lambda first: nn.MultiheadAttention(8, 2, batch_first=first),
]


@pytest.mark.parametrize("make", LAYERS, ids=["GRU", "LSTM", "attention"])
def test_a_layer_that_takes_examples_for_a_sequence_is_named(make: Any) -> None:
    masked = sl.MaskedNetwork(Reader(make(False)), samples=2)
    with pytest.warns(
        UserWarning, match="^layer takes the examples of a batch for the steps of a sequence.*batch_dim=1"
    ):
        masked(torch.randn(8, 5, 4))
    assert not masked.network.layer._forward_pre_hooks
    with pytest.warns(UserWarning, match="^layer takes"):
        sl.MaskedNetwork(Reader(make(True)), samples=2, batch_dim=1)(torch.randn(5, 8, 4))


@pytest.mark.parametrize("make", LAYERS, ids=["GRU", "LSTM", "attention"])
def test_sequences_along_another_dimension_are_fine(make: Any) -> None:
    sl.MaskedNetwork(Reader(make(True)), samples=2)(torch.randn(8, 5, 4))  # a warning would be an error
    sl.MaskedNetwork(Reader(make(False), turned=True), samples=2)(torch.randn(8, 5, 4))
    sl.MaskedNetwork(Reader(make(False)), samples=2, batch_dim=1)(torch.randn(5, 8, 4))
    sl.MaskedNetwork(Reader(make(False)), samples=1)(torch.randn(8, 5, 4))


def test_of_torchs_own_module_is_told_once() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sl.MaskedNetwork(layer, samples=2)(torch.randn(8, 5, 8))
    assert ["takes the sequence first" in str(warning.message) for warning in told] == [True]
