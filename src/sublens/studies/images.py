"""Tasks of classifying images: which of some classes is it?"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sublens.mask import Mask, fingerprint
from sublens.studies.image_files import Images
from sublens.study import Task, seed_from

_AT_A_TIME = 1000  # images in one call when a network is measured
_MARGIN = 4  # pixels by which an augmented image is shifted at most

CONV_PAPER: dict[str, Any] = {
    "width": 32,
    "network_steps": 20_000,
    "mask_steps": 20_000,
    "mask_lr": 1e-3,
    "alpha": 3e-4,
    "batch_size": 128,
}
"""The paper's settings of its convolutional network, for all studies of it."""
CONV_QUICK: dict[str, Any] = {
    **CONV_PAPER,
    "width": 16,
    "network_steps": 600,
    "network_lr": 2e-3,
    # 400 steps of 6e-2 can take a logit as far as 24,000 of the paper's; a larger alpha, since they are few.
    "mask_steps": 400,
    "mask_lr": 6e-2,
    "alpha": 6e-4,
    "evaluate_every": 200,
}
"""Minutes instead of hours; a network half as wide."""

Batch = tuple[Tensor, Tensor]
Confusion = Mapping[str, Mapping[str, float]]
"""Class of the image -> class answered -> share of that class's images, 0 to 1."""


def loss(net: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy over all classes. ``batch`` is inputs [N, C, H, W] and labels [N]."""
    inputs, labels = batch
    return functional.cross_entropy(net(inputs), labels)


@dataclass(frozen=True)
class _Answered:
    """What a network, in one state of its weights, answered to all test images of a data set."""

    network: "weakref.ref[nn.Module]"
    state: str
    images: Images
    answers: Tensor


_last: _Answered | None = None


def answers(net: nn.Module, images: Images) -> Tensor:
    """Return the classes (int64 [N]) that ``net`` answers to the test images.

    The tasks of a study are measured one after the other on the same images, so the last answers are remembered, with
    the state of the weights that gave them.
    """
    global _last
    state = fingerprint(net)
    if (
        _last is None
        or _last.network() is not net
        or _last.state != state
        or _last.images is not images
        or net.training
    ):
        with torch.no_grad():
            parts = images.test.pixels.split(_AT_A_TIME)
            given = torch.cat([net(images.standard(part)).argmax(-1) for part in parts])
        _last = _Answered(weakref.ref(net), state, images, given)
    return _last.answers


def image_task(
    name: str,
    images: Images,
    classes: Sequence[int],
    batch_size: int,
    *,
    augment: bool = False,
    leaves_out: bool = False,
) -> Task:
    """Return the task of telling some classes apart, with all classes as possible answers.

    Args:
        name: name of the task.
        images: the data set.
        classes: whose images the batches are drawn from, and the accuracy is measured on.
        batch_size: images in a batch, drawn with replacement.
        augment: shift and mirror each training image by chance, as is usual for CIFAR-10 (padding of 4 pixels, a
            random crop, a random horizontal flip).
        leaves_out: whether the other classes are something else that the network can do, and is asked for.
    """
    chosen = tuple(classes)
    train, test = images.train.of(chosen), images.test.of(chosen)
    others = images.test.of(tuple(number for number in range(len(images.classes)) if number not in chosen))

    def batches(step: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed_from(seed, step))
        rows = train[torch.randint(len(train), (batch_size,), generator=generator)]
        inputs = images.standard(images.train.pixels[rows])
        return _augmented(inputs, generator) if augment else inputs, images.train.labels[rows]

    def accuracy(rows: Tensor, net: nn.Module) -> float:
        return (answers(net, images) == images.test.labels)[rows].double().mean().item()

    return Task(
        name=name,
        batches=batches,
        loss=loss,
        metric=partial(accuracy, test),
        left_out=partial(accuracy, others) if leaves_out and len(others) else None,
    )


def _augmented(inputs: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = inputs.shape
    padded = functional.pad(inputs, (_MARGIN,) * 4)
    down, right = torch.randint(2 * _MARGIN + 1, (2, count, 1, 1), generator=generator)
    flipped = torch.rand(count, 1, 1, generator=generator) < 0.5
    columns = torch.arange(width)
    columns = torch.where(flipped, columns.flip(0), columns) + right
    rows = torch.arange(height).view(1, -1, 1) + down
    # Channels last while images, rows and columns are chosen together, then back.
    return padded.permute(0, 2, 3, 1)[torch.arange(count).view(-1, 1, 1), rows, columns].permute(0, 3, 1, 2)


def confusion(images: Images) -> Callable[[nn.Module], Confusion]:
    """Return the function that says, for the test images of each class, which share is taken for which class."""
    count = len(images.classes)

    def told(net: nn.Module) -> Confusion:
        pairs = images.test.labels * count + answers(net, images)
        shares = pairs.bincount(minlength=count**2).view(count, count).double()
        shares /= shares.sum(1, keepdim=True).clamp_min(1)
        return {
            name: dict(zip(images.classes, line, strict=True))
            for name, line in zip(images.classes, shares.tolist(), strict=True)
        }

    return told


def layers_of(mask: Mask) -> dict[str, list[str]]:
    """Return the masked tensors by the module that holds them (weight and bias are one layer), in their order."""
    found: dict[str, list[str]] = {}
    for name in mask:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found
