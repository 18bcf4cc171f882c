"""``fit``: from a frozen network and a loss to a trained mask."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import Optimizer

from sublens.errors import MismatchError, SettingError
from sublens.fit.batches import Batches, BatchSource, random_state_kept
from sublens.fit.checkpoint import RunFolder, State, check_storable
from sublens.fit.optimizers import describe_optimizer, make_optimizer
from sublens.fit.progress import Display
from sublens.fit.ranks import Processes, Ranks
from sublens.fit.settings import DEFAULT_ALPHA, DEFAULT_LR, Record, Settings, Settled
from sublens.fit.strength import ENOUGH, AlphaPath, Controller
from sublens.fit.training import Training
from sublens.gates import ContinuousSparsification, Gate, Penalty
from sublens.gates.ranked import RankedGate
from sublens.groups import Grouping, Groups
from sublens.mask import Mask
from sublens.masked_network import MaskedNetwork
from sublens.ranking import Kept
from sublens.selection import Where
from sublens.storage import held


@dataclass(frozen=True)
class Run:
    """What a finished call of :func:`fit` leaves.

    Attributes:
        mask: the mask, kept iff logit > 0.
        logits: name -> float32 logits, of the masked parameter's shape, or one for each group.
        history: the records, oldest first; see ``docs/training.md`` for their fields.
        stopped: ``"steps"`` when all steps were done, ``"settled"`` when the mask had settled before.
        steps: number of steps done.
        seconds: wall time of the training, those of the earlier processes of a resumed run included.
        groupings: of the logits, by name: what :meth:`sublens.Mask.by_group` asks for where weights share logits.
    """

    mask: Mask
    logits: dict[str, Tensor]
    history: list[Record]
    stopped: Literal["steps", "settled"]
    steps: int
    seconds: float
    groupings: Mapping[str, Grouping]


def fit(
    network: nn.Module,
    batches: Batches,
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int = 20_000,
    alpha: float | AlphaPath | None = None,
    kept: Kept | None = None,
    per_layer: bool = False,
    penalty: Penalty = "logits",
    keep: float = 0.9,
    samples: int = 4,
    seed: int = 0,
    where: Where = None,
    biases: bool = False,
    gate: Gate | None = None,
    groups: Groups = "weight",
    batch_dim: int = 0,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    lr: float = DEFAULT_LR,
    clip: float | None = 1.0,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    evaluate_every: int = 1000,
    record_every: int = 100,
    settle: Settled | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: int = 1000,
    progress: bool | str = True,
    callbacks: Sequence[Callable[[Record], object]] = (),
    processes: Processes = None,
) -> Run:
    """Train a mask for one task on a frozen network, which is left exactly as it was.

    Each step, in the paper's order (section 2 and its code): the loss of one batch and its backward pass, the backward
    pass of the penalty, the clip of both gradients together, the optimizer's step on the logits.

    Args:
        network: the trained network. Neither its weights nor its buffers, flags or hooks change.
        batches: a function ``batches(step) -> batch`` of the step number, from 0; or something to iterate over again
            and again, such as a DataLoader, one pass after the other.
        loss: ``loss(net, batch)`` returns a tensor with one number. ``net`` is called like the network.
        steps: number of steps, at least 1.
        alpha: multiplies the penalty as it stands, at least 0; 1e-4 if neither it nor ``kept`` is given, and 0 for
            gates that keep a given number. (The paper divides its alpha by the batch size.) An
            :class:`sublens.AlphaPath` grows through the run.
        kept: how much the mask keeps at the end, instead of ``alpha``, which is then steered there: a float is a
            fraction above 0 and at most 1, an int a number of elements (of groups, where these are masked).
        per_layer: whether ``kept`` is that of each masked parameter, or of all together.
        penalty: ``"logits"``, the paper's sum of all logits, or ``"expected"``, the expected number of kept elements.
        keep: keep probability at the start, see :class:`sublens.MaskedNetwork`, as for the next seven arguments.
        samples: number of draws of all gates per step.
        seed: seed of the gates' noise, and of all that draws from torch's random numbers during the run.
        where: which parameters are masked.
        biases: whether the biases of the selected weights are masked too.
        gate: the estimator; :class:`sublens.GumbelSigmoid` by default.
        groups: which elements share one logit; by default each has its own.
        batch_dim: the dimension of inputs and outputs that counts the batch.
        optimizer: a function that makes a torch optimizer for the list of logits; by default Adam with ``lr``.
        lr: learning rate of the default optimizer.
        clip: largest gradient norm over all logits, or ``None``.
        evaluate: ``evaluate(net) -> {metric: number}``, called without gradients and with the mask itself in ``net``.
        evaluate_every: steps between evaluations. One more follows the last step.
        record_every: steps between records of the history.
        settle: when to stop early; ``None`` trains for all ``steps``.
        folder: where ``history.jsonl`` and ``checkpoint.safetensors`` go. ``None`` writes nothing.
        resume: continue the run in ``folder`` if there is one; the result is the bit-identical mask and history.
            Settings must be those it began with, except ``steps``, which may grow (not where ``kept`` or an
            ``AlphaPath`` is given: their way depends on ``steps``).
        checkpoint_every: steps between checkpoints. One more follows the last step, and Ctrl-C.
        progress: a bar on a terminal and lines elsewhere, on standard error; a string labels them, ``False`` is silent.
        callbacks: functions (or objects with ``__call__``) that are given a copy of each new record.
        processes: ``"all"``, or a torch.distributed ProcessGroup: its processes train this one mask together, each with
            ``samples`` samples of its own and its own part of every batch; see ``docs/processes.md``. ``None`` trains
            in this process alone, also where there are others.

    Returns:
        The run: its mask, logits and history.

    Raises:
        SettingError: a setting is impossible. Nothing was trained or written.
        SelectionError: ``where`` matches nothing.
        CutGraphError: the first loss does not reach the logits.
        BatchError: a batch cannot be split into ``samples``.
        NonFiniteError: NaN or infinity in the loss or in a gradient; the last checkpoint is kept.
        MismatchError: the run in ``folder`` had other settings than this call.
        FileError: a file in ``folder`` cannot be read or written, or another process writes a run there.
        LostRankError: another process of ``processes`` is gone.
    """
    return _end_of(fitting(None, **locals()))


def _end_of(training: Generator[None, None, Run]) -> Run:
    """Go through a training without a pause."""
    with contextlib.closing(training):
        while True:
            try:
                next(training)
            except StopIteration as ended:
                run: Run = ended.value
                return run


def fitting(
    bar: Progress | None,
    *,
    network: nn.Module,
    batches: Batches,
    alpha: float | AlphaPath | None,
    kept: Kept | None,
    seed: int,
    keep: float,
    samples: int,
    where: Where,
    biases: bool,
    gate: Gate | None,
    groups: Groups,
    batch_dim: int,
    processes: Processes,
    callbacks: Sequence[Callable[[Record], object]],
    **others: Any,
) -> Generator[None, None, Run]:
    """One call of :func:`fit`, which pauses now and then so that others can do something.

    Args:
        bar: where progress is shown, if others show theirs there too.
        **others: what of the arguments of :func:`fit` is in :class:`Settings` and not named here.
    """
    if callable(callbacks):
        raise SettingError("callbacks is a function; it must be a list of such, as in callbacks=[print].")
    if torch.is_inference_mode_enabled():
        raise SettingError(
            "fit was called under torch.inference_mode(), in which nothing can be trained. Call it outside; what must"
            " not be trained, the network's weights, is frozen anyway."
        )
    ranks = Ranks(processes)
    settings = Settings(
        alpha=_default_alpha(gate) if alpha is None and kept is None else alpha,
        kept=kept,
        seed=seed,
        callbacks=tuple(callbacks),
        **others,
    )
    source = BatchSource(batches, seed)
    with random_state_kept(), source.generators_kept(), contextlib.ExitStack() as folders:
        masked = MaskedNetwork(
            network,
            keep=keep,
            samples=samples,
            seed=seed,
            where=where,
            biases=biases,
            gate=gate,
            groups=groups,
            batch_dim=batch_dim,
        )
        with torch.no_grad():
            # Refused here, before anything is written, where a gate takes no penalty.
            masked.penalty(settings.alpha if isinstance(settings.alpha, (int, float)) else 1.0, kind=settings.penalty)
        if kept is not None:
            Controller(masked, settings.steps, kept, settings.per_layer, [])  # likewise, more elements than there are
        masked.first_sample = ranks.rank * samples
        trainer = make_optimizer(settings, masked.logits)
        yield  # what can be refused has been: with several tasks, before any of them trains or writes
        described = _describe(settings, masked, trainer, keep=keep, samples=samples * ranks.count, batch_dim=batch_dim)
        ranks.check_equal(masked.logits, 0, described)
        store: RunFolder | None = None
        state, history = State(forwards=masked.step), list[Record]()
        if settings.folder is not None:
            ranks.gather_state(trainer)
            if ranks.leads:
                check_storable(trainer)
            store = RunFolder(settings.folder, resume=settings.resume, writes=ranks.leads)
            if ranks.leads:
                folders.enter_context(held(store.path))
            state = store.restore(described, masked.logits, trainer) or state
            if state.step > settings.steps:
                raise MismatchError(
                    f"The run in {store.path} has already done {state.step} steps, where this call has "
                    f"steps={settings.steps}. Resume it with steps={state.step} or more, or start anew in another "
                    "folder."
                )
            ranks.check_equal(masked.logits, state.step)  # all have read what is there before it is written to
            history = store.open_history(state)
            source.rewind(state.step, state.epoch, state.epoch_start, state.batch if ranks.count == 1 else None)
        masked.train()
        training = Training(settings, described, masked, trainer, source, store, state, history, ranks)
        shown = settings.progress if ranks.leads else False
        with Display(shown, settings.steps, done=state.step, bar=bar) as display:
            stopped = yield from training.run(display)
        ranks.check_equal(masked.logits, state.step)
        logits = {name: logit.detach() for name, logit in masked.logits.items()}
        mask = masked.mask()
        if mask.kept == 1 and settings.alpha and state.step >= ENOUGH and ranks.leads:
            lowest = min(float(layer.min()) for layer in masked.decisions().values())
            warnings.warn(
                f"The mask keeps every weight after {state.step} steps: no logit has come below 0, the lowest is"
                f" {lowest:.2g}. With Adam a logit moves by at most about the learning rate in a step. Take more steps,"
                " or a larger lr or alpha.",
                stacklevel=4,  # past this generator, and who goes through it
            )
        if mask.kept == 0 and isinstance(settings.alpha, int | float) and state.step >= ENOUGH and ranks.leads:
            warnings.warn(
                f"The mask removes every weight after {state.step} steps: the penalty outweighs what the loss loses by"
                " it. Take a smaller alpha, and see that the loss depends on what the network gives.",
                stacklevel=4,
            )
        soft = masked.gate
        if isinstance(soft, ContinuousSparsification) and state.step < soft.steps >= ENOUGH and ranks.leads:
            warnings.warn(
                f"{soft!r} was to be trained for {soft.steps} steps and was for {state.step}: its gates are soft still,"
                f" with a beta of {soft.beta(state.step):.3g} where {soft.final:.3g} is the end. The binary mask is not"
                f" what was trained. Give the gate the number of steps that are taken.",
                stacklevel=4,
            )
        return Run(mask, logits, history, stopped, state.step, training.seconds(), masked.groupings)


def _default_alpha(gate: Gate | None) -> float:
    return 0.0 if isinstance(gate, RankedGate) else DEFAULT_ALPHA  # those keep a given number, whatever the penalty


def _describe(settings: Settings, masked: MaskedNetwork, optimizer: Optimizer, **others: Any) -> dict[str, Any]:
    """All that a run's result depends on and that can be compared, as JSON. Functions cannot be."""
    same = ("penalty", "seed", "clip", "evaluate_every", "record_every")
    described: dict[str, Any] = {
        **others,
        **{name: getattr(settings, name) for name in same},
        "alpha": repr(settings.alpha) if isinstance(settings.alpha, AlphaPath) else settings.alpha,
        "settle": None if settings.settle is None else repr(settings.settle),
        "gate": repr(masked.gate),
        "optimizer": describe_optimizer(optimizer),
        "network": masked.fingerprint,
        "selection": {name: list(logit.shape) for name, logit in masked.logits.items()},
    }
    if coarse := {name: each.describe() for name, each in masked.groupings.items() if not each.fine}:
        described["groups"] = coarse
    if settings.kept is not None:
        described |= {"kept": settings.kept, "per_layer": settings.per_layer}
    if settings.scheduled:
        described["steps"] = settings.steps
    loaded: dict[str, Any] = json.loads(json.dumps(described))
    return loaded
