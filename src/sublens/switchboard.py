"""``Switchboard``: many masks over one frozen network, one of them chosen for each call, or for each example."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sublens import recomputation
from sublens.calling import OutputAxes, call_with
from sublens.errors import MismatchError, SettingError, check_named
from sublens.mask import Mask, check_mask, fingerprint
from sublens.selection import tied_names
from sublens.splitting import Batch, flatten, join

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Switchboard:
    """One copy of the weights, and a mask for each task at one bit a weight: masks in place of adapters.

    ``board("add", x)`` is the network's output for ``x`` under the mask called ``"add"``; ``board(["add", "mul",
    "add"], x)`` takes each example of the batch through the mask that is named for it; ``None`` names no mask, the
    network as it is. The network is called as it is trained for evaluation: BatchNorm uses its running statistics and
    dropout is off. Gradients reach the inputs, but no weight.

    The network is never modified: masked weights are put in for the time of a call, as :class:`sublens.MaskedNetwork`
    does. Those of the mask used last are kept, so calls with one mask after another call with it cost what the network
    costs; a switch costs unpacking the bits and one pass over the masked weights. Memory: the network, one bit a
    weight for each mask, and one masked copy of the masked weights.

    Not for several threads at once: a call puts its weights into the one network. Without gradients, masked weights are
    overwritten by those of the next mask; a network that returns its own weights should return a copy.

    Args:
        network: the network that the masks were made for. Its parameters must stay as they are.
        masks: name -> mask. More can be added later (:meth:`add`, :meth:`remove`).
        batch_dim: dimension of the batch in the first tensor that the network is called with.

    Raises:
        MismatchError: a mask belongs to another network.
        SettingError: ``masks`` is no mapping.
    """

    def __init__(self, network: nn.Module, masks: Mapping[str, Mask], *, batch_dim: int = 0) -> None:
        self._network = network
        self._batch_dim = batch_dim
        self._aliases = tied_names(network)
        self._fingerprint = fingerprint(network)
        self._state = self._versions()
        self._masks: dict[str, Mask] = {}
        self._axes = OutputAxes(network, self._aliases, batch_dim)
        self._held: tuple[str | None, dict[str, Tensor]] = (None, {})
        self._overwritable = False
        check_named("masks", masks, "{'add': add}")
        for name, mask in masks.items():
            self.add(name, mask)

    @property
    def network(self) -> nn.Module:
        """The frozen network."""
        return self._network

    @property
    def masks(self) -> dict[str, Mask]:
        """Name -> mask."""
        return dict(self._masks)

    def add(self, name: str, mask: Mask) -> None:
        """Add a mask, or put another one in its place.

        Raises:
            SettingError: ``name`` is no text, or ``mask`` no mask.
            MismatchError: the mask belongs to another network, or the network has changed.
        """
        if not isinstance(name, str):
            raise SettingError(f"A mask's name must be text, not {name!r}; None is the network without a mask.")
        check_mask(f"The mask {name!r}", mask)
        self._check_unchanged()
        mask.check(self._network, self._fingerprint)
        self._masks[name] = mask
        if self._held[0] == name:
            self._held = (None, {})

    def remove(self, name: str) -> None:
        """Take a mask away.

        Raises:
            SettingError: there is none of this name.
        """
        self._known(name)
        del self._masks[name]
        if self._held[0] == name:
            self._held = (None, {})

    def __call__(self, task: str | Sequence[str | None] | None, /, *args: Any, **kwargs: Any) -> Any:
        """The network's output under one mask, or with a mask for each example.

        Args:
            task: the name of a mask, or ``None``; or one of these for each example of the batch, in its order.
            args: the network's arguments.
            kwargs: likewise.

        Raises:
            SettingError: no mask of this name.
            BatchError: names for each example, and the batch cannot be taken apart, or has another size.
            MismatchError: the network has changed since the masks were added.
        """
        self._check_unchanged()
        if task is None or isinstance(task, str):
            return self._through(task, args, kwargs)
        return self._by_example(list(task), args, kwargs)

    def _by_example(self, tasks: list[str | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = Batch(args, kwargs, self._batch_dim)
        if len(tasks) != batch.size:
            raise SettingError(f"{len(tasks)} masks are named for a batch of {batch.size} examples; name one for each.")
        distinct = sorted(set(tasks), key=lambda name: (name is not None, name or ""))
        # The mask that is held comes first, if it is wanted.
        distinct.sort(key=lambda name: name != self._held[0])
        for name in distinct:
            self._known(name)
        members = [[i for i, name in enumerate(tasks) if name == one] for one in distinct]
        order = [i for group in members for i in group]
        sizes = [len(group) for group in members]
        axes = self._axes.of(batch, batch.size)
        sorted_batch = batch.taken(order)
        bounds = pairwise(accumulate(sizes, initial=0))
        outputs = [self._through(name, *sorted_batch.part(*span)) for name, span in zip(distinct, bounds, strict=True)]
        joined = join(outputs, sizes, axes)
        leaves, rebuild = flatten(joined)
        back = torch.tensor(order).argsort()
        return rebuild([_reordered(leaf, axis, back) for leaf, axis in zip(leaves, axes, strict=True)])

    def _through(self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        weights = self._weights(name)
        around = partial(recomputation.covered, self._network, again={})
        return call_with(self._network, self._aliases, lambda n, weight: weights.get(n, weight), args, kwargs, around)

    def _weights(self, name: str | None) -> dict[str, Tensor]:
        """The masked weights under a mask."""
        self._known(name)
        if name is None:
            return {}
        if self._held[0] != name:
            mask, before = self._masks[name], self._held[1] if self._overwritable else {}
            self._held = (None, {})
            parameters = dict(self._network.named_parameters(remove_duplicate=False))
            first = {alias: aliases[0] for aliases in self._aliases.values() for alias in aliases}
            made = {}
            for layer in mask:
                weight = parameters[layer].detach()
                # Fresh memory costs more than the masking itself.
                made[first[layer]] = _zeroed(weight, mask[layer], before.pop(first[layer], None))
            # A graph that is waiting for its backward pass needs the weights that it was made with.
            self._overwritable = not torch.is_grad_enabled()
            self._held = (name, made)
        self._overwritable = self._overwritable and not torch.is_grad_enabled()
        return self._held[1]

    def _known(self, name: str | None) -> None:
        if name is not None and name not in self._masks:
            there = ", ".join(map(repr, self._masks)) or "none yet"
            raise SettingError(f"No mask is called {name!r}. There are {there}; None is the network without a mask.")

    def _versions(self) -> list[tuple[int, int, torch.device]]:
        """What tells, at no cost, whether anyone has written to a tensor or put another one in its place."""
        tensors = (*self._network.parameters(), *self._network.buffers())
        return [(t.data_ptr(), 0 if t.is_inference() else t._version, t.device) for t in tensors]

    def _check_unchanged(self) -> None:
        state = self._versions()
        if state == self._state:
            return
        if fingerprint(self._network) != self._fingerprint:
            raise MismatchError(
                "The network's weights have changed since its Switchboard was made, so its masks belong to a network "
                "that no longer exists. Put the weights back, or make a Switchboard of masks for the new ones."
            )
        self._state, self._held = state, (None, {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def __repr__(self) -> str:
        return f"Switchboard({type(self._network).__name__}, {len(self)} masks: {', '.join(self._masks)})"


def _zeroed(weight: Tensor, kept: Tensor, memory: Tensor | None) -> Tensor:
    """The weight, +0.0 where not kept: by its bits, which takes a tenth of the time of ``torch.where`` on a CPU."""
    integer = _INTEGERS[weight.element_size()]
    bits = kept.to(weight.device).to(integer).neg_()
    if memory is None or memory.device != weight.device:
        return torch.bitwise_and(weight.view(integer), bits).view(weight.dtype)
    torch.bitwise_and(weight.view(integer), bits, out=memory.view(integer))
    return memory


def _reordered(leaf: Any, axis: int | None, order: Tensor) -> Any:
    """A leaf's examples in another order. Examples may hold several entries each, one after the other."""
    if axis is None:
        return leaf
    apart = leaf.unflatten(axis, (len(order), -1))
    return apart.index_select(axis, order.to(leaf.device)).flatten(axis, axis + 1)
