"""Hugging Face Accelerate: a loop of your own, with its gradient accumulation."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import sublens as sl


def main(epochs: int = 4) -> sl.Mask:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 4))
    x = torch.randn(4096, 16)
    data = TensorDataset(x, x[:, :4].argmax(dim=1))

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    masked = sl.MaskedNetwork(network, samples=4, seed=0)
    optimizer = torch.optim.Adam(masked.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(masked, optimizer, DataLoader(data, batch_size=128, shuffle=True))
    for _ in range(epochs):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(inputs), targets) + masked.penalty(1e-6))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    mask = accelerator.unwrap_model(model).mask()
    with mask.applied(network), torch.no_grad():
        accuracy = (network(x).argmax(dim=1) == data.tensors[1]).float().mean()
    print(f"{mask.kept:.1%} of the weights kept, accuracy {accuracy:.3f}")
    return mask


if __name__ == "__main__":
    main()
