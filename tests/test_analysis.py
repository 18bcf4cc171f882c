"""The analysis against slow definitions, draws, and numbers worked out by hand."""

import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sublens.analysis import (
    accuracies,
    first_half,
    interrogate,
    overlap,
    shared_by_chance,
    stability,
    t_interval,
    total,
    transfer,
)
from sublens.errors import MismatchError, SettingError
from sublens.mask import Mask, fingerprint


def by_counting(size: int, first: int, second: int) -> dict[int, float]:
    """The chance distribution by going through every pair of masks there is."""
    mine = set(range(first))
    shared = [len(mine & set(other)) for other in itertools.combinations(range(size), second)]
    return {count: shared.count(count) / len(shared) for count in set(shared)}


@pytest.mark.parametrize(
    ("size", "first", "second"), [(7, 3, 4), (7, 5, 6), (6, 0, 3), (6, 6, 2), (1, 1, 1), (9, 4, 4)]
)
def test_chance_is_what_counting_every_mask_gives(size: int, first: int, second: int) -> None:
    exact = by_counting(size, first, second)
    found = shared_by_chance(size, first, second)
    assert {
        int(value): p for value, p in zip(found.values(), found.probability.tolist(), strict=True)
    } == pytest.approx(exact)


def test_chance_of_a_large_layer_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    size, first, second = 16_000_000, 1_300_000, 3_200_000
    found = shared_by_chance(size, first, second)
    truth = stats.hypergeom(size, first, second)
    assert found.z(260_500) == pytest.approx((260_500 - truth.mean()) / truth.std(), rel=1e-6)
    assert found.p(261_500) == pytest.approx(2 * truth.sf(261_499), rel=1e-4)
    low, high = truth.ppf([0.025, 0.975])
    assert found.summary(lambda x: x) == pytest.approx({"mean": truth.mean(), "low": low, "high": high}, rel=1e-9)


def test_p_is_twice_the_smaller_tail() -> None:
    exact = by_counting(9, 4, 4)
    chance = shared_by_chance(9, 4, 4)
    assert chance.p(4) == pytest.approx(2 * exact[4])
    assert chance.p(0) == pytest.approx(2 * exact[0])
    assert chance.p(2) == 1.0
    assert shared_by_chance(10**6, 10**5, 10**5).p(10**5) == 0.0


def test_layers_add_up_as_their_convolution() -> None:
    parts = [by_counting(7, 3, 4), by_counting(6, 2, 2), by_counting(5, 5, 3)]
    exact: dict[int, float] = {}
    for counts in itertools.product(*(part.items() for part in parts)):
        value = sum(count for count, _ in counts)
        exact[value] = exact.get(value, 0.0) + math.prod(p for _, p in counts)
    found = total([shared_by_chance(7, 3, 4), shared_by_chance(6, 2, 2), shared_by_chance(5, 5, 3)])
    assert dict(zip(map(int, found.values()), found.probability.tolist(), strict=True)) == pytest.approx(
        exact, abs=1e-15
    )


def test_large_layers_add_up_though_rare_outcomes_are_left_out() -> None:
    layers = [shared_by_chance(160_000, 40_000, 50_000), shared_by_chance(80_000, 30_000, 8_000)]
    found = total(layers)
    mean, variance = 12_500 + 3_000, 12_500 * 0.75 * 110 / 160 + 3_000 * (5 / 8) * 0.9  # hypergeometric, by formula
    assert found.summary(lambda x: x)["mean"] == pytest.approx(mean, rel=1e-9)
    assert found.z(mean + 100) == pytest.approx(100 / variance**0.5, rel=1e-4)


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))


def drawn_mask(network: nn.Module, seed: int, share: float = 0.5) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: value for name, value in network.named_parameters() if value.dim() > 1}
    kept = {name: torch.rand(value.shape, generator=generator) < share for name, value in weights.items()}
    return Mask(kept, fingerprint(network))


def test_overlap_is_the_masks_own(network: nn.Module) -> None:
    first, second = drawn_mask(network, 1), drawn_mask(network, 2, 0.3)
    found = overlap(first, second)
    assert found["iou"] == pytest.approx(first.iou(second))
    assert found["iomin"] == pytest.approx(first.iomin(second))
    assert found["shared"] == pytest.approx(first.shared(second))
    assert found["shared_back"] == pytest.approx(second.shared(first))
    layers = found["per_layer"]
    assert {name: layer["iou"] for name, layer in layers.items()} == pytest.approx(first.iou_per_layer(second))
    assert {name: layer["iomin"] for name, layer in layers.items()} == pytest.approx(first.iomin_per_layer(second))
    assert {name: layer["size"] for name, layer in layers.items()} == first.sizes()


def test_chance_beside_the_overlap_is_that_of_random_masks(network: nn.Module) -> None:
    first, second = drawn_mask(network, 1), drawn_mask(network, 2, 0.3)
    found = overlap(first, second)
    drawn = torch.tensor(
        [Mask.random_like(first, 2 * seed).iou(Mask.random_like(second, 2 * seed + 1)) for seed in range(2000)]
    )
    chance = found["chance"]["iou"]
    assert chance["mean"] == pytest.approx(drawn.mean().item(), abs=4 * drawn.std().item() / 2000**0.5)
    inside = ((drawn >= chance["low"] - 1e-9) & (drawn <= chance["high"] + 1e-9)).double().mean().item()
    assert inside >= 0.95 - 0.015  # a band of whole numbers covers 95 % or more
    assert chance["low"] < chance["mean"] < chance["high"]


def test_p_is_corrected_for_the_number_of_layers(network: nn.Module) -> None:
    first, second = drawn_mask(network, 1), drawn_mask(network, 2, 0.3)
    for name, layer in overlap(first, second)["per_layer"].items():
        sizes = layer["sizes"]
        alone = shared_by_chance(sizes["total"], sizes["first"], sizes["second"]).p(sizes["both"])
        assert layer["p"] == pytest.approx(min(1.0, 3 * alone)), name


def test_layers_without_a_choice_have_no_z(network: nn.Module) -> None:
    full = Mask.full(network)
    for pair in ((full, full), (~full, ~full), (full, ~full)):
        for layer in overlap(*pair)["per_layer"].values():
            assert layer["z"] is None
            assert layer["p"] == 1.0
            assert layer["iou"] == layer["chance"]["iou"]["mean"]
    assert overlap(~full, ~full)["iou"] == (~full).iou(~full)


def test_overlap_of_masks_of_two_networks_is_refused(network: nn.Module) -> None:
    mask = drawn_mask(network, 1)
    other = Mask({name: mask[name] for name in mask}, "0" * 64)
    with pytest.raises(MismatchError, match="different networks"):
        overlap(mask, other)
    with pytest.raises(MismatchError, match="only one of the masks has the layer"):
        overlap(mask, Mask({n: mask[n] for n in mask.names[1:]}, mask.network))


def test_things_of_another_kind_are_refused(network: nn.Module) -> None:
    mask = drawn_mask(network, 1)
    for call, said in (
        (lambda: transfer(network, [mask], {"sums": sums}), "masks is a list"),  # type: ignore[arg-type]
        (lambda: transfer(network, {"m": mask}, sums), "metrics is a function"),  # type: ignore[arg-type]
        (lambda: transfer(network, {"m": mask}, {"sums": lambda net: None}), "'sums' returned None"),
        (lambda: transfer(network, {"m": mask}, {"sums": lambda net: math.nan}), "'sums' returned nan"),
        (lambda: stability({"m": mask, "n": mask}), "without their names"),  # type: ignore[arg-type]
        (lambda: stability([mask, mask, mask], level=95), "level=95"),
        (lambda: t_interval([0.9, math.nan]), "finite numbers"),
    ):
        with pytest.raises(SettingError, match=said):
            call()


def sums(network: nn.Module) -> float:
    return float(network(torch.ones(1, 6)).sum())


def test_the_questions_are_answered_on_the_masked_network(network: nn.Module) -> None:
    mask = drawn_mask(network, 3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = interrogate(network, mask, {"sum": sums}, draws=3, seed=5)

    def by_hand(**masks: Mask) -> float:
        weights = {name: value.clone() for name, value in before.items()}
        for name, layer in masks.items():
            weights[name.replace("_", ".")] *= layer[name.replace("_", ".")]
        return float(torch.func.functional_call(network, weights, torch.ones(1, 6)).sum())

    assert found["accuracy"]["sum"] == pytest.approx(by_hand(**{"0_weight": mask, "2_weight": mask, "4_weight": mask}))
    rest = ~mask
    assert found["inverse_accuracy"]["sum"] == pytest.approx(
        by_hand(**{"0_weight": rest, "2_weight": rest, "4_weight": rest})
    )
    assert found["half_accuracy"]["sum"] == pytest.approx(by_hand(**{"0_weight": mask, "2_weight": mask}))
    assert found["late_half_accuracy"]["sum"] == pytest.approx(by_hand(**{"4_weight": mask}))
    assert interrogate(network, mask, {"sum": sums}, half=["0.weight"], draws=0)["half_accuracy"][
        "sum"
    ] == pytest.approx(by_hand(**{"0_weight": mask}))
    drawn = [accuracies(network, {"sum": sums}, Mask.random_like(mask, 5 + draw))["sum"] for draw in range(3)]
    assert found["random_accuracy"]["sum"] == pytest.approx(
        {"mean": sum(drawn) / 3, "low": min(drawn), "high": max(drawn)}
    )
    assert found["kept_per_layer"] == mask.kept_per_layer()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_measuring_is_in_evaluation_mode_and_puts_the_flags_back(network: nn.Module) -> None:
    network.train()
    network[2].eval()

    def seen(net: nn.Module) -> float:
        assert not torch.is_grad_enabled()
        return float(any(module.training for module in net.modules()))

    assert accuracies(network, {"training": seen}) == {"training": 0.0}
    assert [module.training for module in network] == [True, True, False, True, True]

    def failing(net: nn.Module) -> float:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        accuracies(network, {"failing": failing}, drawn_mask(network, 1))
    assert [module.training for module in network] == [True, True, False, True, True]


class Normalised(nn.Module):
    """Rows divided by their norms, as under weight_norm. What it gives is a mapping, as Hugging Face's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": x @ (self.weight / self.weight.norm(dim=1, keepdim=True)).t()}


def test_accuracies_of_nan_are_warned_of() -> None:
    network, x = Normalised(), torch.randn(6, 4)
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[1] = False
    metrics = {"class 1": lambda net: (net(x)["logits"].argmax(1) == 1).double().mean()}
    with pytest.warns(UserWarning, match="under the mask gives is NaN, which the whole network does not"):
        assert accuracies(network, metrics, Mask({"weight": keep}, network)) == {"class 1": 1.0}
    accuracies(network, metrics, Mask({"weight": ~keep | keep}, network))  # a warning would be an error here
    assert not network._forward_hooks


class Padded(nn.Module):
    """NaN at one place, whatever the weights, as in a row of attention that sees nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(x)
        return found.masked_fill(torch.arange(len(x))[:, None] == 0, float("nan"))


def test_what_metrics_do_with_a_network_is_not_disturbed() -> None:
    network, x = Padded(), torch.randn(6, 4)
    plain = nn.Linear(4, 3)
    mask = Mask({"out.weight": torch.rand(3, 4) < 0.5}, network)
    of_plain = Mask({"weight": torch.rand(3, 4) < 0.5}, plain)
    accuracies(network, {"padded": lambda net: net(x)[1:].mean()}, mask)  # a warning would be an error
    metrics = {
        "vmap": lambda net: torch.vmap(net)(x).mean(),
        "pickled": lambda net: float(len(pickle.dumps(net)) > 0),
        "sparse": lambda net: net(x).to_sparse().sum(),
        "compiled": lambda net: torch.compile(net, fullgraph=True, backend="eager")(x).mean(),
    }
    found = accuracies(plain, metrics, of_plain)
    assert found["vmap"] == pytest.approx(found["compiled"])


def test_the_first_half_is_the_larger_one() -> None:
    assert first_half(["a", "b", "c"]) == ["a", "b"]
    assert first_half(["a", "b"]) == ["a"]


def test_a_half_of_unknown_layers_is_refused(network: nn.Module) -> None:
    with pytest.raises(SettingError, match=r"nothere.*0\.weight"):
        interrogate(network, drawn_mask(network, 1), {}, half=["nothere"])


def test_the_p_over_all_layers_of_few_groups_is_exact() -> None:
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    kept = {name: torch.tensor([True] + [False] * 15).view(4, 4) for name in ("0.weight", "1.weight")}
    mask = Mask.full(network) & Mask.from_logits(
        {name: 2.0 * each - 1.0 for name, each in kept.items()}, network=fingerprint(network)
    )
    found = overlap(mask, mask)
    assert found["p"] == pytest.approx(2 / 16**2)  # both masks keep the same one of 16, twice
    assert found["per_layer"]["0.weight"]["p"] == pytest.approx(2 * 2 / 16)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=4))
def test_few_layers_are_added_up_as_every_combination_gives(layers: list[tuple[int, float, float]]) -> None:
    parts = [shared_by_chance(size, round(a * size), round(b * size)) for size, a, b in layers]
    summed: dict[int, float] = {0: 1.0}
    for part in parts:
        added: dict[int, float] = {}
        for seen, chance in summed.items():
            for i, probability in enumerate(part.probability.tolist()):
                added[seen + part.low + i] = added.get(seen + part.low + i, 0.0) + chance * probability
        summed = added
    found = total(parts)
    for seen, chance in summed.items():
        assert found.probability[seen - found.low].item() == pytest.approx(chance, rel=1e-9)
        tails = (sum(p for s, p in summed.items() if s <= seen), sum(p for s, p in summed.items() if s >= seen))
        assert found.p(seen) == pytest.approx(min(1.0, 2 * min(tails)), rel=1e-9)


def test_far_tails_of_many_outcomes_are_those_of_the_normal_distribution() -> None:
    parts = [shared_by_chance(20_000, 5_000, 5_000) for _ in range(3)]
    found = total(parts)
    middle = round((found.values() * found.probability).sum().item())
    for far in (0, 100, 400, 2000):
        z = found.z(middle + far)
        assert z is not None
        assert found.p(middle + far) == pytest.approx(min(1.0, math.erfc(abs(z) / math.sqrt(2))), rel=0.3)
