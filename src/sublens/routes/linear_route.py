"""The fast route for layers of an unmodified network that multiply: one pass over a weight serves all K samples.

The network is called once. Each masked weight is put in as a :class:`GatedWeight`, a tensor without data that answers
``torch.nn.functional.linear`` with the blocked product of all chunks (:mod:`sublens.kernels.blocked`), attention and
LSTMs by what they are made of, and everything else by asking for the general route. Which networks can go this way is
:func:`applies`; that one of them cannot after all (code that vmap does not take, a weight used for something else) is
found at its first call.

With one sample, and for networks that treat every example by itself (:func:`per_example`), the call is an ordinary one
on the whole batch. Other networks are called under :func:`torch.func.vmap` over the K chunks, so that their code still
sees one chunk; that costs some milliseconds a call. Where vmap does not take that code, the call is an ordinary one on
the whole batch, if chunks are seen to give the same outputs (``MaskedNetwork``).
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.modules import module as modules

from sublens import kernels, recomputation
from sublens.gates import Gate
from sublens.kernels import blocked, cells, cpu
from sublens.noise import Draw
from sublens.routes import recurrent_route
from sublens.splitting import Batch, Rebuild, flatten


class NotLinearError(Exception):
    """A masked weight was used otherwise than by a linear layer; the general route takes over."""


class CallError(NotLinearError):
    """Something of this call only, which says nothing of others.

    An input is not as wide as the weight it meets (the general route fails too, with the network's own error), or
    weights or logits are not float32 numbers in order, since somebody has put others in their place.
    """


_LINEAR = {
    (nn.Linear, "weight"),
    (nn.Linear, "bias"),
    (nn.modules.linear.NonDynamicallyQuantizableLinear, "weight"),  # of nn.MultiheadAttention
    (nn.modules.linear.NonDynamicallyQuantizableLinear, "bias"),
    (nn.MultiheadAttention, "in_proj_weight"),
    (nn.MultiheadAttention, "in_proj_bias"),
    (nn.MultiheadAttention, "q_proj_weight"),
    (nn.MultiheadAttention, "k_proj_weight"),
    (nn.MultiheadAttention, "v_proj_weight"),
}
"""Which parameters of which modules are used by ``torch.nn.functional.linear`` and nothing else."""


def _linear_only(module: nn.Module, name: str) -> bool:
    """Whether a module's own parameter is used for nothing else than products with what goes through a layer."""
    if type(module) is nn.LSTM:
        return module.proj_size == 0 and name.startswith("weight_")
    return (type(module), name) in _LINEAR


def applies(network: nn.Module, logits: Mapping[str, Tensor], gate: Gate) -> bool:
    """Whether all that is masked are float32 CPU weights of linear layers, attention or LSTMs, under a fused gate."""
    if not (gate.fused and kernels.fused() and blocked.agrees()) or is_compiled(network):
        return False
    parameters = dict(network.named_parameters())
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    return all(
        cpu.applies(parameter, scores)
        and parameter.is_contiguous()
        and all(_linear_only(module, own) for module, own in owners[id(parameter)])
        for parameter, scores in ((parameters[name], scores) for name, scores in logits.items())
    )


_BY_EXAMPLE = (
    nn.CELU, nn.Dropout, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.Linear, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign,
    nn.Tanh, nn.Tanhshrink,
)  # fmt: skip


def per_example(network: nn.Module) -> bool:
    """Whether the network is a chain of modules that act on each example of a batch alone, and nothing watches it.

    Such a network gives each chunk the same outputs whether it is called on chunks or on the whole batch. Only modules
    of torch's own classes are taken at their word, and none with hooks, which would see another batch.
    """

    def acts_alone(module: nn.Module) -> bool:
        if hooked(module) or "forward" in module.__dict__:
            return False
        if type(module) is nn.Sequential:
            return all(acts_alone(part) for part in module)
        if type(module) is nn.LayerNorm:
            return len(module.normalized_shape) == 1
        if type(module) is nn.Flatten:
            return module.start_dim == 1
        return type(module) in _BY_EXAMPLE

    return type(network) is nn.Sequential and not hooked_everywhere() and acts_alone(network)


def vectorised(network: nn.Module) -> bool:
    """Whether :func:`torch.func.vmap` takes the network without loops, and each chunk is seen by whoever watches it.

    It has no rules for attention and LSTMs, and hooks of backward passes would see the gradients of all chunks at once.
    """
    return not (modules._global_backward_hooks or modules._global_backward_pre_hooks) and not any(
        isinstance(module, nn.MultiheadAttention | nn.LSTM) or module._backward_hooks or module._backward_pre_hooks
        for module in network.modules()
    )


def watched(network: nn.Module) -> bool:
    """Whether hooks watch a part of the network: they would see calls that serve to compare two routes."""
    return hooked_everywhere() or any(map(hooked, network.modules()))


def hooked(module: nn.Module) -> bool:
    """Whether hooks watch the calls of a module, or their backward passes."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hooked_everywhere() -> bool:
    """Whether hooks watch the calls of all modules, or their backward passes. Our own, in first calls, do not count."""
    if modules._global_backward_hooks or modules._global_backward_pre_hooks or modules._global_forward_hooks:
        return True
    hooks = modules._global_forward_pre_hooks.values()
    return any(getattr(hook, "__module__", None) != recomputation.__name__ for hook in hooks)


def is_compiled(network: nn.Module) -> bool:
    """Whether a part of the network is compiled: its code wants weights that are ordinary tensors."""
    compiler = sys.modules.get("torch._dynamo")
    return compiler is not None and any(isinstance(module, compiler.OptimizedModule) for module in network.modules())


@dataclass(frozen=True)
class _Source:
    logits: Tensor
    weight: Tensor
    draw: Draw
    chunks: int
    first: int = 0  # row of the parameter at which logits and weight begin
    examples: int = 0  # number of examples, where they are not in the first dimension but the last but one
    reduced: bool = False  # products in bfloat16

    def rows(self, sizes: int | Sequence[int]) -> "list[_Source]":
        """Parts of so many rows each, as ``torch.split`` makes them."""
        parts = zip(self.logits.split(sizes), self.weight.split(sizes), strict=True)
        found, first = [], self.first
        for logits, weight in parts:
            found.append(replace(self, logits=logits, weight=weight, first=first))
            first += len(weight)
        return found


class GatedWeight(Tensor):
    """Stands for a weight under all K samples at once; has its shape and dtype, but no data."""

    source: _Source

    def __new__(cls, logits: Tensor, weight: Tensor, draw: Draw, chunks: int) -> "GatedWeight":
        """Stand for ``weight`` under the samples that follow ``draw``.

        Args:
            logits: of the weight.
            weight: the weight.
            draw: names the first sample.
            chunks: number K of chunks that lie one after the other in the first dimension of the inputs, or 0 where
                there is a dimension of chunks under :func:`torch.func.vmap`.
        """
        for given in (logits, weight):
            # Looked at in each call: loops read whatever lies at an address.
            if not cpu.has_plain_data(given) or not given.is_contiguous() or given.shape != weight.shape:
                raise CallError(f"{type(given).__name__} of {given.dtype}, shape {tuple(given.shape)}, in other order")
        return cls._of(_Source(logits, weight, draw, chunks))

    @classmethod
    def _of(cls, source: _Source) -> "GatedWeight":
        weight = source.weight
        learns = torch.is_grad_enabled() and (source.logits.requires_grad or weight.requires_grad)
        made = Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=learns
        )
        made.source = source
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, GatedWeight) and not isinstance(x, GatedWeight):
                return _linear_and_bias(x, weight.source, bias.source if type(bias) is GatedWeight else bias)
        if func is nn.functional.multi_head_attention_forward:
            return cls._attention(args, kwargs)
        if func is torch.lstm:
            return _lstm(*args, **kwargs)
        if func in (Tensor.split, Tensor.chunk) and len(args) == 2 and kwargs in ({}, {"dim": 0}):
            # Attention to another sequence multiplies some rows of its weight with that one.
            source, given = args[0].source, args[1]
            sizes = math.ceil(len(source.weight) / given) if func is Tensor.chunk else given
            return tuple(cls._of(part) for part in source.rows(sizes))
        if getattr(func, "__name__", "") == "__get__":  # .shape, .dtype, .device, ...
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        raise NotLinearError(getattr(func, "__name__", str(func)))

    @classmethod
    def _attention(cls, args: Any, kwargs: Any) -> Any:
        query = args[0]
        if query.dim() != 3:
            raise NotLinearError("attention without a batch")

        def known(argument: Any) -> Any:
            # In attention the second dimension is the batch's.
            is_weight = type(argument) is GatedWeight
            return cls._of(replace(argument.source, examples=query.shape[1])) if is_weight else argument

        # Attention multiplies with its weights by ``linear``, once it has found that none of them has other ideas.
        # Made at each call, since names in ``torch.nn.functional`` may be given other functions.
        original = nn.functional.multi_head_attention_forward
        names = {**vars(nn.functional), "has_torch_function": lambda tensors: False}
        function = FunctionType(original.__code__, names, argdefs=original.__defaults__)
        return function(*map(known, args), **{name: known(argument) for name, argument in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotLinearError(str(func))


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


def _linear_and_bias(x: Tensor, source: _Source, bias: Any) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        # What goes into a layer and comes out has the precision that was asked for. What is multiplied has it where
        # the processor gains by that: elsewhere the loops are faster in float32 than PyTorch in half of it.
        asked = torch.get_autocast_dtype("cpu")
        if x.dtype not in (torch.float32, asked):
            raise NotLinearError(f"an input of {x.dtype} under autocast to {asked}")
        with torch.autocast("cpu", enabled=False):
            reduced = asked == torch.bfloat16 and blocked.multiplies_bfloat16()
            return _linear_and_bias(x.float(), replace(source, reduced=reduced), bias).to(asked)
    if source.chunks == 0:
        return _outside_vmap(x, source, bias)
    if isinstance(bias, _Source):
        return _plus_of_samples(_linear(x, source, None), source, bias)
    within = _bias_within(bias, source)
    y = _linear(x, source, bias if within else None)
    return y if within or bias is None else y + bias


def _outside_vmap(x: Tensor, source: _Source, bias: Any) -> Tensor:
    """The layer's output under :func:`over_chunks`' vmap, computed for all chunks as if that were not there.

    vmap hands a step of autograd on to a rule of its own by way of much code, which costs a small layer more than its
    product.
    """
    levels = functorch.get_interpreter_stack()
    if not functorch.is_batchedtensor(x) or len(levels) != 1:
        raise NotLinearError("an input that does not depend on the batch, or a transform within the network")
    level = functorch.maybe_get_level(x)
    of_each = isinstance(bias, Tensor) and functorch.is_batchedtensor(bias)  # a bias for each chunk
    with temporarily_clear_interpreter_stack():
        values = functorch.get_unwrapped(x).movedim(functorch.maybe_get_bdim(x), 0)
        if isinstance(bias, _Source):
            bias = replace(bias, chunks=values.shape[0])
        y = _linear_and_bias(values, replace(source, chunks=values.shape[0]), None if of_each else bias)
    y = functorch._add_batch_dim(y, 0, level)
    return y + bias if of_each else y


def _bias_within(bias: Any, source: _Source) -> bool:
    """Whether the blocked product adds the bias: not one that is trained, is no ordinary tensor, or is broadcast."""
    return (
        isinstance(bias, Tensor)
        and not bias.requires_grad
        and bias.shape == source.weight.shape[:1]
        and cpu.has_plain_data(bias)
        and bias.is_contiguous()
    )


def _plus_of_samples(y: Tensor, source: _Source, bias: _Source) -> Tensor:
    """What a layer gives plus a bias that is masked too, which is another one in each chunk."""
    if bias.weight.shape != source.weight.shape[:1]:
        raise NotLinearError(f"a masked bias of shape {tuple(bias.weight.shape)}")
    chunks = source.chunks
    of_samples: Tensor = _Samples.apply(bias.logits, bias.weight, bias.draw, bias.first, chunks)
    if chunks == 1:
        return y + of_samples[0]
    if source.examples:
        # As _linear has them: attention also multiplies all places of all examples as rows of one matrix.
        by_chunk = y.reshape(-1, chunks, source.examples // chunks, y.shape[-1])
        return (by_chunk + of_samples.unsqueeze(1)).view(y.shape)
    by_chunk = y.view(chunks, -1, y.shape[-1])
    return (by_chunk + of_samples.unsqueeze(1)).view(y.shape)


class _Samples(torch.autograd.Function):
    """A masked vector (n) under K samples, (K, n)."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, weight: Tensor, draw: Draw, first: int, samples: int) -> Tensor:
        ctx.save_for_backward(logits, weight)
        ctx.draw, ctx.first = draw, first  # type: ignore[attr-defined]
        out = weight.new_empty(samples, len(weight))
        cpu.walk(weight, logits.detach(), draw, masked=out, samples=samples, before=first)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, weight = ctx.saved_tensors
        of_weight, gradient, samples = None, gradient.resolve_neg().contiguous(), len(gradient)
        of_logits = torch.empty_like(logits)
        run = {"samples": samples, "before": ctx.first}
        cpu.walk(weight, logits, ctx.draw, gradient=gradient, result=of_logits, **run)
        if ctx.needs_input_grad[1]:
            is_open = torch.empty_like(gradient)
            cpu.walk(torch.ones_like(weight), logits, ctx.draw, masked=is_open, **run)
            of_weight = torch.where(is_open != 0, gradient, 0).sum(0)
        return of_logits, of_weight, None, None, None


def _linear(x: Tensor, source: _Source, bias: Tensor | None) -> Tensor:
    if x.shape[-1:] != source.weight.shape[1:]:
        raise CallError(f"an input of shape {tuple(x.shape)} for a weight of {tuple(source.weight.shape)}")
    rest = (source.logits, source.weight, source.draw, source.first, source.reduced, source.chunks, bias)
    if x.dtype != torch.float32 or x.numel() == 0:
        raise NotLinearError(f"an input of {x.dtype} and shape {tuple(x.shape)}")
    if source.chunks > 1 and source.examples:
        if source.examples % source.chunks:
            raise NotLinearError(f"{source.examples} examples for {source.chunks} chunks")
        if x.dim() == 3 and x.shape[1] == source.examples and x.transpose(0, 1).is_contiguous():
            # As attention sees batches that come first: so the chunks lie in memory already.
            chunked = x.transpose(0, 1).unflatten(0, (source.chunks, -1))
            return _LinearOfSamples.apply(chunked, *rest).flatten(0, 1).transpose(0, 1).contiguous()  # type: ignore[no-any-return]
        chunked = x.reshape(-1, source.chunks, source.examples // source.chunks, x.shape[-1]).movedim(1, 0)
        return _LinearOfSamples.apply(chunked, *rest).movedim(0, 1).reshape(*x.shape[:-1], -1)  # type: ignore[no-any-return]
    if source.chunks > 1 and (x.dim() == 1 or x.shape[0] % source.chunks):
        raise NotLinearError(f"an input of shape {tuple(x.shape)} for {source.chunks} chunks")
    return _LinearOfSamples.apply(x, *rest)  # type: ignore[no-any-return]


def _lstm(
    x: Any, state: Any, weights: Any, has_biases: Any, layers: Any = None, dropout: Any = None, train: Any = None,
    bidirectional: Any = None, batch_first: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``torch.lstm`` with gated weights, on the whole batch. Networks are called in evaluation mode: no dropout."""
    if batch_first is None or train:
        raise NotLinearError("an LSTM of packed sequences, or with dropout")
    if torch.is_autocast_enabled("cpu"):
        asked = torch.get_autocast_dtype("cpu")
        if any(part.dtype not in (torch.float32, asked) for part in (x, *state)):
            raise NotLinearError(f"an input of {x.dtype} under autocast to {asked}")
        first = next(weight for weight in weights if type(weight) is GatedWeight)
        if first.source.chunks == 1 and asked == torch.bfloat16 and blocked.multiplies_bfloat16():
            raise NotLinearError("one sample on a processor where PyTorch's own layer is faster in bfloat16")
        rest = (weights, has_biases, layers, dropout, train, bidirectional, batch_first)
        with torch.autocast("cpu", enabled=False):
            y, h, c = _lstm(x.float(), [part.float() for part in state], *rest)
        return y.to(asked), h.to(asked), c.to(asked)
    each = 4 if has_biases else 2  # weight_ih, weight_hh, bias_ih, bias_hh of a layer and direction
    gated = [weight for i, weight in enumerate(weights) if i % each < 2]
    biases = [bias for i, bias in enumerate(weights) if i % each >= 2]
    if not all(type(weight) is GatedWeight for weight in gated) or any(type(bias) is GatedWeight for bias in biases):
        raise NotLinearError("an LSTM that is masked in part, or whose biases are")
    if any(weight.source.weight.requires_grad for weight in gated):
        raise NotLinearError("an LSTM whose weights are trained")
    if not cells.agrees():
        raise NotLinearError("an LSTM, whose loops do not give PyTorch's outputs on this machine")
    chunks = gated[0].source.chunks
    examples = x.shape[0 if batch_first else 1]
    if (
        chunks == 0
        or examples % chunks
        or any(part.dtype != torch.float32 or part.numel() == 0 for part in (x, *state, *biases))
    ):
        raise NotLinearError(f"{examples} examples for {chunks} chunks, of {x.dtype}")
    each_chunk = (chunks, examples // chunks)
    by_chunk = x.unflatten(0, each_chunk).transpose(1, 2) if batch_first else x.unflatten(1, each_chunk).transpose(0, 1)
    states = [part.unflatten(1, each_chunk) for part in state]
    directions = 2 if bidirectional else 1
    y, h, c = recurrent_route.lstm(by_chunk, states, [weight.source for weight in gated], biases, directions)
    y = y.transpose(1, 2).flatten(0, 1) if batch_first else y.transpose(0, 1).flatten(1, 2)
    return y, h.flatten(1, 2), c.flatten(1, 2)


class _LinearOfSamples(torch.autograd.Function):
    """Inputs (..., in), whose first dimension holds K chunks, under K samples.

    Keeps inputs, logits and weight for the backward pass, no sample.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, logits: Tensor, weight: Tensor, draw: Draw, first: int, reduced: bool,
        chunks: int, bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        # In order, as torch's own layer keeps it: a network may write into a transposed input afterwards.
        flat = _in_order(x, chunks)
        ctx.save_for_backward(flat, logits, weight)
        ctx.draw, ctx.first, ctx.reduced, ctx.shape = draw, first, reduced, x.shape  # type: ignore[attr-defined]
        # Not a view of the result: autograd would forbid the network to change that in place, as a ReLU may.
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        blocked.forward(flat, weight, logits.detach(), draw, first, bias, y.view(*flat.shape[:2], -1), reduced)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, logits, weight = ctx.saved_tensors
        wants, gradient = ctx.needs_input_grad[0], _in_order(gradient, x.shape[0])
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[2] else None
        of_x: Tensor | None
        if wants and torch.is_grad_enabled():
            of_x, of_logits = Gradients.apply(gradient, x, weight, logits, ctx.draw, ctx.first, ctx.reduced, of_weight)
        else:
            of_x, of_logits = blocked.backward(
                gradient, x, weight, logits, ctx.draw, ctx.first, wants_x=wants, reduced=ctx.reduced,
                of_weight=of_weight,
            )  # fmt: skip
        return None if of_x is None else of_x.view(ctx.shape), of_logits, of_weight, None, None, None, None, None


class Gradients(torch.autograd.Function):
    """What :func:`blocked.backward` gives, where a graph of it is asked for, as to penalise a gradient.

    The inputs' gradient is a product with the same masked weights, so it can be differentiated once more. Those of
    logits and weights cannot, as on the general route.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, logits: Tensor, draw: Draw, first: int, reduced: bool,
        of_weight: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        ctx.save_for_backward(gradient, weight, logits)
        ctx.named = (draw, first)
        of_x, of_logits = blocked.backward(
            gradient, x, weight, logits.detach(), draw, first, wants_x=True, reduced=reduced, of_weight=of_weight
        )
        ctx.mark_non_differentiable(of_logits)
        return of_x, of_logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        came, weight, logits = ctx.saved_tensors
        gradient = gradient.resolve_neg().contiguous()
        of_came = blocked.forward(gradient, weight, logits, *ctx.named)
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[2] else None
        of_logits = blocked.backward(came, gradient, weight, logits, *ctx.named, wants_x=False, of_weight=of_weight)[1]
        return of_came, None, of_weight, of_logits, None, None, None, None


def _in_order(x: Tensor, chunks: int) -> Tensor:
    """(..., n), whose first dimension holds the chunks, as (K, rows, n), contiguous."""
    return x.resolve_neg().reshape(chunks, -1, x.shape[-1]).contiguous()


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
