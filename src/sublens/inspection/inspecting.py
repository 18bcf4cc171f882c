"""``inspect``: from a study to a finished run folder."""

import dataclasses
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

import sublens
from sublens.analysis import accuracies, interrogate, measuring, overlap
from sublens.analysis.verdict import ABLE
from sublens.answers import Answer, percent
from sublens.errors import SettingError, StudyError
from sublens.fit import fit
from sublens.fit.batches import random_state_kept, seed_torch
from sublens.fit.settings import Record
from sublens.groups import check_groups, group
from sublens.inspection.checking import check_study
from sublens.inspection.folder import Folder, default_folder, hash_of, is_used
from sublens.inspection.judging import excluded_by, verdict_on
from sublens.inspection.network import load_network, prepared, save_network, train_network
from sublens.inspection.together import train_together
from sublens.mask import Mask
from sublens.questions import Found, ask, keep_histogram, unsure_share
from sublens.selection import Where, match_names
from sublens.study import Asked, Study, Task, repeat_of, seed_from

log = logging.getLogger("sublens.inspection")

CHECKPOINT_EVERY = 1000
_PACKAGES = ("torch", "numba", "numpy", "safetensors")
_ANSWERS = tuple(
    f"settings.{name}"
    for name in ("questions", "functions", "compared", "first_half", "random_masks", "study.file_sha256")
)
"""What may change when everything is trained. Of a study's file that changed, nobody but its author knows in what."""


def inspect(
    study: Study,
    *,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    steps: int | None = None,
    samples: int | None = None,
    alpha: float | None = None,
    groups: Any = None,
    resume: bool = False,
    network: str | os.PathLike[str] | None = None,
    progress: bool = True,
    report: bool = True,
) -> dict[str, Any]:
    """Train a study's network and its masks, ask the masks every question, and write the run folder.

    The same study and arguments give the same masks and the same ``result.json``, bit for bit but for its wall times,
    on one machine with the same versions and number of threads; also if the run was killed in between and resumed.

    Args:
        study: the study.
        out: run folder; by default ``runs/STUDY-PRESET-seedSEED``. It must be empty or not exist, unless ``resume``.
        seed: of the network, the data order and the gates' noise.
        steps: training steps of each mask, instead of the study's.
        samples: draws per step, instead of the study's.
        alpha: weight of the penalty before the division by the batch size, instead of the study's.
        groups: what shares a logit, instead of the study's.
        resume: go on with the run in ``out``, if there is one. Finished parts are not done again.
        network: file of weights (``.safetensors``, ``.pt``, ``.pth``); the network is then not trained.
        progress: whether to show how far the training is.
        report: whether to write ``report.html`` and ``figures/``.

    Returns:
        What ``result.json`` holds; see ``docs/studies.md``.

    Raises:
        SettingError: an argument is impossible, or the folder is in use.
        StudyError: the study does not fit its network, or a function of it does not return what it must.
        BatchError: a batch cannot be split for the samples.
        CutGraphError: a loss does not reach the gates.
        SelectionError: its ``where`` matches nothing that can be masked.
        MismatchError: the folder holds another run, or the weights do not fit the network.
        FileError: a file cannot be read or written, or another process works in the folder.
    """
    weights = None if network is None else Path(network)
    study, config = _asked(study, seed, steps, samples, alpha, groups, weights)
    path = default_folder(study, seed) if out is None else Path(out)
    if not is_used(path):
        check_study(study, seed, weights)  # before there is a folder that only this very run could go on in
    folder = _opened(study, config, path, resume)
    with folder.held():
        result = _finished(study, config, seed, folder, weights, progress)
        if report:
            from sublens.report import write_report  # matplotlib is slow to import, and not needed before

            write_report(folder.path)
    return result


def _finished(
    study: Study, config: dict[str, Any], seed: int, folder: Folder, weights: Path | None, progress: bool
) -> dict[str, Any]:
    """Return the run's result, made now as far as it or a part of the run is not there."""
    result = cast(dict[str, Any] | None, folder.read_json("result.json"))
    if not _answered(result, config) or not _is_trained(study, folder):
        if folder.changed:
            check_study(study, seed, folder.network if folder.network.exists() else None)
            log.warning(
                "sublens: the questions are asked anew of the masks in %s, which were trained with another %s. If more"
                " changed than the questions (the network, tasks, losses or data), give another folder (--out).",
                folder.path,
                ", ".join(folder.changed),
            )
        networks, masks = _trained(study, seed, folder, weights, progress)
        if unknown := [name for name in masks if name not in folder.keep_probabilities()]:
            log.warning(
                "sublens: how sure the gates of %s were when their training ended is not known (%s has nothing of it),"
                " so the verdict does not ask whether they had settled.",
                ", ".join(unknown),
                folder.path / "parts.json",
            )
        clock = time.perf_counter()
        answers = _answers(study, networks, masks, seed, folder.keep_probabilities())
        seconds = {**folder.seconds(), "analysis": time.perf_counter() - clock}
        seconds["total"] = sum(seconds.values())
        rounded = {name: round(value, 2) for name, value in seconds.items()}
        result = {**config, "versions": _versions(), "seconds": rounded, **answers}
        if folder.changed:
            result["trained_with"] = folder.changed
        folder.write_json("result.json", result)
    folder.tidy()
    return cast(dict[str, Any], result)


def _opened(study: Study, config: dict[str, Any], path: Path, resume: bool) -> Folder:
    """Open a run's folder. What only its answers depend on may have changed since everything in it was trained."""
    folder = Folder(path, config, resume=resume, answers=_ANSWERS)
    if not _is_trained(study, folder):
        folder.refuse_changes()
    return folder


def _is_trained(study: Study, folder: Folder) -> bool:
    return folder.holds(_parts(study), together=study.together is not None)


def _answered(result: dict[str, Any] | None, config: dict[str, Any]) -> bool:
    """Return whether this is the result of just this configuration."""
    return result is not None and all(result.get(key) == value for key, value in config.items())


def progress_of(
    study: Study,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    steps: int | None = None,
    samples: int | None = None,
    alpha: float | None = None,
    groups: Any = None,
    network: str | os.PathLike[str] | None = None,
) -> Literal["new", "begun", "finished"]:
    """Return how far the run that :func:`inspect` would make of these arguments has come in ``out``.

    Raises:
        SettingError: an argument is impossible, or the folder holds something else than a run.
        MismatchError: it holds another run; the differences are named.
        FileError: a file cannot be read.
    """
    weights = None if network is None else Path(network)
    study, config = _asked(study, seed, steps, samples, alpha, groups, weights)
    path = Path(out)
    if not is_used(path):
        return "new"
    return "finished" if _answered(_opened(study, config, path, True).read_json("result.json"), config) else "begun"


def _asked(
    study: Study,
    seed: int,
    steps: int | None,
    samples: int | None,
    alpha: float | None,
    groups: Any,
    weights: Path | None,
) -> tuple[Study, dict[str, Any]]:
    """Return the study with what was asked put in, and everything that the run depends on."""
    if not isinstance(study, Study):
        raise StudyError(f"inspect takes a sublens.Study, such as study() returns, not a {type(study).__name__}.")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise SettingError(f"seed={seed!r} must be a whole number from 0 to 2**63-1.")
    changes: dict[str, Any] = {"mask_steps": steps, "samples": samples, "alpha": alpha, "groups": groups}
    study = dataclasses.replace(study, **{name: value for name, value in changes.items() if value is not None})
    if study.together is not None and weights is not None:
        raise SettingError(
            f"The study {study.name} trains weights and masks together, so it has no use for the weights in {weights}."
            " Leave the network out."
        )
    check_groups(study.groups)
    return study, config_of(study, seed, None if weights is None else hash_of(weights))


def _parts(study: Study) -> dict[str, Task]:
    """Return every mask of the study by name: the control, the tasks, and the repeated ones."""
    tasks = {task.name: task for task in (study.control, *study.tasks)}
    return {**tasks, **{repeat_of(name): tasks[name] for name in study.repeated}}


def config_of(study: Study, seed: int, weights: str | None) -> dict[str, Any]:
    """Return everything a run depends on that can be written down."""
    plain = (
        "network_steps", "network_lr", "network_clip", "network_optimizer", "network_decay", "network_betas",
        "network_warmup", "network_milestones",
        "mask_steps", "mask_lr", "mask_clip", "alpha", "batch_size",
        "penalty", "keep", "samples", "biases", "batch_dim", "evaluate_every", "first_half", "repeated", "random_masks",
        "functions", "compared", "from_control",
    )  # fmt: skip
    settings = {name: getattr(study, name) for name in plain}
    settings["where"] = study.where if study.where is None or isinstance(study.where, str) else _described(study.where)
    settings["groups"] = _described(study.groups)
    settings["tasks"] = [task.name for task in study.tasks]
    settings["control"] = study.control.name
    settings["questions"] = list(study.questions)
    settings["together"] = None if study.together is None else dataclasses.asdict(study.together)
    settings["prepare"] = None if study.prepare is None else _described(study.prepare)
    settings["study"] = study.settings
    settings["network_file_sha256"] = weights
    config = {"study": study.name, "preset": study.preset, "seed": seed, "settings": settings}
    read_back: dict[str, Any] = json.loads(json.dumps(config))  # as the folder's files have it: tuples are lists
    return read_back


def _described(where: Any) -> Any:
    if isinstance(where, (list, tuple)):
        return [_described(item) for item in where]
    return (
        where if isinstance(where, (str, int, type(None))) else getattr(where, "__qualname__", type(where).__qualname__)
    )


def _trained(
    study: Study, seed: int, folder: Folder, weights: Path | None, progress: bool
) -> tuple[dict[str, nn.Module], dict[str, Mask]]:
    """Train every part of the run, or load what is finished: each mask by its name, and the network it belongs to."""
    if study.together is not None:
        return train_together(study, study.together, seed, folder, progress)
    net = network_of(study, seed, folder, weights, progress)
    masks: dict[str, Mask] = {}
    for name, task in _parts(study).items():
        masks[name] = _mask(study, task, name, net, masks.get(study.control.name), seed, folder, progress)
    return dict.fromkeys(masks, net), masks


def network_of(study: Study, seed: int, folder: Folder, weights: Path | None, progress: bool) -> nn.Module:
    """Return the study's network: from the folder, from a file of weights, or trained; in the folder afterwards."""
    if folder.network.exists():
        with folder.reading(folder.network):
            return load_network(study, seed, folder.network)
    if weights is not None:
        net, history, seconds = load_network(study, seed, weights), list[Record](), 0.0
    else:
        net, history, seconds = train_network(
            study, seed, folder.checkpoints("network"), "network" if progress else False
        )
    net = prepared(study, net)
    folder.finish("network", history, seconds)
    save_network(net, folder.network)
    folder.forget("network")
    _tell_what_is_not_learned(study, net)
    return net


def _tell_what_is_not_learned(study: Study, net: nn.Module) -> None:
    """Warn before hours are spent on masks of functions that are not there."""
    poor = [f"{name} in {percent(value)}" for name, value in accuracies(net, study.metrics()).items() if value < ABLE]
    if poor:
        log.warning(
            "sublens: the network answers only %s. A mask cannot find what the network has not learned, and the verdict"
            " counts a mask as evidence only if its task is at least half solved. Train the network longer"
            " (network_steps) or with another seed, or give weights that are trained (--network).",
            ", ".join(poor),
        )


def _mask(
    study: Study,
    task: Task,
    name: str,
    net: nn.Module,
    control: Mask | None,
    seed: int,
    folder: Folder,
    progress: bool,
) -> Mask:
    if folder.mask(name).exists():
        with folder.reading(folder.mask(name)):
            return Mask.load(folder.mask(name), net)
    part_seed = seed_from(seed, name)
    metrics = study.metrics()
    taken: list[str] = []
    if study.from_control and control is not None and task is not study.control:
        taken = match_names(study.from_control, control)
        # Masked as in the control already while the rest is trained.
        net = control.only(taken).apply(net)
    run = fit(
        net,
        task.batches_for(part_seed),
        task.loss,
        **{**study.fit_settings(), "where": _without(study.where, taken)},
        seed=part_seed,
        evaluate=lambda masked: {task: metric(masked) for task, metric in metrics.items()},
        evaluate_every=study.evaluate_every,
        folder=folder.checkpoints(name),
        resume=True,
        checkpoint_every=CHECKPOINT_EVERY,
        progress=f"mask {name}" if progress else False,
    )
    folder.finish(name, run.history, run.seconds)
    folder.note_keep_probabilities(name, keep_histogram(run.logits))
    mask = run.mask
    if control is not None and taken:
        mask = Mask({layer: (control if layer in taken else mask)[layer] for layer in control}, control.network)
    mask.save(folder.mask(name))
    folder.forget(name)
    return mask


def _without(where: Where, names: list[str]) -> Where:
    """Return the selection without some parameters."""
    if not names:
        return where
    single = where is None or isinstance(where, str | type) or callable(where)
    given: list[Any] = [where] if single else list(cast(Iterable[Any], where))
    return [*(item for item in given if item is not None), *(f"!{name}" for name in names)]


def _answers(
    study: Study,
    networks: dict[str, nn.Module],
    masks: dict[str, Mask],
    seed: int,
    keep_probabilities: dict[str, list[int]],
) -> dict[str, Any]:
    """Ask every question; see ``docs/studies.md`` for what each answer means."""
    metrics = study.metrics()
    net = networks[study.tasks[-1].name]
    repeats = {name: masks[repeat_of(name)] for name in study.repeated}
    # Masks that trained along with their weights are compared by their places in the network.
    placed = masks if study.together is None else {name: mask.bind(net) for name, mask in masks.items()}
    asked = {name: masks[name] for name in (study.control.name, *metrics)}
    groupings = group(net, study.where, study.biases, study.groups)
    # What is chosen together counts once, or chance would be taken for much narrower than it is.
    units = {name: mask.by_group(groupings) for name, mask in placed.items()}
    overlaps = [
        {"masks": [first, second], **overlap(units[first], units[second])} for first, second in combinations(metrics, 2)
    ]
    answers: dict[str, Any] = {
        "network": {
            "accuracy": {name: accuracies(networks[name], {name: metric})[name] for name, metric in metrics.items()}
        },
        "masks": {
            name: interrogate(
                networks[name],
                mask,
                metrics,
                half=study.first_half,
                draws=study.random_masks,
                seed=seed_from(seed, name, "random"),
                groupings=groupings,
            )
            for name, mask in asked.items()
        },
        "overlap": overlaps[0] if overlaps else None,
        "repeats": {
            name: {
                "accuracy": accuracies(net, metrics, mask),
                "kept": mask.kept,
                "overlap": {"masks": [name, repeat_of(name)], **overlap(units[name], units[repeat_of(name)])},
            }
            for name, mask in repeats.items()
        },
    }
    if len(overlaps) > 1:
        answers["overlaps"] = overlaps
    if study.confusion is not None:
        answers["confusion"] = {"network": _confusion(study, net, None)}
        answers["confusion"] |= {name: _confusion(study, networks[name], mask) for name, mask in asked.items()}
    unsure = {name: unsure_share(counts) for name, counts in keep_probabilities.items()}
    if excluded := excluded_by(study, networks, masks, groupings, seed):
        answers["excluded"] = excluded
    answers["verdict"] = verdict_on(study, placed, answers, unsure, seed)
    everything = Asked(network=net, masks=masks, metrics=metrics, study=study, seed=seed, networks=networks)
    if study.together is None:  # else each mask has another network, and these questions are asked of one
        found = Found(
            network=answers["network"]["accuracy"],
            masks=answers["masks"],
            repeats={name: answers["repeats"][name]["accuracy"] for name in repeats},
            confusion=answers.get("confusion", {}),
            keep_probabilities={name: counts for name, counts in keep_probabilities.items() if name in asked},
        )
        answers["analysis"] = {name: answer.as_json() for name, answer in ask(everything, found).items()}
    if study.questions:
        answers["answers"] = _asked_questions(everything)
    return answers


def _asked_questions(asked: Asked) -> dict[str, Any]:
    """Return the answers to the study's own questions, as JSON values."""
    answers = {}
    for name, question in asked.study.questions.items():
        with random_state_kept():
            seed_torch("question", asked.seed, name)
            asked.network.eval()
            answer = question(asked)
        if not isinstance(answer, Answer):
            raise StudyError(
                f"Study {asked.study.name!r}: the question {name} returned a {type(answer).__name__}, not a"
                " sublens.answers.Answer."
            )
        answers[name] = answer.as_json()
    return answers


def _confusion(study: Study, net: nn.Module, mask: Mask | None) -> dict[str, dict[str, float]]:
    asked = cast(Callable[[nn.Module], dict[str, dict[str, float]]], study.confusion)
    with measuring(net):
        if mask is None:
            return asked(net)
        with mask.applied(net):
            return asked(net)


def _versions() -> dict[str, str]:
    versions = {"sublens": sublens.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return {**versions, "threads": str(torch.get_num_threads())}
