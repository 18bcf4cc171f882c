"""A duel: gates, and ways to make a mask without training, on one frozen network with the same data and budget.

What is finished is read from the duel's folder alone, so that it can be killed at any moment and go on, and so that
more contestants, kept fractions and seeds can be added later.
"""

import contextlib
import ctypes
import gc
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import nn

from sublens import gates
from sublens.analysis import accuracies
from sublens.errors import FileError, MismatchError, SettingError
from sublens.fit import fit
from sublens.gates import Gate
from sublens.inspection.folder import Folder, hash_of
from sublens.inspection.inspecting import config_of, network_of
from sublens.mask import Mask
from sublens.ranking import check_kept
from sublens.reference_masks import attribution_mask, magnitude_mask, random_mask
from sublens.report import Between, DuelRow, DuelTable, duel_csv, duel_figure, duel_json, duel_page, write_figures
from sublens.storage import atomic_write_text
from sublens.study import Study, Task, seed_from

REFERENCES = ("magnitude", "magnitude-per-layer", "attribution", "random")
"""Contestants that make a mask without training."""
ATTRIBUTION_BATCHES = 100


@dataclass(frozen=True)
class Bout:
    """One mask to be made: a contestant, at one kept fraction, with one seed, for one task."""

    task: str
    contestant: str
    kept: float
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return re.sub(r"[^A-Za-z0-9._-]", "-", f"{self.task}-{self.contestant}-{self.kept:g}-seed{self.seed}")


@dataclass(frozen=True)
class Duel:
    """A duel that has come to its end."""

    folder: Path
    table: DuelTable


def duel(
    study: Study,
    contestants: Sequence[str | type[Gate]],
    kept: Sequence[float],
    *,
    out: str | os.PathLike[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    tasks: Sequence[str] | None = None,
    steps: int | None = None,
    samples: int | None = None,
    network: str | os.PathLike[str] | None = None,
    network_seed: int = 0,
    progress: bool = True,
    told: Callable[[Bout, int, int], None] | None = None,
) -> Duel:
    """Let every contestant make a mask for each task, kept fraction and seed; write ``duel.json``, ``.csv``, ``.html``.

    All train on one network, from the same batches, with the study's optimizer, samples and start, for as many steps. A
    gate with a penalty is steered to the kept fraction (:func:`sublens.fit`, ``kept``), of all parameters together.
    What is in the folder already is not done again.

    Args:
        study: the study.
        contestants: names of sublens's gates (``"GumbelSigmoid"``), of :data:`REFERENCES`, or gates' classes.
        kept: fractions above 0 and at most 1.
        out: the duel's folder, by default ``duels/STUDY``.
        seeds: seeds of the masks: of the gates' noise and the order of the data.
        tasks: names of the study's tasks; all of them if not given.
        steps: training steps of each mask, instead of the study's.
        samples: draws per step, instead of the study's.
        network: file of weights; the network is then not trained.
        network_seed: seed of the network.
        progress: whether to show how far each training is.
        told: called after each mask with what it was, the number of those that are there, and that of all.

    Raises:
        SettingError: an argument is impossible.
        MismatchError: the folder holds a duel with other settings.
        FileError: a file cannot be read or written, or another process works in the folder.
    """
    changes: dict[str, Any] = {"mask_steps": steps, "samples": samples}
    study = replace(study, **{name: value for name, value in changes.items() if value is not None})
    if study.together is not None:
        raise SettingError(
            f"The study {study.name} trains its weights with its masks; a duel needs one frozen network."
        )
    if study.groups != "weight":
        raise SettingError(
            f"The study {study.name} masks groups ({study.groups!r}); a duel counts weights, and takes studies that "
            "mask single weights."
        )
    entered = _entered(contestants)
    chosen = _tasks(study, tasks)
    _check(kept, seeds)
    weights = None if network is None else Path(network)
    config = {"kind": "duel", **config_of(study, network_seed, None if weights is None else hash_of(weights))}
    folder = Folder(Path("duels") / study.name if out is None else Path(out), config, resume=True)
    with folder.held():
        net = network_of(study, network_seed, folder, weights, progress)
        bouts = [  # one seed after the other, so that a duel that is under way has met everyone
            Bout(task, name, float(fraction), seed)
            for task, seed, fraction, name in itertools.product(chosen, seeds, kept, entered)
        ]
        warm: set[str] = set()
        for index, bout in enumerate(bouts, start=1):
            made = folder.read_json(_result(bout))
            if made is not None:
                _same(made, _described(study, entered[bout.contestant], bout), bout, folder)
            else:
                if bout.contestant not in warm:
                    # What is loaded and compiled once in a process is no part of anyone's time and memory.
                    _mask(
                        replace(study, mask_steps=2),
                        chosen[bout.task],
                        net,
                        entered[bout.contestant],
                        bout,
                        None,
                        False,
                    )
                    warm.add(bout.contestant)
                _fight(study, chosen[bout.task], net, entered[bout.contestant], bout, folder, progress)
            if told is not None:
                told(bout, index, len(bouts))
        table = _tabulate(study, net, chosen, bouts, folder)
        _write(folder.path, table)
        folder.tidy()
        return Duel(folder.path, table)


def from_file(text: str) -> type[Gate]:
    """Return the gate that ``FILE.py:NAME`` names.

    Raises:
        SettingError: there is no such file or gate.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    module = ModuleType(f"sublens_gates_{path.stem}")
    sys.modules[module.__name__] = module  # where dataclasses look their module up
    try:
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
    except OSError as error:
        raise SettingError(f"Cannot read the gates in {file}: {error.strerror}.") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Gate)):
        raise SettingError(f"{file} defines no gate {name!r}: no class of this name that is a sublens.Gate.")
    return found


def known() -> list[str]:
    """Return the names that a duel knows."""
    return [*_known_gates(), *REFERENCES]


def _known_gates() -> dict[str, type[Gate]]:
    found = {name: getattr(gates, name) for name in gates.__all__}
    return {
        name: each for name, each in found.items() if isinstance(each, type) and issubclass(each, Gate) and each != Gate
    }


def _entered(contestants: Sequence[str | type[Gate]]) -> dict[str, type[Gate] | None]:
    """Return each contestant's gate by its name; ``None`` for one that trains nothing."""
    entered: dict[str, type[Gate] | None] = {}
    own = _known_gates()
    for each in contestants:
        name = each if isinstance(each, str) else each.__name__
        if name in entered:
            raise SettingError(f"The contestant {name} is given twice.")
        if isinstance(each, str) and each not in own and each not in REFERENCES:
            raise SettingError(f"No contestant {each!r}. There are {', '.join(known())}.")
        entered[name] = own.get(each) if isinstance(each, str) else each
    if not entered:
        raise SettingError(f"A duel needs contestants. There are {', '.join(known())}.")
    return entered


def _tasks(study: Study, names: Sequence[str] | None) -> dict[str, Task]:
    every = {task.name: task for task in (*study.tasks, study.control)}
    wanted = [task.name for task in study.tasks] if names is None else list(names)
    unknown = [name for name in wanted if name not in every]
    if unknown or not wanted:
        raise SettingError(f"The study {study.name} has no task {', '.join(unknown)}. Its tasks: {', '.join(every)}.")
    return {name: every[name] for name in wanted}


def _check(kept: Sequence[float], seeds: Sequence[int]) -> None:
    for what, values in (("kept fractions", kept), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise SettingError(f"The {what} {list(values)} must be one or more, each of them once.")
    for fraction in kept:
        check_kept(float(fraction))


def _described(study: Study, gate: type[Gate] | None, bout: Bout) -> str:
    return bout.contestant if gate is None else repr(gate.for_run(steps=study.mask_steps, kept=bout.kept))


def _same(made: Mapping[str, Any], contestant: str, bout: Bout, folder: Folder) -> None:
    if made.get("contestant") != contestant:
        raise MismatchError(
            f"The mask {bout.name} in {folder.path} was made by {made.get('contestant')}, and is asked of "
            f"{contestant}. Give another folder (--out), or remove that mask and its result."
        )


def _result(bout: Bout) -> str:
    return f"results/{bout.name}.json"


def _fight(
    study: Study,
    task: Task,
    net: nn.Module,
    gate: type[Gate] | None,
    bout: Bout,
    folder: Folder,
    progress: bool,
) -> None:
    with _peak_memory() as peak:
        mask, seconds = _mask(study, task, net, gate, bout, folder, progress)
    metrics = study.metrics() | {task.name: task.measure}
    result = {
        "contestant": _described(study, gate, bout),
        "kept": mask.kept,
        "accuracy": accuracies(net, metrics, mask),
        "seconds": seconds,
        "memory": peak(),
    }
    mask.save(folder.mask(bout.name))
    (folder.path / "results").mkdir(exist_ok=True)
    folder.write_json(_result(bout), result)  # last: it says that the mask is there
    folder.forget(bout.name)


def _mask(
    study: Study, task: Task, net: nn.Module, gate: type[Gate] | None, bout: Bout, folder: Folder | None, progress: bool
) -> tuple[Mask, float]:
    """Return the mask and the seconds it took."""
    part_seed = seed_from(bout.seed, task.name)
    batches = task.batches_for(part_seed)
    if gate is None:
        began = time.perf_counter()
        mask = _reference(study, task, net, batches, part_seed, bout)
        return mask, time.perf_counter() - began
    chosen = gate.for_run(steps=study.mask_steps, kept=bout.kept)
    amount: dict[str, Any] = {"alpha": None, "kept": bout.kept} if chosen.takes_penalty else {"alpha": 0.0}
    run = fit(
        net,
        batches,
        task.loss,
        **{**study.fit_settings(), **amount},
        seed=part_seed,
        gate=chosen,
        evaluate_every=study.mask_steps,
        folder=None if folder is None else folder.checkpoints(bout.name),
        resume=folder is not None,
        progress=bout.name if progress else False,
    )
    return run.mask, run.seconds


def _reference(study: Study, task: Task, net: nn.Module, batches: Any, seed: int, bout: Bout) -> Mask:
    masked: dict[str, Any] = {"where": study.where, "biases": study.biases}
    if bout.contestant == "random":
        return random_mask(net, bout.kept, seed=seed, **masked)
    if bout.contestant == "attribution":
        steps = min(study.mask_steps, ATTRIBUTION_BATCHES)
        return attribution_mask(net, batches, task.loss, bout.kept, steps=steps, seed=seed, **masked)
    return magnitude_mask(net, bout.kept, per_layer=bout.contestant == "magnitude-per-layer", **masked)


def _tabulate(
    study: Study, net: nn.Module, tasks: Mapping[str, Task], bouts: Sequence[Bout], folder: Folder
) -> DuelTable:
    masks = {bout: Mask.load(folder.mask(bout.name), net) for bout in bouts}
    results = {bout: cast(dict[str, Any], folder.read_json(_result(bout))) for bout in bouts}
    groups: dict[tuple[str, float, str], list[Bout]] = {}
    for bout in bouts:
        groups.setdefault((bout.task, bout.kept, bout.contestant), []).append(bout)
    rows = []
    for (task, asked, name), members in groups.items():
        pairs = [(masks[a], masks[b]) for a, b in itertools.combinations(members, 2)]
        rows.append(
            DuelRow(
                task=task,
                contestant=name,
                asked=asked,
                kept=tuple(results[bout]["kept"] for bout in members),
                accuracy=tuple(results[bout]["accuracy"][task] for bout in members),
                seconds=tuple(results[bout]["seconds"] for bout in members),
                memory=tuple(results[bout]["memory"] for bout in members),
                stability=tuple(a.iou(b) for a, b in pairs),
                stability_by_chance=tuple(_iou_by_chance(a, b) for a, b in pairs),
            )
        )
    between = []
    for (task, asked, first), (other_task, other_asked, second) in itertools.combinations(groups, 2):
        if (task, asked) == (other_task, other_asked):
            two = zip(groups[task, asked, first], groups[task, asked, second], strict=True)
            pairs = [(masks[a], masks[b]) for a, b in two]
            ious = tuple(a.iou(b) for a, b in pairs)
            between.append(Between(task, asked, first, second, ious, tuple(_iou_by_chance(a, b) for a, b in pairs)))
    network = accuracies(net, {name: task.measure for name, task in tasks.items()})
    seeds = tuple(dict.fromkeys(bout.seed for bout in bouts))
    return DuelTable(study.name, network, study.mask_steps, seeds, tuple(rows), tuple(between))


def _iou_by_chance(first: Mask, second: Mask) -> float:
    """IoU at the expected number of shared weights of random masks that keep as many in each layer."""
    sizes, kept, kept_too = first.sizes(), first.kept_counts(), second.kept_counts()
    shared = sum(kept[name] * kept_too[name] / sizes[name] for name in sizes)
    return shared / (first.kept_count + second.kept_count - shared)


def _write(folder: Path, table: DuelTable) -> None:
    drawing = duel_figure(table)
    atomic_write_text(folder / "duel.json", json.dumps(duel_json(table), indent=1, allow_nan=False) + "\n")
    atomic_write_text(folder / "duel.csv", duel_csv(table))
    atomic_write_text(folder / "duel.html", duel_page(table, drawing))
    try:
        write_figures({"duel": drawing}, folder)
    except OSError as error:
        raise FileError(f"The figure cannot be written to {folder}: {error.strerror}.") from error


@contextlib.contextmanager
def _peak_memory() -> Iterator[Callable[[], int | None]]:
    """Give a function that says, after the block, how many bytes it needed at most beyond those held before.

    Linux tells, and lets the peak be forgotten; elsewhere the answer is ``None``.
    """
    peak: list[int | None] = [None]
    before = None
    try:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # memory that is free, but still held, would hide what is needed
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except OSError:
        pass
    yield lambda: peak[0]
    highest = None if before is None else _status("VmHWM")
    if before is not None and highest is not None:
        peak[0] = max(0, highest - before)


def _status(field: str) -> int | None:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), None)
