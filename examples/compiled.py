"""torch.compile: compile the network, then mask it. The mask fits the network as it was before, too."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sublens as sl


def main(steps: int = 60, backend: str = "inductor") -> sl.Mask:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
    x = torch.randn(4096, 16)
    y = x[:, :4].argmax(dim=1)

    masked = sl.MaskedNetwork(torch.compile(network, backend=backend), samples=4, seed=0)
    optimizer = torch.optim.Adam(masked.parameters(), lr=0.2)
    for step in range(steps):
        chosen = torch.arange(128 * step, 128 * (step + 1)) % len(x)
        loss = cross_entropy(masked(x[chosen]), y[chosen]) + masked.penalty(1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # torch.compile puts "_orig_mod." before every name; without it the mask is one of the network itself.
    found = masked.mask()
    mask = sl.Mask({name.removeprefix("_orig_mod."): found[name] for name in found}, sl.fingerprint(network))
    with mask.applied(network), torch.no_grad():
        accuracy = (network(x).argmax(dim=1) == y).float().mean()
    print(f"{mask.kept:.1%} of the weights kept, accuracy {accuracy:.3f}")
    return mask


if __name__ == "__main__":
    main()
