"""Gradient checkpointing: blocks are run again in the backward pass, under the same masked weights, instead of kept."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import sublens as sl


class Blocks(nn.Module):
    """A network that checkpoints its own blocks, as those do that would not fit otherwise."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )
        self.runs = 0  # how often a block was run

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        self.runs += 1
        return x + block(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(self.run, block, x, use_reentrant=False)
        return self.last(x)


def main(steps: int = 100) -> sl.Mask:
    torch.manual_seed(0)
    network = Blocks()
    x = torch.randn(2048, 16)
    y = x[:, :4].argmax(dim=1)

    masked = sl.MaskedNetwork(network, samples=4, seed=0)
    optimizer = torch.optim.Adam(masked.parameters(), lr=0.1)
    for step in range(steps):
        rows = torch.arange(128) + 128 * (step % 16)
        loss = cross_entropy(masked(x[rows]), y[rows]) + masked.penalty(1e-6)
        optimizer.zero_grad()
        loss.backward()  # here each block is run a second time, for each of the four samples
        optimizer.step()

    mask = masked.mask()
    runs = network.runs / steps
    with mask.applied(network), torch.no_grad():
        accuracy = (network(x).argmax(dim=1) == y).float().mean()
    print(f"{mask.kept:.1%} of the weights kept, accuracy {accuracy:.3f}, {runs:.0f} runs of a block in each step")
    return mask


if __name__ == "__main__":
    main()
