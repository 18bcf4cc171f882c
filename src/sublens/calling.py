"""Calling a network with other weights, and leaving it as it was."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_with(
    network: nn.Module,
    aliases: Mapping[str, tuple[str, ...]],
    put: Callable[[str, Tensor], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    around: Callable[[Mapping[str, Tensor]], AbstractContextManager[Any]] = nullcontext,
) -> Any:
    """Call a network with other weights, and leave it as it was.

    Args:
        network: any module.
        aliases: its :func:`sublens.selection.tied_names`.
        put: ``put(name, weight)`` gives what stands in a weight's place; :func:`plain` gives the weight itself.
        args: the network's arguments.
        kwargs: likewise.
        around: makes a context for the call itself, given all that was put into the network.
    """
    tensors: dict[str, Tensor] = {}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for name, names in aliases.items():
        # All names of a tied tensor get the same object, so that it is sampled once.
        tensors |= dict.fromkeys(names, put(name, parameters[name].detach()))
    copies: dict[int, Tensor] = {}
    for name, buffer in network.named_buffers(remove_duplicate=False):
        tensors[name] = copies.setdefault(id(buffer), buffer.detach().clone())
    with at_rest(network), around(tensors):
        return functional_call(network, tensors, args, kwargs, strict=True)


def plain(name: str, weight: Tensor) -> Tensor:
    """The weight itself, in its own place."""
    return weight


@contextmanager
def at_rest(network: nn.Module) -> Iterator[None]:
    """The network's modules in evaluation mode; what calls change in them is put back."""
    modules = list(network.modules())
    training = [m for m in modules if m.training]
    # Recurrent layers keep a list of their weights, which a functional call replaces and does not restore.
    flat = [(m, m.__dict__["_flat_weights"], m.__dict__.get("_flat_weight_refs"))
            for m in modules if "_flat_weights" in m.__dict__]  # fmt: skip
    # A module that has two names is given other tensors twice, and a functional call then puts back the first ones.
    own: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (tensors, dict(tensors)) for m in modules for tensors in (m._parameters, m._buffers)
    ]
    try:
        for m in training:
            m.training = False
        yield
    finally:
        for m in training:
            m.training = True
        for tensors, before in own:
            for name, tensor in before.items():
                if tensors.get(name) is not tensor:
                    tensors[name] = tensor
        for m, weights, refs in flat:
            m.__dict__["_flat_weights"], m.__dict__["_flat_weight_refs"] = weights, refs
