"""A study of the handwritten digits that scikit-learn ships: are even digits and odd ones told by different weights?

sublens inspect examples/digits.py
sublens duel examples/digits.py --tasks all
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import sublens as sl
from sublens.study import seed_from

BATCH = 128
TRAIN = 1_437  # of 1,797; the rest measures


def study(width: int = 64) -> sl.Study:
    """Return the study of a network with two hidden layers."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]

    def task(name: str, wanted: list[int]) -> sl.Task:
        mine = torch.isin(labels, torch.tensor(wanted)).nonzero().flatten()
        train, test = mine[mine < TRAIN], mine[mine >= TRAIN]

        def batches(step: int, seed: int) -> tuple[Tensor, Tensor]:
            generator = torch.Generator().manual_seed(seed_from(seed, step))
            rows = train[torch.randint(len(train), (BATCH,), generator=generator)]
            return images[rows], labels[rows]

        def accuracy(net: nn.Module) -> float:
            # Among the task's own digits: a mask that shuts the others' outputs would look wiser than it is, or duller.
            given = net(images[test])[:, wanted].argmax(1)
            return (torch.tensor(wanted)[given] == labels[test]).double().mean().item()

        return sl.Task(name=name, batches=batches, loss=loss, metric=accuracy)

    return sl.Study(
        name="digits",
        network=lambda seed: nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        ),
        tasks=[task("even", [0, 2, 4, 6, 8]), task("odd", [1, 3, 5, 7, 9])],
        control=task("all", list(range(10))),
        batch_size=BATCH,
        network_steps=1_500,
        network_lr=3e-3,
        mask_steps=3_000,
        mask_lr=5e-2,
        evaluate_every=500,
        repeated=["even"],
        from_control=["4.weight"],  # the outputs belong to one task each; the question is asked of the layers before
        compared=["0.weight", "2.weight"],
        settings={"width": width},
    )


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy over the ten digits."""
    return functional.cross_entropy(net(batch[0]), batch[1])
