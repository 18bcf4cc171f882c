"""What the user hands to a diagnosis, and small words about it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sublens.errors import SettingError

_EXPECTED = "a tensor, a list of tensors, a dict of names and tensors, or an iterable such as module.parameters()"


def named_logits(logits: object) -> dict[str, Tensor]:
    """The logits with names: a dict's or a module's own; ``"logits"`` for one tensor; ``"logits[2]"`` in a list.

    Raises:
        SettingError: there are no logits, or something among them is no tensor.
    """
    pairs: list[tuple[Any, Any]]
    if isinstance(logits, Tensor):
        pairs = [("logits", logits)]
    elif isinstance(logits, torch.nn.ParameterDict | Mapping):
        pairs = list(logits.items())
    elif isinstance(logits, torch.nn.Module):
        pairs = list(logits.named_parameters())
    elif isinstance(logits, Iterable):
        pairs = [_pair(index, entry) for index, entry in enumerate(logits)]
    else:
        raise SettingError(f"diagnose() got {type(logits).__name__} as logits. Give it {_EXPECTED}.")
    for name, tensor in pairs:
        if not isinstance(tensor, Tensor):
            raise SettingError(f"Logits {name!r} are of type {type(tensor).__name__}. Give diagnose() {_EXPECTED}.")
    if not pairs:
        raise SettingError("diagnose() got no logits: the collection is empty (an iterator used up before?).")
    named: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in pairs:
        if id(tensor) not in known:
            named[str(name)] = tensor
        known.add(id(tensor))
    return named


def _pair(index: int, entry: object) -> tuple[object, object]:
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str):
        return entry
    return f"logits[{index}]", entry


def param_groups(optimizer: object) -> list[dict[str, Any]]:
    """The optimizer's parameter groups; none if there is no optimizer.

    Raises:
        SettingError: it is not a torch optimizer.
    """
    if optimizer is None:
        return []
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise SettingError(f"diagnose() got {type(optimizer).__name__} as optimizer. Give it a torch.optim.Optimizer.")
    return groups


def listed(names: Sequence[str], limit: int = 4) -> str:
    """Names for a sentence: ``'a', 'b' and 3 more``."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def shapes(tensors: Sequence[Tensor], limit: int = 3) -> str:
    """Shapes for a sentence: ``(20, 10), (10,) and 2 more``."""
    shown = ", ".join(str(tuple(tensor.shape)) for tensor in tensors[:limit])
    return shown if len(tensors) <= limit else f"{shown} and {len(tensors) - limit} more"
