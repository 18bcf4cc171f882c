"""Splitting inputs and joining outputs: nothing is lost, mixed up or weighted wrongly, and doubt is an error."""

import copy
import dataclasses
from collections import Counter, OrderedDict, UserDict, defaultdict, namedtuple
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from sublens.errors import BatchError
from sublens.splitting import Batch, flatten, join, output_axes


class Point(NamedTuple):
    x: Any
    y: Any = None


Plain = namedtuple("Plain", "a b")


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: Any
    b: Any = 0
    derived: Any = dataclasses.field(init=False, default=3)


@dataclasses.dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As in Hugging Face transformers: a dataclass that is a mapping of those of its fields that are not None."""

    loss: Any = None
    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


def default_of(value: Any) -> Any:
    made: defaultdict[str, Any] = defaultdict(list)
    made["k"] = value
    return made


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(one: Any, other: Any) -> bool:
    """Equal in structure, types and every bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict | UserDict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    return bool(one == other)


BRANCHES: list[Any] = [
    lambda v: (v,),
    lambda v: [v, v],
    lambda v: {"a": v, 3: 1.5},
    lambda v: OrderedDict(z=v, a="text"),
    lambda v: Point(v),
    lambda v: Plain(a=None, b=v),
    lambda v: Frozen(v),
    lambda v: ModelOutput(logits=v),
    lambda v: ModelOutput(loss=v, hidden=(v, v)),
    lambda v: UserDict(a=v),
    default_of,
]


@st.composite
def trees(draw: st.DrawFn, leaf: st.SearchStrategy[Any], depth: int = 3) -> Any:
    if depth == 0 or draw(st.booleans()):
        return draw(leaf)
    return draw(st.sampled_from(BRANCHES))(draw(trees(leaf, depth - 1)))


def tensors(batch: int) -> st.SearchStrategy[Any]:
    """Tensors with the batch first, and leaves of other kinds."""
    shapes = st.sampled_from([(batch,), (batch, 3), (batch, 5, 2)])
    kinds = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64])
    made = st.builds(
        lambda shape, kind, seed: (9 * normal(*shape, seed=seed)).to(kind), shapes, kinds, st.integers(0, 9)
    )
    return st.one_of(made, st.none(), st.booleans(), st.integers(), st.text(max_size=2), st.just("mean"))


# --- structures ---


@settings(max_examples=80, deadline=None)
@given(trees(tensors(7)))
def test_flatten_and_rebuild_is_the_identity(tree: Any) -> None:
    leaves, rebuild = flatten(tree)
    assert same(rebuild(leaves), tree)


@pytest.mark.parametrize(
    ("tree", "count"),
    [
        (torch.zeros(2), 1),
        (None, 1),
        ("text", 1),
        ((), 0),
        ({}, 0),
        ([(), {"a": [1, (2, None)]}], 3),
        (Point(1, (2, 3)), 3),
        (Frozen(a=[1, 2], b=3), 3),
        (ModelOutput(loss=1.0, hidden=(1, 2)), 3),
        (torch.zeros(4, 3).max(0), 2),
        (torch.Size([2, 3]), 2),
        (Frozen, 1),
        (range(3), 1),
        ({1, 2}, 1),
        (np.zeros(3), 1),
    ],
)
def test_leaves_of_a_structure(tree: Any, count: int) -> None:
    leaves, rebuild = flatten(tree)
    assert len(leaves) == count
    assert type(rebuild(leaves)) is type(tree)


def test_mappings_of_any_kind_come_back_as_they_were() -> None:
    made = default_of([torch.ones(2)])
    leaves, rebuild = flatten(made)
    again = rebuild([leaves[0] + 1])
    assert type(again) is defaultdict
    assert again.default_factory is list
    assert torch.equal(again["k"][0], torch.full((2,), 2.0))
    assert made["k"][0][0] == 1.0
    assert flatten(Counter(a=2))[1]([5]) == Counter(a=5)
    read_only = MappingProxyType({"a": 1})
    assert dict(flatten(read_only)[1]([5])) == {"a": 5}


def test_a_model_output_keeps_its_attributes() -> None:
    output = ModelOutput(logits=torch.zeros(2), hidden=(torch.ones(2),))
    leaves, rebuild = flatten(output)
    again = rebuild([leaf + 1 for leaf in leaves])
    assert again.loss is None
    assert torch.equal(again.logits, torch.ones(2))
    assert torch.equal(again["hidden"][0], torch.full((2,), 2.0))


# --- splitting and joining ---


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 7), trees(tensors(7)), st.lists(trees(tensors(7)), max_size=2))
def test_split_then_join_is_the_identity(chunks: int, tree: Any, more: list[Any]) -> None:
    args, kwargs = (normal(7, 4), tree), {str(i): other for i, other in enumerate(more)}
    batch = Batch(args, kwargs, 0)
    bounds = batch.bounds(chunks)
    parts = [batch.part(a, b) for a, b in pairwise(bounds)]
    sizes = [b - a for a, b in pairwise(bounds)]
    assert [len(part[0][0]) for part in parts] == sizes
    other = sizes[0] - 1 if sizes[0] > 1 else 2
    axes = (
        output_axes(parts[0], sizes[0], batch.part(0, min(other, 7)), other, batch_leads=True) if chunks > 1 else None
    )
    if axes is not None:
        assert same(join(parts, sizes, axes), (args, kwargs))
    else:
        assert same(parts[0], (args, kwargs))


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 40))
def test_chunks_are_as_equal_as_can_be(size: int, chunks: int) -> None:
    batch = Batch((torch.zeros(size),), {}, 0)
    if size < chunks:
        with pytest.raises(BatchError, match=f"batch of {size} cannot be split for {chunks} samples"):
            batch.bounds(chunks)
        return
    bounds = batch.bounds(chunks)
    sizes = [b - a for a, b in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, size, chunks)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0


def test_inputs_are_split_where_the_batch_is() -> None:
    x, state, mask, lengths, scale = normal(5, 6, 3), normal(2, 6, 8), normal(5, 5), torch.arange(6), torch.tensor(2.0)
    batch = Batch((x, (state, state)), {"mask": mask, "lengths": lengths, "scale": scale, "flag": True}, 1)
    assert batch.size == 6
    (part, states), kwargs = batch.part(2, 5)
    assert torch.equal(part, x[:, 2:5])
    assert torch.equal(states[0], state[:, 2:5])
    assert torch.equal(kwargs["lengths"], lengths[2:5])
    assert kwargs["mask"] is mask
    assert kwargs["scale"] is scale
    assert kwargs["flag"] is True
    assert part.data_ptr() == x[:, 2:5].data_ptr()  # views, no copies


@pytest.mark.parametrize(("batch_dim", "size"), [(0, 4), (1, 5), (2, 6), (-1, 6), (-3, 4)])
def test_batch_dim_counts_from_either_end(batch_dim: int, size: int) -> None:
    x = normal(4, 5, 6)
    batch = Batch((x,), {}, batch_dim)
    assert batch.size == size
    assert torch.equal(batch.part(1, 3)[0][0], x.narrow(batch_dim, 1, 2))


def test_the_state_of_a_recurrent_layer_has_the_batch_second() -> None:
    x, state = normal(6, 9, 3), normal(2, 6, 8)
    (part, of_state), _ = Batch((x, state), {}, 0).part(0, 2)
    assert part.shape == (2, 9, 3)
    assert torch.equal(of_state, state[:, :2])


@pytest.mark.parametrize("kwargs", [{}, {"flag": True}])
def test_a_call_without_tensors_has_no_batch(kwargs: dict[str, Any]) -> None:
    with pytest.raises(BatchError, match="without any tensor"):
        Batch((), kwargs, 0)


@pytest.mark.parametrize(("shape", "batch_dim"), [((4,), 1), ((4, 3), -3), ((), 0)])
def test_a_batch_dim_that_is_not_there_is_refused(shape: tuple[int, ...], batch_dim: int) -> None:
    with pytest.raises(BatchError, match=rf"batch_dim is {batch_dim}, but the first tensor has shape \({shape and 4}"):
        Batch((normal(*shape) if shape else torch.tensor(1.0),), {}, batch_dim)


def test_a_square_table_of_the_size_of_the_batch_is_refused() -> None:
    with pytest.raises(BatchError, match=r"6 x 6 input .* batch size is 6 too.*Use another batch size"):
        Batch((normal(6, 3),), {"mask": normal(6, 6)}, 0)
    Batch((normal(6, 6), normal(6, 6)), {}, 0)  # as the leading tensor: targets, say


@pytest.mark.parametrize("where", ["input", "nested", "output"])
def test_a_packed_sequence_is_refused(where: str) -> None:
    packed = pack_sequence([normal(3, 2), normal(2, 2)])
    with pytest.raises(BatchError, match=r"PackedSequence cannot be split.*samples=1"):
        if where == "input":
            Batch((packed,), {}, 0)
        elif where == "nested":
            Batch((normal(2, 2), {"deep": [packed]}), {}, 0)
        else:
            output_axes(packed, 2, packed, 1, batch_leads=True)


def test_a_packed_sequence_can_be_looked_into() -> None:
    packed = pack_padded_sequence(normal(2, 3, 2).requires_grad_(), torch.tensor([3, 2]), batch_first=True)
    leaves, _ = flatten((packed, None))
    assert any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


# --- outputs ---


def axes_of(make: Any, *, leads: bool = True) -> list[int | None]:
    return output_axes(make(3), 3, make(2), 2, batch_leads=leads)


def test_the_batch_is_found_in_outputs() -> None:
    axes = axes_of(lambda b: {"a": normal(b, 4), "b": [normal(5, b), (normal(2, b, 3), None)], "c": 1})
    assert axes == [0, 1, 1, None, None]
    assert axes_of(lambda b: normal(b * 5, 3)) == [0]  # examples times positions, flattened


def test_flattened_outputs_need_the_batch_to_lead() -> None:
    with pytest.raises(BatchError, match=r"size 15 for 3 examples and 10 for 2.*samples=1"):
        axes_of(lambda b: normal(5 * b, 3), leads=False)


@pytest.mark.parametrize(
    "make",
    [lambda b: normal(b, b), lambda b: normal(*[2] * b), lambda b: normal(b + 1, 3), lambda b: normal(b * b)],
    ids=["batch by batch", "dimensions", "one more", "squared"],
)
def test_outputs_that_cannot_be_joined_are_refused(make: Any) -> None:
    with pytest.raises(BatchError, match=r"join.*samples=1"):
        axes_of(make)


def test_outputs_of_another_structure_are_refused() -> None:
    with pytest.raises(BatchError, match="samples=1"):
        axes_of(lambda b: [normal(b)] * b)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.sampled_from([torch.float32, torch.float64]))
def test_means_over_chunks_are_weighted_by_their_sizes(sizes: list[int], dtype: torch.dtype) -> None:
    values = normal(sum(sizes)).to(dtype).requires_grad_()
    chunks = values.split(sizes)
    loss, _ = join([(chunk.square().mean(), "x") for chunk in chunks], sizes, [None, None])
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, values.square().mean())
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient, 2 * values.detach() / len(values))


def test_what_is_the_same_in_all_chunks_stays_as_it_is() -> None:
    shared, steps = torch.tensor([0.1, 0.7]), torch.arange(3)
    whole = join([(shared, steps, "a", None, 2)] * 3, [3, 2, 2], [None] * 5)
    assert whole[0] is shared
    assert same(whole, (shared, steps, "a", None, 2))


@pytest.mark.parametrize("pair", [(1, 2), ("a", "b"), (torch.tensor(1), torch.tensor(2)), (np.zeros(3), np.ones(3))])
def test_what_differs_and_has_no_mean_is_refused(pair: Any) -> None:
    with pytest.raises(BatchError, match=r"different outputs of type \w+ that cannot be joined.*samples=1"):
        join(pair, [1, 1], [None])


def test_arrays_that_are_equal_are_joined() -> None:
    assert np.array_equal(join([np.ones(3), np.ones(3)], [1, 1], [None]), np.ones(3))


class Opaque:
    pass


def test_objects_that_cannot_be_joined_fail_when_they_are_used():
    ones = {"x": torch.ones(2), "cache": Opaque()}
    twos = {"x": torch.ones(1), "cache": Opaque()}
    joined = join([ones, twos], [2, 1], [0, None])
    assert torch.equal(joined["x"], torch.ones(3))
    assert copy.copy(joined["cache"]) is not None
    assert repr(joined["cache"]) == "<Opaque of each chunk of the batch, not joined>"
    with pytest.raises(BatchError, match=r"type Opaque .*asked for its 'states'.*samples=1"):
        _ = joined["cache"].states
    with pytest.raises(BatchError, match="different outputs of type Opaque"):
        join([Opaque(), Opaque()], [2, 1], [None])  # nothing beside it: there is no output at all
