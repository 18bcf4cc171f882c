"""How much is kept: a number that is asked for, and a path of alpha."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sublens as sl
from sublens.errors import MismatchError, SettingError
from sublens.fit.strength import Controller, Steered

NOISY: list[sl.Gate] = [sl.GumbelSigmoid(), sl.HardConcrete(), sl.Bernoulli()]
STEPS = 40
GATES: list[sl.Gate] = [*NOISY, sl.Threshold(), sl.ContinuousSparsification(steps=STEPS)]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))


def batches(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 6)
    return x, x[:, :3].argmax(1)


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def run_of(network: nn.Module, **settings: Any) -> sl.Run:
    base: dict[str, Any] = {
        "steps": STEPS,
        "lr": 0.3,
        "samples": 2,
        "progress": False,
        "evaluate_every": 20,
        "record_every": 10,
    }
    return sl.fit(network, batches, loss, **base | settings)


def from_logits(run: sl.Run, gate: sl.Gate) -> sl.Mask:
    return sl.Mask.from_logits({k: gate.decision(v) for k, v in run.logits.items()}, run.mask.network)


# --- a number that is asked for


@pytest.mark.parametrize("kept", [0.5, 0.1, 30])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
def test_a_mask_keeps_exactly_what_was_asked_for(network: nn.Module, gate: sl.Gate, kept: float | int) -> None:
    run = run_of(network, gate=gate, kept=kept)
    count = kept if isinstance(kept, int) else round(kept * 216)
    assert run.mask.kept_count == count
    assert run.history[-1]["kept"] == count / 216
    assert from_logits(run, gate) == run.mask
    each = run_of(network, gate=gate, kept=kept, per_layer=True)
    sizes = {"0.weight": 144, "2.weight": 72}
    counts = {name: kept if isinstance(kept, int) else round(kept * size) for name, size in sizes.items()}
    assert each.mask.kept_counts() == counts
    assert from_logits(each, gate) == each.mask


@pytest.mark.parametrize("kept", [0.2, 0.5])
@pytest.mark.parametrize("gate", NOISY, ids=lambda gate: type(gate).__name__)
def test_it_is_alpha_that_leads_there(network: nn.Module, gate: sl.Gate, kept: float) -> None:
    """Before the last shift the mask is near what is asked for."""
    run = run_of(network, gate=gate, kept=kept, steps=300, lr=0.1)
    before = run.history[-2]
    assert abs(before["kept"] - kept) < 0.06
    assert before["alpha"] > 0


def test_alpha_rises_while_too_much_would_be_kept_and_falls_otherwise(network: nn.Module) -> None:
    masked = sl.MaskedNetwork(network, keep=0.5)
    for name, logit in masked.logits.items():
        logit.grad = torch.full_like(logit, 0.25 if name == "0.weight" else -0.5)
    for kept, sign in ((0.4, 1), (0.6, -1), (0.5, 0)):
        memory: list[Steered] = []
        controller = Controller(masked, 100, kept, False, memory)
        first, second = (controller.alphas(step)["2.weight"] for step in range(2))
        rms = math.sqrt((144 * 0.25**2 + 72 * 0.5**2) / 216)
        assert math.log(second / first) == pytest.approx(math.log(first / (3e-3 * rms)), abs=1e-6)
        assert math.copysign(1, second - first) == sign if sign else second == pytest.approx(first)
    # Falling by itself: the target will be reached, so alpha need not rise.
    (held,) = [Steered(log_alpha=0.0, share=0.52, speed=-0.01)]
    assert Controller(masked, 100, 0.4, False, [held]).alphas(0)["2.weight"] < 1


def test_a_long_run_looks_less_often(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    masked = sl.MaskedNetwork(network, keep=0.9)
    for logit in masked.logits.values():
        logit.grad = torch.ones_like(logit)
    looks: list[int] = []
    shares = Controller._shares
    monkeypatch.setattr(Controller, "_shares", lambda self: (looks.append(1), shares(self))[1])
    finals = []
    for steps in (500, 2000):
        looks.clear()
        controller = Controller(masked, steps, 0.5, False, [])
        alphas = [controller.alphas(step)["0.weight"] for step in range(steps // 10)]
        assert len(looks) == 50
        finals.append(alphas[-1])
    assert finals[0] == pytest.approx(finals[1])


def test_the_last_shift_is_the_smallest_and_breaks_ties(network: nn.Module) -> None:
    masked = sl.MaskedNetwork(network)
    first, second = masked.logits.values()
    with torch.no_grad():
        first.copy_(torch.linspace(-1, 1, 144).view(24, 6))
        second.fill_(0.5)
    controller = Controller(masked, 10, 40, False, [])
    controller.finish()
    mask = masked.mask()
    # 36 of the first layer lie above 0.5; the four that are left are the first of the second.
    assert mask.kept_count == 40
    assert mask["0.weight"].flatten()[-36:].all()
    assert mask["2.weight"].flatten()[:4].all()
    before = [logit.clone() for logit in masked.logits.values()]
    controller.finish()
    assert all(torch.equal(b, logit) for b, logit in zip(before, masked.logits.values(), strict=True))
    assert float((first.detach().flatten().diff() - 2 / 143).abs().max()) < 1e-4


@pytest.mark.parametrize("cut", [12, 29])
@pytest.mark.parametrize(
    "settings", [{"kept": 0.3}, {"kept": 40, "per_layer": True}, {"alpha": sl.AlphaPath(1e-5, 1e-1)}]
)
def test_a_killed_run_goes_on_to_the_same_bits(
    network: nn.Module, tmp_path: Path, settings: dict[str, Any], cut: int
) -> None:
    class Killed(Exception):
        pass

    def dies(step: int) -> tuple[Tensor, Tensor]:
        if step == cut:
            raise Killed
        return batches(step)

    base: dict[str, Any] = {"steps": 30, "lr": 0.3, "checkpoint_every": 7, "progress": False, "record_every": 5}
    base |= {"evaluate": lambda net: {"kept again": net.mask().kept}, "evaluate_every": 10, "samples": 2, **settings}
    whole = sl.fit(network, batches, loss, **base)
    with pytest.raises(Killed):
        sl.fit(network, dies, loss, folder=tmp_path, **base)
    resumed = sl.fit(network, batches, loss, folder=tmp_path, resume=True, **base)
    assert resumed.history == whole.history
    assert resumed.mask == whole.mask
    assert all(torch.equal(resumed.logits[name], logit) for name, logit in whole.logits.items())
    again = sl.fit(network, batches, loss, folder=tmp_path, resume=True, **base)
    assert again.history == whole.history
    assert all(torch.equal(again.logits[name], logit) for name, logit in whole.logits.items())
    with pytest.raises(MismatchError, match="another steps"):
        sl.fit(network, batches, loss, folder=tmp_path, resume=True, **base | {"steps": 40})
    other: dict[str, Any] = {"kept": 0.31} if settings.get("kept") else {"alpha": sl.AlphaPath(1e-5, 1e-2)}
    with pytest.raises(MismatchError, match=r"another (kept|alpha)"):
        sl.fit(network, batches, loss, folder=tmp_path, resume=True, **base | other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kept": 0.0}, "neither a fraction"),
        ({"kept": 217}, r"217 elements are to be kept, but there are only 216"),
        ({"kept": 100, "per_layer": True}, r"100 elements are to be kept, but there are only 72"),
        ({"kept": 0.5, "alpha": 1e-3}, "exclude each other: kept steers alpha"),
        ({"kept": 0.5, "settle": sl.Settled()}, "exclude each other: what is kept"),
        ({"per_layer": True}, "says how kept=... is meant"),
        ({"kept": 0.5, "gate": sl.TopK()}, "choose how much is kept by the gate's arguments"),
        ({"alpha": -1.0}, "alpha=-1.0 is not a finite number"),
    ],
)
def test_impossible_settings_are_refused(
    network: nn.Module, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        run_of(network, folder=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


# --- a path


def test_a_path_of_alpha_goes_from_dense_to_sparse(network: nn.Module) -> None:
    run = run_of(network, alpha=sl.AlphaPath(1e-5, 1e-1), steps=200, lr=0.1, record_every=1, evaluate_every=100)
    alphas = [record["alpha"] for record in run.history]
    assert alphas == pytest.approx([1e-5 * 1e4 ** (step / 199) for step in range(200)], rel=1e-9)
    assert run.history[0]["kept"] == 1.0
    assert run.history[-1]["kept"] < 0.2
    assert any(0.3 < record["kept"] < 0.7 for record in run.history)
    assert json.loads(json.dumps(run.history)) == run.history


def test_alpha_is_in_the_records_only_where_it_changes(network: nn.Module) -> None:
    assert "alpha" not in run_of(network, steps=3).history[-1]
    assert "alpha" in run_of(network, steps=3, kept=0.5).history[-1]


@pytest.mark.parametrize(("first", "last"), [(0.0, 1.0), (1.0, -1.0), (math.inf, 1.0), (1.0, math.nan), ("a", 1.0)])
def test_an_impossible_path_is_refused(first: Any, last: Any) -> None:
    with pytest.raises(SettingError, match=r"AlphaPath\((first|last)=.* must be a finite number above 0"):
        sl.AlphaPath(first, last)


def test_each_layer_has_the_penalty_of_its_own_alpha(network: nn.Module) -> None:
    masked = sl.MaskedNetwork(network)
    masked.penalty({"0.weight": 0.5, "2.weight": 2.0}).backward()
    assert [float(logit.grad.unique()) for logit in masked.logits.values() if logit.grad is not None] == [0.5, 2.0]
    with pytest.raises(SettingError, match=r"alpha has values for \['0.weight'\]; masked are"):
        masked.penalty({"0.weight": 0.5})


@pytest.mark.parametrize("per_layer", [False, True])
def test_what_is_left_to_ranking_is_told(per_layer: bool) -> None:
    torch.manual_seed(0)
    network, x = nn.Linear(6, 8), torch.randn(32, 6)

    def train(lr: float) -> sl.Run:
        return sl.fit(
            network, lambda step: x, lambda net, x: net(x).square().mean(), steps=100, lr=lr, kept=0.25,
            per_layer=per_layer, progress=False,
        )  # fmt: skip

    with pytest.warns(UserWarning, match=r"After 100 steps the mask kept 100.0% of .* where 25.0% were asked for"):
        assert train(1e-3).mask.kept == 0.25
    assert train(0.2).mask.kept == 0.25  # a warning would be an error
