"""Lightning Fabric: a loop of your own on Fabric's devices and precisions."""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import sublens as sl


def main(epochs: int = 3) -> sl.Mask:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 4))
    x = torch.randn(4096, 16)
    data = TensorDataset(x, x[:, :4].argmax(dim=1))

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    masked = sl.MaskedNetwork(network, samples=4, seed=0)
    model, optimizer = fabric.setup(masked, torch.optim.Adam(masked.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=128, shuffle=True))
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            fabric.backward(cross_entropy(model(inputs), targets) + masked.penalty(1e-6))
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()

    mask = masked.mask()
    with mask.applied(network), torch.no_grad():
        accuracy = (network(x).argmax(dim=1) == data.tensors[1]).float().mean()
    print(f"{mask.kept:.1%} of the weights kept, accuracy {accuracy:.3f}")
    return mask


if __name__ == "__main__":
    main()
