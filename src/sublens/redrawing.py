"""Masked weights that are drawn again in the backward pass instead of being kept from the forward pass.

An operation such as a product keeps its operands for its backward pass, and with them every masked weight of every
sample: K times the network. For the time of a call, PyTorch's hooks for saved tensors replace each masked weight, or
view of one, by its name; when the backward pass asks for it, its draw is repeated. What it made stays until it has
been asked for as often as it was to be kept, since a recurrent layer asks for it at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sublens.kernels.threads import untraced


@dataclass(frozen=True)
class _View:
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Redrawing:
    """The masked weights of one call of the network: give each to :meth:`add`, then call under :meth:`hooks`."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}  # where a masked weight's data begin -> its name
        self._makers: dict[str, Callable[[], Tensor]] = {}
        self._made: dict[str, Tensor] = {}
        self._uses: dict[str, int] = {}  # how often it was to be kept
        self._left: dict[str, int] = {}  # how often it will still be asked for in this backward pass

    def add(self, name: str, masked: Tensor, make: Callable[[], Tensor]) -> None:
        """Remember that ``make()`` gives the data of ``masked`` again."""
        storage = _storage(masked)
        if storage is not None and masked.is_contiguous():
            self._names[storage] = name
            self._makers[name] = make

    def hooks(self) -> saved_tensors_hooks:
        """A context in which no masked weight is kept for the backward pass."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def called(self) -> None:
        """The call is over: from now on the memory of its masked weights may hold something else."""
        self._names.clear()

    def done(self, name: str) -> None:
        """This masked weight is not needed any more in this backward pass."""
        self._made.pop(name, None)
        self._left.pop(name, None)

    @untraced
    def _pack(self, tensor: Tensor) -> Any:
        storage = _storage(tensor)
        name = None if storage is None else self._names.get(storage)
        if name is None:
            # With hooks PyTorch no longer notices a kept tensor that is overwritten before the backward pass.
            return tensor, tensor._version
        self._uses[name] = self._uses.get(name, 0) + 1
        return _View(name, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    @untraced
    def _unpack(self, kept: Any) -> Tensor:
        if not isinstance(kept, _View):
            tensor, version = kept
            if tensor._version != version:
                raise RuntimeError(
                    f"A tensor of shape {tuple(tensor.shape)} that the backward pass needs has been modified by an "
                    f"inplace operation: it is at version {tensor._version}, expected version {version}. Replace the "
                    "inplace operation in the network or in the loss."
                )
            return tensor  # type: ignore[no-any-return]
        if kept.name not in self._made:
            with torch.no_grad():
                self._made[kept.name] = self._makers[kept.name]()
        view = self._made[kept.name].as_strided(kept.size, kept.stride, kept.offset)
        self._left[kept.name] = self._left.get(kept.name, self._uses[kept.name]) - 1
        if self._left[kept.name] == 0:
            self.done(kept.name)
        return view


def _storage(tensor: Tensor) -> int | None:
    """Where a tensor's data begin; ``None`` if it has none of its own, as inside a function transform."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None
