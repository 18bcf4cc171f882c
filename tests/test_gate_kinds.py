"""Every gate against its paper: its samples and gradients, derived here in float64, in every module.

A gate's multiplier is written as the paper writes it, from the same uniform numbers. Where the forward value is hard
and the gradient soft, it is ``hard + (soft - soft.detach())``: the value of one, the gradient of the other.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import sublens as sl
from sublens.errors import SettingError
from sublens.noise import Draw, parameter_id, uniform

COUNT = 2**16
Oracle = Callable[[Tensor, Tensor, int], Tensor]  # (logits, u, step) -> multiplier of the weight; all float64


def logistic(u: Tensor) -> Tensor:
    return torch.log(u) - torch.log(1 - u)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    return hard.double() + (soft - soft.detach())


def gumbel_sigmoid(logits: Tensor, u: Tensor, step: int) -> Tensor:
    s = torch.sigmoid(logits + logistic(u))
    return straight_through(s > 0.5, s)


def hard_concrete(logits: Tensor, u: Tensor, step: int) -> Tensor:
    s = torch.sigmoid((logistic(u) + logits) / (2 / 3))
    return torch.clamp(s * 1.2 - 0.1, 0, 1)


def bernoulli(logits: Tensor, u: Tensor, step: int) -> Tensor:
    p = torch.sigmoid(logits)
    return straight_through(u > 1 - p, p)


def threshold(logits: Tensor, u: Tensor, step: int) -> Tensor:
    return straight_through(logits > 0, logits)


def continuous_sparsification(logits: Tensor, u: Tensor, step: int) -> Tensor:
    beta = math.exp(math.log(200) * step / 10)
    return 1 / (1 + torch.exp(-beta * logits))


def top_k(logits: Tensor, u: Tensor, step: int) -> Tensor:
    scores = logits.abs()
    order = sorted(range(logits.numel()), key=scores.flatten().tolist().__getitem__)
    hard = torch.ones(logits.numel())
    hard[order[: logits.numel() - max(1, round(0.3 * logits.numel()))]] = 0
    return straight_through(hard.view(logits.shape), scores)


def n_of_m(logits: Tensor, u: Tensor, step: int) -> Tensor:
    # One of every three along the inputs, element by element.
    dim = 1 if logits.dim() > 1 and logits.shape[1] > 1 else 0
    rows = logits.detach().movedim(dim, -1).reshape(-1, logits.shape[dim]).tolist()
    hard = []
    for row in rows:
        for start in range(0, len(row), 3):
            run = row[start : start + 3]
            hard += [float(sum(other > score for other in run) < 1) for score in run]
    shape = logits.movedim(dim, -1).shape
    return straight_through(torch.tensor(hard).view(shape).movedim(-1, dim), logits)


GATES: dict[str, tuple[sl.Gate, Oracle]] = {
    "GumbelSigmoid": (sl.GumbelSigmoid(), gumbel_sigmoid),
    "Bernoulli": (sl.Bernoulli(), bernoulli),
    "ContinuousSparsification": (sl.ContinuousSparsification(steps=10), continuous_sparsification),
    "HardConcrete": (sl.HardConcrete(), hard_concrete),
    "Threshold": (sl.Threshold(), threshold),
    "NOfM": (sl.NOfM(1, 3), n_of_m),
    "TopK": (sl.TopK(0.3), top_k),
}
ALL = pytest.mark.parametrize("name", GATES)


def noise(draw: Draw, logits: Tensor) -> Tensor:
    return uniform(draw, logits.numel()).double().view(logits.shape)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@ALL
@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_paper(name: str, sample: int, dtype: torch.dtype) -> None:
    gate, oracle = GATES[name]
    draw = Draw(seed=3, step=5, sample=sample, parameter=parameter_id("weight"))
    weight, gradient = normal(37, 41).to(dtype), normal(37, 41, seed=1).to(dtype)
    logits = 2 * normal(37, 41, seed=2)
    exact = logits.double().requires_grad_()
    product = oracle(exact, noise(draw, logits), draw.step) * weight.double()
    product.backward(gradient.double())
    masked = gate.masked(weight, logits, draw)
    assert (masked.dtype, masked.shape) == (dtype, weight.shape)
    rounding = {torch.float32: 2e-6, torch.float64: 2e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(masked.double(), product.detach(), rtol=rounding, atol=rounding)
    result = gate.logit_gradient(gradient, weight, logits, draw)
    assert (result.dtype, result.shape) == (torch.float32, logits.shape)
    torch.testing.assert_close(result.double(), exact.grad, rtol=1e-5, atol=1e-5)


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]  # type: ignore[no-any-return]


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(5, 4), (6, 5)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3), (6, 2, 5, 5)),
    "LSTM": (LastState, (6, 4, 3)),
}


@ALL
@pytest.mark.parametrize("module", MODULES)
def test_every_gate_in_every_module(name: str, module: str) -> None:
    gate, oracle = GATES[name]
    make, shape = MODULES[module]
    torch.manual_seed(0)
    network, x = make(), normal(*shape)
    masked = sl.MaskedNetwork(network, keep=0.7, samples=3, seed=7, gate=gate)
    with torch.no_grad():
        for i, logits in enumerate(masked.logits.values()):
            logits.add_(normal(*logits.shape, seed=i))
    masked.step = 4
    output = masked(x)
    direction = normal(*output.shape, seed=9)
    (output * direction).sum().backward()

    exact = {key: logits.detach().double().requires_grad_() for key, logits in masked.logits.items()}
    parts = []
    for k, (start, stop) in enumerate(pairwise((0, 2, 4, 6) if gate.noisy else (0, 6))):
        weights = {key: value.detach().double() for key, value in network.named_parameters()}
        for key, logits in exact.items():
            draw = Draw(seed=7, step=4, sample=k, parameter=parameter_id(key))
            weights[key] = weights[key] * oracle(logits, noise(draw, logits), 4)
        parts.append(functional_call(network, weights, (x[start:stop].double(),)))
    expected = torch.cat(parts)
    (expected * direction.double()).sum().backward()
    torch.testing.assert_close(output.detach().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for key, logits in masked.logits.items():
        assert logits.grad is not None
        assert float(logits.grad.norm()) > 0
        torch.testing.assert_close(logits.grad.double(), exact[key].grad, rtol=1e-4, atol=1e-5)

    masked.eval()
    kept = masked.mask()
    assert 0 < kept.kept < 1
    with torch.no_grad():
        torch.testing.assert_close(masked(x), kept.apply(network)(x))


@ALL
def test_every_gate_trains_resumes_and_is_found_sound(name: str, tmp_path: Path) -> None:
    gate, _ = GATES[name]
    torch.manual_seed(0)
    network, x = nn.Linear(6, 5), normal(8, 6)

    def run(steps: int, folder: Path) -> sl.Run:
        return sl.fit(
            network, lambda step: x, lambda net, batch: net(batch).square().mean(), steps=steps,
            alpha=0.0 if isinstance(gate, (sl.TopK, sl.NOfM)) else 1e-3, penalty="expected", samples=2, gate=gate,
            lr=0.3, folder=folder, resume=True, progress=False,
        )  # fmt: skip

    whole = run(6, tmp_path / "whole")
    run(3, tmp_path / "parts")
    parts = run(6, tmp_path / "parts")
    assert torch.equal(whole.logits["weight"], parts.logits["weight"])
    assert whole.mask == parts.mask
    assert whole.history[-1]["kept"] == pytest.approx(whole.mask.kept)

    masked = sl.MaskedNetwork(network, samples=2, gate=gate)
    masked.load_state_dict({"logits_tree.weight": whole.logits["weight"]})
    optimizer = torch.optim.Adam(masked.parameters(), lr=1e-2)
    loss = masked(x).square().mean()
    if not isinstance(gate, (sl.TopK, sl.NOfM)):
        loss = loss + masked.penalty(1e-3, "expected")
    diagnosis = sl.diagnose(loss, masked, optimizer)
    assert diagnosis.findings == ()


# --- hard concrete


@pytest.mark.parametrize("logit", [-3.0, -1.0, 0.0, 0.7, 2.2])
def test_hard_concrete_is_closed_between_and_open_as_often_as_its_distribution_says(logit: float) -> None:
    # P(t <= c) = sigmoid(beta logit(q) - log alpha) with q = (c - gamma) / (zeta - gamma): the paper's CDF.
    def below(c: float) -> float:
        q = (c + 0.1) / 1.2
        return 1 / (1 + math.exp(logit - 2 / 3 * math.log(q / (1 - q))))

    logits = torch.full((COUNT,), logit)
    z = sl.HardConcrete().masked(torch.ones(COUNT), logits, Draw(1, 0, 0, 0)).double()
    shares = [float((z == 0).double().mean()), float((z <= 0.5).double().mean()), 1 - float((z == 1).double().mean())]
    for share, p in zip(shares, (below(0), below(0.5), below(1)), strict=True):
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / COUNT) + 2.0**-16
    expected = sl.HardConcrete().keep_probability(torch.tensor(logit).double(), 0)
    assert float(expected) == pytest.approx(1 - below(0), rel=1e-6)


@pytest.mark.parametrize("gate", [sl.HardConcrete(), sl.HardConcrete(0.3, -0.2, 1.5)])
@pytest.mark.parametrize("logit", [-3.0, 0.0, 2.0])
def test_what_is_steered_of_hard_concrete_is_how_often_its_sample_is_above_a_half(
    gate: sl.HardConcrete, logit: float
) -> None:
    """Of 65,536 samples; five standard errors, so a false alarm in one of two million."""
    logits = torch.full((COUNT,), logit)
    z = gate.masked(torch.ones(COUNT), logits, Draw(5, 6, 0, 7))
    expected = float(gate.mask_probability(torch.tensor(logit), 0))
    assert float((z > 0.5).float().mean()) == pytest.approx(expected, abs=5 * 0.5 / COUNT**0.5)
    assert torch.equal(sl.GumbelSigmoid().mask_probability(logits, 0), sl.GumbelSigmoid().keep_probability(logits, 0))


def test_expected_penalty_of_hard_concrete_is_its_expected_l0_norm() -> None:
    masked = sl.MaskedNetwork(nn.Linear(6, 5), gate=sl.HardConcrete(), keep=0.8)
    masked.penalty(2.0, "expected").backward()
    [logits] = masked.logits.values()
    p = 1 / (1 + math.exp(-(math.log(4) + 2 / 3 * math.log(11))))
    assert float(masked.penalty(2.0, "expected").detach()) == pytest.approx(2 * 30 * p, rel=1e-6)
    torch.testing.assert_close(logits.grad, torch.full((5, 6), 2 * p * (1 - p)))


def test_mask_of_hard_concrete_is_its_test_time_gate_rounded() -> None:
    logits = torch.linspace(-4, 4, 801)
    for gate in (sl.HardConcrete(), sl.HardConcrete(gamma=-0.5, zeta=1.1)):
        at_test = (torch.sigmoid(logits.double()) * (gate.zeta - gate.gamma) + gate.gamma).clamp(0, 1)
        away = (at_test - 0.5).abs() > 1e-6
        assert torch.equal((gate.decision(logits) > 0)[away], (at_test > 0.5)[away])
    assert not bool(sl.HardConcrete().decision(torch.zeros(())) > 0)


@pytest.mark.parametrize(
    "values", [{"beta": 0.0}, {"beta": math.nan}, {"gamma": 0.0}, {"zeta": 1.0}, {"gamma": -math.inf}]
)
def test_an_impossible_hard_concrete_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=r"must be .*the paper uses"):
        sl.HardConcrete(**values)


# --- Bernoulli


def test_bernoulli_is_open_with_its_probability_and_its_gradient_has_no_noise() -> None:
    logits, ones = torch.full((COUNT,), -1.3), torch.ones(COUNT)
    p = 1 / (1 + math.exp(1.3))
    draws = [Draw(1, step, 0, 0) for step in range(2)]
    frequency = float(sl.Bernoulli().masked(ones, logits, draws[0]).double().mean())
    assert abs(frequency - p) < 5 * math.sqrt(p * (1 - p) / COUNT) + 2.0**-17
    first, second = (sl.Bernoulli().logit_gradient(ones, ones, logits, draw) for draw in draws)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.full((COUNT,), p * (1 - p)))


# --- the threshold


def test_training_and_evaluation_of_the_threshold_agree_and_its_penalty_counts() -> None:
    masked = sl.MaskedNetwork(nn.Linear(6, 5), gate=sl.Threshold(), samples=2)
    [logits] = masked.logits.values()
    with torch.no_grad():
        logits.copy_(normal(5, 6))
        logits[0, 0] = 0.0
    x = normal(8, 6)
    training = masked(x)
    torch.testing.assert_close(training, masked.eval()(x))
    penalty = masked.train().penalty(0.5, "expected")
    penalty.backward()
    assert float(penalty.detach()) == 0.5 * float((logits > 0).sum()) == 0.5 * 30 * masked.mask().kept
    torch.testing.assert_close(logits.grad, torch.full((5, 6), 0.5))


# --- continuous sparsification


def test_continuous_sparsification_hardens_into_its_mask() -> None:
    gate = sl.ContinuousSparsification(steps=4, final=16.0)
    logit, one = torch.tensor([0.3]), torch.ones(1)
    values = [float(gate.masked(one, logit, Draw(0, step, 0, 0))) for step in range(7)]
    for value, beta in zip(values, (1, 2, 4, 8, 16, 16, 16), strict=True):
        assert value == pytest.approx(1 / (1 + math.exp(-0.3 * beta)), rel=1e-6)
    logits = torch.tensor([-0.5, -0.2, 0.2, 0.5])
    last = sl.ContinuousSparsification(steps=4).masked(torch.ones(4), logits, Draw(0, 4, 0, 0))
    torch.testing.assert_close(last, (logits > 0).float())


def test_penalty_of_continuous_sparsification_has_the_temperature_of_the_last_call() -> None:
    masked = sl.MaskedNetwork(
        nn.Linear(6, 5), keep=0.6, samples=1, gate=sl.ContinuousSparsification(steps=4, final=16.0)
    )
    for beta in (1, 1, 2, 4):  # before any call as in the first
        assert float(masked.penalty(1.0, "expected").detach()) == pytest.approx(
            30 / (1 + (0.4 / 0.6) ** beta), rel=1e-5
        )
        masked(normal(8, 6))
    masked.penalty(1.0, "expected").backward()
    [logits] = masked.logits.values()
    m = 1 / (1 + (0.4 / 0.6) ** 8)
    torch.testing.assert_close(logits.grad, torch.full((5, 6), 8 * m * (1 - m)))


@pytest.mark.parametrize(
    "values",
    [{"steps": 0}, {"steps": 2.5}, {"steps": True}, {"steps": 5, "final": 0.5}, {"steps": 5, "final": math.inf}],
)
def test_an_impossible_schedule_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"(steps|final) is .*must be"):
        sl.ContinuousSparsification(**values)


# --- top k


@pytest.mark.parametrize(("fraction", "kept"), [(0.3, 9), (0.5, 15), (0.001, 1), (0.99, 30), (1.0, 30)])
def test_top_k_keeps_its_fraction_of_each_parameter(fraction: float, kept: int) -> None:
    gate = sl.TopK(fraction)
    masked = sl.MaskedNetwork(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6)), gate=gate, samples=1)
    assert all(layer.kept == pytest.approx(kept / 30) for layer in map(masked_part(masked), masked.logits))
    assert int((gate.decision(torch.zeros(5, 6)) > 0).flatten()[:kept].sum()) == kept  # ties: the earlier ones


def test_top_k_of_all_together_lets_parameters_compete() -> None:
    network = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 2))
    masked = sl.MaskedNetwork(network, gate=sl.TopK(0.4, per_layer=False), samples=1)
    with torch.no_grad():
        for index, logits in enumerate(masked.logits.values()):
            logits.copy_(torch.randint(-20, 20, logits.shape, generator=torch.Generator().manual_seed(index)) / 10)
        list(masked.logits.values())[2].mul_(1e-3)
    scores = torch.cat([logits.detach().abs().flatten() for logits in masked.logits.values()]).tolist()
    # Many are equal: the earlier ones, in the network's order, are kept.
    first = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: round(0.4 * 79)]
    kept = torch.zeros(79, dtype=torch.bool)
    kept[first] = True
    mask = masked.mask()
    assert torch.equal(torch.cat([mask[name].flatten() for name in mask.names]), kept)
    assert mask.kept_counts()["2.weight"] == 0
    x = normal(8, 6)
    training = masked(x)
    torch.testing.assert_close(training, masked.eval()(x))
    training.square().sum().backward()
    # Closed elements have a gradient too, and so can return: here all of the last layer.
    last = masked.logits["2.weight"].grad
    assert last is not None
    assert bool(last.any())


def test_a_penalty_that_would_do_nothing_is_refused(tmp_path: Path) -> None:
    masked = sl.MaskedNetwork(nn.Linear(6, 5), gate=sl.TopK())
    for kind in ("logits", "expected"):
        with pytest.raises(SettingError, match=r"TopK\(fraction=0\.5, per_layer=True\) keeps .* Set alpha=0"):
            masked.penalty(0.5, kind)  # type: ignore[arg-type]
        assert float(masked.penalty(0.0, kind).detach()) == 0  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="Set alpha=0"):
        sl.fit(nn.Linear(6, 5), [normal(8, 6)], lambda net, x: net(x).mean(), steps=2, alpha=1e-3, gate=sl.TopK(),
               folder=tmp_path / "run", progress=False)  # fmt: skip
    assert not (tmp_path / "run").exists()


@ALL
def test_a_gate_without_noise_has_one_sample(name: str) -> None:
    gate, _ = GATES[name]
    calls: list[int] = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    # The reference path for all: the route of linear layers calls the network once for all samples.
    masked = sl.MaskedNetwork(Counted(6, 5), gate=gate, samples=4, biases=True, keep=0.6)
    masked(normal(3, 6) if name in ("Threshold", "ContinuousSparsification", "TopK", "NOfM") else normal(8, 6))
    calls.clear()
    masked(normal(8, 6))
    assert (calls == [8]) == (not gate.noisy)
    assert gate.noisy == (name not in ("Threshold", "ContinuousSparsification", "TopK", "NOfM"))


def masked_part(masked: sl.MaskedNetwork) -> Callable[[str], sl.Mask]:
    mask = masked.mask()
    return lambda name: sl.Mask({name: mask[name]}, mask.network)


def test_top_k_starts_from_scores_of_its_own_that_the_seed_names() -> None:
    def scores(seed: int) -> dict[str, Tensor]:
        network = nn.Sequential(nn.Conv2d(4, 50, 5), nn.Linear(100, 50))
        return {
            k: v.detach() for k, v in sl.MaskedNetwork(network, biases=True, gate=sl.TopK(), seed=seed).logits.items()
        }

    for name, bound in {"0.weight": 0.1, "1.weight": 0.1, "0.bias": 1.0}.items():
        first = scores(1)[name]
        assert torch.equal(first, scores(1)[name])
        assert not torch.equal(first, scores(2)[name])
        assert float(first.abs().max()) < bound
        assert float(first.max()) > 0.7 * bound
        # Uniform: variance bound^2 / 3; five standard errors of mean and variance.
        n = first.numel()
        assert abs(float(first.mean())) < 5 * bound / math.sqrt(3 * n)
        assert abs(float(first.square().mean()) - bound**2 / 3) < 5 * bound**2 * math.sqrt(4 / 45 / n)


def test_top_k_makes_no_mask_of_nan() -> None:
    masked = sl.MaskedNetwork(nn.Linear(6, 5), gate=sl.TopK())
    with torch.no_grad():
        next(iter(masked.logits.values()))[0, 0] = math.nan
    with pytest.raises(sl.NonFiniteError, match="NaN"):
        masked.mask()


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, math.nan])
def test_an_impossible_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(SettingError, match=r"fraction is .* above 0 and at most 1"):
        sl.TopK(fraction)


# --- a gate of one's own


def test_the_gate_of_the_docs_does_what_they_say() -> None:
    text = (Path(__file__).parents[1] / "docs" / "gates.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 40
    made: dict[str, Any] = {"__name__": "docs"}
    exec(compile(code, "docs/gates.md", "exec", dont_inherit=True), made)
    gate: sl.Gate = made["Probit"](scale=2.0)
    logits, ones, draw = torch.full((COUNT,), 0.8), torch.ones(COUNT), Draw(1, 0, 0, 0)
    p = float(torch.special.ndtr(torch.tensor(0.4, dtype=torch.float64)))
    assert abs(float(gate.masked(ones, logits, draw).mean()) - p) < 5 * math.sqrt(p * (1 - p) / COUNT)
    exact = logits[:1].double().requires_grad_()
    gate.keep_probability(exact, 0).sum().backward()
    assert exact.grad is not None
    assert float(gate.logit_gradient(ones, ones, logits, draw)[0]) == pytest.approx(float(exact.grad), rel=1e-5)
    x = normal(8, 6)
    run = sl.fit(
        nn.Linear(6, 5), lambda step: x, lambda net, batch: net(batch).square().mean(), steps=2, samples=2, gate=gate,
        progress=False,
    )  # fmt: skip
    assert run.mask.kept == 1.0
