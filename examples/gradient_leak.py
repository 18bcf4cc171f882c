"""Why the official code's masks are sparser for the same alpha: the algorithm without the leak and with it.

One network learns to add and to multiply (400-400-200, add-mul). Then the mask for adding is trained on it twice, with
the same batches and the same noise. The two runs differ in one thing only. In the second, as in the official code of
the paper's authors, the frozen weights still require gradients; the optimizer, which knows only the logits, never
clears them; and the clip runs over weights and logits together.

    python examples/gradient_leak.py [--steps 3000] [--svg docs/figures/gradient_leak.svg]

Nothing of sublens is used. Source of the method: Csordas, van Steenkiste and Schmidhuber (ICLR 2021), section 2.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

BATCH, SAMPLES, ALPHA, CLIP = 128, 4, 1e-4, 1.0
START = 2.0  # of every logit
EVERY = 250  # steps between two measurements

Point = tuple[int, float, float, float]
"""Step, share of the weights kept, share of problems right, and the mean factor of the clip since the last point."""


def problems() -> tuple[Tensor, Tensor]:
    """All 20,000 problems, additions first: inputs [20000, 42] and the digits of the results [20000, 2]."""
    first, second = torch.arange(100).repeat_interleave(100), torch.arange(100).repeat(100)
    digits = torch.stack([first // 10, first % 10, second // 10, second % 10], 1)
    numbers = one_hot(digits, 10).flatten(1).repeat(2, 1)
    told = one_hot(torch.arange(2).repeat_interleave(10_000), 2)
    results = torch.cat([(first + second) % 100, first * second % 100])
    return torch.cat([numbers, told], 1).float(), torch.stack([results // 10, results % 10], 1)


def loss_of(outputs: Tensor, digits: Tensor) -> Tensor:
    """Cross-entropy of each digit, averaged."""
    return cross_entropy(outputs.view(-1, 10), digits.flatten())


def trained_network(inputs: Tensor, digits: Tensor, steps: int) -> nn.Sequential:
    """A network that adds and multiplies."""
    torch.manual_seed(0)
    sizes = [42, 400, 400, 200, 20]
    layers = [layer for before, after in itertools.pairwise(sizes) for layer in (nn.Linear(before, after), nn.ReLU())]
    network = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (BATCH,))
        optimizer.zero_grad()
        loss_of(network(inputs[rows]), digits[rows]).backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
    return network


def masked(network: nn.Sequential, gates: list[Tensor], x: Tensor) -> Tensor:
    """The network's outputs with each layer's weight multiplied by its gates."""
    for number, (layer, gate) in enumerate(zip(network[::2], gates, strict=True)):
        x = torch.nn.functional.linear(torch.relu(x) if number else x, layer.weight * gate, layer.bias)
    return x


def sampled(logits: Tensor) -> Tensor:
    """One draw of gates: 0 or 1 forward, the relaxed sample's gradient backward."""
    u = torch.rand_like(logits).clamp(1e-10, 1 - 1e-7)
    soft = torch.sigmoid(logits + u.log() - (1 - u).log())
    return (soft > 0.5).float() - soft.detach() + soft


def train_mask(network: nn.Sequential, inputs: Tensor, digits: Tensor, steps: int, *, leak: bool) -> Iterator[Point]:
    """Train a mask and measure it on the way."""
    weights = list(network.parameters())
    for weight in weights:
        weight.requires_grad_(leak)
        weight.grad = None
    logits = [torch.full_like(layer.weight, START).requires_grad_() for layer in network[::2]]
    optimizer = torch.optim.Adam(logits, lr=1e-2)
    factors = [1.0]
    torch.manual_seed(1)
    for step in range(steps + 1):
        if step % EVERY == 0:
            yield step, *measure(network, logits, inputs, digits), sum(factors) / len(factors)
            factors = []
        rows = torch.randint(len(inputs), (BATCH,))
        optimizer.zero_grad()  # the logits' gradients, and theirs only
        outputs = [masked(network, list(map(sampled, logits)), part) for part in inputs[rows].chunk(SAMPLES)]
        loss_of(torch.cat(outputs), digits[rows]).backward()
        (ALPHA / BATCH * sum(logit.sum() for logit in logits)).backward()
        norm = nn.utils.clip_grad_norm_([*logits, *weights] if leak else logits, CLIP)
        factors.append(min(1.0, CLIP / (norm.item() + 1e-6)))
        optimizer.step()


@torch.no_grad()
def measure(network: nn.Sequential, logits: list[Tensor], inputs: Tensor, digits: Tensor) -> tuple[float, float]:
    """Share of the weights that the mask keeps, and the share of problems answered right under it."""
    gates = [(logit > 0).float() for logit in logits]
    answers = masked(network, gates, inputs).view(-1, 2, 10).argmax(-1)
    kept = sum(gate.sum().item() for gate in gates) / sum(gate.numel() for gate in gates)
    return kept, (answers == digits).all(1).float().mean().item()


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """Write both curves as an SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "sublens", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 3.0), layout="constrained")
    for (name, points), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot([p[0] for p in points], [p[1] for p in points], style, color="black", label=name)
    axes.set(xlabel="mask training steps", ylabel="share of weights kept", ylim=(0, 1.02))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Train the network and both masks, and print what they keep."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--network-steps", type=int, default=5000)
    options.add_argument("--steps", type=int, default=3000, help="of each mask")
    options.add_argument("--svg", type=Path, help="file for the figure")
    asked = options.parse_args()
    inputs, digits = problems()
    network = trained_network(inputs, digits, asked.network_steps)
    inputs, digits = inputs[:10_000], digits[:10_000]  # additions only
    kinds = {"as stated": False, "with the leak": True}
    curves: dict[str, list[Point]] = {name: [] for name in kinds}
    for name, leak in kinds.items():
        print(f"{name}\n  step   kept  right  mean clip factor")
        for point in train_mask(network, inputs, digits, asked.steps, leak=leak):
            curves[name].append(point)
            print("{:>6}  {:.3f}  {:.3f}  {:.3f}".format(*point), flush=True)
    if asked.svg:
        draw(curves, asked.svg)


if __name__ == "__main__":
    main()
