"""Masks without training, and the ranking they share with gates that keep a given number of weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sublens as sl
from sublens.errors import NonFiniteError, SettingError
from sublens.ranking import count_of, highest, highest_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4))


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 6)
    return x, x[:, :4].argmax(1)


# --- ranking


@given(st.lists(st.integers(-3, 3) | st.just(math.inf), min_size=1, max_size=40), st.data())
def test_highest_is_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    expected = [i in order[:count] for i in range(len(values))]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert highest(torch.tensor(values, dtype=dtype), count).tolist() == expected


@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=9), min_size=1, max_size=5), st.floats(0.01, 1.0))
def test_layers_are_ranked_together_or_one_by_one(layers: list[list[int]], kept: float) -> None:
    scores = {str(i): torch.tensor(layer, dtype=torch.float32) for i, layer in enumerate(layers)}
    together = highest_of(scores, kept, per_layer=False)
    flat = torch.cat(list(scores.values()))
    assert torch.equal(torch.cat(list(together.values())), highest(flat, max(1, round(kept * len(flat)))))
    for name, chosen in highest_of(scores, kept, per_layer=True).items():
        assert torch.equal(chosen, highest(scores[name], max(1, round(kept * len(scores[name])))))


def test_nan_is_never_among_the_highest() -> None:
    assert highest(torch.tensor([1.0, math.nan, 2.0, 0.0]), 2).tolist() == [False, False, True, False]


@pytest.mark.parametrize("kept", [0, -1, 0.0, -0.1, 1.01, math.nan, math.inf, True, "0.1", None])
def test_an_impossible_share_is_refused(kept: object) -> None:
    with pytest.raises(SettingError, match="neither a fraction above 0 and at most 1"):
        count_of(kept, 100)  # type: ignore[arg-type]


def test_a_fraction_is_no_number_of_elements() -> None:
    assert (count_of(1.0, 100), count_of(1, 100), count_of(0.001, 100), count_of(0.257, 100)) == (100, 1, 1, 26)
    with pytest.raises(SettingError, match="101 elements are to be kept, but there are only 100"):
        count_of(101, 100)


# --- magnitude


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("kept", [0.3, 50])
def test_magnitude_keeps_the_largest(per_layer: bool, kept: float | int) -> None:
    net = network()
    mask = sl.magnitude_mask(net, kept, per_layer=per_layer)
    sizes = {"0.weight": 120, "2.weight": 80}
    if per_layer:
        assert mask.kept_counts() == {n: kept if kept == 50 else round(0.3 * size) for n, size in sizes.items()}
    else:
        assert mask.kept_count == (50 if kept == 50 else 60)
    weights = {name: net.get_parameter(name).detach().abs() for name in sizes}
    groups = [[name] for name in sizes] if per_layer else [list(sizes)]
    for names in groups:
        inside = torch.cat([weights[name][mask[name]] for name in names])
        outside = torch.cat([weights[name][~mask[name]] for name in names])
        assert float(inside.min()) > float(outside.max())


def test_magnitude_has_no_limit_at_16_million() -> None:
    net = nn.Linear(4100, 4100, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.arange(4100 * 4100).view(4100, 4100))
        net.weight[::2].neg_()
    mask = sl.magnitude_mask(net, 0.25)
    assert mask.kept_count == 4100 * 1025
    # Above 2^24 neighbours are equal in float32, so the border lies within one of them.
    assert mask["weight"].flatten()[-4100 * 1025 + 1 :].all()


def test_magnitude_selects_as_everything_else_does_and_refuses_nan() -> None:
    net = network()
    assert sl.magnitude_mask(net, 0.5, where="2", biases=True).names == ("2.weight", "2.bias")
    with torch.no_grad():
        net[0].weight[0, 0] = math.nan  # type: ignore[index,union-attr]
    with pytest.raises(NonFiniteError, match=r"'0\.weight' contain NaN"):
        sl.magnitude_mask(net, 0.5)


# --- attribution


def test_attribution_is_the_mean_square_of_weight_times_gradient() -> None:
    net = network()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    seen: list[tuple[Tensor, Tensor]] = []

    def recorded(step: int) -> tuple[Tensor, Tensor]:
        seen.append(batch(step))
        return seen[-1]

    state = torch.get_rng_state()
    mask = sl.attribution_mask(net, recorded, loss, 0.3, steps=5, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    exact = network().double()
    scores = {"0.weight": torch.zeros(20, 6).double(), "2.weight": torch.zeros(4, 20).double()}
    for x, y in seen:
        exact.zero_grad()
        loss(exact, (x.double(), y)).backward()
        for name, score in scores.items():
            weight = exact.get_parameter(name)
            assert weight.grad is not None
            score += (weight.detach() * weight.grad).square()
    expected = highest_of(scores, 0.3, per_layer=False)
    assert len(seen) == 5
    assert all(torch.equal(mask[name], expected[name]) for name in scores)
    assert mask == sl.attribution_mask(net, batch, loss, 0.3, steps=5, seed=3)
    with torch.no_grad():
        assert mask == sl.attribution_mask(net, batch, loss, 0.3, steps=5, seed=3)
    assert mask != sl.attribution_mask(net, batch, loss, 0.3, steps=5, seed=4)
    per_layer = sl.attribution_mask(net, batch, loss, 0.3, steps=5, seed=3, per_layer=True)
    assert per_layer.kept_counts() == {"0.weight": 36, "2.weight": 24}


@pytest.mark.parametrize("steps", [0, 1.5, True])
def test_attribution_needs_a_batch(steps: int) -> None:
    with pytest.raises(SettingError, match="whole number of at least 1: each step takes one batch"):
        sl.attribution_mask(network(), batch, loss, 0.3, steps=steps)


# --- random


@pytest.mark.parametrize("per_layer", [False, True])
def test_random_is_uniform_and_named_by_its_seed(per_layer: bool) -> None:
    net = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 20))
    masks = [sl.random_mask(net, 0.3, seed=seed, per_layer=per_layer) for seed in range(400)]
    assert masks[0] == sl.random_mask(net, 0.3, seed=0, per_layer=per_layer)
    assert masks[0] != masks[1]
    assert {mask.kept_count for mask in masks} == {120}
    first = np.array([mask.kept_counts()["0.weight"] for mask in masks])
    if per_layer:
        assert set(first) == {60}
    else:
        # Hypergeometric: 120 of 400, 200 in the layer. Five standard errors of the mean; and the counts do vary.
        variance = 120 * 0.5 * 0.5 * 280 / 399
        assert abs(first.mean() - 60) < 5 * math.sqrt(variance / 400)
        assert abs(first.var() / variance - 1) < 5 * math.sqrt(2 / 400)
    often = sum(torch.cat([mask[name].flatten() for name in mask.names]).double() for mask in masks) / 400
    # 400 elements, each kept with probability 0.3: 5.5 standard deviations leave 1 in 60,000 for all of them.
    assert float((often - 0.3).abs().max()) < 5.5 * math.sqrt(0.3 * 0.7 / 400)


def test_attribution_refuses_a_loss_that_no_gate_can_change() -> None:
    net, other = network(), network()
    x, y = normal(8, 6), torch.arange(8) % 4
    with pytest.raises(sl.CutGraphError, match="did not call net"):
        sl.attribution_mask(net, lambda step: (x, y), lambda _, batch: loss(other, batch), 0.5, steps=2)
    with pytest.raises(sl.CutGraphError, match="does not require gradient"):
        sl.attribution_mask(net, lambda step: (x, y), lambda net, batch: loss(net, batch).detach(), 0.5, steps=2)
