"""What one step of mask training costs, in plain training steps of the same network.

    python benchmarks/masked_step.py [--widths 400,400,200 800,800,800,800 ...] [--json FILE]

Checks equality first (the fused path against the reference path, samples and gradients), then times, in turns within
one process, a plain training step and masked steps with 1, 4 and 8 samples, and the textbook rival; prints the median
of the ratios taken pair by pair. Peak memory is read in a process of its own for each kind of step.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path

import torch
from rival import TextbookMasks
from torch import Tensor, nn
from torch.nn import functional

import sublens as sl

BATCH, INPUTS, OUTPUTS, ALPHA = 128, 42, 20, 1e-4 / 128
WIDTHS = ("400,400,200", "800,800,800,800", "2000,2000,2000,2000", "4000,4000,4000,4000")
KINDS = ("sublens 1", "sublens 4", "sublens 8", "rival 4")
Step = Callable[[], float]


def network(widths: list[int]) -> nn.Sequential:
    """A feed-forward ReLU network of the add-mul study."""
    torch.manual_seed(0)
    sizes = [INPUTS, *widths, OUTPUTS]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batch() -> tuple[Tensor, Tensor]:
    """One batch of that study's shapes."""
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(BATCH, INPUTS, generator=generator) < 0.12).float()
    return x, torch.randint(0, 10, (BATCH * 2,), generator=generator)


def stepper(kind: str, widths: list[int]) -> Step:
    """A function that does one step of a kind (``"plain"`` or one of KINDS) and returns the loss."""
    net, (x, y) = network(widths), batch()
    penalty: Callable[[float], Tensor] | None = None
    module: nn.Module = net
    if kind.startswith("sublens"):
        masked = sl.MaskedNetwork(net, samples=int(kind.split()[1]))
        module, penalty = masked, masked.penalty
    elif kind.startswith("rival"):
        linear = [layer for layer in net if isinstance(layer, nn.Linear)]
        rival = TextbookMasks(linear, int(kind.split()[1]), 2.197)
        module, penalty = rival, rival.penalty
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3 if penalty is None else 1e-2, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(module(x).view(-1, 10), y)
        if penalty is not None:
            loss = loss + penalty(ALPHA)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return step


def check_equality(widths: list[int]) -> None:
    """Raise unless the fused path gives the reference path's outputs and gradients for 4 samples."""
    x, y = batch()
    found = []
    for path in ("auto", "reference"):
        os.environ["SUBLENS_KERNELS"] = path
        masked = sl.MaskedNetwork(network(widths))
        loss = functional.cross_entropy(masked(x).view(-1, 10), y)
        loss.backward()
        found.append((loss.item(), {name: logits.grad for name, logits in masked.logits.items()}))
    os.environ["SUBLENS_KERNELS"] = "auto"
    (loss_a, a), (loss_b, b) = found
    # The same samples, but sums in another order: some 2,000 float32 roundings of random sign.
    torch.testing.assert_close(loss_a, loss_b, rtol=1e-5, atol=0)
    for name in a:
        scale = float(b[name].abs().max())
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5 * scale)


def seconds(step: Step) -> float:
    """Wall time of one step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def times(widths: list[int], budget: float) -> dict[str, float]:
    """Median seconds of a plain step under ``"plain"``, and median ratio to the plain step beside it for each kind."""
    plain, found = stepper("plain", widths), {}
    taken: list[float] = []
    for kind in KINDS:
        step = stepper(kind, widths)
        seconds(plain), seconds(step)
        first = seconds(plain) + seconds(step)
        ratios = []
        for _ in range(max(5, min(50, int(budget / first)))):
            base = seconds(plain)
            taken.append(base)
            ratios.append(seconds(step) / base)
        found[kind] = statistics.median(ratios)
    return {"plain": statistics.median(taken), **found}


def peak_bytes(kind: str, widths: str) -> int:
    """Peak memory of three steps beyond a process that has only imported everything."""
    command = [sys.executable, __file__, "--peak", kind, "--widths", widths]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(out.split()[-1])


def print_peak(kind: str, widths: list[int]) -> None:
    """Print the bytes that :func:`peak_bytes` reads."""
    stepper("sublens 1", [8])()  # loads and compiles all code
    before = high_water()
    step = stepper(kind, widths)
    for _ in range(3):
        step()
    print(high_water() - before)


def high_water() -> int:
    """Largest resident size of this process so far, in bytes (Linux)."""
    # Not getrusage: its maximum is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS), help="hidden layers, as 400,400,200")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each pair of steps that is timed")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak, [int(w) for w in args.widths[0].split(",")])
        return
    rows = {}
    print(
        f"{'widths':22} {'plain ms':>9} " + " ".join(f"{kind:>10}" for kind in KINDS) + "   peak memory: 4 samples, 8"
    )
    for text in args.widths:
        widths = [int(w) for w in text.split(",")]
        check_equality(widths)
        row = times(widths, args.budget)
        plain = max(peak_bytes("plain", text), 1)
        memory = {kind: peak_bytes(kind, text) / plain for kind in ("sublens 4", "sublens 8")}
        rows[text] = {"ratio": row, "memory": memory}
        shown = " ".join(f"{row[kind]:10.2f}" for kind in KINDS)
        print(
            f"{text:22} {row['plain'] * 1e3:9.2f} {shown}   {memory['sublens 4']:.2f}, {memory['sublens 8']:.2f}",
            flush=True,
        )
    if args.json:
        about = {"date": str(date.today()), "torch": torch.__version__, "processor": platform.processor()}
        args.json.write_text(json.dumps({**about, "threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
