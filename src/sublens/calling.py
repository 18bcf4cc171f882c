"""Calling a network with other weights, and leaving it as it was."""

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sublens.splitting import Axes, Batch, kind_of_call, output_axes


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


class OutputAxes:
    """Where the batch is in a network's outputs, found once for each kind of call.

    Args:
        network: any module.
        aliases: its :func:`sublens.selection.tied_names`.
        batch_dim: dimension of the batch in the first tensor that it is called with.
    """

    def __init__(self, network: nn.Module, aliases: Mapping[str, tuple[str, ...]], batch_dim: int) -> None:
        self._network, self._aliases, self._batch_dim = network, aliases, batch_dim
        self._found: dict[Hashable, Axes] = {}

    def of(self, batch: Batch, size: int) -> Axes:
        """Where it is in what the network gives for a batch of this kind.

        It is found by two calls of the plain network, with ``size`` and another number of examples. They come before
        the calls that count, so that what hooks capture is left by those, and on copies, so that a network which writes
        into its input does so once.

        Raises:
            BatchError: outputs cannot be joined.
        """
        kind = kind_of_call(batch.leaves)
        if kind not in self._found:
            other = size - 1 if size > 1 else 2
            # Whatever random numbers the network draws in them: a resumed run makes these calls once more.
            looks: list[list[_Sequence]] = []
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                outputs = []
                for count in (size, other):
                    with _sequences_of(self._network) as seen:
                        outputs.append(call_with(self._network, self._aliases, plain, *batch.part(0, count, copy=True)))
                    looks.append(seen)
            first, second = outputs
            _warn_of_sequences(*looks)
            self._found[kind] = output_axes(first, size, second, other, batch_leads=self._batch_dim == 0)
        return self._found[kind]


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


@dataclass(frozen=True)
class _Sequence:
    """What a recurrent layer or attention within a network was given: its name there, and the shape."""

    name: str
    batch_first: bool
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.shape[1 if self.batch_first and len(self.shape) == 3 else 0]

    @property
    def examples(self) -> int | None:
        return self.shape[0 if self.batch_first else 1] if len(self.shape) == 3 else None


_TOLD_OF = (
    nn.RNNBase, nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder,
    nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
)  # fmt: skip


@contextmanager
def _sequences_of(network: nn.Module) -> Iterator[list[_Sequence]]:
    """A list of what such layers are given until the block ends.

    Of torch's own recurrent and Transformer modules that take the sequence first is told when they are masked, so
    nothing is noted of these.
    """
    seen: list[_Sequence] = []

    def watch(name: str, module: nn.Module) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = args[0] if args else kwargs.get("input", kwargs.get("query"))
            if isinstance(given, Tensor) and given.dim() in (2, 3):
                seen.append(_Sequence(name, bool(module.batch_first), tuple(given.shape)))

        return module.register_forward_pre_hook(note, with_kwargs=True)

    kinds = (nn.RNNBase, nn.MultiheadAttention)
    inner = [] if isinstance(network, _TOLD_OF) else list(network.named_modules())
    watched = [watch(name, module) for name, module in inner if isinstance(module, kinds)]
    try:
        yield seen
    finally:
        for handle in watched:
            handle.remove()


def _warn_of_sequences(one: list[_Sequence], other: list[_Sequence]) -> None:
    """Warn of layers whose sequences became longer, and not more, with the number of examples."""
    along = [
        first.name
        for first, second in zip(one, other, strict=False)
        if first.name == second.name and first.length != second.length and first.examples == second.examples
    ]
    if along:
        warnings.warn(
            f"{', '.join(dict.fromkeys(along))} takes the examples of a batch for the steps of a sequence: with fewer"
            " examples its sequences were shorter. So each sample would be given a part of every sequence. If the layer"
            " takes the sequence first (batch_first=False), so do the inputs of the network: give batch_dim=1.",
            stacklevel=6,
        )
