"""Attention of short sequences under autocast to bfloat16, in float32: on CPUs it is faster there.

PyTorch's attention for CPUs takes some time for each head and example, and more of it in bfloat16: with 16 tokens its
backward pass takes 16 ms there and 5 in float32, conversions included (128 x 4 heads of 64 numbers on a Zen 4
processor), with 128 tokens 19 and 9 ms (8 x 12 heads), with 256 tokens 17 and 14, with 512 as long, and with 2,048 it
is bfloat16 that is faster, 160 and 216.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_SHORT = 128  # keys


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``; the result has the dtype that it would have there."""
    plain: Callable[..., Tensor] = functional.scaled_dot_product_attention
    if not _rounds() or any(_stays(x) for x in (query, key, value)) or key.shape[-2] > _SHORT:
        return plain(query, key, value, attn_mask, *rest, **more)
    added = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    with torch.autocast("cpu", enabled=False):
        found = plain(query.float(), key.float(), value.float(), added, *rest, **more)
    return found.to(torch.bfloat16)


def replaced(again: bool | None = None) -> AbstractContextManager[Any]:
    """A context in which the attention that networks ask for is :func:`attention`, where that makes a difference.

    Args:
        again: whether it is, for what is run again: what :func:`is_replaced` said then.
    """
    wanted = _rounds() and not torch.compiler.is_compiling() if again is None else again
    return _Replacing() if wanted else nullcontext()


def is_replaced() -> bool:
    """Whether the code at hand runs in such a context."""
    return any(isinstance(mode, _Replacing) for mode in torch.overrides._get_current_function_mode_stack())


def _stays(x: Tensor) -> bool:
    """Whether autocast, or the kernel for plain tensors, has nothing to do with it."""
    return x.dtype not in (torch.float32, torch.bfloat16) or x.is_nested


def _rounds() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


class _Replacing(TorchFunctionMode):
    """What functions of torch ask for themselves is not seen: ``nn.MultiheadAttention`` needs a way of its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            func = attention
        return func(*args, **(kwargs or {}))
