"""The network of a study: trained here, resumable to the same bits, or loaded from a file of weights."""

import math
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sublens.analysis import accuracies
from sublens.errors import MismatchError, NonFiniteError, StudyError
from sublens.fit.batches import BatchSource, random_state_kept, seed_torch
from sublens.fit.checkpoint import RunFolder, State
from sublens.fit.optimizers import describe_optimizer
from sublens.fit.progress import Display
from sublens.fit.settings import Record
from sublens.fit.training import uninterrupted
from sublens.mask import fingerprint
from sublens.storage import load_weights, save_tensors
from sublens.study import Study, seed_from

_RECORD_EVERY = 100
CHECKPOINT_EVERY = 1000


def build_network(study: Study, seed: int) -> nn.Module:
    """Return the study's untrained network, the same for the same seed. Torch's random state is put back."""
    with random_state_kept():
        seed_torch("network", seed)
        network = study.network(seed)
    if not isinstance(network, nn.Module):
        raise StudyError(f"Study {study.name!r}: network(seed) returned a {type(network).__name__}, not an nn.Module.")
    return network


def load_network(study: Study, seed: int, path: Path) -> nn.Module:
    """Return the study's network with the weights of a file.

    Raises:
        FileError: the file cannot be read as weights.
        MismatchError: its names or shapes are not those of the study's network.
    """
    network = build_network(study, seed)
    weights = load_weights(path)
    wanted = network.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in weights]
    problems += [f"{name} is not in the network" for name in weights if name not in wanted]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise MismatchError(
            f"The weights in {path} do not fit the network of {study.name}: {', '.join(problems[:3])}{more}. Give the"
            " weights of this network, or the study settings (widths) that the weights were trained with."
        )
    network.load_state_dict(weights)
    return network


def prepared(study: Study, network: nn.Module) -> nn.Module:
    """Return the network as the study's ``prepare`` makes it; the same network if the study has none.

    Raises:
        StudyError: it returns no module, or one of other names or shapes, which the run folder could not be read into.
    """
    if study.prepare is None:
        return network
    before = {name: tensor.shape for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        made = study.prepare(network)
    if not isinstance(made, nn.Module):
        raise StudyError(f"Study {study.name!r}: prepare(network) returned a {type(made).__name__}, not the network.")
    if {name: tensor.shape for name, tensor in made.state_dict().items()} != before:
        raise StudyError(f"Study {study.name!r}: prepare(network) changed the names or shapes of the weights.")
    return made.eval()


def save_network(network: nn.Module, path: Path) -> None:
    """Write the network's weights, atomically."""
    save_tensors(path, network.state_dict(), {"kind": "network"})


def train_network(study: Study, seed: int, folder: Path, progress: bool | str) -> tuple[nn.Module, list[Record], float]:
    """Train the study's network on its control task, and return it with its history and the seconds it took.

    ``folder`` holds the checkpoint; training continues from one that is there, to the same bits. As for masks, torch's
    random numbers are seeded for each step, so that dropout is no obstacle to that.

    Raises:
        NonFiniteError: NaN or infinity in the loss or a gradient.
    """
    network = build_network(study, seed)
    training = _Training(study, seed, network, folder)
    with (
        random_state_kept(),
        training.source.generators_kept(),
        Display(progress, study.network_steps, done=training.state.step) as display,
    ):
        training.run(display)
    return network, training.history, training.seconds()


class _Training:
    """Training in progress. Its checkpoint is that of a mask's training, with the network's state for the logits."""

    def __init__(self, study: Study, seed: int, network: nn.Module, folder: Path) -> None:
        self._study, self._network = study, network
        self._seed = seed_from(seed, "network")
        self._metrics = {task.name: task.metric for task in study.tasks}
        self._parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
        self._optimizer = _adam(list(self._parameters.values()), study.network_lr)
        self._settings: dict[str, Any] = {
            "seed": seed,
            "network": fingerprint(network),
            "steps": study.network_steps,
            "clip": float(study.network_clip),
            "optimizer": describe_optimizer(self._optimizer),
        }
        self._tensors = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
        self._store = RunFolder(folder, resume=True)
        self.state = self._store.restore(self._settings, self._tensors, self._optimizer) or State()
        self.history = self._store.open_history(self.state)
        self.source = BatchSource(study.control.batches_for(self._seed), self._seed)
        self.source.rewind(self.state.step, self.state.epoch, self.state.epoch_start)
        self._clock = time.perf_counter()

    def run(self, display: Display) -> None:
        state, steps = self.state, self._study.network_steps
        self._network.train()
        try:
            while True:
                evaluates = state.step == steps or state.step % self._study.evaluate_every == 0
                if state.recorded != state.step and (evaluates or state.step % _RECORD_EVERY == 0):
                    self._record(display, evaluates)
                if state.step == steps or state.step % CHECKPOINT_EVERY == 0:
                    self._save()
                if state.step == steps:
                    break
                self._step()
                display.step(state.step)
        except KeyboardInterrupt:
            with uninterrupted():
                self._save()
            raise
        self._network.eval()

    def _step(self) -> None:
        state = self.state
        batch = self.source(state.step)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._study.control.loss(self._network, batch)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(
                f"The loss of the network is {value} at step {state.step}. Look at this step's batch, and at the"
                f" learning rate ({self._study.network_lr}).",
                step=state.step,
            )
        # From here to the counters the run is in no state that a checkpoint could hold.
        with uninterrupted():
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self._parameters.values(), self._study.network_clip).item()
            if not math.isfinite(norm):
                self._stop(norm)
            self._optimizer.step()
            state.step += 1
            state.epoch, state.epoch_start = self.source.epoch, self.source.epoch_start
            state.count += 1
            state.loss += value
            state.norm += norm

    def _stop(self, norm: float) -> NoReturn:
        broken = next(
            name
            for name, parameter in self._parameters.items()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        )
        raise NonFiniteError(
            f"The gradient of {broken!r} is not finite at step {self.state.step} of the network's training, though the"
            f" loss was. Look at this step's batch, and at the learning rate ({self._study.network_lr}).",
            step=self.state.step,
            parameter=broken,
        )

    def _record(self, display: Display, evaluates: bool) -> None:
        state = self.state
        steps = max(state.count, 1)
        record: Record = {"step": state.step, "loss": state.loss / steps, "gradient_norm": state.norm / steps}
        if evaluates:
            seed_torch("evaluate", self._seed, state.step)
            record |= accuracies(self._network, self._metrics)
        with uninterrupted():
            state.position = self._store.append(record)
            self.history.append(record)
            state.recorded = state.step
            state.count, state.loss, state.norm = 0, 0.0, 0.0
        display.record(record, evaluated=evaluates)

    def _save(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self._clock
        self._clock = now
        if self._store.checkpoint_step != self.state.step:
            self._store.save(self.state, self._settings, self._tensors, self._optimizer)

    def seconds(self) -> float:
        """Wall time so far, that of earlier processes included."""
        return self.state.seconds + time.perf_counter() - self._clock


def _adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    try:
        # One pass over the weights where the device has it, the CPU included.
        return torch.optim.Adam(parameters, lr=lr, fused=True)
    except RuntimeError:
        return torch.optim.Adam(parameters, lr=lr)
