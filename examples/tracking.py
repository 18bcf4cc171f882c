"""TensorBoard, or any other tracker: a callback of three lines. Then: tensorboard --logdir runs"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter

import sublens as sl


def main(steps: int = 200) -> sl.Run:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 4))
    x = torch.randn(4096, 16)
    y = x[:, :4].argmax(dim=1)

    def batches(step):
        chosen = torch.arange(128 * step, 128 * (step + 1)) % len(x)
        return x[chosen], y[chosen]

    def loss(net, batch):
        return cross_entropy(net(batch[0]), batch[1])

    def accuracy(net):
        return {"accuracy": (net(x).argmax(dim=1) == y).float().mean()}

    with SummaryWriter("runs/mask") as writer:

        def log(
            record,
        ):  # a tracker's own call takes the place of add_scalar: wandb.log(record), mlflow.log_metrics(...)
            for name, value in record.items():
                if name != "step" and value is not None:
                    writer.add_scalar(name, value, record["step"])

        run = sl.fit(
            network, batches, loss, steps=steps, alpha=1e-6, lr=0.1, evaluate=accuracy, evaluate_every=50,
            record_every=10, callbacks=[log], progress=False,
        )  # fmt: skip
    print(f"{run.mask.kept:.1%} of the weights kept, accuracy {run.history[-1]['accuracy']:.3f}")
    return run


if __name__ == "__main__":
    main()
