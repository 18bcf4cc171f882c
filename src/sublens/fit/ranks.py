"""The processes that train one mask together, each with its own samples and its own part of every batch.

One process is the case of one rank: then nothing here does anything, and the training loop has no second form.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sublens.errors import LostRankError, MismatchError, SettingError
from sublens.storage import hash_tensors

Processes: TypeAlias = "dist.ProcessGroup | Literal['all'] | None"
T = TypeVar("T")

PATIENCE = 3.0
"""Seconds in which ranks that are still there say so, after one was lost."""


class Ranks:
    """The ranks of a group of processes, and what they tell each other.

    Args:
        processes: ``None`` for this process alone, ``"all"`` for all of the job, or a group of them.

    Raises:
        SettingError: there is no process group.
    """

    def __init__(self, processes: Processes = None) -> None:
        self.rank, self.count = 0, 1
        self._group: dist.ProcessGroup | None = None
        if processes is None:
            return
        if not (dist.is_available() and dist.is_initialized()):
            raise SettingError(
                f"processes={processes!r} needs a process group. Start the program by torchrun, and call "
                "torch.distributed.init_process_group('gloo') before fit; or leave processes out."
            )
        if not (processes == "all" or isinstance(processes, dist.ProcessGroup)):
            raise SettingError(
                f"processes={processes!r} must be None (this process alone), 'all', or a ProcessGroup of torch."
            )
        self._group = None if processes == "all" else processes
        self.rank, self.count = dist.get_rank(self._group), dist.get_world_size(self._group)
        if self.rank < 0:
            raise SettingError("This process is not in the group that it was given as processes=...")

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes files, shows progress and calls callbacks."""
        return self.rank == 0

    def mean(self, number: float) -> float:
        """The mean of a number over the ranks; not finite if any of them is not."""
        if self.count == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        self._together(lambda: dist.all_reduce(total, group=self._group))
        return float(total) / self.count

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the mean over the ranks into every parameter's gradient: the same bits on each of them."""
        if self.count == 1:
            return
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self._together(partial(dist.all_reduce, gradient, group=self._group))
            parameter.grad = gradient.div_(self.count)

    def first(self, value: T) -> T:
        """The value that the leading rank has."""
        if self.count == 1:
            return value
        held = [value]
        source = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        self._together(lambda: dist.broadcast_object_list(held, src=source, group=self._group))
        return held[0]

    def are_equal(self, tensors: Mapping[str, Tensor], *others: object) -> bool:
        """Whether all ranks have the same bits."""
        if self.count == 1:
            return True
        mine = hashlib.sha256((hash_tensors(tensors) + repr(others)).encode()).digest()
        digest = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        all_of_them = [torch.empty_like(digest) for _ in range(self.count)]
        self._together(lambda: dist.all_gather(all_of_them, digest, group=self._group))
        return all(torch.equal(one, digest) for one in all_of_them)

    def check_equal(self, tensors: Mapping[str, Tensor], step: int, *others: object) -> None:
        """Refuse to go on with ranks that have come apart, or were never together.

        Raises:
            MismatchError: some rank has other logits or settings, or has done another number of steps.
        """
        if not self.are_equal(tensors, step, *others):
            raise MismatchError(
                f"The {self.count} ranks do not have the same logits and settings after {step} steps (of this one). "
                "Give all of them the same network, settings and folder, and let none change the logits by itself."
            )

    def gather_state(self, optimizer: Optimizer) -> None:
        """Where an optimizer keeps a part of its state on each rank (ZeRO), bring all of it to the leading one."""
        consolidate: Callable[..., None] | None = getattr(optimizer, "consolidate_state_dict", None)
        if self.count > 1 and consolidate is not None:
            self._together(lambda: consolidate(to=0))

    def shards(self, optimizer: Optimizer) -> bool:
        """Whether no rank alone has the whole state of the optimizer."""
        return self.count > 1 and hasattr(optimizer, "consolidate_state_dict")

    def _together(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:
            lost = self._lost()
            if not lost:
                raise
            names = " and ".join(map(str, lost))
            raise LostRankError(
                f"Rank {names} of {self.count} no longer answers: its process was killed, or ended with an error of "
                "its own, which is to be looked for there. Start all of them again; with folder=... and resume=True "
                "they go on from the last checkpoint.",
                ranks=tuple(lost),
            ) from error

    def _lost(self) -> list[int]:
        """The ranks that do not say within a few seconds that they are there."""
        # What torch's own watchdogs use; there is no public way to the store of a group that has failed.
        store = dist.distributed_c10d._get_default_store()
        name = "sublens/alive/{}".format
        try:
            store.set(name(self.rank), "")
            time.sleep(PATIENCE)
            return [rank for rank in range(self.count) if not store.check([name(rank)])]
        except (RuntimeError, OSError):  # the store is the leading rank's own, where no launcher keeps one
            return [] if self.rank == 0 else [0]
