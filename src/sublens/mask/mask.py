"""``Mask``: which weights of a network are kept."""

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sublens.errors import FileError, MismatchError, NonFiniteError, SettingError
from sublens.groups import Grouping
from sublens.mask.applying import zeroed
from sublens.mask.identity import binarise, fingerprint
from sublens.mask.random_bits import random_bits
from sublens.selection import Where, match_names, select, tied_names
from sublens.storage import (
    check_packed,
    fingerprint_entry,
    hash_tensors,
    load_tensors,
    pack_bits,
    save_tensors,
    shape_entry,
    unpack_bits,
)


class Mask:
    """Which elements of which parameters of one network are kept. Immutable; one bit a weight in memory and on disk.

    Masks of the same network and the same parameters combine: ``a & b`` keeps what both keep, ``a | b`` what either
    keeps, ``a - b`` what ``a`` keeps and ``b`` does not, ``a ^ b`` what exactly one keeps, ``~a`` what ``a`` removes.
    Masks that differ in network, names or shapes are not equal, and combining them raises :class:`MismatchError`.
    Below, *layer* means one masked parameter.

    Args:
        kept: dotted parameter name -> bool tensor of the parameter's shape, ``True`` where the element is kept. Copied.
        network: the network, or its fingerprint from :func:`fingerprint`.

    Raises:
        SettingError: no layer, a tensor that is not bool, or no network.
    """

    __slots__ = ("_network", "_packed", "_shapes")

    _network: str
    _packed: dict[str, Tensor]
    _shapes: dict[str, tuple[int, ...]]

    def __init__(self, kept: Mapping[str, Tensor], network: str | nn.Module) -> None:
        network = fingerprint(network) if isinstance(network, nn.Module) else network
        if not isinstance(network, str) or not network:
            raise SettingError("a mask needs its network, or the network's fingerprint (sublens.fingerprint(network))")
        for name, tensor in kept.items():
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
                found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise SettingError(f"'{name}' must be a bool tensor, not {found}; logits go through Mask.from_logits")
        shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
        self._fill({name: pack_bits(tensor) for name, tensor in kept.items()}, shapes, network)

    def _fill(self, packed: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], network: str) -> None:
        if not packed:
            raise SettingError("a mask needs at least one layer")
        self._packed, self._shapes, self._network = packed, shapes, network

    @classmethod
    def _of(cls, packed: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], network: str) -> "Mask":
        mask = cls.__new__(cls)
        mask._fill(packed, shapes, network)
        return mask

    # --- making masks

    @classmethod
    def from_logits(
        cls, logits: Mapping[str, Tensor], network: str | nn.Module, groupings: Mapping[str, Grouping] | None = None
    ) -> "Mask":
        """The mask of trained logits by :func:`binarise`: kept iff the logit is above 0.

        Args:
            logits: parameter name -> logits of the parameter's shape.
            network: the network, or its fingerprint.
            groupings: :attr:`sublens.MaskedNetwork.groupings`, if elements share logits.

        Raises:
            NonFiniteError: a logit is NaN.
            SettingError: as the constructor.
        """
        for name, logit in logits.items():
            if bool(logit.detach().isnan().any()):
                raise NonFiniteError(f"the logits of '{name}' contain NaN: their training failed", parameter=name)
        kept = {name: binarise(logit) for name, logit in logits.items()}
        if groupings is not None:
            kept = {name: grouping.spread(kept[grouping.owner]) for name, grouping in groupings.items()}
        return cls(kept, network)

    @classmethod
    def full(cls, network: nn.Module, where: Where = None, *, biases: bool = False) -> "Mask":
        """The mask that keeps everything of a selection (:func:`sublens.select`)."""
        parameters = select(network, where, biases=biases)
        kept = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in parameters.items()}
        return cls(kept, fingerprint(network))

    @classmethod
    def random_like(cls, mask: "Mask", seed: int, groupings: Mapping[str, Grouping] | None = None) -> "Mask":
        """A random mask that keeps as many elements of each layer as ``mask``, every choice of them equally likely.

        The same ``seed`` (any integer) and layer names give the same mask on every machine and version.

        Args:
            mask: the mask.
            seed: any integer.
            groupings: :attr:`sublens.MaskedNetwork.groupings`, if elements share logits: whole groups are chosen then,
                as many as ``mask`` keeps.

        Raises:
            MismatchError: ``mask`` keeps a part of a group, or has other layers.
        """
        if groupings is not None:
            drawn = cls.random_like(mask.by_group(groupings), seed)
            kept = {name: grouping.spread(drawn[grouping.owner]) for name, grouping in groupings.items()}
            return cls(kept, mask._network)
        packed = {
            name: random_bits(math.prod(shape), count, f"{seed}/{name}")
            for (name, shape), count in zip(mask._shapes.items(), mask.kept_counts().values(), strict=True)
        }
        return cls._of(packed, dict(mask._shapes), mask._network)

    def only(self, layers: str | Iterable[str]) -> "Mask":
        """This mask in some layers; all of every other layer is kept.

        Args:
            layers: names, names of enclosing modules, or globs.

        Raises:
            SelectionError: one of them matches no layer.
        """
        chosen = set(match_names(layers, self._packed))
        packed = {n: p if n in chosen else pack_bits(_ones(self._shapes[n])) for n, p in self._packed.items()}
        return self._of(packed, dict(self._shapes), self._network)

    def replace(self, other: "Mask", layers: str | Iterable[str]) -> "Mask":
        """This mask, with some layers (as in :meth:`only`) taken from ``other``.

        Raises:
            MismatchError: ``other`` belongs to another network or has other layers.
            SelectionError: one of ``layers`` matches nothing.
        """
        self._check_mask(other)
        chosen = set(match_names(layers, self._packed))
        packed = {name: (other if name in chosen else self)._packed[name] for name in self._packed}
        return self._of(packed, dict(self._shapes), self._network)

    def by_group(self, groupings: Mapping[str, Grouping]) -> "Mask":
        """This mask with one element for each group: what overlap and chance are to be counted in.

        Args:
            groupings: :attr:`sublens.MaskedNetwork.groupings` of the training.

        Returns:
            A mask whose layers are the parameters that own logits, in the logits' shape. It fits no network.

        Raises:
            MismatchError: a group is kept in part, or the groupings are for other layers.
        """
        if groupings.keys() != self._packed.keys():
            raise MismatchError(f"the groupings are for {sorted(groupings)}, the mask has {sorted(self._packed)}")
        for name, grouping in groupings.items():
            if math.prod(self._shapes[name]) != grouping.size:
                raise MismatchError(f"'{name}' has {math.prod(self._shapes[name])} elements, not {grouping.size}")
        kept = {n: each.of_elements(self[n]) for n, each in groupings.items() if each.owner == n}
        return Mask(kept, self._network)

    def bind(self, network: nn.Module) -> "Mask":
        """The same mask for other weights: explicitly transferred to a network with the same names and shapes.

        Raises:
            MismatchError: the network lacks a layer, or has it in another shape.
        """
        self._check_layers(network)
        return self._of(dict(self._packed), dict(self._shapes), fingerprint(network))

    # --- looking at them

    @property
    def network(self) -> str:
        """Fingerprint of the network that the mask belongs to."""
        return self._network

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, in the order of the network's parameters."""
        return tuple(self._packed)

    @property
    def size(self) -> int:
        """Number of elements, kept or not."""
        return sum(self.sizes().values())

    @property
    def kept_count(self) -> int:
        """Number of kept elements."""
        return sum(self.kept_counts().values())

    @property
    def kept(self) -> float:
        """Share of all elements that is kept, 0 to 1."""
        return _share(self.kept_count, self.size)

    def sizes(self) -> dict[str, int]:
        """Layer -> number of elements."""
        return {name: math.prod(shape) for name, shape in self._shapes.items()}

    def kept_counts(self) -> dict[str, int]:
        """Layer -> number of kept elements."""
        return {name: _count(packed) for name, packed in self._packed.items()}

    def kept_per_layer(self) -> dict[str, float]:
        """Layer -> share of its elements that is kept, 0 to 1."""
        sizes = self.sizes()
        return {name: _share(count, sizes[name]) for name, count in self.kept_counts().items()}

    def __getitem__(self, name: str) -> Tensor:
        """A new bool tensor of the layer's shape, on the CPU; changing it does not change the mask."""
        if name not in self._packed:
            raise KeyError(f"the mask has no layer '{name}'; it has {', '.join(self.names)}")
        return unpack_bits(self._packed[name], self._shapes[name])

    def __contains__(self, name: object) -> bool:
        return name in self._packed

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __bool__(self) -> bool:
        raise TypeError(
            "a Mask is neither true nor false: 'a & b', 'a | b' and '~a' combine masks, where Python's 'and', 'or' and "
            "'not' would pick one of them; whether it keeps anything is mask.kept_count > 0"
        )

    def __repr__(self) -> str:
        return f"Mask({len(self)} layers, {self.kept_count:,} of {self.size:,} kept, network {self._network[:12]})"

    # --- algebra

    def __and__(self, other: "Mask") -> "Mask":
        return self._combine(other, torch.bitwise_and)

    def __or__(self, other: "Mask") -> "Mask":
        return self._combine(other, torch.bitwise_or)

    def __xor__(self, other: "Mask") -> "Mask":
        return self._combine(other, torch.bitwise_xor)

    def __sub__(self, other: "Mask") -> "Mask":
        return self._combine(other, lambda a, b: a & ~b)

    def __invert__(self) -> "Mask":
        packed = {}
        for name, bits in self._packed.items():
            packed[name] = ~bits
            if odd := math.prod(self._shapes[name]) % 8:
                packed[name][-1] &= (1 << odd) - 1  # the padding stays 0
        return self._of(packed, dict(self._shapes), self._network)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        same = self._network == other._network and self._shapes == other._shapes
        return same and all(torch.equal(bits, other._packed[name]) for name, bits in self._packed.items())

    def __hash__(self) -> int:
        return hash((self._network, hash_tensors(self._packed)))

    def _combine(self, other: "Mask", operation: Callable[[Tensor, Tensor], Tensor]) -> "Mask":
        self._check_mask(other)
        packed = {name: operation(bits, other._packed[name]) for name, bits in self._packed.items()}
        return self._of(packed, dict(self._shapes), self._network)

    # --- overlap

    def iou(self, other: "Mask") -> float:
        """Intersection over union: kept by both / kept by either, 0 to 1.

        Here and in the other overlaps, 0 / 0 counts as 1: a mask equals itself, and an empty one lies in every other.
        """
        return _share((self & other).kept_count, (self | other).kept_count)

    def iomin(self, other: "Mask") -> float:
        """Intersection over the smaller mask, 0 to 1: 1 if one mask lies in the other."""
        return _share((self & other).kept_count, min(self.kept_count, other.kept_count))

    def shared(self, other: "Mask") -> float:
        """Share of this mask's kept elements that ``other`` keeps too, 0 to 1. Not symmetric."""
        return _share((self & other).kept_count, self.kept_count)

    def iou_per_layer(self, other: "Mask") -> dict[str, float]:
        """Layer -> :meth:`iou` within it."""
        both, either = (self & other).kept_counts(), (self | other).kept_counts()
        return {name: _share(both[name], either[name]) for name in self}

    def iomin_per_layer(self, other: "Mask") -> dict[str, float]:
        """Layer -> :meth:`iomin` within it."""
        both, mine, others = (self & other).kept_counts(), self.kept_counts(), other.kept_counts()
        return {name: _share(both[name], min(mine[name], others[name])) for name in self}

    # --- on the network

    @contextlib.contextmanager
    def applied(self, network: nn.Module) -> Iterator[nn.Module]:
        """Remove the weights that the mask removes, for the time of a ``with`` block.

        Inside, parameters and buffers are the same objects on other memory: a copy whose removed elements are +0.0. The
        original memory is not written at all, and comes back at the end, whatever happens inside: an exception,
        Ctrl-C, training steps, loaded or replaced weights. This takes the memory of one more copy of the network.

        A module that keeps weights elsewhere than in parameters and buffers does not see the mask.

        Args:
            network: the network that the mask was made for.

        Raises:
            MismatchError: the mask belongs to another network, or names or shapes differ. Nothing has changed then.
        """
        self.check(network)
        with zeroed(network, ((name, ~self[name]) for name in self)):
            yield network

    def apply(self, network: nn.Module) -> nn.Module:
        """A deep copy of the network in which removed elements are +0.0: a plain module that shares no memory with it.

        Raises:
            MismatchError: the mask belongs to another network, or names or shapes differ.
        """
        self.check(network)
        names = {alias: aliases for aliases in tied_names(network).values() for alias in aliases}
        pruned = copy.deepcopy(network)
        parameters = dict(pruned.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name in self:
                # Copying unties parameters that merely shared memory; each of them gets the mask.
                for parameter in {id(parameters[alias]): parameters[alias] for alias in names[name]}.values():
                    parameter.masked_fill_(~self[name].to(parameter.device), 0)
        return pruned

    # --- on disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask, atomically, as described in ``docs/file-format.md``.

        Raises:
            FileError: the file cannot be written. An older file there is unharmed.
        """
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        save_tensors(path, self._packed, {"kind": "mask", "network": self._network, "shapes": shapes})

    @classmethod
    def load(cls, path: str | os.PathLike[str], network: nn.Module | None = None) -> "Mask":
        """Read a mask, checking all of it.

        Args:
            path: a file written by :meth:`save`.
            network: if given, the network that the mask must belong to.

        Raises:
            FileError: the file is missing, damaged, or not the file of a mask.
            MismatchError: the mask belongs to another network than ``network``.
        """
        packed, entry = load_tensors(path, "mask")
        shapes = entry.get("shapes")
        if not packed or not isinstance(shapes, dict) or set(shapes) != set(packed):
            raise FileError(f"'{os.fspath(path)}' is no mask: its shapes do not have the names of its tensors")
        checked = {name: shape_entry(path, name, shapes[name]) for name in packed}
        for name, bits in packed.items():
            try:
                check_packed(bits, checked[name])
            except FileError as error:
                raise FileError(f"'{os.fspath(path)}': {name!a}: {error}") from error
        mask = cls._of(packed, checked, fingerprint_entry(path, entry))
        if network is not None:
            mask.check(network)
        return mask

    # --- belonging together

    def _check_mask(self, other: "Mask") -> None:
        if not isinstance(other, Mask):
            raise TypeError(f"a Mask combines with a Mask, not with {type(other).__name__}")
        if self._network != other._network:
            raise MismatchError(
                f"the masks belong to different networks ({self._network[:12]} and {other._network[:12]}); "
                "Mask.bind(network) transfers a mask to other weights"
            )
        if missing := self._packed.keys() ^ other._packed.keys():
            raise MismatchError(f"only one of the masks has the layer '{min(missing)}'; make both with one selection")
        for name, shape in self._shapes.items():
            if shape != other._shapes[name]:
                raise MismatchError(f"'{name}' has shape {shape} in one mask and {other._shapes[name]} in the other")

    def _check_layers(self, network: nn.Module) -> None:
        parameters = dict(network.named_parameters(remove_duplicate=False))
        for name, shape in self._shapes.items():
            if name not in parameters:
                raise MismatchError(f"the network has no parameter '{name}', but the mask does: another structure")
            if tuple(parameters[name].shape) != shape:
                raise MismatchError(
                    f"'{name}' has shape {tuple(parameters[name].shape)} in the network and {shape} in the mask"
                )
        for names in tied_names(network).values():
            if len(twice := [name for name in names if name in self]) > 1:
                raise MismatchError(f"{' and '.join(twice)} are one tensor in the network, but two layers in the mask")

    def check(self, network: nn.Module, found: str | None = None) -> None:
        """Refuse a network that the mask does not belong to.

        Args:
            network: the network.
            found: its :func:`sublens.fingerprint`, if that is known already.

        Raises:
            MismatchError: names, shapes, weights or buffers differ.
        """
        self._check_layers(network)
        if (found := found or fingerprint(network)) != self._network:
            raise MismatchError(
                f"the mask belongs to network {self._network[:12]}, this one is {found[:12]}: names and shapes fit, "
                "but weights or buffers differ, or their dtypes. Load those that the mask was made for, or use "
                "mask.bind(network) to transfer it on purpose. Inside another mask's applied() they differ too: there "
                "put on both as one, mask & other"
            )


def check_mask(what: str, given: object) -> None:
    """Raise SettingError unless ``given`` is a mask; ``what`` is what it was given as."""
    if not isinstance(given, Mask):
        cure = "Give its mask, run.mask." if isinstance(getattr(given, "mask", None), Mask) else "Give a sublens.Mask."
        raise SettingError(f"{what} is a {type(given).__name__}, not a mask. {cure}")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _count(packed: Tensor) -> int:
    return int(np.bitwise_count(packed.numpy()).sum(dtype=np.int64))


def _ones(shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)
