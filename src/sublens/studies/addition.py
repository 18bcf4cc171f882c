"""The world of double addition: two independent additions modulo 100 side by side (paper, section 3.2).

There are 10^8 different problems, so none is listed: problems are drawn, as a pure function of a seed and a step.

Shapes: N problems, P = 2 pairs, 2 numbers of a pair, 2 digits of a number (tens, units), 10 values of a digit.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from sublens.study import Task, seed_from

PAIRS = ("first", "second")
INPUTS = 80  # pair, number, digit, value
OUTPUTS = 40  # pair, digit, value
_NUMBERS = 100
_VALIDATION = 10_000
_ROWS = 5_000  # measured at a time, so that the widest networks need no gigabytes for their activations

Batch = tuple[Tensor, Tensor, Tensor]
"""Inputs [R, I], right digits (int64 [R, P, 2]), and which pairs are asked for (bool [R, P]); R rows."""


def draw(count: int, *seed: object) -> Tensor:
    """Return ``count`` problems, a pure function of ``seed``: uint8 [N, P, 2], numbers in 0..99, all equally likely."""
    generator = torch.Generator().manual_seed(seed_from("double-addition", *seed))
    return torch.randint(_NUMBERS, (count, len(PAIRS), 2), generator=generator, dtype=torch.uint8)


def one_hot(numbers: Tensor, shown: Tensor | None = None) -> Tensor:
    """Return the inputs (float32 [N, I]) of ``numbers`` [N, P, 2]; pairs that are not ``shown`` [N, P] are zero."""
    digits = torch.stack([numbers // 10, numbers % 10], dim=-1).long()
    encoded = functional.one_hot(digits, 10).float()
    if shown is not None:
        encoded = encoded * shown[:, :, None, None, None]
    return encoded.flatten(1)


def sums(numbers: Tensor) -> Tensor:
    """Return the digits of each pair's sum modulo 100: int64 [N, P, 2]."""
    results = numbers.long().sum(-1) % _NUMBERS
    return torch.stack([results // 10, results % 10], dim=-1)


def rows(numbers: Tensor, asked: Sequence[int], *, alone: bool) -> Batch:
    """Lay problems out for a network.

    Args:
        numbers: [N, P, 2].
        asked: the pairs whose sums are asked for. The inputs of the others are zero.
        alone: show each pair in a row of its own, the other pair's inputs zero, as the paper does with a network
            without memory. The rows of a problem follow each other.
    """
    pairs = torch.zeros(len(numbers), len(PAIRS), dtype=torch.bool)
    pairs[:, list(asked)] = True
    if alone:
        numbers = numbers.repeat_interleave(len(asked), 0)
        pairs = torch.eye(len(PAIRS), dtype=torch.bool)[list(asked)].repeat(len(pairs), 1)
    return one_hot(numbers, pairs), sums(numbers), pairs


def loss(net: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each digit asked for, averaged over digits, pairs and examples."""
    inputs, digits, asked = batch
    outputs = net(inputs).view(-1, len(PAIRS), 2, 10)
    return functional.cross_entropy(outputs[asked].flatten(0, 1), digits[asked].flatten())


def right(net: nn.Module, numbers: Tensor, *, alone: bool) -> Tensor:
    """Return which pairs of each problem ``net`` answers right (bool [N, P]), both of them put to it."""
    found = []
    with torch.no_grad():
        for part in numbers.split(_ROWS):
            inputs, digits, asked = rows(part, range(len(PAIRS)), alone=alone)
            answers = net(inputs).view(-1, len(PAIRS), 2, 10).argmax(-1)
            found.append((answers == digits).all(-1)[asked].view(-1, len(PAIRS)))
    return torch.cat(found)


@cache
def _set(name: str, count: int) -> Tensor:
    # The same set for every seed of a run, as in the paper's code: a run's seed changes the order, not the set.
    return draw(count, name)


def task(name: str, asked: Sequence[int], batch_size: int, *, alone: bool, train_samples: int | None) -> Task:
    """Return the task of adding some of the pairs.

    Its metric is the share of 10,000 drawn problems in which all ``asked`` pairs are right, with both put to the
    network.

    Args:
        name: name of the task.
        asked: the pairs, by number.
        batch_size: problems in a batch.
        alone: see :func:`rows`.
        train_samples: size of the training set, drawn with replacement; ``None`` draws every batch anew from all 10^8.
    """

    def batches(step: int, seed: int) -> Batch:
        if train_samples is None:
            return rows(draw(batch_size, seed, step), asked, alone=alone)
        generator = torch.Generator().manual_seed(seed_from(seed, step))
        chosen = torch.randint(train_samples, (batch_size,), generator=generator)
        return rows(_set("train", train_samples)[chosen], asked, alone=alone)

    def accuracy(net: nn.Module) -> float:
        answered = right(net, _set("validation", _VALIDATION), alone=alone)
        return answered[:, list(asked)].all(1).double().mean().item()

    return Task(name=name, batches=batches, loss=loss, metric=accuracy)
