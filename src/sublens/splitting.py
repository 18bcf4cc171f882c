"""Splitting a network's inputs into chunks of the batch, and joining the outputs again.

Nothing here knows of masks. The batch is followed by sizes: an input tensor is split where its size is the batch's, and
where an output follows the batch is found once, by running the network a second time on a batch of another size.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from sublens.errors import BatchError

Rebuild = Callable[[Sequence[Any]], Any]


Build = Callable[[list[Any]], Any]


def flatten(tree: Any) -> tuple[list[Any], Rebuild]:
    """The leaves of nested tuples, lists, mappings and dataclasses, and a function that puts others in their places."""
    opened = _open(tree)
    if opened is None:
        return [tree], lambda v: v[0]
    children, build = opened
    parts = [flatten(child) for child in children]
    leaves = [leaf for part, _ in parts for leaf in part]

    def rebuild(values: Sequence[Any]) -> Any:
        built, at = [], 0
        for part, child in parts:
            built.append(child(values[at : at + len(part)]))
            at += len(part)
        return build(built)

    return leaves, rebuild


def kind_of_call(arguments: Any) -> Hashable:
    """What kind of call the arguments of a network make: the dimensions of tensors, and what else there is.

    Flags can change what a network does, so their values are part of it.
    """
    return tuple(leaf.dim() if isinstance(leaf, Tensor) else repr(leaf) for leaf in flatten(arguments)[0])


def _open(tree: Any) -> tuple[list[Any], Build] | None:
    """What a branch holds, and how to make another one of the same kind; ``None`` for a leaf."""
    if isinstance(tree, Mapping):
        keys = list(tree)
        return [tree[k] for k in keys], lambda v: _mapping(tree, dict(zip(keys, v, strict=True)))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return list(tree), lambda v: type(tree)(*v)
    if isinstance(tree, (tuple, list)):
        return list(tree), lambda v: type(tree)(v)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [f.name for f in dataclasses.fields(tree) if f.init]
        return [getattr(tree, n) for n in names], lambda v: dataclasses.replace(
            tree, **dict(zip(names, v, strict=True))
        )
    return None


def _mapping(like: Any, entries: dict[Any, Any]) -> Any:
    kind: Callable[..., Any] = type(like)
    if dataclasses.is_dataclass(like):  # model outputs take their entries by keyword
        return kind(**entries)
    if not isinstance(like, MutableMapping):
        return kind(entries)
    made = copy.copy(like)  # with what else it carries: the factory of a defaultdict, say
    for key, value in entries.items():
        made[key] = value
    return made


def _refuse_packed(tree: Any) -> None:
    if isinstance(tree, PackedSequence):
        raise BatchError(
            "A PackedSequence cannot be split into chunks of the batch. Pack and unpack inside the network's forward, "
            "from and to a padded tensor and its lengths, or use samples=1."
        )
    opened = _open(tree)
    for child in opened[0] if opened is not None else ():
        _refuse_packed(child)


class Batch:
    """The inputs of one call, and where the batch is in each of them.

    The first tensor among the arguments leads: its size along ``batch_dim`` is the batch size B. Every other tensor is
    split along ``batch_dim`` if its size there is B, otherwise along the only dimension of size B (the state of an LSTM
    has the batch second, whatever the sequence has), otherwise it goes whole into every chunk.

    Args:
        args: positional arguments of the network.
        kwargs: keyword arguments.
        batch_dim: dimension of the batch in the leading tensor; negative ones count from the end.

    Raises:
        BatchError: there is no tensor, the leading one has no such dimension, a tensor's place cannot be told, or there
            is a packed sequence.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch_dim: int) -> None:
        _refuse_packed((args, kwargs))
        self.leaves, self._rebuild = flatten((args, kwargs))
        lead = next((leaf for leaf in self.leaves if isinstance(leaf, Tensor)), None)
        if lead is None:
            raise BatchError("The network was called without any tensor, so there is no batch to split.")
        if not -lead.dim() <= batch_dim < lead.dim():
            raise BatchError(
                f"batch_dim is {batch_dim}, but the first tensor has shape {tuple(lead.shape)}. "
                "Give the dimension along which the examples of the batch stand."
            )
        self.size = lead.shape[batch_dim]
        self._counted = f"its first tensor has shape {tuple(lead.shape)}, of which dimension {batch_dim} is the batch's"
        self.axes = [self._axis(leaf, lead, batch_dim) if isinstance(leaf, Tensor) else None for leaf in self.leaves]

    def _axis(self, leaf: Tensor, lead: Tensor, batch_dim: int) -> int | None:
        fitting = [d for d in range(leaf.dim()) if leaf.shape[d] == self.size]
        wanted = batch_dim % lead.dim()
        if leaf is not lead and len(fitting) == leaf.dim() == 2 and leaf.shape != lead.shape:
            raise BatchError(
                f"A {leaf.shape[0]} x {leaf.shape[1]} input could be a table over the batch or one (an attention mask, "
                f"say) that is the same for all examples, because the batch size is {self.size} too. "
                "Use another batch size."
            )
        if wanted in fitting:
            return wanted
        return fitting[0] if len(fitting) == 1 else None

    def part(self, start: int, stop: int, *, copy: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for the examples ``start`` to ``stop - 1``; tensors are views, or copies if ``copy``."""
        leaves = [
            leaf if axis is None else leaf.narrow(axis, start, stop - start)
            for leaf, axis in zip(self.leaves, self.axes, strict=True)
        ]
        leaves = [leaf.clone() if copy and isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = self._rebuild(leaves)
        return args, kwargs

    def taken(self, examples: Sequence[int]) -> "Batch":
        """The same inputs for some of the examples, by their numbers, in that order."""
        index = torch.tensor(examples)
        leaves = [
            leaf if axis is None else leaf.index_select(axis, index.to(leaf.device))
            for leaf, axis in zip(self.leaves, self.axes, strict=True)
        ]
        made = copy.copy(self)
        made.leaves, made.size = leaves, len(examples)
        return made

    def stacked(self, chunks: int) -> tuple[list[Tensor], Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]]:
        """For a batch that ``chunks`` divides: the split tensors with the chunks stacked in front, and a function from
        one chunk's slices of them to the arguments."""
        split = [i for i, axis in enumerate(self.axes) if axis is not None]
        tensors = [self.leaves[i].unflatten(self.axes[i], (chunks, -1)).movedim(self.axes[i], 0) for i in split]

        def arguments(*slices: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
            leaves = list(self.leaves)
            for i, tensor in zip(split, slices, strict=True):
                leaves[i] = tensor
            args, kwargs = self._rebuild(leaves)
            return args, kwargs

        return tensors, arguments

    def bounds(self, chunks: int) -> list[int]:
        """Where the chunks begin and end: ``chunks + 1`` ascending numbers, sizes differing by one at most.

        Raises:
            BatchError: fewer examples than chunks.
        """
        if self.size < chunks:
            raise BatchError(
                f"A batch of {self.size} cannot be split for {chunks} samples ({self._counted}). "
                f"Use samples={max(self.size, 1)} or fewer, or batches of at least {chunks}; for the short last batch "
                "of a DataLoader give it drop_last=True, and if another dimension counts the examples, give batch_dim."
            )
        share, more = divmod(self.size, chunks)
        return [i * share + min(i, more) for i in range(chunks + 1)]


Axes = list[int | None]


def output_axes(first: Any, first_size: int, second: Any, second_size: int, *, batch_leads: bool) -> Axes:
    """Where the batch is in each leaf of an output, seen from two outputs for batches of different sizes.

    Args:
        first: an output.
        first_size: its number of examples.
        second: the same network's output for another number of examples.
        second_size: that number.
        batch_leads: whether the batch is dimension 0 of the input, so that a dimension that holds a multiple of the
            batch (examples times positions, flattened) is in order of examples.

    Returns:
        A dimension for each leaf, or ``None`` for a leaf that does not grow with the batch.

    Raises:
        BatchError: a leaf's shape changes in a way that cannot be joined.
    """
    axes: Axes = []
    _refuse_packed(first)
    ones, twos = flatten(first)[0], flatten(second)[0]
    kinds = [[isinstance(leaf, Tensor) for leaf in leaves] for leaves in (ones, twos)]
    if kinds[0] != kinds[1]:
        raise BatchError(
            f"The network gave {len(ones)} outputs for {first_size} examples and {len(twos)}, or others, for "
            f"{second_size}; the chunks of a batch cannot be joined. Use samples=1."
        )
    for one, two in zip(ones, twos, strict=True):
        if not isinstance(one, Tensor):
            axes.append(None)
            continue
        changed = [d for d, (a, b) in enumerate(zip(one.shape, two.shape, strict=False)) if a != b]
        if len(changed) > 1 or one.dim() != two.dim():
            raise BatchError(
                f"An output has shape {tuple(one.shape)} for {first_size} examples and {tuple(two.shape)} for "
                f"{second_size}; the chunks of a batch cannot be joined along one dimension. Use samples=1."
            )
        if changed:
            d = changed[0]
            multiple = one.shape[d] * second_size == two.shape[d] * first_size
            if not (multiple and (one.shape[d] == first_size or batch_leads)):
                raise BatchError(
                    f"Dimension {d} of an output has size {one.shape[d]} for {first_size} examples and {two.shape[d]} "
                    f"for {second_size}, so it is not known how to join the chunks of a batch. Use samples=1."
                )
        axes.append(changed[0] if changed else None)
    return axes


_PLAIN = bool | int | float | complex | str | bytes


class Unjoined:
    """Stands in an output for objects of the chunks that cannot be joined, as long as nobody asks anything of it."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy, pickle and the like ask for what may be absent
            raise AttributeError(name)
        raise BatchError(
            f"The chunks of the batch each gave an object of type {self._kind} here, which cannot be joined (asked for "
            f"its '{name}'). Use samples=1, or have the network not make it (a language model: use_cache=False)."
        )

    def __repr__(self) -> str:
        return f"<{self._kind} of each chunk of the batch, not joined>"


def copied(tree: Any) -> Any:
    """The same with every tensor copied, strides and all, so that a network cannot tell it from the original."""
    leaves, rebuild = flatten(tree)
    return rebuild([_copied(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def _copied(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or 0 in tensor.stride() or tensor.numel() == 0:
        return tensor.clone()
    # clone() keeps the strides only where no memory lies between the elements.
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor)


def agree(one: Any, other: Any) -> bool:
    """Whether two outputs are the same but for rounding: numbers within a thousandth and a part of the largest."""
    leaves, others = flatten(one)[0], flatten(other)[0]
    return len(leaves) == len(others) and all(map(_agree, leaves, others))


def _agree(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        if isinstance(other, Unjoined):  # chunks gave one each, of which nothing is known; the other one is whole
            return not isinstance(one, Tensor)
        try:
            return type(one) is type(other) and _equal(one, other)
        except Exception:  # an object that nothing is known of
            return False
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or one.numel() == 0:
        return torch.equal(one, other)
    largest = float(other.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * largest, equal_nan=True)


def join(outputs: Sequence[Any], sizes: Sequence[int], axes: Axes) -> Any:
    """One output from those of the chunks, in order.

    Leaves that follow the batch are concatenated. Floating-point tensors that do not (a loss computed inside the
    network, say) are averaged with the chunks' sizes as weights; other leaves must be equal in all chunks. An object
    beside such tensors that nothing is known of (the cache of a language model, say) becomes an :class:`Unjoined`.

    Raises:
        BatchError: a leaf differs between the chunks and cannot be averaged.
    """
    parts = [flatten(output)[0] for output in outputs]
    rebuild = flatten(outputs[0])[1]
    total = sum(sizes)
    joined: list[Any] = []
    for axis, leaves in zip(axes, zip(*parts, strict=True), strict=True):
        head = leaves[0]
        if axis is not None:
            joined.append(torch.cat(leaves, dim=axis))
        elif isinstance(head, Tensor) and head.is_floating_point():
            same = all(leaf is head for leaf in leaves)
            if not same and head.numel() > 1:
                warnings.warn(
                    f"The network's output holds a tensor of shape {tuple(head.shape)} that does not follow the batch,"
                    " so it is averaged over the samples' chunks. If it has a row for each example, the inputs count"
                    " their examples in another dimension (a network that takes the sequence first): give batch_dim=1.",
                    stacklevel=2,
                )
            weighted = (leaf * (size / total) for leaf, size in zip(leaves, sizes, strict=True))
            joined.append(head if same else sum(weighted, torch.zeros_like(head)))
        elif all(_equal(head, leaf) for leaf in leaves):
            joined.append(head)
        elif isinstance(head, Tensor | np.ndarray | _PLAIN) or not any(isinstance(leaf, Tensor) for leaf in parts[0]):
            raise BatchError(
                f"The chunks of a batch gave different outputs of type {type(head).__name__} that cannot be joined. "
                "Use samples=1."
            )
        else:
            joined.append(Unjoined(type(head).__name__))
    return rebuild(joined)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    try:
        return a is b or bool(a == b)
    except Exception:  # an object that holds tensors, say
        return False
