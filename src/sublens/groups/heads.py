"""Attention heads: contiguous blocks of the projections, counted by the module that attends.

The projections of one head share its logit: query, key, value and output together, or, where groups of query heads
share a key-value head, query with output and key with value.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from sublens.errors import SelectionError
from sublens.groups.grouping import Blocks, Grouping
from sublens.groups.layout import layout_of

# The names of projections in torch, Hugging Face transformers and timm.
_ROLES = {
    "query": ("q_proj", "query", "q_lin", "q", "to_q", "wq"),
    "key": ("k_proj", "key", "k_lin", "k", "to_k", "wk"),
    "value": ("v_proj", "value", "v_lin", "v", "to_v", "wv"),
    "packed": ("in_proj", "c_attn", "qkv"),
    "output": ("out_proj", "o_proj", "out_lin", "o", "to_out", "wo", "c_proj", "proj"),
}
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


@dataclass(frozen=True)
class _Place:
    """Where a projection stands: the name of its attention module, its role there, and the heads it has."""

    attention: str
    role: str
    heads: int
    shared: bool  # whether key and value heads are those of the query


def heads(
    modules: Mapping[str, nn.Module], name: str, parameter: nn.Parameter, found: Mapping[str, Grouping]
) -> Blocks:
    """One group for each head of the attention module that a projection belongs to.

    Args:
        modules: the network's modules by name.
        name: name of the projection's weight or bias.
        parameter: it.
        found: the groupings so far, whose logits are shared where they are of the same heads.

    Raises:
        SelectionError: it is no projection of attention with a known number of heads, or they do not divide it.
    """
    place = _place(modules, name)
    if place is None:
        raise SelectionError(
            f"groups='head': '{name}' is no projection of an attention module with a known number of heads. (A module "
            f"of your own is one if it has {_HEADS[0]}, and projections of the usual names, such as q_proj, k_proj, "
            "v_proj and out_proj.) Select the projections only, as in where='*attn*weight'; or give groups as a "
            "function, which may return 'head' for them and 'row' for others, or the block lengths of a head's "
            "elements, as in (64, None)."
        )
    blocks = _blocks(modules, name, parameter, place)
    query_side = place.shared or place.role in ("query", "output")
    for other, grouping in found.items():
        if not isinstance(grouping, Blocks) or grouping.owner != other or math.prod(grouping.grid) != place.heads:
            continue
        at = _place(modules, other)
        same_side = at is not None and (at.shared or at.role in ("query", "output")) == query_side
        if at is not None and at.attention == place.attention and same_side and _is_by_head(grouping, at.heads):
            return replace(blocks, owner=other)
    return blocks


def _blocks(modules: Mapping[str, nn.Module], name: str, parameter: nn.Parameter, place: _Place) -> Blocks:
    shape, count = tuple(parameter.shape), place.heads
    layout = layout_of(modules[name.rpartition(".")[0]], parameter)
    along = layout.inputs if place.role == "output" else layout.outputs
    parts = (3, count) if place.role == "packed" else (count,)
    if len(along) != 1 or shape[along[0]] % math.prod(parts):
        raise SelectionError(
            f"groups='head': '{name}' has shape {shape}, which does not divide into the {count} heads of "
            f"'{place.attention}'. Give groups as a function that returns the block lengths of its heads."
        )
    d = along[0]
    split = (*parts, shape[d] // math.prod(parts))
    view = (*shape[:d], *split, *shape[d + 1 :])
    head = d + len(parts) - 1
    block = tuple(1 if at == head else size for at, size in enumerate(view))
    # Where an output's dimension was split, its pieces count the outputs in the same order.
    outputs = tuple(range(d, d + len(split))) if place.role != "output" else ()
    return Blocks(name, shape, view, block, outputs)


def _is_by_head(grouping: Blocks, count: int) -> bool:
    cut = [size for size, length in zip(grouping.view, grouping.block, strict=True) if length < size]
    return cut == [count] or (count == 1 and not cut)


def _place(modules: Mapping[str, nn.Module], name: str) -> _Place | None:
    path = name.split(".")
    # The attention module holds the projection, or the projection's weight if that is its own; BERT's output
    # projection is output.dense beside it.
    for depth in (1, 2):
        attention = ".".join(path[:-depth])
        if len(path) < depth or attention not in modules:
            continue
        role = _role(path[-depth])
        if role is not None and _attends(modules[attention]):
            return _with_heads(modules[attention], attention, role)
    if path[-3:-1] == ["output", "dense"]:
        around = modules[".".join(path[:-3])]
        for child, module in around.named_children():
            if _attends(module):
                return _with_heads(module, ".".join([*path[:-3], child]), "output")
    return None


def _role(last: str) -> str | None:
    for role, names in _ROLES.items():
        if last in names or any(last in (f"{name}_weight", f"{name}_bias") for name in names):
            return role
    return None


def _attends(module: nn.Module) -> bool:
    held = [name for name, _ in module.named_children()] + [name for name, _ in module.named_parameters(recurse=False)]
    return any(_role(name) in ("query", "packed") for name in held)


def _with_heads(module: nn.Module, name: str, role: str) -> _Place | None:
    count = _number(module, _HEADS)
    if count is None:
        return None
    of_keys = _number(module, _KEY_VALUE_HEADS) or count
    if role == "packed" and of_keys != count:
        return None
    return _Place(name, role, of_keys if role in ("key", "value") else count, of_keys == count)


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """A number that a module, or the configuration that it keeps, has under one of these names."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None
