"""``fit`` does what a hand-written loop does, and fails before or loudly where it cannot."""

import copy
import io
import json
import re
import signal
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sublens as sl
from sublens.fit import Settled
from sublens.fit.optimizers import Adam
from sublens.fit.progress import Display
from sublens.fit.training import uninterrupted
from sublens.storage import load_tensors


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def batches(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def accuracy(net: nn.Module) -> dict[str, float]:
    x, y = batches(10_000)
    return {"accuracy": (net(x).argmax(1) == y).float().mean()}  # type: ignore[dict-item]


def run_of(network: nn.Module, **settings: object) -> sl.Run:
    return sl.fit(network, **{"batches": batches, "loss": loss, "steps": 12, "progress": False} | settings)  # type: ignore[arg-type]


def assert_same_logits(one: sl.Run, other: sl.Run) -> None:
    assert one.logits.keys() == other.logits.keys()
    for name in one.logits:
        assert torch.equal(one.logits[name], other.logits[name]), name


def test_a_mask_that_had_no_time_to_close_a_gate_says_so(network: nn.Module) -> None:
    with pytest.warns(UserWarning, match="keeps every weight after 100 steps.*the lowest is 1.2") as told:
        run_of(network, steps=100, alpha=1.0, lr=0.01)
    assert len(told) == 1 and told[0].filename == __file__
    assert run_of(network, steps=100, alpha=0.0, lr=0.01).mask.kept == 1.0  # nobody asked for fewer
    with pytest.warns(UserWarning, match="removes every weight after 100 steps") as told:
        assert run_of(network, steps=100, alpha=1.0, lr=0.1).mask.kept == 0.0
    assert len(told) == 1 and told[0].filename == __file__


class CutInside(nn.Module):
    """Uses its first layer without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x).relu()
        return self.second(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("samples", [1, 4])
def test_layers_that_the_task_does_not_reach_are_named(samples: int, caplog: pytest.LogCaptureFixture) -> None:
    x, y = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
    said = "does not reach the logits of first.weight, so the penalty alone"
    for network, told in ((CutInside(), 1), (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), 0)):
        caplog.clear()
        sl.fit(network, lambda step: (x, y), lambda net, b: nn.functional.cross_entropy(net(b[0]), b[1]),
               steps=2, samples=samples, progress=False)  # fmt: skip
        assert sum(said in record.getMessage() for record in caplog.records) == told


def test_a_gate_whose_training_was_to_take_longer_says_so(network: nn.Module) -> None:
    with pytest.warns(UserWarning, match="for 200 steps and was for 100.*a beta of 14.1 where 200 is the end") as told:
        run_of(network, steps=100, samples=1, alpha=0.0, gate=sl.ContinuousSparsification(200))
    assert len(told) == 1 and told[0].filename == __file__
    run_of(network, steps=100, samples=1, alpha=0.0, gate=sl.ContinuousSparsification(100))


# --- the step ---


@pytest.mark.parametrize("penalty", ["logits", "expected"])
@pytest.mark.parametrize("clip", [None, 0.01, 1e6])
def test_is_the_hand_written_loop(network: nn.Module, penalty: str, clip: float | None) -> None:
    def sgd(logits: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(logits, lr=20.0, momentum=0.5)  # unlike Adam's, its steps scale with the clip

    run = run_of(network, alpha=1e-3, penalty=penalty, clip=clip, seed=5, samples=2, keep=0.8, optimizer=sgd)

    masked = sl.MaskedNetwork(network, keep=0.8, samples=2, seed=5).train()
    optimizer = sgd(list(masked.parameters()))
    norms = []
    for step in range(12):
        optimizer.zero_grad()
        loss(masked, batches(step)).backward()
        masked.penalty(1e-3, kind=penalty).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(masked.parameters(), clip if clip is not None else 1e9).item())
        optimizer.step()
    for name, logit in masked.logits.items():
        # torch rounds the clip's factor to float32, we do not.
        torch.testing.assert_close(run.logits[name], logit.detach(), rtol=0, atol=1e-6 if clip == 0.01 else 0)
    assert clip != 0.01 or min(norms) > 0.01, "this case must clip"
    assert run.history[-1]["gradient_norm"] == pytest.approx(sum(norms) / 12, rel=1e-3)
    assert run.mask == masked.mask()


@pytest.mark.parametrize("penalty", ["logits", "expected"])
@pytest.mark.parametrize("clip", [None, 0.01, 1e6])
@pytest.mark.parametrize("alpha", [0.0, 1e-3])
def test_default_optimizer_is_adam(network: nn.Module, alpha: float, clip: float | None, penalty: str) -> None:
    settings = {"alpha": alpha, "clip": clip, "penalty": penalty}
    run = run_of(network, **settings)
    plain = run_of(network, optimizer=lambda logits: torch.optim.Adam(logits, lr=1e-2, fused=True), **settings)
    for name, logits in run.logits.items():
        # Steps of at most 1e-2, twelve of them. A gradient near 0 is a quotient of two small numbers in Adam, so a
        # rounding can change a step by more than itself; a wrong constant, clip or bias correction changes all steps.
        torch.testing.assert_close(logits, plain.logits[name], rtol=0, atol=2e-5)
    for one, other in zip(run.history, plain.history, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-7)


def test_default_optimizer_goes_on_from_the_state_of_adam_and_back(network: nn.Module) -> None:
    logits, other = (nn.Parameter(torch.linspace(-2, 2, 40_000)) for _ in range(2))
    gradients = [torch.sin(torch.arange(40_000) * (step + 1.0)) for step in range(6)]
    own, torchs = Adam([logits], lr=1e-2), torch.optim.Adam([other], lr=1e-2, fused=True)
    for step, gradient in enumerate(gradients):
        logits.grad, other.grad = gradient.clone(), 0.5 * (gradient + 0.25)
        torchs.step()
        if step % 3 == 2:  # as any other optimizer
            logits.grad = other.grad.clone()
            own.step()
        else:
            assert own.takes()
            (square,) = own.squares([0.25])
            assert square == pytest.approx((gradient.double() + 0.25).square().sum().item(), rel=2e-5)
            own.update([0.25], 0.5)
        # Also after a step that is not its own, whatever it remembers.
        assert own.totals() == [pytest.approx(logits.double().sum().item(), abs=1e-5 * logits.abs().sum().item())]
        if step == 3:
            state = own.state_dict()
            own = Adam([logits], lr=1e-2)
            own.load_state_dict(state)
    torch.testing.assert_close(logits, other, rtol=0, atol=1e-6)
    assert own.state_dict()["state"].keys() == torchs.state_dict()["state"].keys()
    assert own.state_dict()["state"][0].keys() == torchs.state_dict()["state"][0].keys()


def test_an_update_keeps_logits_within_their_bound_and_the_next_call_believes_it(network: nn.Module) -> None:
    logits = nn.Parameter(torch.tensor([-9.99, 9.99, 9.99, 0.0]))
    logits.grad = torch.tensor([1.0, -1.0, float("nan"), 1.0])
    own = Adam([logits], lr=0.5)
    own.update([0.0], 1.0)
    assert logits[:2].tolist() == [-10, 10]
    assert logits[2].isnan()
    assert logits[3].item() == pytest.approx(-0.5)
    masked = sl.MaskedNetwork(network)
    (layer, *_) = masked.logits.values()
    for outside in (50.0, -50.0):  # not believed of what has changed since
        with torch.no_grad():
            layer[0, 0] = outside
        masked(torch.ones(4, 6))
        assert layer[0, 0].item() == (10 if outside > 0 else -10)
        masked.trust_bound()


def test_an_update_is_seen_by_autograd() -> None:
    logits = nn.Parameter(torch.zeros(10))
    squared = (logits * logits).sum()
    logits.grad = torch.ones(10)
    Adam([logits], lr=1e-2).update([0.0], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


def test_alpha_zero_has_no_penalty(network: nn.Module) -> None:
    run = run_of(network, alpha=0)
    assert run.history[-1]["penalty"] == 0
    assert run.history[-1]["kept"] == run.mask.kept


def snapshot(network: nn.Module) -> dict[str, object]:
    return {
        "state": {name: tensor.clone() for name, tensor in network.state_dict().items()},
        "gradients": [(name, p.requires_grad, p.grad is None) for name, p in network.named_parameters()],
        "training": [module.training for module in network.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()],
        "classes": [type(module) for module in network.modules()],
    }


def assert_unchanged(network: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(network)
    state, old = after.pop("state"), before.pop("state")
    assert isinstance(state, dict) and isinstance(old, dict)
    assert state.keys() == old.keys()
    assert all(torch.equal(state[name], old[name]) for name in state)
    assert after == before


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("training", [True, False])
def test_network_and_random_state_are_untouched(
    network: nn.Module, error: type[BaseException] | None, training: bool
) -> None:
    network.train(training)
    before, state = snapshot(network), torch.get_rng_state()

    def failing(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        value = loss(net, batch)
        torch.rand(3)
        if error is not None and failing.calls == 3:  # type: ignore[attr-defined]
            raise error("stop")
        failing.calls += 1  # type: ignore[attr-defined]
        return value

    failing.calls = 0  # type: ignore[attr-defined]
    if error is None:
        run_of(network, loss=failing, evaluate=accuracy, evaluate_every=5)
    else:
        with pytest.raises(error, match="stop"):
            run_of(network, loss=failing)
    assert_unchanged(network, before)
    assert torch.equal(torch.get_rng_state(), state)


# --- batches ---


def test_a_function_that_draws_from_torch_is_a_function_of_seed_and_step(network: nn.Module) -> None:
    def drawn(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(16, 6)
        return x, x[:, :3].argmax(1)

    torch.manual_seed(1)
    one = run_of(network, batches=drawn)
    torch.manual_seed(2)
    other = run_of(network, batches=drawn)
    assert_same_logits(one, other)
    assert one.history != run_of(network, batches=drawn, seed=1).history


def loader(generator: torch.Generator | None = None) -> DataLoader[tuple[Tensor, ...]]:
    x, y = batches(3)
    return DataLoader(TensorDataset(torch.arange(16), x, y), batch_size=6, shuffle=True, generator=generator)


def test_a_shuffling_loader_is_iterated_anew_in_another_order(network: nn.Module) -> None:
    seen: list[list[int]] = []

    def noting(net: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        seen.append(batch[0].tolist())
        return loss(net, batch[1:])

    run_of(network, batches=loader(), loss=noting, steps=6, samples=2)
    first, second = [i for b in seen[:3] for i in b], [i for b in seen[3:] for i in b]
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second
    again, seen[:] = list(seen), []
    run_of(network, batches=loader(), loss=noting, steps=6, samples=2)
    assert seen == again


def test_a_loaders_own_generator_counts_and_gets_its_state_back(network: nn.Module) -> None:
    def order(seed: int) -> list[object]:
        generator = torch.Generator().manual_seed(seed)
        state = generator.get_state()
        run = run_of(network, batches=loader(generator), loss=lambda net, b: loss(net, b[1:]), samples=2, steps=5)
        assert torch.equal(generator.get_state(), state)
        return [run.history[-1]["loss"]]

    assert order(3) == order(3)
    assert order(3) != order(4)


def test_a_sampler_is_told_the_epoch(network: nn.Module) -> None:
    class Sampler(torch.utils.data.Sampler[int]):
        epochs: list[int] = []  # noqa: RUF012 - read by the test below

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(range(16))

        def __len__(self) -> int:
            return 16

    data = DataLoader(TensorDataset(*batches(0)), batch_size=8, sampler=Sampler())
    run_of(network, batches=data, steps=5)
    assert Sampler.epochs == [0, 1, 2]


def test_a_one_shot_iterator_works_until_it_runs_dry(network: nn.Module) -> None:
    assert run_of(network, batches=(batches(step) for step in range(12))).steps == 12
    with pytest.raises(
        sl.SettingError, match=r"one-shot iterator \(generator\) and ran dry at step 4\. Give a function"
    ):
        run_of(network, batches=(batches(step) for step in range(4)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "yields nothing at step 0"),
        (3, r"batches is a int; it must be a function batches\(step\)"),
        (batches(0), r"a tuple of tensors.* batches=lambda step: \(x, y\)"),
        (TensorDataset(torch.ones(3)), "batches is a TensorDataset; .* such as a torch DataLoader"),
    ],
)
def test_impossible_batches_are_refused(network: nn.Module, data: object, message: str) -> None:
    with pytest.raises(sl.SettingError, match=message):
        run_of(network, batches=data)


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0 is not a whole number of at least 1"),
        ({"steps": 1e3}, "steps=1000.0 is not a whole number"),
        (
            {"alpha": -1e-4},
            "alpha=-0.0001 is not a finite number of at least 0: a negative penalty would push every gate open",
        ),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"penalty": "l1"}, "penalty='l1' is unknown. Use 'logits'"),
        ({"lr": 0.0}, "lr=0.0 is not a finite number above 0"),
        ({"lr": 0.1, "optimizer": torch.optim.Adam}, r"lr=0.1 would have no effect beside optimizer"),
        ({"clip": 0}, "clip=0 is not a finite number above 0: .*clip=None"),
        ({"seed": 0.5}, "seed=0.5 is not a whole number"),
        ({"evaluate_every": 0}, "evaluate_every=0"),
        ({"record_every": True}, "record_every=True"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1"),
        ({"settle": True}, "settle=True is not a sublens.fit.Settled. Use settle=Settled"),
        ({"resume": True}, "resume=True needs folder"),
        ({"loss": None}, "loss is a NoneType; it must be a function"),
        ({"evaluate": {}}, "evaluate is a dict; it must be a function"),
        ({"callbacks": ["log"]}, "callbacks holds a str; each must be a function"),
        (
            {"optimizer": torch.optim.SGD([torch.ones(1)], lr=1.0)},
            "optimizer is a SGD; it must be a function that makes one",
        ),
        ({"optimizer": lambda logits: logits}, "returned a list; it must return a torch.optim.Optimizer"),
        (
            {"optimizer": lambda logits: torch.optim.SGD(logits[1:], lr=1.0)},
            "does not hold the logits of '0.weight' .1 of 2",
        ),
        (
            {"optimizer": lambda logits: torch.optim.SGD([*logits, nn.Parameter(torch.ones(1))], lr=1.0)},
            "holds 1 parameters beside the logits",
        ),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS computes the loss several times in one step"),
        ({"keep": 2.0}, "keep"),
    ],
)
def test_impossible_settings_are_refused(
    network: nn.Module, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    folder = {} if "resume" in settings else {"folder": tmp_path / "run"}
    with pytest.raises(sl.SettingError, match=message):
        run_of(network, **folder | settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("field", "value"), [("window", 1), ("kept", -0.1), ("metric", float("inf"))])
def test_impossible_settled_is_refused(field: str, value: float) -> None:
    with pytest.raises(sl.SettingError, match=f"{field}={value}"):
        Settled(**{field: value})  # type: ignore[arg-type]


def test_weight_decay_does_not_act_unnoticed(network: nn.Module) -> None:
    with pytest.warns(UserWarning, match="AdamW has a weight decay, which pulls every logit towards 0"):
        run_of(network, optimizer=torch.optim.AdamW)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda net, batch: net(batch[0]), r"a tensor of shape \(16, 3\)"),
        (lambda net, batch: loss(net, batch).item(), "a float; it must return a tensor with one number"),
    ],
)
def test_a_loss_that_is_no_number_is_refused(network: nn.Module, returned: object, message: str) -> None:
    with pytest.raises(sl.SettingError, match=message):
        run_of(network, loss=returned)


def test_a_loss_that_does_not_reach_the_logits_is_refused(network: nn.Module) -> None:
    with pytest.raises(sl.CutGraphError):
        run_of(network, loss=lambda net, batch: loss(net, batch).detach())


def test_a_loss_that_calls_the_network_from_outside_is_named(network: nn.Module) -> None:
    with pytest.raises(sl.CutGraphError, match=r"did not call net.*Call net\(x\) in it"):
        run_of(network, loss=lambda net, batch: loss(network, batch))


def test_a_loss_that_evaluates_the_mask_is_named(network: nn.Module) -> None:
    with pytest.raises(sl.CutGraphError, match="put net into evaluation mode"):
        run_of(network, loss=lambda net, batch: loss(net.eval(), batch))


def test_a_first_step_that_fails_leaves_the_folder_free(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(sl.CutGraphError):
        run_of(network, loss=lambda net, batch: loss(net, batch).detach(), folder=tmp_path)
    assert run_of(network, folder=tmp_path).steps == 12


@pytest.mark.parametrize(("folder", "error"), [("", sl.SettingError), ("file", sl.FileError), ("file/x", sl.FileError)])
def test_a_folder_that_cannot_be_made_is_refused(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, error: type[Exception]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(error, match="folder"):
        run_of(network, folder=folder)
    assert [path.name for path in Path().iterdir()] == ["file"]


# --- NaN ---


def test_a_loss_that_is_not_finite_stops_the_run(network: nn.Module, tmp_path: Path) -> None:
    def breaking(step: int) -> tuple[Tensor, Tensor]:
        x, y = batches(step)
        return (x * float("nan") if step == 7 else x), y

    with pytest.raises(
        sl.NonFiniteError, match=r"loss is nan at step 7\. .*this step's batch.*after 6 steps is kept"
    ) as caught:
        run_of(network, batches=breaking, folder=tmp_path, checkpoint_every=3)
    assert (caught.value.step, caught.value.parameter) == (7, None)
    # The last good checkpoint leads on, once the batch is mended, to the run that never broke.
    assert_same_logits(run_of(network, folder=tmp_path, resume=True), run_of(network))


def test_a_broken_weight_is_named(network: nn.Module) -> None:
    with torch.no_grad():
        network[4].weight[0, 0] = float("inf")  # type: ignore[index,operator,union-attr]
    with pytest.raises(sl.NonFiniteError, match=r"'4\.weight' holds values that are not finite") as caught:
        run_of(network)
    assert (caught.value.step, caught.value.parameter) == (0, "4.weight")


def test_a_gradient_that_is_not_finite_is_named_and_nothing_is_updated(network: nn.Module) -> None:
    logits: dict[str, Tensor] = {}

    def breaking(net: sl.MaskedNetwork, batch: tuple[Tensor, Tensor]) -> Tensor:
        value = loss(net, batch)
        logits["now"] = net.logits["4.weight"]
        logits["before"] = net.logits["4.weight"].detach().clone()
        if breaking.calls == 2:  # type: ignore[attr-defined]
            value = value + (net.logits["4.weight"] * 0).sum().sqrt()  # 0, with an infinite slope
        breaking.calls += 1  # type: ignore[attr-defined]
        return value

    breaking.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(sl.NonFiniteError, match=r"logits of '4\.weight' is not finite at step 2") as caught:
        run_of(network, loss=breaking)
    assert (caught.value.step, caught.value.parameter) == (2, "4.weight")
    assert torch.equal(logits["now"], logits["before"])


def test_logits_that_the_optimizer_broke_reach_no_checkpoint(network: nn.Module, tmp_path: Path) -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            self.param_groups[0]["params"][1].data.fill_(float("nan"))

    with pytest.raises(sl.NonFiniteError, match=r"'4\.weight' hold NaN or infinity after 1 steps.*\(Broken\)"):
        run_of(network, optimizer=lambda logits: Broken(logits, lr=1.0), folder=tmp_path, checkpoint_every=1)
    assert not (tmp_path / "checkpoint.safetensors").exists()


# --- history, evaluation, early stop ---


def test_history(network: nn.Module, tmp_path: Path) -> None:
    given: list[dict[str, object]] = []
    run = run_of(
        network,
        evaluate=accuracy,
        evaluate_every=5,
        record_every=3,
        folder=tmp_path,
        callbacks=[given.append, dict.clear],
    )
    assert [record["step"] for record in run.history] == [3, 5, 6, 9, 10, 12]
    own = ["step", "loss", "penalty", "kept", "gradient_norm"]
    for record in run.history:
        assert list(record) == (own if record["step"] in (3, 6, 9) else [*own, "accuracy"])
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.history
    assert given == run.history  # the second callback emptied copies of its own
    assert run.seconds > 0


def test_loss_is_the_mean_since_the_last_record(network: nn.Module) -> None:
    each = run_of(network, record_every=1).history
    some = run_of(network, record_every=5).history
    for record, begin, end in zip(some, (0, 5, 10), (5, 10, 12), strict=True):
        for name in ("loss", "penalty", "gradient_norm"):
            assert record[name] == pytest.approx(sum(r[name] for r in each[begin:end]) / (end - begin))
        assert record["kept"] == each[end - 1]["kept"]


def test_evaluation_sees_the_mask_itself_and_training_goes_on(network: nn.Module) -> None:
    x, _ = batches(77)
    seen: list[Tensor] = []

    def evaluate(net: sl.MaskedNetwork) -> dict[str, float]:
        assert not net.training and not torch.is_grad_enabled()
        torch.rand(5)
        out = net(x)
        torch.testing.assert_close(out, net.mask().apply(copy.deepcopy(network)).eval()(x))
        seen.append(out)
        return {"worst": float("inf")}

    run = run_of(network, evaluate=evaluate, evaluate_every=4, alpha=0.01, lr=0.5)
    assert len(seen) == 3 and not torch.equal(seen[0], seen[-1])
    assert [record["worst"] for record in run.history] == [None] * 3
    assert_same_logits(run, run_of(network, alpha=0.01, lr=0.5))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (0.5, r"returned a float \(0\.5\); it must return a dict of numbers"),
        ({"accuracy": "high"}, "must return a dict of numbers"),
        ({"loss": 1.0}, "a metric called 'loss', a name that each record already has"),
    ],
)
def test_an_evaluation_without_numbers_is_refused(network: nn.Module, returned: object, message: str) -> None:
    with pytest.raises(sl.SettingError, match=message):
        run_of(network, evaluate=lambda net: returned)


@pytest.mark.parametrize(
    ("seen", "settled"),
    [
        ([[0.5], [0.5]], False),  # too few
        ([[0.5], [0.5], [0.5]], True),
        ([[0.9], [0.51], [0.5], [0.505]], True),  # only the window counts
        ([[0.52], [0.51], [0.505]], False),  # moves by 0.015
        ([[0.5, 0.9], [0.5, 0.9], [0.5, 0.95]], False),  # the metric moves
        ([[0.5, 0.93], [0.5, 0.94], [0.5, 0.95]], True),
        ([[0.5, 1.0, 0.0], [0.5, 1.0, 0.0], [0.5, 1.0, 1.0]], False),  # each metric counts
        ([[0.5, None], [0.5, None], [0.5, None]], False),  # undefined is not settled
        ([[0.5], [0.5, 1.0], [0.5]], False),
    ],
)
def test_settled(seen: list[list[float | None]], settled: bool) -> None:
    assert Settled(window=3, kept=0.0101, metric=0.0201).reached(seen) is settled


def test_a_settled_run_stops(network: nn.Module) -> None:
    quiet = {"lr": 1e-6, "evaluate": accuracy, "evaluate_every": 3, "steps": 40}
    run = run_of(network, settle=Settled(window=4), **quiet)
    assert (run.stopped, run.steps, len(run.history)) == ("settled", 12, 4)
    run = run_of(network, settle=None, **quiet)
    assert (run.stopped, run.steps) == ("steps", 40)


def test_the_tensorboard_example_of_the_docs(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    (example,) = re.findall(r"```python\n(from torch.utils.tensorboard.*?)```", text, re.DOTALL)
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == "runs/add"

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, float(value), step))

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    short = types.SimpleNamespace(fit=lambda *a, **k: sl.fit(*a, **k, steps=3, progress=False))
    variables: dict[str, object] = {"sl": short, "network": network, "batches": batches, "loss": loss}
    exec(example, variables)
    run = variables["run"]
    assert isinstance(run, sl.Run)
    assert written == [(name, value, 3) for name, value in run.history[0].items()]


# --- what a person sees, and Ctrl-C ---


def test_plain_lines(network: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    run_of(network, progress="add [1]", evaluate=accuracy, evaluate_every=6, record_every=2)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"add \[1\]: step 6/12, loss [\d.]+, kept \d+\.\d%, accuracy [\d.]+, \d+ s left", lines[0])
    assert re.fullmatch(r"add \[1\]: step 12/12, .*, \d+ s", lines[1])


def test_silence(network: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    run_of(network, progress=False, evaluate=accuracy, evaluate_every=6)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [True, False])
def test_a_slow_run_shows_a_line_every_ten_seconds(progress: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=120)
    with Display(progress, 10, done=4, console=console) as display:
        for step in (5, 6, 7, 8):
            now[0] += 6
            display.step(step)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == (["mask: step 6/10, 24 s left", "mask: step 8/10, 12 s left"] if progress else [])


def test_what_is_left_is_not_told_by_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=120)
    with Display(True, 1000, console=console) as display:
        for step, seconds in ((1, 30), (2, 11), (3, 11)):
            now[0] += seconds
            display.step(step)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == ["mask: step 1/1000", "mask: step 2/1000, 10978 s left", "mask: step 3/1000, 10967 s left"]


def test_a_bar_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Display("add", 10, console=console) as display:
        display.step(4)
        display.record({"step": 10, "loss": 0.25, "kept": 0.5, "accuracy": None}, evaluated=True)
        display.step(10)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "10/10" in text and "loss 0.25, kept 50.0%, accuracy undefined" in text


def test_ctrl_c_waits_for_the_update() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("update")
        done.append("more")
    assert done == ["update"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_a_step_but_never_cuts_the_update_in_it() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted(insist=True):
        signal.raise_signal(signal.SIGINT)
        done.append("first")
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("update")
        done.append("rest")
    assert done == ["first", "update"]
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted(insist=True):
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
            done.append("once")
        done.append("more")
    assert done == ["first", "update", "once"]
    calls: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    try:
        with uninterrupted(insist=True):
            for sent in range(1, 4):
                signal.raise_signal(signal.SIGINT)
                assert len(calls) == 2 * (sent // 2)  # the first of two waits
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert len(calls) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("where", ["loss", "finaliser", "optimizer", "evaluate", "callback"])
def test_ctrl_c_leaves_a_run_to_resume(network: nn.Module, tmp_path: Path, where: str) -> None:
    armed = {"now": True}

    def strike(place: str) -> None:
        strikes[place] = strikes.get(place, 0) + 1
        if armed["now"] and place == where and strikes[place] == (2 if place in ("evaluate", "callback") else 8):
            signal.raise_signal(signal.SIGINT)

    strikes: dict[str, int] = {}

    class Struck(torch.optim.Adam):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(0.99)
                        strike("optimizer")
            super().step()

    def struck_loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        value = loss(net, batch)
        strike("loss")
        gone = torch.zeros(())
        weakref.finalize(gone, strike, "finaliser")
        del gone  # an exception in what is called now, Python prints and drops
        return value

    def struck_evaluate(net: nn.Module) -> dict[str, float]:
        drawn = torch.rand(()).item()  # the same also where a resumed run begins with this evaluation
        strike("evaluate")
        return {**accuracy(net), "drawn": drawn}

    settings = {
        "loss": struck_loss,
        "optimizer": Struck,
        "evaluate": struck_evaluate,
        "evaluate_every": 4,
        "callbacks": [lambda record: strike("callback")],
        "checkpoint_every": 100,
    }
    with pytest.raises(KeyboardInterrupt):
        run_of(network, folder=tmp_path / "struck", **settings)
    armed["now"] = False
    state = load_tensors(tmp_path / "struck/checkpoint.safetensors")[1]["state"]
    assert state["step"] == {"loss": 8, "finaliser": 8, "optimizer": 4, "evaluate": 8, "callback": 8}[where]
    resumed = run_of(network, folder=tmp_path / "struck", resume=True, **settings)
    whole = run_of(network, folder=tmp_path / "whole", **settings)
    assert_same_logits(resumed, whole)
    assert (tmp_path / "struck/history.jsonl").read_bytes() == (tmp_path / "whole/history.jsonl").read_bytes()


def test_training_under_inference_mode_is_refused(network: nn.Module) -> None:
    with torch.inference_mode(), pytest.raises(sl.SettingError, match="nothing can be trained"):
        sl.fit(network, lambda step: torch.randn(4, 6), lambda net, x: net(x).mean(), steps=1, progress=False)
