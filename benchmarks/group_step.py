"""What one step of mask training costs in each granularity, in plain training steps of the same network.

    python benchmarks/group_step.py [row column 16x16 ...]

Steps take turns within one process; the medians of their CPU time are compared, which other programs disturb least. Use
one thread (OMP_NUM_THREADS=1), since CPU time adds up over threads.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import sublens as sl

ROUNDS, SAMPLES = 15, 4


def mlp() -> nn.Module:
    """The add-mul study's network, four layers of 800."""
    hidden = [layer for _ in range(3) for layer in (nn.Linear(800, 800), nn.ReLU())]
    return nn.Sequential(nn.Linear(42, 800), nn.ReLU(), *hidden, nn.Linear(800, 20))


def convolutional() -> nn.Module:
    """Three convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def step_of(
    module: nn.Module, x: Tensor, y: Tensor, lr: float, penalty: Callable[[], Tensor] | None
) -> Callable[[], None]:
    """One step of Adam on a module's parameters."""
    optimizer = torch.optim.Adam(module.parameters(), lr=lr, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(module(x), y).backward()
        if penalty is not None:
            penalty().backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure and print."""
    kinds = sys.argv[1:] or ["weight", "row", "column", "kernel", "layer", "16x16"]
    torch.manual_seed(0)
    for label, make, x in (("4 x 800", mlp, torch.randn(128, 42)), ("conv", convolutional, torch.randn(64, 3, 32, 32))):
        network, y = make(), torch.randint(0, 10, (len(x),))
        steps = {"plain": step_of(network, x, y, 0.0, None)}
        for kind in kinds:
            masked = sl.MaskedNetwork(network, groups=kind, samples=SAMPLES)
            steps[kind] = step_of(masked, x, y, 1e-2, lambda masked=masked: masked.penalty(1e-6))
        times: dict[str, list[float]] = {kind: [] for kind in steps}
        for turn in range(ROUNDS + 2):
            for kind, step in steps.items():
                start = time.process_time()
                step()
                if turn >= 2:  # the first ones find out which way to go
                    times[kind].append(time.process_time() - start)
        plain = statistics.median(times["plain"])
        print(f"{label}: plain step {plain * 1e3:.1f} ms; with {SAMPLES} samples, in plain steps:")
        print("  " + ", ".join(f"{kind} {statistics.median(seen) / plain:.2f}" for kind, seen in times.items()))


if __name__ == "__main__":
    main()
