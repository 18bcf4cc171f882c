"""Masks in reduced precision: add-mul under autocast, so that layers take and give bfloat16; logits and noise do not.

sublens inspect examples/bfloat16.py --network FILE asks the questions of add-mul; without --network, the network is
trained in bfloat16 too. Accuracies are measured in float32.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import sublens as sl
from sublens.studies import add_mul


def reduced(task: sl.Task) -> sl.Task:
    """The task, with its loss under autocast: nothing else has to change."""

    def loss(network: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return task.loss(network, batch)

    return replace(task, loss=loss)


def study(preset: str = "quick", *, widths: Sequence[int] = (400, 400, 200)) -> sl.Study:
    """Return the study add-mul, trained in bfloat16."""
    plain = add_mul.study(preset, widths=widths)
    assert plain.control is not None
    tasks = [reduced(task) for task in plain.tasks]
    return replace(plain, name="add-mul-bfloat16", tasks=tasks, control=reduced(plain.control))
