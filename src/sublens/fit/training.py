"""The training loop: what happens in one step, in which order, and what must never be interrupted."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Mapping
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sublens.diagnosis import check_first_step
from sublens.errors import CutGraphError, NonFiniteError, SettingError
from sublens.fit.batches import BatchSource, seed_torch
from sublens.fit.checkpoint import RunFolder, State
from sublens.fit.optimizers import Adam
from sublens.fit.progress import Display
from sublens.fit.ranks import Ranks
from sublens.fit.settings import OWN_FIELDS, Record, Settings
from sublens.fit.strength import AlphaPath, Controller
from sublens.masked_network import MaskedNetwork
from sublens.splitting import flatten

log = logging.getLogger("sublens.fit")


class Training:
    """One run in progress. :meth:`run` takes it from ``state.step`` to its end."""

    def __init__(
        self,
        settings: Settings,
        described: Mapping[str, Any],
        masked: MaskedNetwork,
        optimizer: Optimizer,
        batches: BatchSource,
        folder: RunFolder | None,
        state: State,
        history: list[Record],
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self.state = state
        self.history = history
        self._settings = settings
        self._described = described
        self._masked = masked
        self._optimizer = optimizer
        self._batches = batches
        self._folder = folder
        self._logits = masked.logits
        self._controller: Controller | None = None
        if settings.kept is not None:
            self._controller = Controller(masked, settings.steps, settings.kept, settings.per_layer, state.steered)
        self._clock = time.perf_counter()

    def run(self, display: Display) -> Generator[None, None, Literal["steps", "settled"]]:
        """Train to the end, pausing after each record, and return why it ended: ``"steps"`` or ``"settled"``.

        Whoever closes it while it pauses stops it as Ctrl-C does: with a checkpoint.
        """
        state, settings = self.state, self._settings
        first = True
        try:
            while True:
                last = state.step == settings.steps
                if last and self._controller is not None:
                    with uninterrupted():
                        self._controller.finish()
                evaluates = state.step % settings.evaluate_every == 0
                # The last record of a run lies off the grid when it ends between two evaluations. It is then made after
                # the checkpoint, and so is no part of it: a run taken further has the records of one never stopped.
                if self._record_due() and (evaluates or not last):
                    self._record(display, evaluates)
                    if not last:
                        yield from self._pause()
                settled = settings.settle is not None and settings.settle.reached(state.seen)
                if settled or last or (state.step > 0 and state.step % settings.checkpoint_every == 0):
                    self._save()
                if settled:
                    return "settled"
                if last:
                    if state.recorded != state.step:
                        self._record(display, True)
                    return "steps"
                saved_next = state.step + 1 == settings.steps or (state.step + 1) % settings.checkpoint_every == 0
                batch = self._batches(state.step, remember=self._folder is not None and (first or saved_next))
                with uninterrupted(insist=True):
                    self._step(batch, first)
                first = False
                display.step(state.step)
        except (KeyboardInterrupt, GeneratorExit):
            # Other ranks are interrupted elsewhere, so nothing can be asked of them now.
            if self._ranks.leads and not self._ranks.shards(self._optimizer):
                with uninterrupted():
                    self._write()
            raise

    def _pause(self) -> Generator[None, None, None]:
        """Let others do something. Their time is not this run's."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._clock += time.perf_counter() - began

    def _step(self, batch: Any, first: bool) -> None:
        """One step in the paper's order: backward of the task loss, of the penalty, clip, update."""
        state, masked = self.state, self._masked
        masked.step = state.forwards
        if first:
            self._warn_of_equal_batches(batch)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._settings.loss(masked, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise SettingError(
                f"loss(net, batch) returned {what}; it must return a tensor with one number, such as a batch's mean."
            )
        if first:
            check_first_loss(loss, masked, state.forwards)
        value = self._ranks.mean(loss.item())
        if not math.isfinite(value):
            self._stop_on_loss(value)
        loss.backward()
        if first:
            self._tell_what_is_not_reached()
        self._ranks.average_gradients(self._logits.values())
        # From here to the counters the run is in no state that a checkpoint could hold.
        with uninterrupted():
            alpha = self._alpha()
            penalty, norm, broken = update(masked, self._optimizer, self._settings, alpha)
            if broken is not None:
                self._stop_on_gradient(broken)
            state.step += 1
            state.forwards = masked.step
            state.epoch, state.epoch_start = self._batches.epoch, self._batches.epoch_start
            state.count += 1
            state.loss += value
            state.penalty += penalty
            state.alpha += sum(alpha.values()) / len(alpha) if isinstance(alpha, dict) else alpha
            state.norm += norm

    def _tell_what_is_not_reached(self) -> None:
        unreached = [name for name, logits in self._logits.items() if logits.grad is None]
        if unreached and self._ranks.leads:
            log.warning(
                "sublens: the loss does not reach the logits of %s, so the penalty alone moves these gates, and shuts"
                " them. That is right for layers which the task does not use. If the network does use them, something"
                " in it cuts the gradient (torch.no_grad(), .detach(), .data, numpy): mend that, or leave the layers"
                " out with where=.",
                ", ".join(unreached),
            )

    def _alpha(self) -> float | dict[str, float]:
        """Alpha of this step, of all layers or of each. The logits have the gradients of the task."""
        step, settings = self.state.step, self._settings
        if self._controller is not None:
            return self._controller.alphas(step)
        if isinstance(settings.alpha, AlphaPath):
            return settings.alpha.at(step, settings.steps)
        assert settings.alpha is not None  # one of the two is given
        return settings.alpha

    def _record_due(self) -> bool:
        step, settings = self.state.step, self._settings
        on_grid = step % settings.record_every == 0 or step % settings.evaluate_every == 0
        return on_grid and self.state.recorded != step

    def _record(self, display: Display, evaluates: bool) -> None:
        state, settings = self.state, self._settings
        kept = self._masked.kept
        record: Record = {
            "step": state.step,
            "loss": state.loss / max(state.count, 1),
            "penalty": state.penalty / max(state.count, 1),
            "kept": kept,
            "gradient_norm": state.norm / max(state.count, 1),
        }
        if settings.scheduled:
            record["alpha"] = state.alpha / max(state.count, 1)
        if evaluates:
            record |= self._evaluate()
        with uninterrupted():
            if self._folder is not None:
                state.position = self._folder.append(record)
            self.history.append(record)
            state.recorded = state.step
            state.count, state.loss, state.penalty, state.alpha, state.norm = 0, 0.0, 0.0, 0.0, 0.0
            if evaluates and settings.settle is not None:
                metrics = [value for name, value in record.items() if name not in OWN_FIELDS]
                state.seen = [*state.seen, [kept, *metrics]][-settings.settle.window :]
        display.record(record, evaluated=evaluates)
        for callback in settings.callbacks if self._ranks.leads else ():
            callback(dict(record))

    def _evaluate(self) -> dict[str, float | None]:
        """The user's metrics of the mask itself; one that is NaN or infinite becomes ``None``."""
        if self._settings.evaluate is None:
            return {}
        seed_torch("evaluate", self._settings.seed, self.state.step)
        self._masked.eval()
        try:
            with torch.no_grad():
                found = self._settings.evaluate(self._masked)
        finally:
            self._masked.train()
        try:
            metrics = {str(name): float(value) for name, value in found.items()}
        except (AttributeError, TypeError, ValueError, RuntimeError):
            raise SettingError(
                f"evaluate(net) returned {_brief(found)}; it must return a dict of numbers, as {{'accuracy': 0.98}}."
            ) from None
        if taken := [name for name in metrics if name in OWN_FIELDS]:
            raise SettingError(
                f"evaluate(net) returned a metric called {taken[0]!r}, a name that each record already has."
            )
        # Those of one rank count for all, so that all of them stop at the same step.
        return self._ranks.first({name: value if math.isfinite(value) else None for name, value in metrics.items()})

    def _warn_of_equal_batches(self, batch: Any) -> None:
        tensors = {str(i): leaf for i, leaf in enumerate(flatten(batch)[0]) if isinstance(leaf, Tensor)}
        if self._ranks.count > 1 and self._ranks.are_equal(tensors) and tensors:
            warnings.warn(
                f"All {self._ranks.count} ranks were given the same batch. Each should take a part of it, as in "
                "batch[rank::ranks], or a DataLoader with a DistributedSampler.",
                stacklevel=4,
            )

    def _save(self) -> None:
        if self._folder is None or self._folder.checkpoint_step == self.state.step:
            return
        self._ranks.check_equal(self._logits, self.state.step)
        self._ranks.gather_state(self._optimizer)
        self._write()

    def _write(self) -> None:
        folder, state = self._folder, self.state
        if folder is None or folder.checkpoint_step == state.step:
            return
        for name, logit in self._logits.items():
            if not bool(torch.isfinite(logit).all()):
                raise NonFiniteError(
                    f"The logits of {name!r} hold NaN or infinity after {state.step} steps, though their gradients "
                    f"were finite: the optimizer ({type(self._optimizer).__name__}) made them. Check its settings."
                    + self._kept_note(),
                    step=state.step - 1,
                    parameter=name,
                )
        now = time.perf_counter()
        state.seconds += now - self._clock
        self._clock = now
        state.batch = self._batches.remembered if self._ranks.count == 1 else None  # else each has its own
        folder.save(state, self._described, self._logits, self._optimizer)

    def seconds(self) -> float:
        """Wall time of the whole run so far, in seconds, with what earlier processes spent on it."""
        return self.state.seconds + time.perf_counter() - self._clock

    def _stop_on_loss(self, value: float) -> NoReturn:
        step = self.state.step
        network: nn.Module = self._masked.network
        tensors = [*self._logits.items(), *network.named_parameters(), *network.named_buffers()]
        broken = next((name for name, tensor in tensors if not bool(torch.isfinite(tensor).all())), None)
        cause = (
            f"{broken!r} holds values that are not finite."
            if broken is not None
            else "Weights and logits are finite: look at this step's batch, and for a division or log in the loss or in"
            " the network (weight_norm divides by the length of what is kept of a row)."
        )
        raise NonFiniteError(
            f"The loss is {value} at step {step}. {cause}{self._kept_note()}", step=step, parameter=broken
        )

    def _stop_on_gradient(self, name: str) -> NoReturn:
        step = self.state.step
        raise NonFiniteError(
            f"The gradient of the logits of {name!r} is not finite at step {step}, though the loss was. Look at this "
            "step's batch, and for a square root, logarithm or division at 0 in the network or in the loss."
            + self._kept_note(),
            step=step,
            parameter=name,
        )

    def _kept_note(self) -> str:
        if self._folder is None or self._folder.checkpoint_step is None:
            return ""
        return f" The checkpoint after {self._folder.checkpoint_step} steps is kept in {self._folder.path}."


def update(
    masked: MaskedNetwork, optimizer: Optimizer, settings: Settings, alpha: float | dict[str, float]
) -> tuple[float, float, str | None]:
    """Add the penalty's gradient to the task's, clip both together, and let the optimizer step.

    Returns:
        The penalty, the gradient norm of all logits before clipping, and the name of the first parameter whose logits
        have a gradient that is not finite. If there is one, nothing was updated.
    """
    slopes = masked.penalty_slopes(alpha, settings.penalty)
    if slopes is not None and isinstance(optimizer, Adam) and optimizer.takes():
        return _update_in_two_passes(masked, optimizer, settings, list(slopes.values()))
    value = 0.0
    if alpha:
        penalty = masked.penalty(alpha, kind=settings.penalty)
        penalty.backward()
        value = penalty.item()
    # Only the logits are here. Clipping over the frozen weights too is what changes the official code's masks.
    gradients = {name: logit.grad for name, logit in masked.logits.items() if logit.grad is not None}
    if not gradients:
        return value, 0.0, None
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients.values()])
    norm = torch.linalg.vector_norm(norms).item()
    if not math.isfinite(norm):
        return value, norm, list(gradients)[_worst(norms.tolist())]
    if (factor := _clipping(settings, norm)) < 1:
        for gradient in gradients.values():
            gradient.mul_(factor)
    optimizer.step()
    return value, norm, None


def _update_in_two_passes(
    masked: MaskedNetwork, optimizer: Adam, settings: Settings, constants: list[float]
) -> tuple[float, float, str | None]:
    """The same where the penalty's gradient is a constant for each parameter, and the penalty that times its sum.

    The constants are added while the gradients are read anyway, and the sums come from the last update.
    """
    value = sum(a * b for a, b in zip(constants, optimizer.totals(), strict=True)) if any(constants) else 0.0
    squares = optimizer.squares(constants)
    norm = math.sqrt(sum(squares))
    if not math.isfinite(norm):
        return value, norm, list(masked.logits)[_worst(squares)]
    optimizer.update(constants, _clipping(settings, norm))
    masked.trust_bound()
    return value, norm, None


def _worst(norms: list[float]) -> int:
    """Which norm, or square of one, is not finite; where only their sum overflows, the largest is to blame."""
    return max(range(len(norms)), key=lambda i: math.inf if math.isnan(norms[i]) else norms[i])


def _clipping(settings: Settings, norm: float) -> float:
    """What gradients of that norm are multiplied by.

    The formula of ``torch.nn.utils.clip_grad_norm_``, which passes over the gradients also when it does not clip.
    """
    return 1.0 if settings.clip is None else min(1.0, settings.clip / (norm + 1e-6))


def check_first_loss(loss: Tensor, masked: MaskedNetwork, forwards: int) -> None:
    """Refuse a loss from which no mask can be learned; ``forwards`` is the masked network's ``step`` before it.

    Raises:
        CutGraphError: the loss did not call the masked network, or does not reach its logits.
    """
    if masked.step == forwards and not masked.training:
        raise CutGraphError(
            "loss(net, batch) put net into evaluation mode, in which no gate is sampled, so nothing can be learned from"
            " it. Leave net in the mode that it comes in."
        )
    if masked.step == forwards:
        raise CutGraphError(
            "loss(net, batch) did not call net, which is the network under its mask, so the loss does not depend on any"
            " gate. Call net(x) in it, and not the network from outside."
        )
    check_first_step(loss, masked.logits)


@contextlib.contextmanager
def uninterrupted(*, insist: bool = False) -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done. In a thread, where no Ctrl-C arrives, nothing is to be done.

    Around whole training steps too: Python raises it wherever it is, and swallows it where that is a finaliser or the
    callback of a weak reference, of which autograd has many.

    Args:
        insist: let a second Ctrl-C through at once, for blocks that may take long.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    held: list[Any] = []

    def hold(*arguments: Any) -> None:
        held.append(arguments)
        if insist and len(held) > 1:
            hand_over()

    def hand_over() -> None:
        while held:  # all of them: an outer block counts
            previous(*held.pop(0))

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    hand_over()


def _brief(value: object) -> str:
    text = repr(value)
    return f"a {type(value).__name__}" + (f" ({text})" if len(text) <= 60 else "")
