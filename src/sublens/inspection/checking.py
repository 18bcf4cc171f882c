"""What is refused before a run has a folder, since an untrained network shows it already."""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from sublens.analysis import measuring
from sublens.errors import SelectionError, StudyError, SublensError
from sublens.fit.batches import random_state_kept, seed_torch
from sublens.fit.training import check_first_loss
from sublens.inspection.network import build_network, load_network
from sublens.masked_network import MaskedNetwork
from sublens.selection import match_names
from sublens.study import Study, Task

log = logging.getLogger("sublens.inspection")


def check_study(study: Study, seed: int, weights: Path | None) -> None:
    """Refuse what an untrained network shows to be impossible already.

    Raises:
        StudyError: the study names layers that are not masked, or a metric returns no number in 0..1.
        BatchError: the first batch of a function cannot be split for the samples.
        CutGraphError: a loss does not reach the gates.
        SelectionError: ``where`` matches nothing that can be masked.
        SettingError: ``groups`` does not fit the network.
        MismatchError: the weights do not.
        FileError: they cannot be read.
    """
    net = build_network(study, seed) if weights is None else load_network(study, seed, weights)
    settings = study.fit_settings()
    taken = ("keep", "samples", "where", "biases", "groups", "batch_dim")

    def masked() -> MaskedNetwork:
        return MaskedNetwork(net, **{name: settings[name] for name in taken})

    names = list(masked().groupings)
    fresh = () if study.together is None else study.together.fresh
    for what, patterns in (("compared", study.compared), ("from_control", study.from_control), ("fresh", fresh)):
        try:
            match_names(patterns or (), names)
        except SelectionError as error:
            raise StudyError(f"Study {study.name!r}: {what} must name masked layers: {error}") from None
    unknown = [name for name in study.first_half or () if name not in names]
    if unknown:
        raise StudyError(
            f"Study {study.name!r}: first_half names {', '.join(unknown)}; the masked layers are {', '.join(names)}."
        )
    # Of an untrained network, but a number must come out. What fails there may not fail later, and is seen if it does.
    tasks = (study.control, *study.tasks)
    with random_state_kept(), measuring(net):
        for task in tasks:
            for what in ("metric", "held_back", "left_out"):
                if getattr(task, what) is not None:
                    seed_torch("evaluate", seed, 0)
                    _tried(f"{what} of {task.name}", partial(task.measure, net, what))
        for task in tasks:
            if not isinstance(task.batches, Iterable):  # which may be iterated over once only
                seed_torch("step", seed, 0)
                _tried(f"loss of {task.name}", partial(_first_loss, task, masked(), seed))


@torch.enable_grad()
def _first_loss(task: Task, masked: MaskedNetwork, seed: int) -> None:
    batches = cast(Callable[[int], Any], task.batches_for(seed))
    check_first_loss(task.loss(masked, batches(0)), masked, 0)


def _tried(what: str, attempt: Callable[[], Any]) -> None:
    """Let through what sublens itself refuses, and tell of what else fails."""
    try:
        attempt()
    except SublensError:
        raise
    except Exception as error:
        log.warning(
            "sublens: the %s fails on the untrained network (%s: %s). If it does so on the trained one, the run will"
            " stop there.",
            what,
            type(error).__name__,
            error,
        )
