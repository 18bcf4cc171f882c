"""Weights and masks that train together, one task after the other (paper: permuted digits)."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sublens.errors import StudyError
from sublens.fit.checkpoint import State
from sublens.gates import Penalty
from sublens.inspection.folder import Folder
from sublens.inspection.network import WeightTraining, adam, build_network, load_network, save_network
from sublens.mask import Mask, fingerprint
from sublens.masked_network import MaskedNetwork
from sublens.questions import keep_histogram
from sublens.selection import match_names
from sublens.study import Study, Task, Together, seed_from


def train_together(
    study: Study, plan: Together, seed: int, folder: Folder, progress: bool
) -> tuple[dict[str, nn.Module], dict[str, Mask]]:
    """Train network and mask of the control, then of each task in turn, or load those that are finished.

    Returns:
        For each of them the network as its training left it, and the mask, which belongs to that network.

    Raises:
        StudyError: a parameter of the network is not masked: nothing would say which task may change it.
        NonFiniteError: NaN or infinity in the loss or a gradient.
    """
    networks: dict[str, nn.Module] = {}
    masks: dict[str, Mask] = {}
    previous: nn.Module | None = None
    for task in (study.control, *study.tasks):
        if folder.mask(task.name).exists() and folder.network_of(task.name).exists():
            with folder.reading(folder.network_of(task.name)):
                network = load_network(study, seed, folder.network_of(task.name))
            with folder.reading(folder.mask(task.name)):
                mask = Mask.load(folder.mask(task.name), network)
        else:
            network, mask = _train(study, plan, task, seed, previous, masks, folder, progress)
        networks[task.name], masks[task.name] = network, mask
        previous = network
    return networks, masks


def used_before(masks: Mapping[str, Mask], task: str, fresh: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return which weights the masks of the tasks before ``task`` keep: parameter -> bool tensor of its shape.

    Args:
        masks: of all tasks in their order.
        task: one of them, or a name that is not there, for all of them.
        fresh: layers that every task gets anew, in which no weight counts as used.
    """
    used: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if name == task:
            break
        for layer in mask:
            used[layer] = used[layer] | mask[layer] if layer in used else mask[layer]
    anew = match_names(fresh, used) if used and fresh else []
    return {layer: torch.zeros_like(kept) if layer in anew else kept for layer, kept in used.items()}


def _train(
    study: Study,
    plan: Together,
    task: Task,
    seed: int,
    previous: nn.Module | None,
    earlier: Mapping[str, Mask],
    folder: Folder,
    progress: bool,
) -> tuple[nn.Module, Mask]:
    part_seed = seed_from(seed, task.name)
    network = build_network(study, part_seed)
    masked = MaskedNetwork(
        network,
        keep=study.keep,
        samples=study.samples,
        seed=part_seed,
        where=study.where,
        biases=study.biases,
        batch_dim=study.batch_dim,
        frozen=False,
    )
    logits, weights = masked.logits, dict(network.named_parameters())
    if free := [name for name in weights if name not in logits]:
        raise StudyError(
            f"Study {study.name!r}: weights and masks train together, but {', '.join(free[:3])} has no mask, so that"
            " every task would change it. Mask all parameters (biases=True, where=...)."
        )
    match_names(plan.fresh, logits)  # refuses one that matches nothing
    used = used_before(earlier, task.name, plan.fresh) or {
        name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in weights.items()
    }
    with torch.no_grad():
        before = {} if previous is None else dict(previous.named_parameters())
        for name, weight in before.items():
            weights[name].copy_(torch.where(used[name], weight, weights[name]))
        for name, logit in logits.items():
            logit.copy_(torch.where(used[name], plan.used, plan.new))

    def after_backward() -> float:
        penalty = masked.penalty(study.alpha / study.batch_size, cast(Penalty, study.penalty))
        penalty.backward()
        for name, weight in weights.items():
            if weight.grad is not None:
                # Adam moves a weight whose gradients have all been 0 by exactly nothing.
                weight.grad.masked_fill_(used[name], 0)
        return penalty.item()

    def recorded(state: State) -> dict[str, float]:
        return {"penalty": state.penalty / max(state.count, 1), "kept": masked.mask().kept}

    trained = {**{f"logit.{n}": v for n, v in logits.items()}, **{f"weight.{n}": v for n, v in weights.items()}}
    optimizer = adam(list(weights.values()), study.network_lr)
    optimizer.add_param_group({"params": list(logits.values()), "lr": study.mask_lr})
    job = WeightTraining(
        study=study,
        task=task,
        seed=part_seed,
        module=masked,
        parameters=trained,
        tensors=trained,
        optimizer=optimizer,
        steps=study.mask_steps,
        clip=study.mask_clip,
        settings={"seed": seed, "part": task.name, "network": fingerprint(network)},
        after_backward=after_backward,
        recorded=recorded,
    )
    history, seconds = job.run(folder.checkpoints(task.name), task.name if progress else False)
    network.eval()
    mask = masked.mask()
    folder.finish(task.name, history, seconds)
    folder.note_keep_probabilities(task.name, keep_histogram(logits))
    save_network(network, folder.network_of(task.name))
    mask.save(folder.mask(task.name))  # last: it says that this part is finished
    folder.forget(task.name)
    return network, mask
