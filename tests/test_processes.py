"""Several processes train one mask: two ranks here, with gloo, beside the same run in one process."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sublens as sl
from sublens.errors import SettingError

WORKER = Path(__file__).with_name("ranks_worker.py")
_spec = importlib.util.spec_from_file_location("ranks_worker", WORKER)
assert _spec is not None
assert _spec.loader is not None
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(folder: Path, *scenarios: str) -> list[subprocess.CompletedProcess[str]]:
    """Two ranks, to their end; no launcher watches over them."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    begun = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), *scenarios],
            env={**os.environ, **meeting, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    ended = []
    for process in begun:
        out, err = process.communicate(timeout=300)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return ended


def close(run: dict[str, Any], whole: sl.Run) -> None:
    """The same run up to the order in which float32 numbers were added up, and so the same mask."""
    for name, logits in whole.logits.items():
        torch.testing.assert_close(run["logits"][name], logits, rtol=1e-3, atol=1e-3)
        assert torch.equal(
            run["logits"][name] > 0, whole.mask[name] if logits.dim() == 2 and logits.shape[1] > 1 else logits > 0
        )
    for mine, theirs in zip(run["history"], whole.history, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left, after all that they can do in one life."""
    folder = tmp_path_factory.mktemp("ranks")
    worker.train(4, steps=4, folder=folder / "theirs")  # in one process, for them to resume
    ended = start(
        folder, "samples1", "samples2", "samples3", "rows", "checkpoint", "resume", "zero", "ddp",
        "equal batches", "apart",
    )  # fmt: skip
    for rank in [*ended, *start(folder, "fsdp")]:
        assert rank.returncode == 0, rank.stderr
    return folder


def of(folder: Path, name: str, rank: int = 0) -> Any:
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=False)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_two_ranks_of_k_samples_are_one_process_of_2k(folder: Path, samples: int) -> None:
    name = f"samples{samples}"
    first, second = of(folder, name), of(folder, name, 1)
    for layer, logits in first["logits"].items():
        assert torch.equal(logits, second["logits"][layer])  # bit for bit
    assert first["history"] == second["history"]
    close(first, worker.train(2 * samples))


def test_groups_and_a_kept_fraction(folder: Path) -> None:
    first, second = of(folder, "rows"), of(folder, "rows", 1)
    whole = worker.train(2, groups="row", kept=0.5)
    for layer, logits in whole.logits.items():
        assert torch.equal(first["logits"][layer], second["logits"][layer])
        torch.testing.assert_close(first["logits"][layer], logits, rtol=1e-3, atol=1e-3)


def test_a_run_goes_on_with_another_number_of_processes(folder: Path) -> None:
    whole = worker.train(4)
    close(of(folder, "resume"), whole)  # begun by one process, finished by two
    assert of(folder, "resume")["logits"]["0.weight"].equal(of(folder, "resume", 1)["logits"]["0.weight"])
    ours = folder / "ours"  # begun by two
    # The numbers of the leading rank count, and only it writes.
    records = [json.loads(line) for line in (ours / "history.jsonl").read_text().splitlines()]
    assert [record["rank"] for record in records if "rank" in record] == [0.0]
    assert of(folder, "checkpoint", 1)["history"] == of(folder, "checkpoint")["history"]
    again = worker.train(4, folder=ours, resume=True, evaluate=lambda net: {"rank": 0})
    for layer, logits in whole.logits.items():
        torch.testing.assert_close(again.logits[layer], logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(sl.MismatchError, match="another samples: 4, where this call has 2"):
        worker.train(2, folder=ours, resume=True)


def test_optimizer_state_in_shards(folder: Path) -> None:
    # ZeRO-1: each rank keeps the optimizer's state of a part of the logits; stopped and resumed on the way.
    close({**of(folder, "zero"), "history": []}, _without_history(worker.train(2)))
    assert of(folder, "zero")["logits"]["0.weight"].equal(of(folder, "zero", 1)["logits"]["0.weight"])
    assert sorted(of(folder, "zero-owned", rank) for rank in (0, 1)) == [5, 7]


def _without_history(run: sl.Run) -> sl.Run:
    return sl.Run(run.mask, run.logits, [], run.stopped, run.steps, run.seconds, run.groupings)


def reference() -> sl.MaskedNetwork:
    masked = sl.MaskedNetwork(worker.network(), samples=4, seed=3)
    worker.one_step(masked, 0, 1)
    return masked


def test_torch_ddp_around_a_masked_network(folder: Path) -> None:
    for name, logits in reference().logits.items():
        torch.testing.assert_close(of(folder, "ddp")[name], logits.grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(of(folder, "ddp")[name], of(folder, "ddp", 1)[name])


def test_logits_gradients_and_optimizer_state_in_shards(folder: Path) -> None:
    masked = reference()
    optimizer = torch.optim.Adam(masked.parameters(), lr=0.2)
    optimizer.step()
    found = of(folder, "fsdp")
    for name, logits in masked.logits.items():
        assert found["held"][name].numel() == logits.numel() // 2
        torch.testing.assert_close(found["grads"][name], logits.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["logits"][name], logits.detach(), rtol=1e-3, atol=1e-3)
        assert torch.equal(found["logits"][name], of(folder, "fsdp", 1)["logits"][name])


def test_what_users_do_wrong_is_said(folder: Path) -> None:
    assert "All 2 ranks were given the same batch" in (folder / "warned.0").read_text()
    assert "All 2 ranks were given the same batch" in (folder / "warned.1").read_text()
    # Ranks with seeds of their own.
    assert "do not have the same" in (folder / "apart.0").read_text()
    assert "do not have the same" in (folder / "apart.1").read_text()
    with pytest.raises(SettingError, match="needs a process group"):
        worker.train(1, processes="all")


def test_a_killed_rank_is_named_and_a_resume_goes_on(tmp_path: Path) -> None:
    survivor, killed = start(tmp_path, "killed")
    assert killed.returncode == -9
    assert survivor.returncode == 1
    assert "LostRankError: Rank 1 of 2 no longer answers" in survivor.stderr
    again = worker.train(4, folder=tmp_path / "killed", resume=True)
    close({"logits": again.logits, "history": again.history}, worker.train(4))


def test_torchrun_ends_the_job_and_names_the_rank(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(),
         str(WORKER), str(tmp_path), "killed"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert ended.returncode != 0
    cause = ended.stderr[ended.stderr.index("Root Cause") :]
    assert "rank      : 1" in cause
    assert "SIGKILL" in cause
    again = worker.train(4, folder=tmp_path / "killed", resume=True)
    for name, logits in worker.train(4).logits.items():
        torch.testing.assert_close(again.logits[name], logits, rtol=1e-3, atol=1e-3)


def test_the_first_sample_may_be_odd() -> None:
    # Samples 3 to 5 alone are those of a run of six; by whichever route.
    network, x = nn.Linear(6, 5), torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    whole = sl.MaskedNetwork(network, samples=6, seed=1)
    part = sl.MaskedNetwork(network, samples=3, seed=1)
    part.first_sample = 3
    with torch.no_grad():
        for masked in (whole, part):
            masked.logits["weight"].fill_(0.3)
    expected, found = whole(x), part(x[3:])
    torch.testing.assert_close(found, expected[3:])
    direction = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    (expected[3:] * direction).sum().backward()
    (found * direction).sum().backward()
    torch.testing.assert_close(part.logits["weight"].grad, whole.logits["weight"].grad)
