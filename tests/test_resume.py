"""A run that is killed at any moment is resumed to the bit-identical mask, logits and history."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sublens as sl
from sublens.fit import Settled
from sublens.storage import load_tensors, save_tensors

# One process imports everything once and forks a child for each attempt; the parent kills it. A child that is to die at
# an exact place counts what it does to its files and kills itself there.
KILLED = '''
import json, os, random, signal, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import sublens as sl
import sublens.storage
from sublens.fit.checkpoint import RunFolder

def run(folder, kind):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    x = torch.randn(40, 6)
    data = TensorDataset(x, x[:, :3].argmax(1))
    torch.seed()  # nothing may depend on torch's own random state
    if kind == "loader":
        batches = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(9))
    else:
        def batches(step):
            return data[torch.randint(40, (8,))]
    return sl.fit(
        network, batches, lambda net, b: nn.functional.cross_entropy(net(b[0]), b[1]), steps=60, alpha=1e-3, lr=0.1,
        evaluate=lambda net: {"accuracy": (net(x).argmax(1) == data.tensors[1]).float().mean()},
        evaluate_every=7, record_every=3, checkpoint_every=2, folder=folder, resume=True, progress=False,
    )

def finish(folder, kind):
    result = run(folder, kind)
    result.mask.save(f"{folder}/mask.safetensors")
    sublens.storage.save_logits(f"{folder}/logits.safetensors", result.logits, result.mask.network)
    with open(f"{folder}/returned.json", "w") as file:
        json.dump([result.history, result.stopped, result.steps], file)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def arm(countdown):
    """Die at the given one of all events on files: before it, after it, or half way through."""
    left = [countdown]
    def count():
        left[0] -= 1
        if left[0] == 0:
            die()
    def counted(function):
        def call(*a, **k):
            count()
            value = function(*a, **k)
            count()
            return value
        return call
    os.replace, os.fsync = counted(os.replace), counted(os.fsync)
    replace = os.replace
    def half(source, target):
        left[0] -= 1
        if left[0] == 0:
            os.truncate(source, os.path.getsize(source) // 2)
            die()
        replace(source, target)
    os.replace = half
    append = RunFolder.append
    def half_append(self, record):
        left[0] -= 1
        if left[0] == 0:
            with open(self.path / "history.jsonl", "ab") as file:
                file.write(b'{"step": 3, "lo')
            die()
        return append(self, record)
    RunFolder.append = counted(half_append)

def attempt(folder, kind, countdown=None, seconds=None):
    """Whether the child lived to the end."""
    child = os.fork()
    if child == 0:
        try:
            if countdown is not None:
                arm(countdown)
            finish(folder, kind)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return False
    assert os.WEXITSTATUS(status) == 0
    return True

base, seed = sys.argv[1], int(sys.argv[2])
run(f"{base}/warm", "loader")  # compiles the kernels, which the children inherit
draw = random.Random(seed)
kills = 0
for kind in ("loader", "function"):
    began = time.monotonic()
    assert attempt(f"{base}/{kind}-whole", kind)
    whole = time.monotonic() - began
    while not attempt(f"{base}/{kind}-places", kind, countdown=draw.randrange(1, 80)):
        kills += 1
        if kills > 200:
            sys.exit("no progress")
    for _ in range(4):
        kills += not attempt(f"{base}/{kind}-times", kind, seconds=draw.uniform(0.2, 0.9) * whole)
    assert attempt(f"{base}/{kind}-times", kind)
print(kills)
'''


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and fork")
def test_sigkill_at_any_moment(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(tmp_path), "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10, "too few kills to mean anything"
    for kind in ("loader", "function"):
        for how in ("places", "times"):
            for name in ("mask.safetensors", "logits.safetensors", "history.jsonl", "returned.json"):
                whole, killed = (tmp_path / f"{kind}-{which}" / name for which in ("whole", how))
                assert whole.read_bytes() == killed.read_bytes(), (kind, how, name)
            assert not list((tmp_path / f"{kind}-{how}").glob(".checkpoint*")), "an unfinished file was left behind"


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def batches(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 6)
    return x, x[:, :3].argmax(1)


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def run_of(network: nn.Module, folder: Path | None, **settings: object) -> sl.Run:
    base = {"batches": batches, "loss": loss, "steps": 12, "progress": False, "record_every": 3, "evaluate_every": 5}
    return sl.fit(network, folder=folder, **base | settings)  # type: ignore[arg-type]


def assert_same(one: sl.Run, other: sl.Run) -> None:
    assert one.history == other.history
    assert one.mask == other.mask
    assert (one.stopped, one.steps) == (other.stopped, other.steps)
    for name in one.logits:
        assert torch.equal(one.logits[name], other.logits[name]), name


OPTIMIZERS = [
    lambda p: torch.optim.Adam(p, lr=0.1),
    lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, foreach=True),
    lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), weight_decay=0.0),
    lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "lr": 3.0}], lr=1.0, momentum=0.9, nesterov=True),
    lambda p: torch.optim.SGD(p, lr=1.0),
    lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    lambda p: torch.optim.Adagrad(p, lr=0.1),
    lambda p: torch.optim.Adadelta(p, lr=1.0),
    lambda p: torch.optim.Adamax(p, lr=0.1),
    lambda p: torch.optim.NAdam(p, lr=0.1),
    lambda p: torch.optim.RAdam(p, lr=0.1),
    lambda p: torch.optim.ASGD(p, lr=1.0, t0=3.0),
    lambda p: torch.optim.Rprop(p, lr=0.01, step_sizes=(1e-6, float("inf"))),
    lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.0),
]


@pytest.mark.parametrize("optimizer", [None, *OPTIMIZERS])
def test_any_optimizer_is_resumed(network: nn.Module, tmp_path: Path, optimizer: object) -> None:
    run_of(network, tmp_path, optimizer=optimizer, steps=7)
    resumed = run_of(network, tmp_path, optimizer=optimizer, resume=True)
    assert_same(resumed, run_of(network, None, optimizer=optimizer))


def test_nested_optimizer_state_is_resumed(network: nn.Module, tmp_path: Path) -> None:
    class Nested(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    past = self.state[parameter].setdefault("past", {"gradients": [], "best": (float("-inf"), None)})
                    assert type(past["best"]) is tuple
                    past["gradients"] = [*past["gradients"], parameter.grad.clone()][-3:]
                    parameter.data.add_(sum(past["gradients"]), alpha=-1.0)

    optimizer = lambda p: Nested(p, lr=1.0)  # noqa: E731
    run_of(network, tmp_path, optimizer=optimizer, steps=7)
    assert_same(run_of(network, tmp_path, optimizer=optimizer, resume=True), run_of(network, None, optimizer=optimizer))


def test_an_optimizer_that_needs_pickle_is_refused_at_once(network: nn.Module, tmp_path: Path) -> None:
    def optimizer(logits: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = torch.optim.SGD(logits, lr=1.0)
        made.param_groups[0]["schedule"] = object()
        return made

    with pytest.raises(sl.SettingError, match=r"keeps a object in its state \(optimizer\.param_groups\.0\.schedule\)"):
        run_of(network, tmp_path / "run", optimizer=optimizer)
    assert not (tmp_path / "run").exists()


def loader() -> DataLoader[tuple[Tensor, ...]]:
    x = torch.linspace(-1, 1, 240).reshape(40, 6)
    generator = torch.Generator().manual_seed(4)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8, shuffle=True, generator=generator)


@pytest.mark.parametrize("cut", [3, 5, 7, 10, 12])
@pytest.mark.parametrize("kind", ["loader", "list", "iterator"])
def test_a_run_taken_further_is_the_longer_run(network: nn.Module, tmp_path: Path, cut: int, kind: str) -> None:
    def data() -> object:
        drawn = [batches(step) for step in range(20 if kind == "iterator" else 5)]
        return {"loader": loader(), "list": drawn, "iterator": iter(drawn)}[kind]

    def run(folder: Path | None, **settings: object) -> sl.Run:
        torch.manual_seed(0)
        evaluate = lambda net: {"noise": torch.rand(()).item()}  # noqa: E731
        return run_of(network, folder, batches=data(), evaluate=evaluate, **settings)

    run(tmp_path, steps=cut)
    assert_same(run(tmp_path, steps=13, resume=True), run(None, steps=13))


def test_a_loader_of_other_data_is_noticed(network: nn.Module, tmp_path: Path) -> None:
    run_of(network, tmp_path, batches=[batches(0)] * 5, steps=4)
    with pytest.raises(sl.SettingError, match="ended after 3 batches, but the run to resume had already used 4"):
        run_of(network, tmp_path, batches=[batches(0)] * 3, resume=True)


@pytest.mark.parametrize("settings", [{}, {"settle": Settled(window=2, kept=1.0), "evaluate_every": 4}])
def test_an_ended_run_is_resumed_to_itself(network: nn.Module, tmp_path: Path, settings: dict[str, object]) -> None:
    first = run_of(network, tmp_path, **settings)
    history = (tmp_path / "history.jsonl").read_bytes()

    def never(step: int) -> None:
        raise RuntimeError("an ended run needs no batch")

    again = run_of(network, tmp_path, resume=True, batches=never, **settings)
    assert_same(again, first)
    assert (tmp_path / "history.jsonl").read_bytes() == history
    assert first.stopped == ("settled" if settings else "steps")


OTHER = {
    "alpha": {"alpha": 1e-3},
    "penalty": {"penalty": "expected"},
    "keep": {"keep": 0.8},
    "samples": {"samples": 2},
    "seed": {"seed": 1},
    "batch_dim": {"batch_dim": 1},
    "gate": {"gate": sl.GumbelSigmoid(tau=0.5)},
    "optimizer": {"lr": 0.02},
    "clip": {"clip": None},
    "evaluate_every": {"evaluate_every": 6},
    "record_every": {"record_every": 4},
    "settle": {"settle": Settled(window=100)},
    "selection": {"where": "0.weight"},
    "steps": {"steps": 6},
}


@pytest.mark.parametrize("name", [*OTHER, "network"])
def test_other_settings_are_refused(network: nn.Module, tmp_path: Path, name: str) -> None:
    run_of(network, tmp_path, steps=7)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if name == "network":
        with torch.no_grad():
            network[0].bias[0] += 1  # type: ignore[index,operator,union-attr]
    pattern = "with another " + name if name != "steps" else "has already done 7 steps, where this call has steps=6"
    with pytest.raises(sl.MismatchError, match=pattern):
        run_of(network, tmp_path, resume=True, **OTHER.get(name, {}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_changes_no_result_may_change(network: nn.Module, tmp_path: Path) -> None:
    run_of(network, tmp_path, steps=7)
    resumed = run_of(network, tmp_path, resume=True, checkpoint_every=2, progress="other")
    assert_same(resumed, run_of(network, None))


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "history.jsonl"])
def test_a_run_is_not_overwritten(network: nn.Module, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(sl.SettingError, match=r"already holds a run\. Pass resume=True"):
        run_of(network, tmp_path)
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize("kind", ["function", "list"])
def test_batches_that_are_no_pure_function_are_noticed(network: nn.Module, tmp_path: Path, kind: str) -> None:
    calls = itertools.count()

    def impure(step: int) -> tuple[Tensor, Tensor]:
        x, y = batches(step)
        return x + next(calls), y

    given = impure if kind == "function" else [impure(step) for step in range(12)]
    run_of(network, tmp_path, batches=given, steps=4)
    given = impure if kind == "function" else [impure(step) for step in range(12)]
    with pytest.warns(UserWarning, match="another batch for step 3 than before the run was interrupted"):
        run_of(network, tmp_path, batches=given, resume=True)


def test_batches_that_a_loss_changes_in_place_are_not_taken_for_others(network: nn.Module, tmp_path: Path) -> None:
    def spoil(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        batch[0].mul_(2.0)
        return loss(net, batch)

    run_of(network, tmp_path, loss=spoil, steps=4)
    run_of(network, tmp_path, loss=spoil, resume=True)  # a warning would be an error


def test_one_process_at_a_time_writes_a_run(network: nn.Module, tmp_path: Path) -> None:
    """Also in one process, as from a callback; what is left of a process that was killed holds nobody up."""
    refused = []

    def begin_another(_: object) -> None:
        with pytest.raises(sl.FileError, match=r"Another run is writing in .* give another folder"):
            run_of(network, tmp_path, resume=True)
        refused.append(1)

    (tmp_path / ".lock").touch()
    run = run_of(network, tmp_path, callbacks=[begin_another])
    assert refused
    assert not (tmp_path / ".lock").exists()
    assert_same(run, run_of(network, tmp_path, resume=True))


def test_resume_without_a_run_begins_one(network: nn.Module, tmp_path: Path) -> None:
    assert_same(run_of(network, tmp_path / "new" / "run", resume=True), run_of(network, None))


def test_files_that_do_not_fit_together_are_refused(network: nn.Module, tmp_path: Path) -> None:
    run_of(network, tmp_path)
    history, checkpoint = tmp_path / "history.jsonl", tmp_path / "checkpoint.safetensors"
    whole, data = history.read_bytes(), checkpoint.read_bytes()

    history.write_bytes(whole[:50])
    with pytest.raises(sl.FileError, match=r"has 50 bytes, but the checkpoint beside it counts \d+"):
        run_of(network, tmp_path, resume=True)
    history.write_bytes(b"x" * len(whole))
    with pytest.raises(sl.FileError, match="is not a history of records"):
        run_of(network, tmp_path, resume=True)
    history.write_bytes(whole)

    for broken in (data[:-5], data[:-1] + bytes([data[-1] ^ 1]), b""):
        checkpoint.write_bytes(broken)
        with pytest.raises(sl.FileError):
            run_of(network, tmp_path, resume=True)
    tensors, metadata = load_tensors_of(data, tmp_path)
    for missing in ("state", "settings", "optimizer"):
        save_tensors(checkpoint, tensors, {key: value for key, value in metadata.items() if key != missing})
        with pytest.raises(sl.FileError, match="is not the checkpoint of a run"):
            run_of(network, tmp_path, resume=True)
    for hostile in ({"dict": 3}, {"tensor": "nowhere"}, {"a": 1, "b": 2}, [1], {"list": [{"float": "x"}]}):
        save_tensors(checkpoint, tensors, metadata | {"optimizer": hostile})
        with pytest.raises(sl.FileError, match="is not the checkpoint of a run"):
            run_of(network, tmp_path, resume=True)
    assert history.read_bytes() == whole


def load_tensors_of(data: bytes, folder: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    copy = folder / "copy.safetensors"
    copy.write_bytes(data)
    return load_tensors(copy)


def test_seconds_add_up_and_are_not_in_the_history(network: nn.Module, tmp_path: Path) -> None:
    first = run_of(network, tmp_path, steps=7)
    tensors, metadata = load_tensors(tmp_path / "checkpoint.safetensors")
    metadata["state"]["seconds"] = 1000.0
    save_tensors(tmp_path / "checkpoint.safetensors", tensors, metadata)
    assert first.seconds < 1000 < run_of(network, tmp_path, resume=True).seconds
    assert b"seconds" not in (tmp_path / "history.jsonl").read_bytes()
    assert all(json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines())
