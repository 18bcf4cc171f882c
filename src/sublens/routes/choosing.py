"""How a training call is computed: by the fastest route that gives what one chunk after the other gives.

By definition each chunk of a batch goes through the network by itself, under whole masked weights of its own draw: the
general route. The others give the same, where they apply:

- :mod:`sublens.routes.chain_route`, for plain chains of linear layers and ReLUs;
- :mod:`sublens.routes.linear_route`, for networks in which only linear layers, attention and LSTMs are masked: one call
  on the whole batch where each example is known to go its own way, or one under vmap, or one on the whole batch on
  trial.

Which one a kind of call can take is found at its first call and remembered.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from sublens import recomputation
from sublens.calling import OutputAxes, call_with
from sublens.gates import Gate
from sublens.groups import FactoredWeight, GroupedGate, Grouping, factors
from sublens.kernels import short_attention
from sublens.noise import Draw, parameter_id
from sublens.redrawing import Redrawing
from sublens.routes import chain_route, eligibility, linear_route
from sublens.selection import tied_names
from sublens.splitting import Batch, agree, copied, join, kind_of_call

log = logging.getLogger("sublens.routes")


@dataclass(frozen=True)
class Sampling:
    """What a training call samples: ``count`` draws of all gates.

    Attributes:
        logits: by the names of their parameters.
        count: number K of samples.
        seed: names the noise, with the step and the number of the sample.
        step: number of the call.
        first: number of the first sample within the step.
    """

    logits: Mapping[str, Tensor]
    count: int
    seed: int
    step: int
    first: int

    def draw(self, parameter: int, sample: int = 0) -> Draw:
        """The noise of a parameter in the sample of that number, counted from the first one."""
        return Draw(self.seed, self.step, self.first + sample, parameter)


class Routes:
    """Computes the training calls of one masked network.

    Args:
        network: any module; it is never modified.
        groupings: of the masked parameters, by name.
        gate: the estimator.
        batch_dim: dimension of the batch in the first tensor that the network is called with.
        frozen: whether the weights stay as they are.
    """

    def __init__(
        self, network: nn.Module, groupings: Mapping[str, Grouping], gate: Gate, *, batch_dim: int, frozen: bool
    ) -> None:
        self.network = network
        self.ids = {name: parameter_id(grouping.owner) for name, grouping in groupings.items()}
        self.factors = factors(network, groupings)
        self.general: dict[Hashable, bool] = {}  # kinds of call seen -> whether they need the general route
        self.gate, self.batch_dim, self.frozen = gate, batch_dim, frozen
        self._groupings = groupings
        self._aliases = tied_names(network)
        self._axes = OutputAxes(network, self._aliases, batch_dim)
        self._why: str | None = None  # the call at hand does not go a faster route, if that is new
        self._told: set[str] = set()  # reasons that were logged
        self._chained: bool | None = None  # whether gate and logits, and the network as it was, are for chain_route

    def forget(self) -> None:
        """Look anew which routes apply, after the network was moved or cast."""
        self.general.clear()
        self._chained = None

    def through(
        self,
        put: Callable[[str, Tensor], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        around: Callable[[Mapping[str, Tensor]], AbstractContextManager[Any]] = nullcontext,
    ) -> Any:
        """Call the network with ``put(name, weight)`` in place of each masked weight; see :func:`call_with`."""
        ids = self.ids
        with short_attention.replaced():
            return call_with(
                self.network, self._aliases, lambda n, w: put(n, w) if n in ids else w, args, kwargs, around
            )

    def call(self, sampling: Sampling, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network's output for a batch, of which each chunk goes through its own sample.

        Raises:
            BatchError: the batch cannot be split into the samples, or the outputs cannot be joined.
        """
        self._why = None
        if len(args) == 1 and not kwargs:
            output = self._by_chain(sampling, args[0])
            if output is not None:
                return output
        if sampling.count == 1:
            output = self._whole_batch(sampling, kind_of_call((args, kwargs)), args, kwargs)
            if output is not None:
                return output
            return self._generally(partial(self._by_chunk, sampling, 0, args, kwargs))
        batch = Batch(args, kwargs, self.batch_dim)
        bounds = batch.bounds(sampling.count)
        sizes = [stop - start for start, stop in pairwise(bounds)]
        kind, axes = kind_of_call(batch.leaves), self._axes.of(batch, sizes[0])
        of_leading_batch = self.batch_dim == 0 and batch.size % sampling.count == 0
        if eligibility.per_example(self.network) and of_leading_batch:
            output = self._whole_batch(sampling, kind, args, kwargs)
            if output is not None:
                return output
        outputs = self._all_at_once(sampling, batch, kind)
        if outputs is not None:
            return join(outputs, sizes, axes)

        def in_chunks(of_chunk: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            of_these = Batch(args, kwargs, self.batch_dim)
            parts = [of_chunk(sampling, k, *of_these.part(*span)) for k, span in enumerate(pairwise(bounds))]
            return join(parts, sizes, axes)

        if of_leading_batch:
            output = self._on_trial(sampling, kind, args, kwargs, in_chunks)
            if output is not None:
                return output
        if batch.size % sampling.count:
            self._why = "the number of examples is not a multiple of that of samples"
        return self._generally(partial(in_chunks, self._by_chunk, args, kwargs))

    def _generally(self, run: Callable[[], Any]) -> Any:
        """What ``run`` gives, which goes the general route; say why, once for each reason."""
        if self._why is not None and self._why not in self._told:
            self._told.add(self._why)
            log.info(
                "sublens: a training call goes the general route, chunk by chunk under whole masked weights, which is "
                f"slower. Why not a faster one: {self._why}."
            )
        try:
            return run()
        except Exception:
            self.forget()  # a mistake in this call says nothing of others
            raise

    def _by_chain(self, sampling: Sampling, x: Any) -> Tensor | None:
        """The output for a batch by the chain route, or ``None`` where that route does not apply."""
        if self._chained is None:
            self._chained = self.batch_dim == 0 and self.frozen and self._masks_linear_layers(sampling.logits)
        if not self._chained:
            return None
        chain = chain_route.layers(self.network, sampling.logits, x, sampling.count)
        if chain is None:
            return None
        draws = {name: sampling.draw(parameter) for name, parameter in self.ids.items()}
        return chain_route.call(chain, x, sampling.logits, draws, sampling.count)

    def _masks_linear_layers(self, logits: Mapping[str, Tensor]) -> bool:
        fine = all(grouping.fine for grouping in self._groupings.values())
        return fine and eligibility.applies(self.network, logits, self.gate)

    def _whole_batch(self, sampling: Sampling, kind: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of one call by the linear route, or ``None`` where that route does not apply."""

        def call(copy: bool) -> Any:
            inputs = copied((args, kwargs)) if copy else (args, kwargs)
            return self.through(self._put(sampling, sampling.count), *inputs)

        return self._by_linear_layers(sampling, kind, call)

    def _all_at_once(self, sampling: Sampling, batch: Batch, kind: Hashable) -> list[Any] | None:
        """The outputs of the chunks by the linear route, or ``None`` where that route does not apply."""
        if batch.size % sampling.count or not eligibility.vectorised(self.network):
            return None

        def call(copy: bool) -> Any:
            def network(*args: Any, **kwargs: Any) -> Any:
                return self.through(self._put(sampling, 0), args, kwargs)

            return linear_route.over_chunks(network, batch, sampling.count, copy=copy)

        outputs: list[Any] | None = self._by_linear_layers(sampling, kind, call)
        return outputs

    def _by_linear_layers(self, sampling: Sampling, kind: Hashable, call: Callable[[bool], Any]) -> Any:
        """What ``call`` returns, or ``None`` if this kind of call has to go the general route.

        The first call of a kind is told to use copies of the inputs: a network that writes into its input, and then
        cannot go this way after all, must do so once.
        """
        kind = _with_precision(kind)
        first = kind not in self.general
        if first and not self._masks_linear_layers(sampling.logits):
            self._why = "not all that is masked are float32 weights of linear layers, attention or LSTMs on the CPU"
            self.general[kind] = True
        if self.general.get(kind):
            return None
        try:
            with recomputation.refused():
                outputs = call(first)
        except linear_route.CallError as error:
            self._why = str(error)
            return None
        except Exception as error:
            # The network, or this kind of call, cannot go this way. The general route decides: if it fails too, its
            # error is the network's own and is the one to be seen.
            self.general[kind] = True
            self._why = f"{type(error).__name__}: {error}"
            return None
        self.general[kind] = False
        return outputs

    def _on_trial(
        self,
        sampling: Sampling,
        kind: Hashable,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_chunks: Callable[..., Any],
    ) -> Any:
        """The output of one call on the whole batch by the linear route, if chunks give the same; otherwise ``None``.

        For networks whose code :func:`torch.func.vmap` does not take (it looks at values, as to find that nothing is
        padded), though each example goes its own way in them. That this is so is not believed: it is looked at in the
        first call of a kind in this process, and in training calls 1, 2, 4, 8, 16, and so on. As long as chunks agree,
        what is returned does not depend on when it was looked at, so that a resumed run has the same bits.

        The first look is at chunks by the general route, which masks all weights of the network at once; later ones,
        when gradients and an optimizer's state need memory too, at single chunks by the linear route. Under autocast it
        is taken without that, since the routes round at other places there, and outputs that differ would say nothing.
        """
        step, trial = sampling.step, ("whole batch", _with_precision(kind))
        key = _with_precision(trial)  # another one under autocast, where the trial itself is without
        known = key in self.general
        if not known and eligibility.watched(self.network):
            self._why = "hooks watch the network"
            self.general[key] = True
        if self.general.get(key):
            return None
        if known and step & (step + 1) != 0:
            return self._whole_batch(sampling, trial, args, kwargs)
        inputs, state = copied((args, kwargs)), torch.get_rng_state()  # a network may write into its inputs
        output = self._whole_batch(sampling, trial, args, kwargs)
        if output is None:
            return None
        self.general[key] = True  # until chunks have been seen to agree
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            whole = output
            if key != trial:
                whole = self._whole_batch(sampling, trial, *copied(inputs))
            alone = None
            if whole is not None:
                alone = in_chunks(self._chunk_by_linear_layers if known else self._by_chunk, *copied(inputs))
            same = alone is not None and agree(whole, alone)
        if same:
            self.general[key] = False
            return output
        torch.set_rng_state(state)
        if not known:
            self._why = "the network does not treat the examples of a batch each by itself, or not to rounding"
            return None  # this first call was made on copies
        warnings.warn(
            f"In training call {step + 1} the network does not treat the examples of a batch each by itself, which "
            "it did before. From here on each chunk of the batch is computed alone, which is slower. What was "
            "trained since the last look may rest on samples that were mixed up: train the mask again with "
            "SUBLENS_KERNELS=reference in the environment if that matters.",
            stacklevel=5,
        )
        return in_chunks(self._by_chunk, *inputs)

    def _chunk_by_linear_layers(
        self, sampling: Sampling, sample: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return self.through(self._put(sampling, 1, sample), *copied((args, kwargs)))
        except Exception:  # with a batch of this size the network does something else: see _by_linear_layers
            return self._by_chunk(sampling, sample, args, kwargs)

    def _put(self, sampling: Sampling, chunks: int, sample: int = 0) -> Any:
        trained = {} if self.frozen else dict(self.network.named_parameters())

        def put(name: str, weight: Tensor) -> Tensor:
            draw = sampling.draw(self.ids[name], sample)
            return linear_route.GatedWeight(sampling.logits[name], trained.get(name, weight), draw, chunks)

        return put

    def _by_chunk(self, sampling: Sampling, sample: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The general route: the network's output for one chunk, under one draw of whole masked weights."""
        logits = sampling.logits
        gates = self.gate.across(logits)
        redrawing = Redrawing()
        again: dict[int, Callable[[], Tensor]] = {}
        trained = {} if self.frozen else dict(self.network.named_parameters())

        def put(name: str, weight: Tensor) -> Tensor:
            draw = sampling.draw(self.ids[name], sample)
            grouping = self._groupings[name]
            scores = logits[grouping.owner]
            gate = gates[grouping.owner] if grouping.fine else GroupedGate(gates[grouping.owner], grouping)

            def made() -> Tensor:
                return gate.masked(weight, scores.detach(), draw)

            def whole() -> Tensor:
                gated: Tensor = _Gated.apply(scores, trained.get(name, weight), gate, draw, redrawing, name)
                # Logits that are changed before the backward pass are noticed there, by the node just made.
                redrawing.add(name, gated, made)
                again[id(gated)] = made
                return gated

            if name not in self.factors or not self.frozen:
                return whole()
            vector, of_outputs = self.factors[name]
            of_each = GroupedGate(gates[grouping.owner], vector)
            ones = torch.ones(vector.shape, device=weight.device)
            numbers = _Gated.apply(scores, ones, of_each, draw, redrawing, name)
            return FactoredWeight(weight, numbers, of_outputs, functools.cache(whole))

        @contextmanager
        def around(tensors: Mapping[str, Tensor]) -> Iterator[None]:
            with redrawing.hooks(), recomputation.covered(self.network, tensors, dict(again)):
                yield

        try:
            return self.through(put, args, kwargs, around)
        finally:
            redrawing.called()


def _with_precision(kind: Hashable) -> Hashable:
    """A kind of call, in the precision of the autocast that it is made under: one says nothing of another."""
    return (kind, torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else kind


class _Gated(torch.autograd.Function):
    """A masked weight for one draw. Keeps the logits and the weight for the backward pass, no sample and no noise."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        logits: Tensor,
        weight: Tensor,
        gate: Gate | GroupedGate,
        draw: Draw,
        redrawing: Redrawing,
        name: str,
    ) -> Tensor:
        ctx.save_for_backward(logits, weight)
        ctx.gate, ctx.draw, ctx.done = gate, draw, partial(redrawing.done, name)  # type: ignore[attr-defined]
        return gate.masked(weight.detach(), logits.detach(), draw)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        ctx.done()
        logits, weight = ctx.saved_tensors
        weight, logits = weight.detach(), logits.detach()
        # A masked weight is the weight times its sample, so the gradient of the weight is the gradient times that.
        of_weight = ctx.gate.masked(gradient, logits, ctx.draw) if ctx.needs_input_grad[1] else None
        return ctx.gate.logit_gradient(gradient, weight, logits, ctx.draw), of_weight, None, None, None, None
