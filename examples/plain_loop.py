"""A loop of your own: DataLoader workers, mixed precision, gradient accumulation, a schedule, a rate for each layer."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import sublens as sl


def main(steps: int = 60, workers: int = 2) -> sl.Mask:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
    x = torch.randn(4096, 16)
    data = TensorDataset(x, x[:, :4].argmax(dim=1))
    loader = DataLoader(data, batch_size=128, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    masked = sl.MaskedNetwork(network, samples=4, seed=0)
    first, *others = masked.logits.values()  # name -> logits, so any grouping is a few lines
    optimizer = torch.optim.Adam([{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.2}])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=steps)

    accumulate, done = 2, 0
    while done < steps:
        for part, (inputs, targets) in enumerate(loader, start=1):
            with torch.autocast("cpu", dtype=torch.bfloat16):  # logits stay float32, so no GradScaler is needed
                loss = cross_entropy(masked(inputs), targets)
            (loss / accumulate).backward()  # every call of masked draws gates of its own
            if part % accumulate:
                continue
            masked.penalty(1e-6).backward()  # once for each step of the optimizer
            torch.nn.utils.clip_grad_norm_(masked.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            done += 1
            if done == steps:
                break

    mask = masked.mask()
    with mask.applied(network), torch.no_grad():
        accuracy = (network(x).argmax(dim=1) == data.tensors[1]).float().mean()
    print(f"{mask.kept:.1%} of the weights kept, accuracy {accuracy:.3f}, learning rates {schedule.get_last_lr()}")
    return mask


if __name__ == "__main__":
    main()
