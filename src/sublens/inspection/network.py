"""The network of a study: trained here, resumable to the same bits, or loaded from a file of weights."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from sublens.masked_network import MaskedNetwork
from sublens.storage import load_weights, save_tensors
from sublens.study import Study, Task, seed_from

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
    parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
    job = WeightTraining(
        study=study,
        task=study.network_task or study.control,
        seed=seed_from(seed, "network"),
        module=network,
        parameters=parameters,
        tensors={name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)},
        optimizer=_optimizer(study, list(parameters.values())),
        steps=study.network_steps,
        clip=study.network_clip,
        settings={"seed": seed, "network": fingerprint(network)},
        # A pure function of the step: nothing of it needs a place in the checkpoint.
        rate=lambda step: _rate(study, step),
    )
    history, seconds = job.run(folder, progress)
    return network, history, seconds


@dataclass(frozen=True, kw_only=True)
class WeightTraining:
    """A training of weights, alone or along with the logits of a mask, that can be killed and resumed at any moment.

    Its checkpoint is that of a mask's training.

    Attributes:
        study: whose metrics are recorded, at every ``evaluate_every`` steps.
        task: batches and loss.
        seed: of this part of the run.
        module: what the loss is called with, in training mode until the end.
        parameters: what is trained and clipped; name -> parameter.
        tensors: what a checkpoint must hold beside the optimizer's state; name -> tensor.
        optimizer: of the parameters.
        steps: number of steps.
        clip: largest gradient norm over all parameters.
        settings: JSON values that tell this training from any other.
        after_backward: called between the loss's backward pass and the clip; may add to the gradients or take from
            them, and returns the value of the penalty.
        recorded: called for every record; returns what it holds beside loss and gradient norm.
        rate: step -> learning rate of all parameters; ``None`` leaves those of the optimizer.
    """

    study: Study
    task: Task
    seed: int
    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    tensors: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    steps: int
    clip: float
    settings: Mapping[str, Any]
    after_backward: Callable[[], float] | None = None
    recorded: Callable[[State], Mapping[str, float]] | None = None
    rate: Callable[[int], float] | None = None

    def run(self, folder: Path, progress: bool | str) -> tuple[list[Record], float]:
        """Train, from the checkpoint in ``folder`` if there is one. Return history and seconds."""
        training = _Training(self, folder)
        with (
            random_state_kept(),
            training.source.generators_kept(),
            Display(progress, self.steps, done=training.state.step) as display,
        ):
            training.run(display)
        return training.history, training.seconds()


class _Training:
    """A :class:`WeightTraining` in progress."""

    def __init__(self, job: WeightTraining, folder: Path) -> None:
        self._job = job
        self._metrics = job.study.metrics()
        self._settings = {
            **job.settings,
            "steps": job.steps,
            "clip": float(job.clip),
            "optimizer": describe_optimizer(job.optimizer),
        }
        self._store = RunFolder(folder, resume=True)
        self.state = self._store.restore(self._settings, job.tensors, job.optimizer) or State()
        self.history = self._store.open_history(self.state)
        self.source = BatchSource(job.task.batches_for(job.seed), job.seed)
        self.source.rewind(self.state.step, self.state.epoch, self.state.epoch_start, self.state.batch)
        self._clock = time.perf_counter()

    def run(self, display: Display) -> None:
        state, job = self.state, self._job
        job.module.train()
        try:
            while True:
                evaluates = state.step == job.steps or state.step % job.study.evaluate_every == 0
                if state.recorded != state.step and (evaluates or state.step % _RECORD_EVERY == 0):
                    self._record(display, evaluates)
                if state.step == job.steps or state.step % CHECKPOINT_EVERY == 0:
                    self._save()
                if state.step == job.steps:
                    break
                saved_next = state.step + 1 == job.steps or (state.step + 1) % CHECKPOINT_EVERY == 0
                batch = self.source(state.step, remember=self.source.remembered is None or saved_next)
                with uninterrupted(insist=True):
                    self._step(batch)
                display.step(state.step)
        except KeyboardInterrupt:
            with uninterrupted():
                self._save()
            raise
        job.module.eval()

    def _step(self, batch: Any) -> None:
        state, job = self.state, self._job
        if isinstance(job.module, MaskedNetwork):
            job.module.step = state.forwards
        if job.rate is not None:
            for group in job.optimizer.param_groups:
                group["lr"] = job.rate(state.step)
        job.optimizer.zero_grad(set_to_none=True)
        loss = job.task.loss(job.module, batch)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(
                f"The loss of the network is {value} at step {state.step}. Look at this step's batch, and at the"
                f" learning rate ({self._rate}).",
                step=state.step,
            )
        # From here to the counters the run is in no state that a checkpoint could hold.
        with uninterrupted():
            loss.backward()
            penalty = 0.0 if job.after_backward is None else job.after_backward()
            norm = nn.utils.clip_grad_norm_(job.parameters.values(), job.clip).item()
            if not math.isfinite(norm):
                self._stop(norm)
            job.optimizer.step()
            state.step += 1
            if isinstance(job.module, MaskedNetwork):
                state.forwards = job.module.step
            state.epoch, state.epoch_start = self.source.epoch, self.source.epoch_start
            state.count += 1
            state.loss += value
            state.penalty += penalty
            state.norm += norm

    @property
    def _rate(self) -> float:
        rate: float = self._job.optimizer.param_groups[0]["lr"]
        return rate

    def _stop(self, norm: float) -> NoReturn:
        broken = next(
            name
            for name, parameter in self._job.parameters.items()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        )
        raise NonFiniteError(
            f"The gradient of {broken!r} is not finite at step {self.state.step} of the network's training, though the"
            f" loss was. Look at this step's batch, and at the learning rate ({self._rate}).",
            step=self.state.step,
            parameter=broken,
        )

    def _record(self, display: Display, evaluates: bool) -> None:
        state, job = self.state, self._job
        steps = max(state.count, 1)
        record: Record = {"step": state.step, "loss": state.loss / steps, "gradient_norm": state.norm / steps}
        if job.recorded is not None:
            record |= job.recorded(state)
        if evaluates:
            seed_torch("evaluate", job.seed, state.step)
            record |= accuracies(job.module, self._metrics)
        with uninterrupted():
            state.position = self._store.append(record)
            self.history.append(record)
            state.recorded = state.step
            state.count, state.loss, state.penalty, state.norm = 0, 0.0, 0.0, 0.0
        display.record(record, evaluated=evaluates)

    def _save(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self._clock
        self._clock = now
        if self._store.checkpoint_step != self.state.step:
            self.state.batch = self.source.remembered
            self._store.save(self.state, self._settings, self._job.tensors, self._job.optimizer)

    def seconds(self) -> float:
        """Wall time so far, that of earlier processes included."""
        return self.state.seconds + time.perf_counter() - self._clock


def _optimizer(study: Study, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if study.network_optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=study.network_lr, momentum=0.9, weight_decay=study.network_decay)
    return adam(parameters, study.network_lr, study.network_decay, study.network_betas)


def _rate(study: Study, step: int) -> float:
    warm = min(1.0, (step + 1) / study.network_warmup) if study.network_warmup else 1.0
    return float(study.network_lr * warm * 0.1 ** sum(step >= milestone for milestone in study.network_milestones))


def adam(
    parameters: list[nn.Parameter], lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """Return Adam over ``parameters``, in one pass over the weights where the device has it, the CPU included."""
    try:
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, betas=betas, fused=True)
    except RuntimeError:
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, betas=betas)
