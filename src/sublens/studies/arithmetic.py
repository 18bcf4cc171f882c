"""The world of add-mul: two numbers of two digits, an operation, and a result modulo 100 (paper, section 3.1).

There are only 20,000 different problems, so all of them are laid out once, and a batch is a set of row numbers.

Shapes: N problems, I = 42 inputs (4 digits of 10, 2 operations), O = 20 outputs (2 digits of 10).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from sublens.study import Task, seed_from

OPERATIONS = ("add", "mul")
INPUTS = 42
OUTPUTS = 20
_NUMBERS = 100


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Every problem, once. Row = operation * 10,000 + first number * 100 + second number.

    Attributes:
        inputs: float32 [20000, I], one-hot: tens and units of both numbers, then the operation.
        digits: int64 [20000, 2], tens and units of the result modulo 100.
        results: int64 [2, 10000], the result of each pair of numbers under each operation.
    """

    inputs: Tensor
    digits: Tensor
    results: Tensor


@cache
def problems() -> Problems:
    """Lay out the 20,000 problems (once per process)."""
    first = torch.arange(_NUMBERS).repeat_interleave(_NUMBERS)
    second = torch.arange(_NUMBERS).repeat(_NUMBERS)
    results = torch.stack([(first + second) % _NUMBERS, (first * second) % _NUMBERS])
    numbers = torch.stack([first // 10, first % 10, second // 10, second % 10], dim=1)
    digits = functional.one_hot(numbers, 10).flatten(1).float()
    blocks = []
    for operation in range(len(OPERATIONS)):
        chosen = torch.zeros(len(first), len(OPERATIONS))
        chosen[:, operation] = 1
        blocks.append(torch.cat([digits, chosen], dim=1))
    answers = results.flatten()
    return Problems(inputs=torch.cat(blocks), digits=torch.stack([answers // 10, answers % 10], dim=1), results=results)


def rows_of(operations: Sequence[str]) -> Tensor:
    """Return the row numbers (int64) of all problems of the named operations."""
    size = _NUMBERS * _NUMBERS
    return torch.cat([torch.arange(size) + size * OPERATIONS.index(name) for name in operations])


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each digit, averaged over digits and examples. ``batch`` is inputs [N, I] and digits [N, 2]."""
    inputs, digits = batch
    return functional.cross_entropy(net(inputs).view(-1, 10), digits.flatten())


def answers(net: nn.Module, rows: Tensor) -> Tensor:
    """Return what ``net`` answers (int64 [N], 0..99) to the problems in ``rows``."""
    with torch.no_grad():
        # A few thousand at a time, so that the widest networks need no gigabytes for their activations.
        digits = torch.cat([net(problems().inputs[part]).view(-1, 2, 10).argmax(-1) for part in rows.split(5000)])
    return digits[:, 0] * 10 + digits[:, 1]


def task(
    name: str, operations: Sequence[str], batch_size: int, train_samples: int | None, validation_samples: int | None
) -> Task:
    """Return the task of the named operations.

    Args:
        name: name of the task.
        operations: of :data:`OPERATIONS`.
        batch_size: problems in a batch.
        train_samples: size of the training set, drawn with replacement; ``None`` trains on all problems alike.
        validation_samples: size of the validation set, drawn with replacement; ``None`` measures on each problem once.
    """
    everything = rows_of(operations)
    train = everything if train_samples is None else _drawn(everything, train_samples, "train", name)
    held = everything if validation_samples is None else _drawn(everything, validation_samples, "validation", name)
    right = problems().results.flatten()[held]

    def batches(step: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed_from(seed, step))
        rows = train[torch.randint(len(train), (batch_size,), generator=generator)]
        return problems().inputs[rows], problems().digits[rows]

    def accuracy(net: nn.Module) -> float:
        return (answers(net, held) == right).double().mean().item()

    return Task(name=name, batches=batches, loss=loss, metric=accuracy)


def _drawn(rows: Tensor, count: int, *label: str) -> Tensor:
    # The same set for every seed of a run, as in the paper's code: a run's seed changes the order, not the set.
    generator = torch.Generator().manual_seed(seed_from("add-mul", *label))
    return rows[torch.randint(len(rows), (count,), generator=generator)]


def confusion() -> Callable[[nn.Module], dict[str, dict[str, float]]]:
    """Return the function that says whether a network adds when told to multiply, and the other way round.

    It gives, for each operation told, the share of answers that equal the sum, the product, or neither, over the pairs
    of numbers whose sum and product differ (modulo 100).
    """
    sums, products = problems().results
    pairs = (sums != products).nonzero().flatten()

    def told(net: nn.Module) -> dict[str, dict[str, float]]:
        table = {}
        for position, operation in enumerate(OPERATIONS):
            given = answers(net, pairs + position * _NUMBERS * _NUMBERS)
            added = (given == sums[pairs]).double().mean().item()
            multiplied = (given == products[pairs]).double().mean().item()
            neither = ((given != sums[pairs]) & (given != products[pairs])).double().mean().item()
            table[operation] = {"sum": added, "product": multiplied, "neither": neither}
        return table

    return told
