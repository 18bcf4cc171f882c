"""Ablations, minimality, completeness and stability, against what they mean."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sublens.analysis import (
    ablate,
    ablate_layers,
    ablated,
    blocks_of,
    completeness,
    faithfulness,
    minimality,
    overlap,
    stability,
    t_interval,
    thinned,
    transfer,
)
from sublens.errors import MismatchError, SettingError
from sublens.mask import Mask, fingerprint


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20))


@pytest.fixture
def mask(network: nn.Module) -> Mask:
    generator = torch.Generator().manual_seed(1)
    return Mask(
        {
            "0.weight": torch.rand(40, 30, generator=generator) < 0.4,
            "2.weight": torch.rand(20, 40, generator=generator) < 0.7,
        },
        fingerprint(network),
    )


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("fill", ["zero", "mean", "resample"])
def test_what_the_mask_removes_is_replaced_and_nothing_else(network: nn.Module, mask: Mask, fill: str) -> None:
    before = weights(network)
    copy = ablated(network, mask, fill=fill, seed=3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    after = weights(copy)
    for name in ("0.bias", "2.bias"):
        assert torch.equal(after[name], before[name])
    for name in mask:
        kept, layer = mask[name], before[name]
        assert torch.equal(after[name][kept], layer[kept])
        new = after[name][~kept]
        if fill == "resample":
            assert torch.isin(new, layer).all()
            # With replacement, from the whole layer: the mean lies within 5 standard errors (p of missing: 6e-7).
            assert abs(new.mean() - layer.mean()) < 5 * layer.std() / math.sqrt(len(new))
            assert new.unique().numel() < new.numel()
            other = ablated(network, mask, fill=fill, seed=4).state_dict()[name]
            assert not torch.equal(other, after[name])
        else:
            assert torch.equal(new, torch.full_like(new, layer.mean().item() if fill == "mean" else 0.0))


def test_ablation_of_tied_weights_reaches_every_name() -> None:
    network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    network[1].weight = network[0].weight
    kept = torch.zeros(6, 6, dtype=torch.bool)
    copy = ablated(network, Mask({"0.weight": kept}, fingerprint(network)), fill="mean")
    assert torch.equal(copy.state_dict()["1.weight"], torch.full((6, 6), network[0].weight.mean().item()))


def test_unknown_fillings_and_other_networks_are_refused(network: nn.Module, mask: Mask) -> None:
    with pytest.raises(SettingError, match="fill='noise' must be one of zero, mean, resample"):
        ablated(network, mask, fill="noise")
    with pytest.raises(MismatchError):
        ablated(nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20)), mask)


def kept_weights(net: nn.Module) -> float:
    """A metric that needs no data: the share of weights that are not zero."""
    found = torch.cat([net.state_dict()[name].flatten() for name in ("0.weight", "2.weight")])
    return float((found != 0).double().mean())


METRICS = {"kept": kept_weights}


def test_layers_are_ablated_one_block_at_a_time(network: nn.Module, mask: Mask) -> None:
    found = ablate_layers(network, mask, METRICS, {"first": ["0.weight"], "last": ["2.weight"]}, draws=2)
    counts, size = mask.kept_counts(), mask.size
    assert found["first"]["zero"]["kept"]["mean"] == pytest.approx(1 - counts["0.weight"] / size)
    assert found["last"]["zero"]["kept"]["mean"] == pytest.approx(1 - counts["2.weight"] / size)
    assert found["last"]["resample"]["kept"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert ablate(network, mask, METRICS)["kept"]["mean"] == pytest.approx(mask.kept)


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 23])
def test_blocks_are_neighbours_of_about_the_same_number(count: int) -> None:
    names = [f"layer{index}" for index in range(count)]
    blocks = blocks_of(names, most=6)
    assert [name for block in blocks.values() for name in block] == names
    sizes = [len(block) for block in blocks.values()]
    assert len(sizes) == min(count, 6)
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 1.0])
def test_a_thinned_mask_lacks_that_share_of_each_layer(mask: Mask, fraction: float) -> None:
    thin = thinned(mask, fraction, seed=0)
    assert (thin - mask).kept_count == 0
    for name, count in mask.kept_counts().items():
        assert thin.kept_counts()[name] == count - round(fraction * count)
    assert thin == thinned(mask, fraction, seed=0)
    if fraction == 0.5:
        other = thinned(mask, fraction, seed=1)
        # Two random halves share half of what they keep: within 5 standard deviations of about 0.5 / sqrt(600).
        assert abs(thin.shared(other) - 0.5) < 0.1


def test_thinning_takes_a_share() -> None:
    network = nn.Linear(2, 2)
    with pytest.raises(SettingError, match=r"fraction=1.5 must lie between 0 and 1"):
        thinned(Mask.full(network), 1.5, seed=0)


def test_one_fraction_is_asked_for_as_a_list(network: nn.Module, mask: Mask) -> None:
    with pytest.raises(SettingError, match=r"write fractions=\[0\.05\]"):
        minimality(network, mask, {}, fractions=0.05)  # type: ignore[arg-type]


def test_minimality_and_completeness_measure_what_they_say(network: nn.Module, mask: Mask) -> None:
    found = minimality(network, mask, METRICS, fractions=(0.5,), draws=2)
    half = sum(count - round(0.5 * count) for count in mask.kept_counts().values()) / mask.size
    assert found[0.5]["kept"] == {"mean": half, "low": half, "high": half}
    left, random = completeness(network, mask, METRICS, draws=2)
    assert left["kept"] == random["kept"]["mean"] == pytest.approx(1 - mask.kept)


@pytest.mark.parametrize(
    "measure",
    [
        lambda *given: ablate(*given, fill="resample", draws=0),
        lambda *given: completeness(*given, draws=0),
        lambda *given: minimality(*given, draws=0),
    ],
)
def test_no_draws_measure_nothing(network: nn.Module, mask: Mask, measure: Callable[..., object]) -> None:
    with pytest.raises(SettingError, match="draws must be 1 or more"):
        measure(network, mask, METRICS)


def test_transfer_and_faithfulness_are_differences_of_the_metrics(network: nn.Module, mask: Mask) -> None:
    assert transfer(network, {"a": mask, "b": ~mask}, METRICS) == {
        "a": {"kept": mask.kept},
        "b": {"kept": (~mask).kept},
    }
    assert faithfulness(network, mask, METRICS) == {"kept": mask.kept - 1}


def test_the_t_interval_is_students() -> None:
    # Worked by hand: mean 2, standard deviation 1, n 3, and the 97.5 % point of t with 2 degrees of freedom, 4.3027.
    mean, low, high = t_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2, 2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)
    assert t_interval([5.0]) == (5.0, -math.inf, math.inf)
    assert t_interval(torch.tensor([1.0, 2.0, 3.0])) == (mean, low, high)
    with pytest.raises(SettingError, match="a flat sequence of numbers"):
        t_interval(torch.ones(2, 2))
    with pytest.raises(SettingError, match="over 0 values"):
        t_interval([])


def test_the_t_interval_holds_the_truth_as_often_as_it_says() -> None:
    draws = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0)).double()
    hits = sum(low <= 0 <= high for _, low, high in map(t_interval, draws.tolist()))
    assert abs(hits / 2000 - 0.95) < 0.02  # 4 standard errors


def test_stability_is_the_mean_over_pairs(mask: Mask) -> None:
    masks = [mask, thinned(mask, 0.2, seed=0), thinned(mask, 0.5, seed=0), thinned(mask, 0.2, seed=1)]
    found = stability(masks)
    pairs = [(a, b) for index, a in enumerate(masks) for b in masks[index + 1 :]]
    assert found["pairs"] == 6
    assert found["iou"]["mean"] == pytest.approx(sum(a.iou(b) for a, b in pairs) / 6)
    assert found["chance"] == pytest.approx(sum(overlap(a, b)["chance"]["iou"]["mean"] for a, b in pairs) / 6)
    assert found["per_layer"]["0.weight"] == pytest.approx(sum(a.iou_per_layer(b)["0.weight"] for a, b in pairs) / 6)
    ious = [a.iou(b) for a, b in pairs]
    assert min(ious) - 1e-12 <= found["iou"]["low"] < found["iou"]["mean"] < found["iou"]["high"] <= max(ious) + 1e-12
    assert stability(masks) == found
    assert stability(masks[:2])["iou"]["low"] is None
    with pytest.raises(SettingError, match="two or more masks"):
        stability(masks[:1])
