"""Putting a mask on a network in place, and taking it off without a trace."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def zeroed(network: nn.Module, removed: Iterable[tuple[str, Tensor]]) -> Iterator[nn.Module]:
    """Zero some elements for the time of a ``with`` block; see :meth:`sublens.Mask.applied` for what is promised.

    Args:
        network: any module; its original memory is not written.
        removed: name of a parameter, and a bool tensor of its shape: ``True`` where the block sees +0.0.
    """
    held = [(module, [dict(registry) for registry in _registries(module)]) for module in network.modules()]
    tensors = {id(t): t for _, registries in held for r in registries for t in r.values() if isinstance(t, Tensor)}
    originals = {key: tensor.data for key, tensor in tensors.items()}
    masked = _masked_copies(network, originals, removed)
    try:
        for key, tensor in tensors.items():
            tensor.data = masked[key]
        del masked
        torch.clear_autocast_cache()  # around the block, autocast may hold copies of the weights in another precision
        yield network
    finally:
        for module, registries in held:
            _reinstate(module, registries)
        for key, tensor in tensors.items():
            tensor.data = originals[key]
        torch.clear_autocast_cache()


def _masked_copies(
    network: nn.Module, originals: dict[int, Tensor], removed: Iterable[tuple[str, Tensor]]
) -> dict[int, Tensor]:
    """Masked copies by ``id``, which share memory among themselves exactly as the originals do."""
    storages: dict[object, torch.UntypedStorage] = {}
    copies = {}
    for key, tensor in originals.items():
        if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            copies[key] = tensor.clone()
            continue
        storage = tensor.untyped_storage()
        place = (storage.device, storage.data_ptr(), storage.nbytes())
        if place not in storages:
            storages[place] = storage.clone()
        view = tensor.new_empty(0)
        copies[key] = view.set_(storages[place], tensor.storage_offset(), tensor.size(), tensor.stride())
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for name, where in removed:
        copied = copies[id(parameters[name])]
        copied.masked_fill_(where.to(copied.device), 0)
    return copies


def _reinstate(module: nn.Module, held: Iterable[dict[str, Any]]) -> None:
    """Undo what replaced, added or deleted parameters, buffers or submodules of a module."""
    for registry, content in zip(_registries(module), held, strict=True):
        if [(name, id(value)) for name, value in registry.items()] == [(name, id(v)) for name, v in content.items()]:
            continue
        for name, value in content.items():
            if isinstance(value, nn.Parameter) and registry.get(name) is not value:
                setattr(module, name, value)  # an nn.LSTM keeps a list of its own, which only this updates
        registry.clear()
        registry.update(content)


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules
