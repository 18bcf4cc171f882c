"""Where a run's batches come from, such that batch number ``step`` is the same in a resumed run.

Everything random that torch's global generator feeds (a shuffling loader, a function that draws its batch, noise in a
loss) is made a function of (seed, step) by seeding that generator before each batch. The generator's state is put back
when the run is over.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sublens.errors import SettingError
from sublens.storage import hash_tensors

Batches = Callable[[int], Any] | Iterable[Any]


def derive(*parts: object) -> int:
    """A 63-bit seed that is a pure function of ``parts``: neighbouring parts give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_torch(*parts: object) -> None:
    """Seed torch's global generators (CPU, and CUDA where it is in use) with :func:`derive` of ``parts``."""
    seed = derive(*parts)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put torch's global random state back at the end, whatever happens inside."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


class BatchSource:
    """Batch number ``step`` of a callable, a re-iterable (one pass is an epoch), or a one-shot iterator.

    Attributes:
        epoch: number of the epoch now running, from 0; -1 before the first batch. Stays -1 for a callable.
        epoch_start: the step at which this epoch began.
        remembered: number and hash of the last batch that was to be remembered, if there is one.
    """

    def __init__(self, batches: Batches, seed: int) -> None:
        self.epoch = -1
        self.epoch_start = 0
        self.remembered: list[Any] | None = None
        self._batches = batches
        self._seed = seed
        self._iterator: Iterator[Any] | None = None
        self._expected: list[Any] | None = None  # what an earlier process drew last, until it is compared
        self._iterates = isinstance(batches, Iterable)
        if isinstance(batches, tuple) and batches and all(isinstance(part, Tensor) for part in batches):
            raise SettingError(
                "batches is a tuple of tensors, which would be taken for several batches. For one batch in every step"
                " write batches=lambda step: (x, y)."
            )
        if not self._iterates and not callable(batches):
            raise SettingError(
                f"batches is a {type(batches).__name__}; it must be a function batches(step) -> batch, or something to "
                "iterate over again and again, such as a torch DataLoader or a list of batches."
            )
        self._generators = _own_generators(batches)

    def __call__(self, step: int, remember: bool = False) -> Any:
        """The batch of ``step``. Steps must be asked for in order, except right after :meth:`rewind`.

        Args:
            remember: whether this may be the batch by which a resumed run sees that it draws the same ones.
        """
        if self._expected is not None:  # only now: a run that has ended needs no batch
            _compare(self._expected, self._expected[0], self._draw(self._expected[0]))
            self._expected = None
        batch = self._draw(step)
        if remember and (found := _hash_of(batch)) is not None:
            self.remembered = [step, found]
        return batch

    def _draw(self, step: int) -> Any:
        if not self._iterates:
            seed_torch("step", self._seed, step)
            return self._batches(step)  # type: ignore[operator]
        if self._iterator is None:
            self._begin(step)
        seed_torch("step", self._seed, step)
        try:
            return next(self._iterator)  # type: ignore[arg-type]
        except StopIteration:
            self._begin(step)
        seed_torch("step", self._seed, step)
        try:
            return next(self._iterator)  # type: ignore[arg-type]
        except StopIteration:
            raise self._empty(step) from None

    def rewind(self, step: int, epoch: int, epoch_start: int, last: list[Any] | None = None) -> None:
        """Continue before batch ``step`` of a run that stood in ``epoch``, begun at ``epoch_start``.

        The epoch's used batches are drawn again and dropped: how far a loader has come is nowhere else to be read.

        Args:
            last: what was ``remembered`` before. If that batch is another one now, there is a warning.
        """
        self.remembered = last
        if not self._iterates:
            self._expected = last
        if not self._iterates or epoch < 0:
            return
        self.epoch = epoch - 1
        self._begin(epoch_start)
        for used in range(epoch_start, step):
            seed_torch("step", self._seed, used)
            try:
                batch = next(self._iterator)  # type: ignore[arg-type]
                if last is not None:
                    _compare(last, used, batch)
            except StopIteration:
                raise SettingError(
                    f"batches ended after {used - epoch_start} batches, but the run to resume had already used "
                    f"{step - epoch_start} of this epoch. Resume with the same data."
                ) from None

    @contextlib.contextmanager
    def generators_kept(self) -> Iterator[None]:
        """Put the state of the loader's own generators back at the end."""
        states = [generator.get_state() for generator, _ in self._generators]
        try:
            yield
        finally:
            self._iterator = None
            for (generator, _), state in zip(self._generators, states, strict=True):
                generator.set_state(state)

    def _begin(self, step: int) -> None:
        if self._iterator is not None and self._iterator is self._batches:
            raise self._empty(step)
        self.epoch += 1
        self.epoch_start = step
        for generator, initial in self._generators:
            generator.manual_seed(derive("epoch", self._seed, step, initial))
        set_epoch = getattr(getattr(self._batches, "sampler", None), "set_epoch", None)
        if callable(set_epoch):
            set_epoch(self.epoch)
        seed_torch("epoch", self._seed, step)
        self._iterator = iter(self._batches)  # type: ignore[arg-type]

    def _empty(self, step: int) -> SettingError:
        if self._iterator is self._batches:
            return SettingError(
                f"batches is a one-shot iterator ({type(self._batches).__name__}) and ran dry at step {step}. Give a "
                "function batches(step) -> batch, or something that can be iterated again, such as a torch DataLoader "
                "or a list; or set steps to the number of batches there are."
            )
        return SettingError(
            f"batches yields nothing at step {step}: an epoch without a single batch. Is the data set empty?"
        )


def _hash_of(batch: Any) -> str | None:
    """Hash of the numbers and texts in a batch; ``None`` where there are none, or none that can be read as bytes."""
    digest, found = hashlib.blake2b(digest_size=16), False
    try:
        for path, leaf in _leaves(batch, ""):
            digest.update(f"{path} {type(leaf).__name__}\n".encode())
            if isinstance(leaf, Tensor):
                digest.update(hash_tensors({path: leaf}).encode())
            elif isinstance(leaf, np.ndarray):
                digest.update(f"{leaf.dtype} {leaf.shape}\n".encode() + np.ascontiguousarray(leaf).tobytes())
            else:
                digest.update(repr(leaf).encode())
            found = True
    except Exception:  # batches may hold whatever their loss can use: then nothing is promised of them
        return None
    return digest.hexdigest() if found else None


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Tensor | str | bytes | int | float):
        yield path, tree
    elif isinstance(tree, np.ndarray):
        if tree.dtype.kind in "biufcSU":
            yield path, tree
    elif isinstance(tree, Mapping):
        for key in sorted(tree, key=repr):  # which may have been filled in any order
            yield from _leaves(tree[key], f"{path}/{key}")
    elif isinstance(tree, list | tuple):
        for place, child in enumerate(tree):
            yield from _leaves(child, f"{path}/{place}")
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from _leaves(getattr(tree, field.name), f"{path}/{field.name}")


def _compare(last: list[Any], step: int, batch: Any) -> None:
    if step == last[0] and _hash_of(batch) not in (last[1], None):
        warnings.warn(
            f"batches gave another batch for step {step} than before the run was interrupted, so the resumed run is not"
            " the one that would have come without the interruption. The data must be the same, and batches a pure"
            " function of the step (and of its seed): torch's random numbers are seeded before each call, those of"
            " numpy and random are not.",
            stacklevel=2,
        )


def moving_parts(batches: object) -> list[object]:
    """What changes while these batches are drawn, so that nobody else may draw from it meanwhile.

    That is an iterator itself, a DataLoader's generators, and a DataLoader whose workers persist: it has one iterator.
    """
    whole = isinstance(batches, Iterator) or getattr(batches, "persistent_workers", False)
    return [*([batches] if whole else []), *(generator for generator, _ in _own_generators(batches))]


def _own_generators(batches: object) -> list[tuple[torch.Generator, int]]:
    """The torch generators a DataLoader and its samplers draw from, each once, with the seed its owner gave it."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    owners = (batches, getattr(batches, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    held = (getattr(owner, "generator", None) for owner in owners)
    found = {id(generator): generator for generator in held if isinstance(generator, torch.Generator)}
    return [(generator, generator.initial_seed()) for generator in found.values()]
