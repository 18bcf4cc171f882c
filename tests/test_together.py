"""Weights and masks that train together: gradients, what is frozen and drawn anew, and resuming to the same bits."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sublens.analysis import reused_share
from sublens.errors import FileError, NonFiniteError, SettingError, StudyError
from sublens.gates import GumbelSigmoid
from sublens.inspection import inspect, used_before
from sublens.inspection import network as network_module
from sublens.mask import Mask
from sublens.masked_network import MaskedNetwork
from sublens.noise import Draw, parameter_id
from sublens.storage import load_weights
from sublens.study import Study, Task, Together, seed_from

STEPS = 40
NAMES = ("zero", "one", "two")


def test_a_network_that_is_not_frozen_gets_the_gradient_of_its_open_weights() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False))
    masked = MaskedNetwork(network, keep=0.6, samples=2, seed=3, frozen=False)
    x = torch.randn(8, 5)
    masked(x).square().sum().backward()
    # By hand: each half of the batch through its own draw of hard gates, as PyTorch differentiates it.
    weights = {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}
    total = torch.zeros(())
    for sample, part in enumerate(x.chunk(2)):
        gated = dict(weights)
        for name in ("0.weight", "2.weight"):
            draw = Draw(3, 0, sample, parameter_id(name))
            gates = GumbelSigmoid().masked(torch.ones_like(weights[name]), masked.logits[name].detach(), draw)
            assert set(gates.unique().tolist()) == {0.0, 1.0}
            gated[name] = weights[name] * gates
        total = total + torch.func.functional_call(network, gated, part).square().sum()
    total.backward()
    for name in ("0.weight", "2.weight"):
        found = dict(network.named_parameters())[name].grad
        assert found is not None
        torch.testing.assert_close(found, weights[name].grad)
    assert network[0].bias.grad is None  # it has no mask
    # The logits learn what they learn on a frozen network.
    frozen = MaskedNetwork(network, keep=0.6, samples=2, seed=3)
    frozen(x).square().sum().backward()
    for name, logit in masked.logits.items():
        torch.testing.assert_close(logit.grad, frozen.logits[name].grad)


def test_only_a_network_that_is_not_frozen_may_change() -> None:
    network = nn.Linear(3, 3)
    frozen, free = MaskedNetwork(network), MaskedNetwork(network, frozen=False)
    before = free.mask().network
    with torch.no_grad():
        network.weight.add_(1)
    assert free.mask().network not in (before, "")
    with pytest.raises(ValueError, match="weights have changed"):
        frozen.mask()
    assert list(free.parameters()) == list(free.logits.values())


def task(number: int, at_batch: Callable[[], object] = lambda: None) -> Task:
    """Return the task of moving four numbers on by ``number`` places."""
    x_test = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))

    def batches(step: int, seed: int) -> Tensor:
        at_batch()
        return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed_from(seed, step)))

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return mse_loss(net(x), x.roll(number, 1))

    def metric(net: nn.Module) -> float:
        return float(((net(x_test) - x_test.roll(number, 1)).abs() < 0.5).double().mean())

    return Task(name=NAMES[number], batches=batches, loss=loss, metric=metric)


def make_study(at_batch: Callable[[], object] = lambda: None, **changes: Any) -> Study:
    tasks = [task(number, at_batch) for number in range(3)]
    settings: dict[str, Any] = {
        "name": "rolls",
        "network": lambda seed: nn.Sequential(
            nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)
        ),
        "control": tasks[0],
        "tasks": tasks[1:],
        "together": Together(used=0.5, new=0.2, fresh=["0"]),
        "batch_size": 16,
        "network_steps": 0,
        "network_lr": 1e-2,
        "mask_steps": STEPS,
        "mask_lr": 0.1,
        "alpha": 0.001,
        "biases": True,
        "evaluate_every": 20,
        "random_masks": 1,
    }
    return Study(**{**settings, **changes})


def run(out: Path, study: Study | None = None, **arguments: Any) -> dict[str, Any]:
    return inspect(study or make_study(), out=out, **{"progress": False, "report": False, **arguments})


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_module, "CHECKPOINT_EVERY", 7)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run(out)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    result = json.loads(found["result.json"])
    assert set(result.pop("seconds")) == {*NAMES, "analysis", "total"}
    found["result.json"] = json.dumps(result).encode()
    parts = json.loads(found["parts.json"])
    assert all(part.pop("seconds") >= 0 for part in parts.values())
    found["parts.json"] = json.dumps(parts).encode()
    return found


def verdict_of(folder: Path) -> dict[str, Any]:
    verdict: dict[str, Any] = json.loads((folder / "result.json").read_text())["verdict"]
    return verdict


def masks_of(folder: Path) -> dict[str, Mask]:
    return {name: Mask.load(folder / "masks" / f"{name}.safetensors") for name in NAMES}


def weights_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {name: load_weights(folder / "networks" / f"{name}.safetensors") for name in NAMES}


def test_the_run_folder_holds_a_network_and_a_mask_for_each_task(finished: Path) -> None:
    assert set(contents(finished)) == {
        "config.json",
        "history.jsonl",
        "parts.json",
        "result.json",
        *(f"{kind}/{name}.safetensors" for kind in ("masks", "networks") for name in NAMES),
    }
    study = make_study()
    for name, mask in masks_of(finished).items():
        network = study.network(0)
        network.load_state_dict(weights_of(finished)[name])
        assert mask.network == Mask.full(network).network
        assert 0 < mask.kept < 1
        with mask.applied(network), torch.no_grad():
            accuracy = task(NAMES.index(name)).metric(network)
        result = json.loads((finished / "result.json").read_text())
        if name != "zero":  # the control
            assert result["masks"][name]["accuracy"][name] == accuracy
            assert accuracy > 0.5  # 0.4 on the other task


def test_used_weights_are_frozen_and_all_others_trained(finished: Path) -> None:
    masks, weights = masks_of(finished), weights_of(finished)
    for before, name in pairwise(NAMES):
        used = used_before(masks, name)
        for layer, kept in used.items():
            same = weights[name][layer] == weights[before][layer]
            if layer.startswith("0."):
                assert not same.any()  # the first layer is new for every task
            else:
                assert same[kept].all()
                assert 0 < kept.float().mean() < 1
                assert not same[~kept].any()
    assert torch.equal(used_before(masks, "two")["2.weight"], masks["zero"]["2.weight"] | masks["one"]["2.weight"])
    assert not used_before(masks, "two", ["0"])["0.weight"].any()
    assert used_before(masks, "zero") == {}


def test_the_verdict_is_on_what_each_function_takes_up_again(finished: Path, tmp_path: Path) -> None:
    # By their places: each mask belongs to the network of its own task.
    masks = {name: Mask({layer: mask[layer] for layer in mask}, "network") for name, mask in masks_of(finished).items()}
    (one, two), other = verdict_of(finished)["reused"], verdict_of(finished)
    # Three functions: of each but the first, what was used by any task before, behind the first layer.
    assert (one["task"], one["same_function"], two["task"], two["same_function"]) == ("one", False, "two", False)
    layers = [name for name in masks["two"] if not name.startswith("0.")]
    used = masks["zero"] | masks["one"]
    kept, both = masks["two"].kept_counts(), (masks["two"] & used).kept_counts()
    chance = sum(kept[name] * used.kept_counts()[name] / used.sizes()[name] for name in layers)
    expected = (sum(both[name] for name in layers) - chance) / (sum(kept[name] for name in layers) - chance)
    assert two["share"]["mean"] == pytest.approx(expected)
    assert two["unsure"] is not None and two["able"] > 0
    assert other["reuse"]["because"].startswith("the study has no two tasks")
    # "two" asks the function of "zero": only what that one used counts; "one" is neither.
    run(tmp_path / "run", make_study(functions={"zero": "f", "two": "f"}))
    (again,) = verdict_of(tmp_path / "run")["reused"]
    assert (again["task"], again["same_function"]) == ("two", True)
    share = reused_share(masks["two"], masks["zero"], layers=layers)
    assert share is not None and again["share"]["mean"] == pytest.approx(share[0])


def test_each_task_starts_from_weights_of_its_own_and_the_logits_of_the_plan(tmp_path: Path) -> None:
    starts: list[dict[str, Tensor]] = []

    def look(net: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(net, MaskedNetwork)
        if net.step == 0:
            starts.append({name: logit.detach().clone() for name, logit in net.logits.items()})
            starts.append({name: value.detach().clone() for name, value in net.network.named_parameters()})
        return mse_loss(net(x), x)

    plain = make_study()
    tasks = [dataclasses.replace(each, loss=look) for each in (plain.control, *plain.tasks)]
    run(tmp_path / "run", make_study(control=tasks[0], tasks=tasks[1:]))
    masks = masks_of(tmp_path / "run")
    starts = starts[-2 * len(NAMES) :]  # each loss is tried before anything is trained
    for position, name in enumerate(NAMES):
        logits, weights = starts[2 * position : 2 * position + 2]
        used = used_before(masks, name, ["0"])
        for layer, logit in logits.items():
            kept = used.get(layer, torch.zeros(logit.shape, dtype=torch.bool))
            assert torch.equal(logit, torch.where(kept, 0.5, 0.2))
            for other in range(position):
                assert not (weights[layer] == starts[2 * other + 1][layer])[~kept].any()


def test_the_penalty_closes_gates_and_is_recorded(finished: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    assert [record["part"] for record in records if record["step"] == STEPS] == list(NAMES)
    last = records[-1]
    assert (last["part"], last["kept"]) == ("two", masks_of(finished)["two"].kept)
    assert {"loss", "penalty", "gradient_norm", "one", "two"} <= set(last)
    run(tmp_path / "none", alpha=0.0)
    assert masks_of(tmp_path / "none")["zero"].kept > masks_of(finished)["zero"].kept


@pytest.mark.parametrize("damaged", [False, True])
def test_the_weights_of_a_task_are_made_again(finished: Path, tmp_path: Path, damaged: bool) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    gone = folder / "networks" / f"{NAMES[-1]}.safetensors"
    if damaged:
        gone.write_bytes(gone.read_bytes()[:40])
        (folder / "result.json").unlink()
        with pytest.raises(FileError, match=re.escape(f"Delete {gone}, and --resume makes it again")):
            run(folder, resume=True)
    gone.unlink()
    run(folder, resume=True)
    assert {**contents(folder), "history.jsonl": b""} == {**contents(finished), "history.jsonl": b""}


@pytest.mark.parametrize("stop", [3, 101])
def test_a_run_stopped_by_ctrl_c_resumes_to_the_same_bits(finished: Path, tmp_path: Path, stop: int) -> None:
    calls = 0

    def at_batch() -> None:
        nonlocal calls
        calls += 1
        if calls == 3 + stop:  # each of three losses is tried before anything is trained
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", make_study(at_batch))
    run(tmp_path / "run", make_study(at_batch), resume=True)
    assert contents(tmp_path / "run") == contents(finished)


KILLED = """
import os, signal, sys, torch
from pathlib import Path
torch.set_num_threads(1)
import test_together as tests
tests.network_module.CHECKPOINT_EVERY = 7
calls, limit = 0, int(sys.argv[1])
def at_batch():
    global calls
    calls += 1
    if calls == limit:
        os.kill(os.getpid(), signal.SIGKILL)
tests.run(Path(sys.argv[2]), tests.make_study(at_batch), resume=True)
"""


def test_a_killed_run_resumes_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.run([sys.executable, script, "60", tmp_path / "run"], env={**os.environ, "PYTHONPATH": paths})
    assert process.returncode == -signal.SIGKILL
    run(tmp_path / "run", make_study(), resume=True)
    assert contents(tmp_path / "run") == contents(finished)


def test_what_cannot_train_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"0\.bias, 2\.bias, 4\.bias has no mask"):
        run(tmp_path / "biases", make_study(biases=False))
    with pytest.raises(StudyError, match="fresh must name masked layers: '9' matches no name"):
        run(tmp_path / "fresh", make_study(together=Together(fresh=["9"])))
    with pytest.raises(SettingError, match="no use for the weights"):
        (tmp_path / "weights.safetensors").touch()
        run(tmp_path / "network", network=tmp_path / "weights.safetensors")
    with pytest.raises(StudyError, match="repeated has no meaning"):
        make_study(repeated=["one"])
    with pytest.raises(StudyError, match="together must be a Together, not a dict"):
        make_study(together={})
    for bad in ({"used": 11}, {"new": "low"}, {"new": float("nan")}):
        with pytest.raises(StudyError, match="must be a logit"):
            Together(**bad)
    broken = dataclasses.replace(task(0), loss=lambda net, x: net(x).sum() * float("nan"))
    with pytest.raises(NonFiniteError, match="loss of the network is nan at step 0"):
        run(tmp_path / "nan", make_study(control=broken))
