"""Groups of whole outputs or whole inputs need no pass over the weight: their numbers go to what the layer computes.

A linear layer or a convolution whose rows are multiplied by m gives its plain output times m; one whose columns are
gives its plain output for the input times m. So the weight is neither copied nor masked, and no gradient of its size is
ever computed. The weight is put into the network as a tensor that knows this and answers ``linear`` and ``conv`` so;
for any other use it becomes the masked weight itself.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sublens.groups.grouping import Blocks, Grouping

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTIONS = {functional.conv1d: 1, functional.conv2d: 2, functional.conv3d: 3}
_PLAIN = ("shape", "dtype", "device", "ndim", "layout")


def factors(network: nn.Module, groupings: Mapping[str, Grouping]) -> dict[str, tuple[Blocks, bool]]:
    """Which weights can go this way: name -> grouping of the outputs or the inputs, and whether it is of the outputs.

    They are weights of linear layers and convolutions, used nowhere else, in groups of whole outputs or inputs.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in network.modules():
        for own, parameter in module.named_parameters(recurse=False):
            plain = type(module) in _KINDS and own == "weight"
            owners.setdefault(id(parameter), []).append(module if plain else nn.Module())
    parameters = dict(network.named_parameters())
    found: dict[str, tuple[Blocks, bool]] = {}
    for name, grouping in groupings.items():
        modules = owners[id(parameters[name])]
        if not isinstance(grouping, Blocks) or grouping.fine or any(type(module) not in _KINDS for module in modules):
            continue
        for dims, of_outputs in ((grouping.outputs, True), (grouping.inputs, False)):
            along = grouping.along(dims)
            if along is not None:
                found[name] = along, of_outputs
                break
    return found


class FactoredWeight(Tensor):
    """Stands for a weight times one number for each output, or for each input; has no data of its own."""

    weight: Tensor
    numbers: Tensor
    of_outputs: bool
    whole: Callable[[], Tensor]

    def __new__(
        cls, weight: Tensor, numbers: Tensor, of_outputs: bool, whole: Callable[[], Tensor]
    ) -> "FactoredWeight":
        """Stand for ``weight``; ``whole`` computes what it stands for, where that is needed."""
        made = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        made.weight, made.numbers, made.of_outputs, made.whole = weight, numbers, of_outputs, whole
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and _is_second(args, kwargs):
            return _layer(func, 0, *args, **kwargs)
        if func in _CONVOLUTIONS and _is_second(args, kwargs):
            return _layer(func, _CONVOLUTIONS[func], *args, **kwargs)
        if getattr(getattr(func, "__self__", None), "__name__", "") in _PLAIN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda factored: factored.whole(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda factored: factored.whole(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _is_second(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a factored tensor is the weight, and nothing else."""
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    others = [*args[:1], *args[2:], *(value for name, value in kwargs.items() if name != "weight")]
    return isinstance(weight, FactoredWeight) and not any(isinstance(other, FactoredWeight) for other in others)


def _layer(
    func: Any, kernel: int, input: Tensor, weight: Any, bias: Tensor | None = None, *more: Any, **named: Any
) -> Any:
    """A linear layer (``kernel`` 0) or a convolution over ``kernel`` dimensions."""
    each = (-1, *(1,) * kernel)
    if not weight.of_outputs:
        return func(input * weight.numbers.view(each).to(input.dtype), weight.weight, bias, *more, **named)
    output = func(input, weight.weight, None, *more, **named)
    output = output * weight.numbers.view(each).to(output.dtype)
    return output if bias is None else output + bias.view(each).to(output.dtype)
