"""From what a user asks for to a :class:`Grouping` of each selected parameter."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sublens.errors import SelectionError, SettingError
from sublens.groups.grouping import Blocks, Grouping, Labels
from sublens.groups.heads import heads
from sublens.groups.layout import Layout, layout_of
from sublens.selection import Where, is_bias, select

Kind: TypeAlias = str | tuple[int | None, ...]
Groups: TypeAlias = "Kind | Callable[[str, nn.Parameter, nn.Module], Kind | Tensor]"

NAMES = ("weight", "row", "column", "channel", "kernel", "head", "layer")
_SIZE = re.compile(r"([1-9]\d*)x([1-9]\d*)")


def check_groups(groups: object) -> None:
    """Refuse what can be no grouping of any network.

    Raises:
        SettingError: neither a known word, nor block lengths, nor a function.
    """
    if callable(groups):
        return
    if isinstance(groups, str) and (groups in NAMES or _SIZE.fullmatch(groups)):
        return
    if isinstance(groups, tuple) and groups and all(_is_length(length) for length in groups):
        return
    raise SettingError(
        f"groups={groups!r} is no grouping. There are {', '.join(map(repr, NAMES))}; blocks of n outputs and m inputs, "
        "as in '16x16'; a tuple with a block length for each dimension, None for a whole one; or a function "
        "groups(name, parameter, module) that returns one of these, or an integer tensor that numbers the groups."
    )


def group(network: nn.Module, where: Where, biases: bool, groups: Groups) -> dict[str, Grouping]:
    """Choose the parameters that get a mask (:func:`sublens.select`), and group the elements of each.

    Args:
        network: any module. It is only read.
        where: which parameters.
        biases: also the biases of the modules whose weights are selected. In groups, a bias goes with the group in
            which its output's weights are; if they are in several, it is left alone.
        groups: what shares a logit; see :class:`sublens.MaskedNetwork`.

    Returns:
        Name -> grouping, in the network's order.

    Raises:
        SettingError: ``groups`` is no grouping.
        SelectionError: the selection is empty, or a selected parameter has no such groups.
    """
    check_groups(groups)
    selected = select(network, where, biases=biases)
    named = set(select(network, where, biases=False)) if biases else set(selected)
    modules = dict(network.named_modules(remove_duplicate=False))
    found: dict[str, Grouping] = {}
    # Weights first: biases follow them.
    for name in sorted(selected, key=is_bias):
        parameter, module = selected[name], modules[name.rpartition(".")[0]]
        following = _of_bias(name, parameter, found)
        if following is not None:
            found[name] = following
        elif name in named or groups == "weight":
            found[name] = _grouping(modules, name, parameter, module, groups, found)
    return {name: found[name] for name in selected if name in found}


def _of_bias(name: str, bias: nn.Parameter, found: Mapping[str, Grouping]) -> Grouping | None:
    if not is_bias(name):
        return None
    path, _, last = name.rpartition(".")
    weight = found.get(f"{path}.{last.replace('bias', 'weight')}".lstrip("."))
    if not isinstance(weight, Blocks) or weight.fine or bias.dim() != 1:
        return None
    vector = weight.along(weight.outputs)
    return vector if vector is not None and vector.shape == bias.shape else None


def _grouping(
    modules: Mapping[str, nn.Module],
    name: str,
    parameter: nn.Parameter,
    module: nn.Module,
    groups: Groups,
    found: Mapping[str, Grouping],
) -> Grouping:
    kind: Any = groups(name, parameter, module) if callable(groups) else groups
    if isinstance(kind, Tensor):
        return _labels(name, parameter, kind)
    try:
        check_groups(kind)
        if callable(kind):
            raise SettingError("a function")
    except SettingError as error:
        raise SettingError(f"groups(...) returned this for '{name}': {error}") from None
    shape = tuple(parameter.shape)
    if isinstance(kind, tuple):
        if len(kind) > len(shape):
            raise SelectionError(
                f"groups={kind!r} has {len(kind)} lengths, but '{name}' has shape {shape}. Select others with where=, "
                "or give groups as a function."
            )
        lengths = (*kind, *(None,) * (len(shape) - len(kind)))
        block = tuple(size if n is None else min(n, size) for n, size in zip(lengths, shape, strict=True))
        layout = layout_of(module, parameter)
        inputs = layout.inputs if layout.view == shape else ()
        return Blocks(name, shape, shape, block, layout.plain_outputs, inputs)
    if kind == "head":
        return heads(modules, name, parameter, found)
    layout = layout_of(module, parameter)
    if kind == "weight":
        return Blocks(name, shape, shape, (1,) * len(shape), layout.plain_outputs)
    return Blocks(name, shape, layout.view, _block(kind, name, layout), layout.outputs, layout.inputs)


def _block(kind: str, name: str, layout: Layout) -> tuple[int, ...]:
    """Block lengths along the layout's dimensions."""
    single: tuple[int, ...] = ()  # the dimensions that are cut into single elements
    if kind in ("row", "channel"):
        single = layout.outputs
    elif kind == "column":
        if not layout.inputs:
            raise SelectionError(f"'{name}' has one dimension, and no columns. Leave it out with where='!{name}'.")
        single = layout.inputs
    elif kind == "kernel":
        single = (*layout.outputs, *layout.inputs)
    if size := _SIZE.fullmatch(kind):
        # Where a convolution has groups of its own, blocks do not reach across them.
        lengths = {layout.outputs[-1]: int(size[1])} | ({layout.inputs[-1]: int(size[2])} if layout.inputs else {})
        lengths |= {d: 1 for d in layout.apart}
        return tuple(min(lengths.get(d, n), n) for d, n in enumerate(layout.view))
    return tuple(1 if d in single else n for d, n in enumerate(layout.view))


def _labels(name: str, parameter: nn.Parameter, labels: Tensor) -> Labels:
    whole = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    if labels.shape != parameter.shape or not whole:
        raise SettingError(
            f"groups(...) returned a tensor of shape {tuple(labels.shape)} and {labels.dtype} for '{name}'; it must "
            f"number the group of each element: integers, shape {tuple(parameter.shape)}."
        )
    # Numbered anew, so that every group has elements and any numbers will do.
    numbers, index = torch.unique(labels.detach(), return_inverse=True)
    return Labels(name, index, numbers.numel())


def _is_length(length: object) -> bool:
    return length is None or (isinstance(length, int) and not isinstance(length, bool) and length >= 1)
