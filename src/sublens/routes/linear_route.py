"""The fast route for layers of an unmodified network that multiply: one pass over a weight serves all K samples.

The network is called once. Each masked weight is put in as a :class:`GatedWeight`, a tensor without data that answers
``torch.nn.functional.linear`` with the blocked product of all chunks (:mod:`sublens.routes.products`), attention and
LSTMs by what they are made of, and everything else by asking for the general route. Which networks can go this way
:mod:`sublens.routes.eligibility` says; that one of them cannot after all (code that vmap does not take, a weight used
for something else) is found at its first call.

With one sample, and for networks that treat every example by itself, the call is an ordinary one on the whole batch.
Other networks are called under :func:`torch.func.vmap` over the K chunks, so that their code still sees one chunk; that
costs some milliseconds a call. Where vmap does not take that code, the call is an ordinary one on the whole batch, if
chunks are seen to give the same outputs (:mod:`sublens.routes.choosing`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from sublens.kernels import blocked, cells, cpu, short_attention
from sublens.noise import Draw
from sublens.routes import products, recurrent_route
from sublens.splitting import Batch, Rebuild, Unjoined, flatten


class NotLinearError(Exception):
    """A masked weight was used otherwise than by a linear layer; the general route takes over."""


class CallError(NotLinearError):
    """Something of this call only, which says nothing of others.

    An input is not as wide as the weight it meets (the general route fails too, with the network's own error), or
    weights or logits are not float32 numbers in order, since somebody has put others in their place.
    """


@dataclass(frozen=True)
class _Source:
    logits: Tensor
    weight: Tensor
    draw: Draw
    chunks: int
    first: int = 0  # row of the parameter at which logits and weight begin
    examples: int = 0  # number of examples, where they are not in the first dimension but the last but one
    reduced: bool = False  # products in bfloat16
    transposed: bool = False  # logits and weight are stored as inputs by outputs

    @property
    def sizes(self) -> tuple[torch.Size, torch.Size]:
        """Of what comes in, and of what goes out."""
        of_rows, of_columns = self.weight.shape[:1], self.weight.shape[1:]
        return (of_rows, of_columns) if self.transposed else (of_columns, of_rows)

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
                raise CallError(
                    f"a weight or its logits are not float32 numbers in order (they are {given.dtype}, of shape "
                    f"{tuple(given.shape)} and strides {given.stride()})"
                )
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
        if func is torch.addmm and len(args) == 3 and not kwargs:  # of layers stored as inputs by outputs
            bias, x, weight = args
            if isinstance(weight, GatedWeight) and not isinstance(x, GatedWeight):
                source = replace(weight.source, transposed=True)
                return _linear_and_bias(x, source, bias.source if type(bias) is GatedWeight else bias)
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
        names = {
            **vars(nn.functional),
            "has_torch_function": lambda tensors: False,
            "scaled_dot_product_attention": short_attention.attention,
        }
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
            x = x if reduced else x.float()
            return _linear_and_bias(x, replace(source, reduced=reduced), bias).to(asked)
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
        and bias.shape == source.sizes[1]
        and cpu.has_plain_data(bias)
        and bias.is_contiguous()
    )


def _plus_of_samples(y: Tensor, source: _Source, bias: _Source) -> Tensor:
    """What a layer gives plus a bias that is masked too, which is another one in each chunk."""
    if bias.weight.shape != source.sizes[1]:
        raise NotLinearError(f"a masked bias of shape {tuple(bias.weight.shape)}")
    chunks = source.chunks
    of_samples = products.vectors(bias.logits, bias.weight, bias.draw, bias.first, chunks)
    if chunks == 1:
        return y + of_samples[0]
    if source.examples:
        # As _linear has them: attention also multiplies all places of all examples as rows of one matrix.
        by_chunk = y.reshape(-1, chunks, source.examples // chunks, y.shape[-1])
        return (by_chunk + of_samples.unsqueeze(1)).view(y.shape)
    by_chunk = y.view(chunks, -1, y.shape[-1])
    return (by_chunk + of_samples.unsqueeze(1)).view(y.shape)


def _linear(x: Tensor, source: _Source, bias: Tensor | None) -> Tensor:
    if x.shape[-1:] != source.sizes[0]:
        raise CallError(f"an input of shape {tuple(x.shape)} for a weight of {tuple(source.weight.shape)}")
    rest = (
        source.logits, source.weight, source.draw, source.first, source.reduced, source.chunks, bias, source.transposed,
    )  # fmt: skip
    if source.reduced and x.numel():
        # What is long stays as it comes and goes, without a copy in float32.
        rows = x.numel() // (source.chunks * x.shape[-1])
        x = x.bfloat16() if blocked.takes_bfloat16(source.chunks, rows) else x.float()
    elif x.dtype != torch.float32 or x.numel() == 0:
        raise NotLinearError(f"an input of {x.dtype} and shape {tuple(x.shape)}")
    if source.chunks > 1 and source.examples:
        if source.examples % source.chunks:
            raise NotLinearError(f"{source.examples} examples for {source.chunks} chunks")
        if x.dim() == 3 and x.shape[1] == source.examples and x.transpose(0, 1).is_contiguous():
            # As attention sees batches that come first: so the chunks lie in memory already.
            chunked = x.transpose(0, 1).unflatten(0, (source.chunks, -1))
            return products.linear(chunked, *rest).flatten(0, 1).transpose(0, 1).contiguous()
        chunked = x.reshape(-1, source.chunks, source.examples // source.chunks, x.shape[-1]).movedim(1, 0)
        return products.linear(chunked, *rest).movedim(0, 1).reshape(*x.shape[:-1], -1)
    if source.chunks > 1 and (x.dim() == 1 or x.shape[0] % source.chunks):
        raise NotLinearError(f"an input of shape {tuple(x.shape)} for {source.chunks} chunks")
    return products.linear(x, *rest)


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
        reduced = asked == torch.bfloat16 and blocked.multiplies_bfloat16()
        if first.source.chunks == 1 and reduced:
            raise NotLinearError("one sample on a processor where PyTorch's own layer is faster in bfloat16")
        weights = [
            GatedWeight._of(replace(weight.source, reduced=reduced)) if type(weight) is GatedWeight else weight
            for weight in weights
        ]
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


def _holds_chunks(leaf: Any) -> bool:
    """Whether an object in an output, such as the cache of a language model, holds tensors of :func:`over_chunks`.

    They are worth nothing after it. What is looked at are attributes and elements, not those of tensors and modules.
    """
    if isinstance(leaf, Tensor):
        return False
    pending, seen = [leaf], set[int]()
    while pending and len(seen) < _MOST_LOOKED_AT:
        found = pending.pop()
        if isinstance(found, Tensor):
            if functorch.is_batchedtensor(found):
                return True
            continue
        if id(found) in seen or isinstance(found, nn.Module | type):
            continue
        seen.add(id(found))
        if isinstance(found, dict):
            pending += found.values()
        elif isinstance(found, list | tuple | set):
            pending += found
        else:
            pending += getattr(found, "__dict__", {}).values()
    return False


_MOST_LOOKED_AT = 10_000


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
        others = [Unjoined(type(leaf).__name__) if _holds_chunks(leaf) else leaf for leaf in others]
        return tuple(leaf for leaf in others if isinstance(leaf, Tensor))

    # What vmap does chunk by chunk, such as attention, the general route does so too: no news for the user. (Not by a
    # filter of warnings: with each change of those Python forgets which warnings it has shown.)
    warn: Any = functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
    warn(False)
    try:
        # Tensors that do not depend on the batch come back once for each chunk, as from the general route.
        stacked = torch.func.vmap(one, randomness="different")(*tensors)
    finally:
        warn(True)
    assert rebuild is not None
    outputs = []
    for k in range(chunks):
        tensors_of_k = iter(leaf[k] for leaf in stacked)
        outputs.append(rebuild([next(tensors_of_k) if isinstance(leaf, Tensor) else leaf for leaf in others]))
    return outputs
