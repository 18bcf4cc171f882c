"""Gradient checkpointing, which would silently train a mask on the wrong network, is found and refused.

:mod:`torch.utils.checkpoint` runs a part of the forward pass again during the backward pass. By then the masked weights
are gone from the network and the noise has moved on, so the second run would see other weights than the first, and the
gradient would belong to neither.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from sublens.errors import SettingError
from sublens.kernels.threads import untraced


@contextmanager
def refused() -> Iterator[None]:
    """Raise if the code inside is, or calls, a checkpointed region (the non-reentrant kind).

    Raises:
        SettingError: at the call of the first module inside such a region.
    """
    _look()
    # A hook for all modules, so that those of the network are not touched.
    handle = register_module_forward_pre_hook(_look)
    try:
        yield
    finally:
        handle.remove()


def refuse_in_graph(outputs: Iterable[Any]) -> None:
    """Raise if the outputs come from a checkpointed region of the reentrant kind, which leaves a node in the graph.

    Raises:
        SettingError: it does.
    """
    nodes = [output.grad_fn for output in outputs if isinstance(output, Tensor)]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if node.name() == "CheckpointFunctionBackward":
            _refuse()
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                nodes.append(following)


@untraced
def _look(module: nn.Module | None = None, inputs: Any = None) -> None:
    # Non-reentrant checkpoints work through default hooks for saved tensors; torch tells of them only privately.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint":
        _refuse()


def _refuse() -> NoReturn:
    raise SettingError(
        "A MaskedNetwork cannot be trained through torch.utils.checkpoint: the second run of the checkpointed part, in "
        "the backward pass, would see other weights than the first. Switch gradient checkpointing off in the network "
        "(often network.gradient_checkpointing_disable()), or use smaller batches to save memory."
    )
