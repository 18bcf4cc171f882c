"""What one rank does in the tests of several processes: ``python ranks_worker.py FOLDER SCENARIO...``.

The network, batches and loss are here, so that the test itself can do the same in one process.
"""

import datetime
import gc
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sublens as sl

BATCH = 12


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def batches(rank: int, ranks: int) -> Any:
    """Rank r's part of a batch: the examples that its samples stand for in one process."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(BATCH, 6)
        part = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        return x[part], x.flip(1)[:, :4].sin()[part]

    return batch


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (net(batch[0]) - batch[1]).square().mean()


def train(samples: int, rank: int = 0, ranks: int = 1, **more: Any) -> sl.Run:
    settings = {"steps": 8, "alpha": 1e-3, "lr": 0.2, "progress": False, "seed": 3, "checkpoint_every": 2}
    if "optimizer" in more:
        del settings["lr"]
    if "kept" in more:
        del settings["alpha"]
    if ranks > 1:
        settings["processes"] = "all"
    taken = more.pop("batches", None) or batches(rank, ranks)
    return sl.fit(network(), taken, loss, samples=samples, **(settings | more))  # type: ignore[arg-type]


def one_step(masked: nn.Module, rank: int, ranks: int) -> None:
    torch.manual_seed(5)
    loss(masked, batches(rank, ranks)(0)).backward()


def play(folder: Path, scenarios: list[str]) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def keep(name: str, run: sl.Run) -> None:
        torch.save({"logits": run.logits, "history": run.history}, folder / f"{name}.{rank}.pt")

    for scenario in scenarios:
        if scenario.startswith("samples"):
            keep(scenario, train(int(scenario[7:]), rank, ranks))
        elif scenario == "rows":
            keep(scenario, train(1, rank, ranks, groups="row", kept=0.5))
        elif scenario == "checkpoint":
            keep(scenario, train(2, rank, ranks, steps=4, folder=folder / "ours", evaluate=lambda net: {"rank": rank}))
        elif scenario == "resume":
            keep(scenario, train(2, rank, ranks, folder=folder / "theirs", resume=True))
        elif scenario == "zero":
            from torch.distributed.optim import ZeroRedundancyOptimizer

            def sharded(logits: list[nn.Parameter]) -> Any:
                return ZeroRedundancyOptimizer(logits, torch.optim.Adam, lr=0.2)

            for steps in (4, 8):
                run = train(1, rank, ranks, steps=steps, optimizer=sharded, folder=folder / "zero", resume=True)
            keep(scenario, run)
            optimizer = sharded([nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7))])
            mine = sum(p.numel() for p in optimizer.optim.param_groups[0]["params"])
            torch.save(mine, folder / f"zero-owned.{rank}.pt")
        elif scenario == "ddp":
            masked = sl.MaskedNetwork(network(), samples=2, seed=3)
            masked.first_sample = 2 * rank
            one_step(nn.parallel.DistributedDataParallel(masked), rank, ranks)
            torch.save({name: logit.grad for name, logit in masked.logits.items()}, folder / f"ddp.{rank}.pt")
        elif scenario == "fsdp":
            from torch.distributed.fsdp import fully_shard

            masked = sl.MaskedNetwork(network(), samples=2, seed=3)
            masked.first_sample = 2 * rank
            fully_shard(masked)
            optimizer = torch.optim.Adam(masked.parameters(), lr=0.2)
            one_step(masked, rank, ranks)
            optimizer.step()
            held = {name: logit.to_local().shape for name, logit in masked.logits.items()}  # type: ignore[attr-defined]
            whole = {name: logit.full_tensor() for name, logit in masked.logits.items()}  # type: ignore[attr-defined]
            grads = {name: logit.grad.full_tensor() for name, logit in masked.logits.items()}  # type: ignore[union-attr]
            torch.save({"held": held, "logits": whole, "grads": grads}, folder / f"fsdp.{rank}.pt")
        elif scenario == "equal batches":
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                train(1, rank, ranks, steps=1, batches=batches(0, 2))
            (folder / f"warned.{rank}").write_text("\n".join(str(one.message) for one in seen))
        elif scenario == "apart":
            try:
                train(1, rank, ranks, steps=1, seed=rank, folder=folder / f"apart{rank}")
            except sl.MismatchError as error:
                (folder / f"apart.{rank}").write_text(str(error))
        elif scenario == "killed":

            def mortal(step: int) -> Any:
                if step == 5 and rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return batches(rank, ranks)(step)

            train(2, rank, ranks, batches=mortal, folder=folder / "killed")


def main() -> None:
    # An optimizer imports it; after init_process_group it would keep the group, whose threads would then outlive it.
    import torch.distributed.optim  # noqa: F401

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
    play(Path(sys.argv[1]), sys.argv[2:])
    gc.collect()
    dist.destroy_process_group()
    # A thread of gloo's that frees a tensor while the interpreter shuts down aborts the process, now and then.
    if "fsdp" in sys.argv:
        os._exit(0)  # because its device mesh keeps the group, and so the threads, whatever one does
    threads = {name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")}
    assert not any("gloo" in name for name in threads), threads


if __name__ == "__main__":
    main()
