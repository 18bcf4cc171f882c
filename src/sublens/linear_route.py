"""The fast route for linear layers of an unmodified network: one pass over a weight serves all K samples.

The network is called once, under :func:`torch.func.vmap` over the K chunks of the batch, so its code still sees one
chunk. Each masked weight is put in as a :class:`GatedWeight`, a tensor without data that answers
``torch.nn.functional.linear`` with the blocked product of all chunks (:mod:`sublens.kernels.blocked`), and everything
else by asking for the general route. Which networks can go this way is :func:`applies`; that one of them cannot after
all (code that vmap does not take, a weight used for something else) is found at its first call.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from sublens import kernels
from sublens.gates import Gate
from sublens.kernels import blocked, cpu
from sublens.noise import Draw
from sublens.splitting import Batch, Rebuild, flatten


class NotLinearError(Exception):
    """A masked weight was used otherwise than by a linear layer; the general route takes over."""


def applies(network: nn.Module, logits: Mapping[str, Tensor], gate: Gate) -> bool:
    """Whether all masked parameters are float32 CPU weights of ``nn.Linear``, used nowhere else, under a fused gate."""
    if not (gate.fused and kernels.fused()):
        return False
    parameters = dict(network.named_parameters())
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    return all(
        cpu.applies(parameter, scores)
        and parameter.is_contiguous()
        and all(type(module) is nn.Linear and own == "weight" for module, own in owners[id(parameter)])
        for parameter, scores in ((parameters[name], scores) for name, scores in logits.items())
    )


@dataclass(frozen=True)
class _Source:
    logits: Tensor
    weight: Tensor
    draw: Draw


class GatedWeight(Tensor):
    """Stands for a weight under all K samples at once; has its shape and dtype, but no data."""

    source: _Source

    def __new__(cls, logits: Tensor, weight: Tensor, draw: Draw) -> "GatedWeight":
        """Stand for ``weight`` under the samples that follow ``draw``."""
        made = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        made.source = _Source(logits, weight, draw)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, GatedWeight) and not isinstance(x, GatedWeight):
                source = weight.source
                y = _Linear.apply(x, source.logits, source.weight, source.draw)
                return y if bias is None else y + bias
        if getattr(func, "__name__", "") == "__get__":  # .shape, .dtype, .device, ...
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        raise NotLinearError(getattr(func, "__name__", str(func)))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotLinearError(str(func))


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


class _Linear(torch.autograd.Function):
    """Seen by one chunk under vmap; the work is done by the vmap rule, for all chunks."""

    @staticmethod
    def forward(x: Tensor, logits: Tensor, weight: Tensor, draw: Draw) -> Tensor:
        raise NotLinearError("an input that does not depend on the batch")

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, logits: Tensor, weight: Tensor, draw: Draw) -> tuple[Tensor, int]:
        return _LinearOfSamples.apply(x.movedim(in_dims[0], 0), logits, weight, draw), 0


class _LinearOfSamples(torch.autograd.Function):
    """(K, ..., in) inputs under K samples. Keeps inputs, logits and weight for the backward pass, no sample."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, logits: Tensor, weight: Tensor, draw: Draw) -> Tensor:
        flat = x.reshape(x.shape[0], -1, x.shape[-1]).contiguous()
        ctx.save_for_backward(flat, logits, weight)
        ctx.draw, ctx.shape = draw, x.shape  # type: ignore[attr-defined]
        y = blocked.forward(flat, weight, logits.detach(), draw)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, logits, weight = ctx.saved_tensors
        flat = gradient.reshape(x.shape[0], -1, weight.shape[0]).contiguous()
        wants = ctx.needs_input_grad[0]
        of_x, of_logits = blocked.backward(flat, x, weight, logits.detach(), ctx.draw, wants_x=wants)
        return None if of_x is None else of_x.view(ctx.shape), of_logits, None, None


def over_chunks(call: Callable[..., Any], batch: Batch, chunks: int, *, copy: bool) -> list[Any]:
    """The outputs of ``call`` for each of the equal chunks of a batch, computed together.

    Args:
        call: takes the network's arguments for one chunk.
        batch: its size is a multiple of ``chunks``.
        chunks: number of chunks K.
        copy: give the network copies, where it is not yet known whether it can be called this way.
    """
    tensors, arguments = batch.stacked(chunks)
    tensors = [tensor.clone() for tensor in tensors] if copy else tensors
    rebuild: Rebuild | None = None
    others: list[Any] = []

    def one(*slices: Tensor) -> tuple[Tensor, ...]:
        nonlocal rebuild, others
        args, kwargs = arguments(*slices)
        others, rebuild = flatten(call(*args, **kwargs))
        return tuple(leaf for leaf in others if isinstance(leaf, Tensor))

    # Tensors that do not depend on the batch come back once for each chunk, as from the general route.
    stacked = torch.func.vmap(one, randomness="different")(*tensors)
    assert rebuild is not None
    outputs = []
    for k in range(chunks):
        tensors_of_k = iter(leaf[k] for leaf in stacked)
        outputs.append(rebuild([next(tensors_of_k) if isinstance(leaf, Tensor) else leaf for leaf in others]))
    return outputs
