"""What one step of mask training costs, in plain training steps of the same network.

    python benchmarks/masked_step.py [--networks 400,400,200 2000,2000,2000,2000 lstm conv transformer] [--json FILE]

A network is the widths of a feed-forward one's hidden layers, or one of residual, lstm, conv, transformer and large (a
Transformer of 101 M masked weights). The benchmark checks equality first (the fused path against the reference path,
outputs and gradients), then times, in turns within one process, a plain training step and masked steps, and prints the
median of the ratios taken pair by pair. "fit" is the step that ``sublens.fit`` makes, with 1, 4 and 8 samples; "loop"
the same in a loop of one's own with ``torch.optim.Adam``; "bfloat16" is "fit" with the loss under ``torch.autocast``,
beside the same plain step in float32; "textbook" the straightforward implementation (feed-forward networks only). Peak
memory is read in a process of its own for each kind of step.
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
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path

import torch
from rival import TextbookMasks
from torch import Tensor, nn
from torch.nn import functional

import sublens as sl
from sublens.fit.optimizers import Adam
from sublens.fit.training import update

BATCH, INPUTS, OUTPUTS, ALPHA = 128, 42, 20, 1e-4 / 128
NETWORKS = (
    "400,400,200",
    "800,800,800,800",
    "2000,2000,2000,2000",
    "4000,4000,4000,4000",
    "residual",
    "lstm",
    "conv",
    "transformer",
)
KINDS = ("fit 1", "fit 4", "fit 8", "loop 4", "bfloat16 1", "bfloat16 4", "textbook 4")
MEMORY = ("fit 1", "fit 4", "fit 8")
Step = Callable[[], float]


class Residual(nn.Module):
    """A feed-forward network with a forward of its own: two hidden layers of 400 that are added to what goes in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.output = nn.Linear(INPUTS, 400), nn.Linear(400, OUTPUTS)
        self.hidden = nn.ModuleList(nn.Linear(400, 400) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) to (B, out)."""
        x = functional.relu(self.first(x))
        for layer in self.hidden:
            x = x + functional.relu(layer(x))
        return self.output(x)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """The LSTM of the add-mul study."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(INPUTS, 256, 2, batch_first=True)
        self.output = nn.Linear(256, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) to (B, out): shown for three steps, answered at the last."""
        return self.output(self.lstm(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


class Encoder(nn.Module):
    """A Transformer encoder over sequences of vectors."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.output = nn.Linear(width, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) to (B, out)."""
        return self.output(self.encoder(x).mean(1))


def convolutional() -> nn.Module:
    """The convolutional network of the paper's image studies, on 32 x 32 images."""
    layers: list[nn.Module] = []
    for a, b in pairwise((3, 32, 64, 128, 256)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 4, OUTPUTS))


def network(name: str) -> nn.Module:
    """A network of its name, in evaluation mode."""
    torch.manual_seed(0)
    if name == "residual":
        return Residual().eval()
    if name == "lstm":
        return Recurrent().eval()
    if name == "conv":
        return convolutional().eval()
    if name == "transformer":
        return Encoder(256, 2).eval()
    if name == "large":
        return Encoder(1024, 8).eval()
    sizes = [INPUTS, *(int(width) for width in name.split(",")), OUTPUTS]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batch(name: str) -> tuple[Tensor, Tensor]:
    """One batch for that network."""
    generator = torch.Generator().manual_seed(1)
    shape = {"conv": (BATCH, 3, 32, 32), "transformer": (BATCH, 16, 256), "large": (16, 16, 1024)}.get(name)
    x = (
        torch.randn(*shape, generator=generator)
        if shape is not None
        else (torch.rand(BATCH, INPUTS, generator=generator) < 0.12).float()
    )
    return x, torch.randint(0, 10, (len(x) * 2,), generator=generator)


@dataclass(frozen=True)
class Settings:
    """What an update of ``fit`` asks its settings for."""

    penalty: str = "logits"
    clip: float = 1.0


def stepper(kind: str, name: str) -> Step:
    """A function that does one step of a kind (``"plain"`` or one of KINDS) and returns the loss."""
    net, (x, y) = network(name), batch(name)
    what, _, samples = kind.partition(" ")

    def loss_of(module: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=what == "bfloat16"):
            return functional.cross_entropy(module(x).view(-1, 10), y)

    if what in ("fit", "bfloat16"):
        masked = sl.MaskedNetwork(net, samples=int(samples))
        own = Adam(list(masked.parameters()), lr=1e-2)

        def fit_step() -> float:
            own.zero_grad()
            loss = loss_of(masked)
            value = loss.item()
            loss.backward()
            update(masked, own, Settings(), ALPHA)  # type: ignore[arg-type]
            return value

        return fit_step

    module, penalty = net, None
    if what == "loop":
        module = sl.MaskedNetwork(net, samples=int(samples))
        penalty = module.penalty
    elif what == "textbook":
        linear = [layer for layer in net.children() if isinstance(layer, nn.Linear)]
        module = TextbookMasks(linear, int(samples), 2.197)
        penalty = module.penalty
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3 if penalty is None else 1e-2, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(module)
        if penalty is not None:
            loss = loss + penalty(ALPHA)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return step


def check_equality(name: str) -> None:
    """Raise unless the fused path gives the reference path's loss and gradients for 4 samples."""
    x, y = batch(name)
    found = []
    for path in ("auto", "reference"):
        os.environ["SUBLENS_KERNELS"] = path
        masked = sl.MaskedNetwork(network(name))
        loss = functional.cross_entropy(masked(x).view(-1, 10), y)
        loss.backward()
        found.append((loss.item(), {name: logits.grad for name, logits in masked.logits.items()}))
    os.environ["SUBLENS_KERNELS"] = "auto"
    (loss_a, a), (loss_b, b) = found
    # The same samples, but sums in another order: some 2,000 float32 roundings of random sign.
    torch.testing.assert_close(loss_a, loss_b, rtol=1e-5, atol=0)
    for parameter in a:
        # As a whole: a ReLU whose input is zero but for rounding may fall either way, which moved the gradients of a
        # large Transformer by 1e-4 of their norm.
        error = float((a[parameter] - b[parameter]).norm() / b[parameter].norm())
        if not error < 1e-3:
            raise AssertionError(f"{name}: gradients of {parameter} differ by {error:.1e} of their norm")


def seconds(step: Step) -> float:
    """Wall time of one step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def kinds_for(name: str) -> list[str]:
    """The kinds of step that this network can make."""
    kinds = [kind for kind in KINDS if "," in name or not kind.startswith("textbook")]
    if name == "lstm" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # PyTorch's own LSTM fails under autocast to bfloat16 on processors without AVX-512, masked or not.
        kinds = [kind for kind in kinds if not kind.startswith("bfloat16")]
    return kinds


def times(name: str, budget: float) -> dict[str, float]:
    """Median seconds of a plain step under ``"plain"``, and median ratio to the plain step beside it for each kind."""
    plain, found = stepper("plain", name), {}
    taken: list[float] = []
    for kind in kinds_for(name):
        step = stepper(kind, name)
        seconds(plain), seconds(step)
        first = seconds(plain) + seconds(step)
        ratios = []
        for _ in range(max(5, min(50, int(budget / first)))):
            base = seconds(plain)
            taken.append(base)
            ratios.append(seconds(step) / base)
        found[kind] = statistics.median(ratios)
    return {"plain": statistics.median(taken), **found}


def peak_bytes(kind: str, name: str) -> int:
    """Peak memory of three steps beyond a process that has only imported everything: median of three processes."""
    command = [sys.executable, __file__, "--peak", kind, "--networks", name]
    # glibc takes ever larger blocks from its heap, where what is freed stays with the process: the same steps then hold
    # a half more, or a third, from one process to the next. So blocks go back to the system when they are freed.
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"}
    outs = [subprocess.run(command, capture_output=True, text=True, check=True, env=exact).stdout for _ in range(3)]
    return statistics.median_low(int(out.split()[-1]) for out in outs)


def print_peak(kind: str, name: str) -> None:
    """Print the bytes that :func:`peak_bytes` reads."""
    stepper("fit 1", "8")()  # loads and compiles all code
    before = high_water()
    step = stepper(kind, name)
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
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="widths as 400,400,200, or a name")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each pair of steps that is timed")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak, args.networks[0])
        return
    about = {"date": str(date.today()), "torch": torch.__version__, "processor": platform.processor()}
    rows = {}
    columns = " ".join(f"{kind:>10}" for kind in KINDS)
    print(f"{'network':22} {'plain ms':>9} {columns}   peak memory: {', '.join(MEMORY)}")
    for name in args.networks:
        check_equality(name)
        row = times(name, args.budget)
        plain = max(peak_bytes("plain", name), 1)
        memory = {kind: peak_bytes(kind, name) / plain for kind in MEMORY}
        rows[name] = {"ratio": row, "memory": memory, "plain peak bytes": plain}
        shown = " ".join(f"{row[kind]:10.2f}" if kind in row else f"{'':>10}" for kind in KINDS)
        peaks = ", ".join(f"{value:.2f}" for value in memory.values())
        print(f"{name:22} {row['plain'] * 1e3:9.2f} {shown}   {peaks}", flush=True)
        if args.json:  # after each row: what was measured stays if a later network fails
            found = {**about, "threads": torch.get_num_threads(), "rows": rows}
            args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
