"""The elements of a parameter that share a logit, and the arithmetic of that: nothing here knows what a module is.

Gates multiply. Whatever a gate is, its sample of a weight is the weight times a number m that depends on logit and
noise only. So a group's m is the gate's sample of a weight of 1, and the group's logit gradient is the gate's, for a
weight of 1 whose gradient is the sum of gradient * weight over the group. No gate has to know of groups.
"""

import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sublens.errors import MismatchError
from sublens.gates import Gate
from sublens.noise import Draw


class Grouping(ABC):
    """How the elements of one parameter share logits.

    Attributes:
        owner: name of the parameter under which the logits stand; another one's, if several parameters share them.
    """

    owner: str

    @property
    def size(self) -> int:
        """Number of elements of the parameter."""
        return self.count(torch.ones(self.grid, dtype=torch.bool))

    @property
    @abstractmethod
    def grid(self) -> tuple[int, ...]:
        """Shape of the logits, one for each group, as this parameter sees them. The owner's has as many elements."""

    @property
    def fine(self) -> bool:
        """Whether every element has a logit of its own."""
        return False

    @abstractmethod
    def masked(self, weight: Tensor, values: Tensor) -> Tensor:
        """Each element times its group's value; +0.0 where the value is ``False``.

        Args:
            weight: the parameter.
            values: one for each group, float or bool; any shape with as many elements as there are groups.

        Returns:
            Shape and dtype of ``weight``.
        """

    @abstractmethod
    def total(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """The sum of ``gradient * weight`` over each group: float32, shape ``grid``."""

    @abstractmethod
    def spread(self, values: Tensor) -> Tensor:
        """Each element's group's value, in the parameter's shape."""

    def of_elements(self, kept: Tensor) -> Tensor:
        """What each group keeps: bool, shape ``grid``.

        Args:
            kept: bool, of the parameter's shape.

        Raises:
            MismatchError: a group is kept in part.
        """
        if self.fine:
            return kept
        groups = self.total(kept.float(), torch.ones(kept.shape)) > 0
        if not torch.equal(self.spread(groups), kept):
            raise MismatchError(
                "The mask keeps a part of a group, so it is no mask of these groups. Give the groups (and the "
                "selection) that it was trained with."
            )
        return groups

    @abstractmethod
    def count(self, values: Tensor) -> int:
        """The number of elements in the groups whose value (bool) is true."""

    @abstractmethod
    def describe(self) -> Any:
        """All of it, as JSON, to tell one grouping from another."""


@dataclass(frozen=True)
class Blocks(Grouping):
    """Blocks of equal size; those at the end of a dimension are smaller where the size does not divide it.

    Attributes:
        owner: as in :class:`Grouping`.
        shape: the parameter's.
        view: the shape in which the parameter is cut, with as many elements.
        block: elements of a block along each dimension of ``view``, from 1 to its size.
        outputs: the dimensions of ``view`` that count the module's outputs, as its bias does; empty if unknown.
        inputs: those that count its inputs; empty if unknown.
    """

    owner: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    block: tuple[int, ...]
    outputs: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()

    @property
    def grid(self) -> tuple[int, ...]:
        """Blocks along each dimension of ``view``."""
        return tuple(-(-size // length) for size, length in zip(self.view, self.block, strict=True))

    @property
    def fine(self) -> bool:
        """Whether every element has a logit of its own, in the parameter's own shape."""
        return self.view == self.shape and all(length == 1 for length in self.block)

    def _regions(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], tuple[int, ...], tuple[int, ...]]]:
        """The parts of ``view`` in which all blocks have one size: mostly there is one, the whole.

        Each is: its slices of the view and of the grid, and the shapes (g1, b1, g2, b2, ...) and (g1, 1, g2, 1, ...) in
        which its elements and its values broadcast.
        """
        axes = []
        for size, length in zip(self.view, self.block, strict=True):
            full, rest = divmod(size, length)
            parts = [(slice(0, full * length), slice(0, full), full, length)]
            if rest:
                parts.append((slice(full * length, size), slice(full, full + 1), 1, rest))
            axes.append(parts)
        for region in itertools.product(*axes):
            elements = tuple(n for part in region for n in part[2:])
            values = tuple(n for part in region for n in (part[2], 1))
            yield tuple(part[0] for part in region), tuple(part[1] for part in region), elements, values

    def masked(self, weight: Tensor, values: Tensor) -> Tensor:
        """One broadcasting pass over the weight."""
        if self.fine:
            return _times(weight, values)
        whole, values = weight.reshape(self.view), values.reshape(self.grid)
        result = torch.empty_like(whole, memory_format=torch.contiguous_format)
        for region, of_grid, elements, broadcast in self._regions():
            w, v, out = whole[region].view(elements), values[of_grid].view(broadcast), result[region].view(elements)
            if 1 < elements[-1] < 64 and elements[-2] > 1:
                # Rows of numbers, one for each element: long rows are multiplied many times faster than short blocks.
                rows = (*elements[:-2], elements[-2] * elements[-1])
                v = v.expand(*broadcast[:-1], elements[-1]).reshape(*broadcast[:-2], rows[-1])
                w, out = whole[region].view(rows), result[region].view(rows)
            if v.dtype == torch.bool:
                torch.where(v, w, w.new_zeros(()), out=out)
            else:
                torch.mul(w, v.to(w.dtype), out=out)
        return result.view(self.shape)

    def total(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """One broadcasting pass and one reduction."""
        whole, by = weight.reshape(self.view), gradient.reshape(self.view)
        result = torch.empty(self.grid, dtype=torch.float32, device=weight.device)
        for region, of_grid, elements, broadcast in self._regions():
            products = (by[region].float() * whole[region].float()).reshape(_merged(elements))
            # The outer dimension first: whole rows are added to each other, and little is left for the inner one.
            for dim in range(1, products.dim(), 2):
                products = products.sum(dim, keepdim=True)
            result[of_grid].view(broadcast).copy_(products.view(broadcast))
        return result

    def spread(self, values: Tensor) -> Tensor:
        """The values, each written as often as its block is large."""
        if self.fine:
            return values
        values = values.reshape(self.grid)
        result = torch.empty(self.view, dtype=values.dtype, device=values.device)
        for region, of_grid, elements, broadcast in self._regions():
            result[region].view(elements).copy_(values[of_grid].view(broadcast).expand(elements))
        return result.view(self.shape)

    def count(self, values: Tensor) -> int:
        """Blocks that are kept times their size."""
        values = values.reshape(self.grid)
        return sum(
            int(values[of_grid].sum()) * math.prod(elements[1::2]) for _, of_grid, elements, _ in self._regions()
        )

    def describe(self) -> Any:
        """The fields that say which elements belong together."""
        return {"owner": self.owner, "view": list(self.view), "block": list(self.block)}

    def along(self, dims: tuple[int, ...]) -> "Blocks | None":
        """The same groups for a vector with one element for each index of some dimensions of ``view``.

        A bias is such a vector along the outputs. ``None`` if an index lies in several groups, or ``dims`` is empty.
        """
        others = [d for d in range(len(self.view)) if d not in dims]
        if not dims or any(self.block[d] < self.view[d] for d in others):
            return None
        view = tuple(self.view[d] for d in dims)
        # One dimension more than the vector has: it is never fine, for the logits have the owner's shape.
        return Blocks(self.owner, (math.prod(view),), (*view, 1), (*(self.block[d] for d in dims), 1))


@dataclass(frozen=True, eq=False)
class Labels(Grouping):
    """Any grouping: a number for each element. Costs one index per element in memory, unlike :class:`Blocks`.

    Attributes:
        owner: as in :class:`Grouping`.
        index: int64 tensor of the parameter's shape, values 0 to ``groups - 1``.
        groups: number of groups.
    """

    owner: str
    index: Tensor
    groups: int

    @property
    def grid(self) -> tuple[int, ...]:
        """A row of groups."""
        return (self.groups,)

    def masked(self, weight: Tensor, values: Tensor) -> Tensor:
        """The weight times values that are gathered for each element."""
        return _times(weight, self.spread(values))

    def total(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Sums by index."""
        products = (gradient.float() * weight.float()).reshape(-1)
        return products.new_zeros(self.groups).index_add_(0, self._index(products).reshape(-1), products)

    def spread(self, values: Tensor) -> Tensor:
        """Values gathered for each element."""
        return values.reshape(-1)[self._index(values)]

    def count(self, values: Tensor) -> int:
        """Elements whose group is kept."""
        return int(self.spread(values).sum())

    def describe(self) -> Any:
        """Owner and a hash of the index."""
        numbers = self.index.contiguous().cpu().numpy().astype("<i8").tobytes()
        return {"owner": self.owner, "labels": hashlib.sha256(numbers).hexdigest()}

    def _index(self, like: Tensor) -> Tensor:
        return self.index.to(like.device)


def _merged(elements: tuple[int, ...]) -> tuple[int, ...]:
    """(g1, b1, g2, b2, ...) with neighbours made one where that changes no group: as few dimensions as there can be."""
    pairs: list[tuple[int, int]] = []
    for groups, length in zip(elements[::2], elements[1::2], strict=True):
        if pairs and groups == 1:
            pairs[-1] = (pairs[-1][0], pairs[-1][1] * length)
        elif pairs and pairs[-1][1] == 1:
            pairs[-1] = (pairs[-1][0] * groups, length)
        else:
            pairs.append((groups, length))
    return tuple(number for pair in pairs for number in pair)


def _times(weight: Tensor, values: Tensor) -> Tensor:
    if values.dtype == torch.bool:
        return torch.where(values, weight, weight.new_zeros(()))
    return weight * values.to(weight.dtype)


@dataclass(frozen=True)
class GroupedGate:
    """A gate on a parameter whose elements share logits: :class:`sublens.Gate`'s two directions, for any gate."""

    gate: Gate
    grouping: Grouping

    def masked(self, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """The weight times its group's sample; noise is drawn for the groups only."""
        return self.grouping.masked(weight, self.gate.masked(torch.ones_like(logits), logits, draw))

    def logit_gradient(self, gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """Gradient of the logits (float32, their shape), given that of :meth:`masked`'s result, for the same draw."""
        total = self.grouping.total(gradient, weight).view(logits.shape)
        return self.gate.logit_gradient(total, torch.ones_like(logits), logits, draw)
