"""Gradient checkpointing inside a masked network: what is run again in the backward pass has to see the same weights.

:mod:`torch.utils.checkpoint` runs a part of the forward pass again during the backward pass. By then the masked weights
are gone from the network, so the second run would see other weights than the first, and the gradient would belong to
neither. For the time of a call, the two private functions through which every checkpoint goes are replaced: the second
run then gets the masked weights that the first one used, drawn again, and the network at rest as in the call.

A checkpoint around the masked network itself is refused: its second run would be another training call.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as checkpoints

from sublens.calling import at_rest
from sublens.errors import SettingError
from sublens.kernels import short_attention
from sublens.kernels.threads import untraced

# Since torch 2.14 the function that does the work has another name. Both take the checkpointed function first.
_NAMES = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
_GENERATOR = next((name for name in _NAMES if hasattr(checkpoints, name)), "")
_here = threading.local()
"""``generator`` is what checkpoints of this thread go through; ``covered`` says in how many such regions it is."""


@contextmanager
def covered(
    network: nn.Module, tensors: Mapping[str, Tensor], again: Mapping[int, Callable[[], Tensor]]
) -> Iterator[None]:
    """Give the checkpointed regions of one call of the network the same weights when they are run again.

    Regions of the reentrant kind become such of the other kind, which computes the same: the reentrant one would look
    for gradients of leaves only.

    Args:
        network: the network.
        tensors: everything that is put into it for the call, by name (:func:`sublens.calling.call_with`).
        again: how some of these tensors, by their ``id``, are made again without a graph; the others are kept.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    drawn = {name: key for key in again for name in names[key]}
    kept = {name: tensor for name, tensor in tensors.items() if name not in drawn}
    shapes = {name: tensors[name].shape for name in drawn}
    trained = {key: tensors[names[key][0]].requires_grad for key in again}
    replaced = short_attention.is_replaced()

    def run_again(function: Callable[..., Any], used: set[int], args: Any, kwargs: Any) -> Any:
        made = {key: again[key]().requires_grad_(trained[key]) for key in used}
        # A weight that the first run did not use has no data now: if the second run used it, that would be an error.
        without = {key: torch.empty(shapes[names[key][0]], device="meta") for key in again if key not in used}
        weights = kept | {name: (made | without)[key] for name, key in drawn.items()}
        makers = {id(made[key]): again[key] for key in used}
        # The second run must choose as the first one did, or autograd finds other tensors than it was promised.
        with at_rest(network), short_attention.replaced(replaced), covered(network, weights, makers):
            whole = {f"network.{name}": tensor for name, tensor in weights.items()}
            return functional_call(_Part(network, function), whole, args, kwargs)

    def generator(function: Callable[..., Any], *rest: Any, **named: Any) -> Generator[Any, Any, Any]:
        used: set[int] = set()

        def second(*args: Any, **kwargs: Any) -> Any:
            return run_again(function, used, args, kwargs)

        with _Uses(again, used), _one_more():
            return (yield from _torchs.generator(second, *rest, **named))

    with _replaced(generator):
        yield


@contextmanager
def refused() -> Iterator[None]:
    """Raise if the code inside calls a checkpointed region.

    Raises:
        SettingError: at the region.
    """

    def generator(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse()

    with _replaced(generator):
        yield


@contextmanager
def watched() -> Iterator[None]:
    """Raise if the code inside is in a checkpointed region, or calls one that :func:`covered` has not seen.

    Raises:
        SettingError: at the call of the first module inside such a region.
    """
    _look()
    with _watching():
        yield


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


class _Part(nn.Module):
    """A part of a network's forward pass, as a module that has the whole network in it."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self.function = (function,)  # in a tuple: it may be a module, and would become one of ours

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function[0](*args, **kwargs)


class _Uses(TorchFunctionMode):
    """Notes which of some tensors any operation is given."""

    def __init__(self, tensors: Iterable[int], used: set[int]) -> None:
        super().__init__()
        self._tensors, self._used = frozenset(tensors), used

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in torch.utils._pytree.tree_iter((args, kwargs or {})):
            if id(leaf) in self._tensors:
                self._used.add(id(leaf))
        return func(*args, **(kwargs or {}))


class _Torchs:
    """The two functions of torch that checkpoints go through: replaced while a thread wants it, for itself only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0
        self.generator: Any = None
        self.reentrant: Any = None

    def replace(self) -> None:
        with self._lock:
            self._wanted += 1
            if self._wanted == 1:
                self.generator, self.reentrant = getattr(checkpoints, _GENERATOR), checkpoints.CheckpointFunction
                setattr(checkpoints, _GENERATOR, _through_ours)
                checkpoints.CheckpointFunction = _Reentrant  # type: ignore[misc,assignment]

    def restore(self) -> None:
        with self._lock:
            self._wanted -= 1
            if self._wanted == 0:
                setattr(checkpoints, _GENERATOR, self.generator)
                checkpoints.CheckpointFunction = self.reentrant  # type: ignore[misc]


_torchs = _Torchs()


def _through_ours(*args: Any, **kwargs: Any) -> Any:
    return (getattr(_here, "generator", None) or _torchs.generator)(*args, **kwargs)


class _Reentrant:
    """Stands for torch's reentrant checkpoint."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        if getattr(_here, "generator", None) is None:
            return _torchs.reentrant.apply(function, preserve, *args)
        return checkpoints.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


@contextmanager
def _replaced(generator: Callable[..., Any]) -> Iterator[None]:
    """Every checkpoint that this thread meets goes through ``generator`` instead of torch's."""
    if not _GENERATOR:  # another torch: what cannot be repeated is refused
        with _watching():
            yield
        return
    before = getattr(_here, "generator", None)
    _torchs.replace()
    _here.generator = generator
    try:
        yield
    finally:
        _here.generator = before
        _torchs.restore()


@contextmanager
def _one_more() -> Iterator[None]:
    _here.covered = getattr(_here, "covered", 0) + 1
    try:
        yield
    finally:
        _here.covered -= 1


@contextmanager
def _watching() -> Iterator[None]:
    thread = threading.get_ident()

    def look(module: nn.Module, inputs: Any) -> None:
        if threading.get_ident() == thread:
            _look()

    # A hook for all modules, so that those of the network are not touched.
    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


@untraced
def _look() -> None:
    # Non-reentrant checkpoints work through default hooks for saved tensors; torch tells of them only privately.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    inside = hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"
    if inside and not getattr(_here, "covered", 0):
        _refuse()


def _refuse() -> NoReturn:
    raise SettingError(
        "A MaskedNetwork cannot be trained inside torch.utils.checkpoint, nor through a checkpoint of another kind: "
        "the second run, in the backward pass, would see other weights than the first. Call torch.utils.checkpoint "
        "inside the network, around parts of it, or use smaller batches to save memory."
    )
