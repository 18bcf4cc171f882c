"""What it is worth that the samples of a step share their noise: variance of the logits' gradient, and steps to a mask.

    python benchmarks/gradient_variance.py --widths 200,200,100 --samples 2,4,8

Samples as sublens draws them (``sublens.noise``: antithetic, or whatever is there now) against independent ones, on the
add-mul study. Both see the same batches in the same chunks. The variance is summed over all logits, once for one batch
(the gates' noise alone) and once for batches that change (what training sees), at the start and in the midst of a
training. Then masks are trained both ways, from the same seeds.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import sublens as sl
from sublens import studies
from sublens.inspection.network import load_network, train_network
from sublens.study import Study, Task

Gradient = Callable[[int, tuple[Tensor, Tensor]], Tensor]


def shared(masked: sl.MaskedNetwork, task: Task) -> Gradient:
    """Return the function that gives the loss of a batch in step ``step``, with the noise of the library."""

    def loss(step: int, batch: tuple[Tensor, Tensor]) -> Tensor:
        masked.step = step
        return task.loss(masked, batch)

    return loss


def independent(masked: sl.MaskedNetwork, task: Task, samples: int) -> Gradient:
    """Return the same with a draw of its own for each chunk: each is a step of its own, of one sample."""

    def loss(step: int, batch: tuple[Tensor, Tensor]) -> Tensor:
        chunks = list(zip(*(part.chunk(samples) for part in batch), strict=True))
        losses = []
        for k, chunk in enumerate(chunks):
            masked.step = samples * step + k
            losses.append(task.loss(masked, chunk) * len(chunk[0]) / len(batch[0]))
        return torch.stack(losses).sum()

    return loss


def two_ways(net: nn.Module, task: Task, samples: int, seed: int) -> dict[str, tuple[sl.MaskedNetwork, Gradient]]:
    """Return both ways, each with a masked network of its own."""
    one = sl.MaskedNetwork(net, samples=samples, seed=seed)
    other = sl.MaskedNetwork(net, samples=1, seed=seed)
    return {"shared": (one, shared(one, task)), "independent": (other, independent(other, task, samples))}


def variance(masked: sl.MaskedNetwork, loss: Gradient, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Return the variance of the gradient over one draw for each batch, summed over all logits."""
    found = []
    for step, batch in enumerate(batches):
        masked.zero_grad()
        loss(1_000_000 + step, batch).backward()
        found.append(torch.cat([logits.grad.flatten() for logits in masked.logits.values()]).double())
    return float(torch.stack(found).var(0).sum())


def train(
    net: nn.Module, task: Task, study: Study, way: tuple[sl.MaskedNetwork, Gradient], steps: int, every: int
) -> list[tuple[int, float, float]]:
    """Train a mask; return (step, kept, accuracy) at every evaluation."""
    masked, loss = way
    batches = task.batches_for(masked.seed)
    optimizer = torch.optim.Adam(masked.parameters(), lr=study.mask_lr)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        (loss(step, batches(step)) + masked.penalty(study.alpha / study.batch_size)).backward()
        nn.utils.clip_grad_norm_(masked.parameters(), study.mask_clip)
        optimizer.step()
        if (step + 1) % every == 0:
            mask = masked.mask()
            with mask.applied(net):
                seen.append((step + 1, mask.kept, task.metric(net)))
    return seen


def main() -> None:
    """Measure, and print a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--widths", default="200,200,100")
    options.add_argument("--network", type=Path, help="weights already trained")
    options.add_argument("--samples", default="2,4,8")
    options.add_argument("--draws", type=int, default=64)
    options.add_argument("--steps", type=int, default=600, help="training steps of each mask; 0 trains none")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument(
        "--alpha", type=float, default=5e-3, help="weight of the penalty, before the division by the batch"
    )
    options.add_argument(
        "--accuracy", type=float, default=0.95, help="a good mask has this part of the network's accuracy"
    )
    options.add_argument("--kept", type=float, default=0.5, help="and keeps at most this fraction")
    given = options.parse_args()
    torch.set_num_threads(1)

    study = studies.load("add-mul", widths=tuple(int(width) for width in given.widths.split(",")))
    study = study.__class__(**{**vars(study), "alpha": given.alpha})
    if given.network is None:
        with TemporaryDirectory() as folder:
            net, _, _ = train_network(study, 0, Path(folder), "network")
    else:
        net = load_network(study, 0, given.network)
    net.eval()
    (task,) = (task for task in study.tasks if task.name == "add")
    with torch.no_grad():
        whole = task.metric(net)
    print(f"add-mul {given.widths}, accuracy of the network on add {whole:.3f}; {given.draws} draws")
    print("variance with shared noise over that with independent noise")
    print("samples  where             one batch   changing batches")
    for samples in (int(text) for text in given.samples.split(",")):
        ways = two_ways(net, task, samples, seed=1)
        for where, steps in (("start", 0), ("after 200 steps", 200)):
            if steps:
                train(net, task, study, ways["shared"], steps, steps)
                state = ways["shared"][0].state_dict()
                ways["independent"][0].load_state_dict(state)
            batches = task.batches_for(7)
            one, changing = ([batches(step if moving else 0) for step in range(given.draws)] for moving in (0, 1))
            fixed = {name: variance(*way, one) for name, way in ways.items()}
            moving = {name: variance(*way, changing) for name, way in ways.items()}
            ratios = [each["shared"] / each["independent"] for each in (fixed, moving)]
            print(f"{samples:7}  {where:15}  {ratios[0]:9.2f}   {ratios[1]:16.2f}", flush=True)
    if given.steps == 0:
        return
    print(f"\nfirst step with accuracy >= {given.accuracy * whole:.3f} and kept <= {given.kept}, alpha {given.alpha:g}")
    for samples in (int(text) for text in given.samples.split(",")):
        reached: dict[str, list[int]] = {"shared": [], "independent": []}
        last: dict[str, list[float]] = {"shared": [], "independent": []}
        for seed in range(given.seeds):
            for name, way in two_ways(net, task, samples, seed).items():
                seen = train(net, task, study, way, given.steps, 25)
                good = [step for step, kept, right in seen if right >= given.accuracy * whole and kept <= given.kept]
                reached[name].append(good[0] if good else given.steps + 1)
                last[name].append(seen[-1][2])
        for name, steps in reached.items():
            shown = ", ".join(str(step) if step <= given.steps else "never" for step in steps)
            print(
                f"{samples} samples, {name:11}: {shown}; accuracy at the end {statistics.fmean(last[name]):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
