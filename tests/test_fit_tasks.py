"""``fit_tasks``: each task has the result of ``fit`` alone, over one copy of the weights, also after stops."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sublens as sl
from sublens.errors import FileError, SettingError
from sublens.fit import progress
from sublens.fit.checkpoint import RunFolder
from sublens.storage import load_tensors


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def task(classes: slice, **others: Any) -> dict[str, Any]:
    """Which of some of the inputs is the largest?"""

    def batches(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(16, 6)  # from torch's own generator, which fit seeds for each step
        return x, x[:, classes].argmax(1)

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    return {"batches": batches, "loss": loss, **others}


TASKS = {"low": task(slice(0, 3)), "high": task(slice(3, 6), seed=5, alpha=1e-2), "short": task(slice(1, 4), steps=4)}
SETTINGS: dict[str, Any] = {"steps": 9, "record_every": 2, "evaluate_every": 4, "progress": False}


def alone(network: nn.Module, name: str, **settings: Any) -> sl.Run:
    return sl.fit(network, **{**SETTINGS, **settings, **TASKS[name]})


def assert_same(one: sl.Run, other: sl.Run) -> None:
    assert one.history == other.history
    assert (one.steps, one.stopped) == (other.steps, other.stopped)
    for name in one.logits:
        assert torch.equal(one.logits[name], other.logits[name]), name
    assert one.mask == other.mask


def test_each_task_has_the_result_of_fit_alone(network):
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    runs = sl.fit_tasks(network, TASKS, **SETTINGS)
    assert list(runs) == list(TASKS)
    for name, run in runs.items():
        assert_same(run, alone(network, name))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_tasks_take_turns_and_read_the_network_itself(network):
    """One copy: the weights that a task's loss runs on are the caller's, so a change of them is seen by all."""
    seen: list[tuple[str, int]] = []
    pointers: set[int] = set()

    def watched(name: str) -> dict[str, Any]:
        def loss(net: nn.Module, batch: Any) -> Tensor:
            pointers.add(net.network[0].weight.data_ptr())
            return TASKS[name]["loss"](net, batch)

        return {**TASKS[name], "loss": loss, "callbacks": [lambda record: seen.append((name, record["step"]))]}

    sl.fit_tasks(network, {name: watched(name) for name in ("low", "short")}, **SETTINGS)
    assert seen == [("low", 2), ("short", 2), ("low", 4), ("short", 4), ("low", 6), ("low", 8), ("low", 9)]
    assert pointers == {network[0].weight.data_ptr()}


def test_a_failing_task_leaves_the_others_ready_to_resume(network, tmp_path):
    def broken(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        return TASKS["high"]["loss"](net, batch) * (float("nan") if len(calls) == 6 else 1.0)

    calls: list[int] = []
    failing = {"low": TASKS["low"], "high": {**TASKS["high"], "loss": broken}}
    with pytest.raises(sl.NonFiniteError, match="at step 5"):
        sl.fit_tasks(network, failing, **SETTINGS, folder=tmp_path)
    _, kept = load_tensors(tmp_path / "low" / "checkpoint.safetensors", "checkpoint")
    assert kept["state"]["step"] == 6  # its third turn was over
    runs = sl.fit_tasks(network, {name: TASKS[name] for name in failing}, **SETTINGS, folder=tmp_path, resume=True)
    for name, run in runs.items():
        assert_same(run, alone(network, name))


def test_ctrl_c_saves_every_task(network, tmp_path):
    def interrupted(net: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return TASKS["high"]["loss"](net, batch)

    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        sl.fit_tasks(
            network, {"low": TASKS["low"], "high": {**TASKS["high"], "loss": interrupted}}, **SETTINGS, folder=tmp_path
        )
    steps = {
        name: load_tensors(tmp_path / name / "checkpoint.safetensors", "checkpoint")[1]["state"]["step"]
        for name in ("low", "high")
    }
    assert steps == {"low": 4, "high": 3}
    runs = sl.fit_tasks(
        network, {name: TASKS[name] for name in ("low", "high")}, **SETTINGS, folder=tmp_path, resume=True
    )
    for name, run in runs.items():
        assert_same(run, alone(network, name))


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        ({}, {}, "tasks is empty"),
        ({"a": {"batches": [1]}}, {}, "Task 'a' has no 'loss'"),
        ({"a": {**TASKS["low"], "lambda": 1}}, {}, "Task 'a': 'lambda' is none of its arguments"),
        ({"a": {**TASKS["low"], "network": nn.Linear(6, 3)}}, {}, "'network' is none of its arguments"),
        ({"a/b": TASKS["low"]}, {"folder": "x"}, "cannot be the name of a task's folder"),
        ({"..": TASKS["low"]}, {"folder": "x"}, "cannot be the name of a task's folder"),
        ({"a": TASKS["low"], "b": {**TASKS["low"], "steps": 0}}, {"folder": "x"}, "steps=0"),
        ({name: {**TASKS["low"], "folder": "x"} for name in "ab"}, {}, "have the same folder"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_trains(network, tmp_path, monkeypatch, tasks, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sl.SettingError, match=message):
        sl.fit_tasks(network, tasks, **{**SETTINGS, **settings})
    assert not list(tmp_path.iterdir())


def loader(seed: int | None) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(9)
    data = TensorDataset(torch.randn(64, 6, generator=generator))
    own = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size=16, shuffle=True, generator=own)


def loss_of_loader(net: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[0][:, :3].argmax(1))


def test_tasks_that_would_take_batches_from_each_other_are_refused(network):
    shared, once = loader(3), iter([1, 2])
    for source, what in ((shared, "Generator"), (once, "list_iterator")):
        both = {name: {"batches": source, "loss": loss_of_loader} for name in "ab"}
        with pytest.raises(sl.SettingError, match=f"draw batches from the same {what}"):
            sl.fit_tasks(network, both, **SETTINGS)


@pytest.mark.parametrize("seed", [None, 3])
def test_loaders_give_each_task_the_batches_it_has_alone(network, seed):
    """Without a generator of its own a loader can be shared: it then draws from torch's, which is seeded each step."""
    one = loader(seed)
    sources = {"a": one, "b": one if seed is None else loader(seed)}
    tasks = {
        name: {"batches": source, "loss": loss_of_loader, "seed": i} for i, (name, source) in enumerate(sources.items())
    }
    for name, run in sl.fit_tasks(network, tasks, **SETTINGS).items():
        assert_same(run, sl.fit(network, **{**SETTINGS, **tasks[name], "batches": loader(seed)}))


def test_the_bars_of_all_tasks_share_a_terminal(network, monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=written, force_terminal=True, width=120))
    sl.fit_tasks(network, TASKS, **{**SETTINGS, "progress": True})
    assert all(name in written.getvalue() for name in TASKS)


def test_one_that_cannot_be_saved_keeps_no_other_from_it(network, tmp_path, monkeypatch):
    def interrupted(net: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            (tmp_path / "low" / "history.jsonl").unlink()
            monkeypatch.setattr(RunFolder, "save", saved)
            raise KeyboardInterrupt
        return TASKS["short"]["loss"](net, batch)

    def saved(folder: RunFolder, state: Any, *rest: Any) -> None:
        if folder.path.name == "low":
            raise FileError("no room")
        original(folder, state, *rest)

    calls: list[int] = []
    original = RunFolder.save
    tasks = {"low": TASKS["low"], "high": TASKS["high"], "last": {**TASKS["short"], "loss": interrupted}}
    with pytest.raises((KeyboardInterrupt, FileError)):
        sl.fit_tasks(network, tasks, **SETTINGS, folder=tmp_path)
    for name in ("high", "last"):
        assert (tmp_path / name / "checkpoint.safetensors").exists()


def test_loaders_whose_workers_persist_have_one_iterator_and_are_not_shared(network):
    both = DataLoader(TensorDataset(torch.randn(64, 6)), batch_size=16, num_workers=1, persistent_workers=True)
    tasks = {name: {"batches": both, "loss": loss_of_loader} for name in "ab"}
    with pytest.raises(sl.SettingError, match="draw batches from the same DataLoader"):
        sl.fit_tasks(network, tasks, **SETTINGS)


def test_an_error_says_which_task_it_was() -> None:
    network, x = nn.Linear(4, 2), torch.ones(8, 4)
    fine: dict[str, Any] = {"batches": lambda step: x, "loss": lambda net, x: net(x).sum()}
    wrong = {**fine, "loss": lambda net, x: net(x).sum() * math.nan}
    for other, kind in ((wrong, sl.errors.NonFiniteError), ({**fine, "gate": "x"}, SettingError)):
        with pytest.raises(kind) as caught:
            sl.fit_tasks(network, {"a": fine, "b": other}, steps=3, progress=False)
        assert caught.value.__notes__ == ["This was the task 'b'."]
    with pytest.raises(SettingError, match="Task 'a' is a tuple"):
        sl.fit_tasks(network, {"a": (1, 2)}, steps=3)  # type: ignore[dict-item]
