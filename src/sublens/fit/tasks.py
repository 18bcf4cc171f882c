"""``fit_tasks``: masks for several tasks at once over one frozen network."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sublens.errors import SettingError, check_named
from sublens.fit.batches import moving_parts, random_state_kept
from sublens.fit.progress import sharing
from sublens.fit.run import Run, fit, fitting


def fit_tasks(network: nn.Module, tasks: Mapping[str, Mapping[str, Any]], **settings: Any) -> dict[str, Run]:
    """Train a mask for each of several tasks at once, over one frozen network of which there is no second copy.

    The tasks take turns, from one record of their history to the next, so that all masks grow side by side and can be
    looked at and stopped together. Each mask and history is, bit for bit, what :func:`fit` gives for that task alone;
    the time is the sum of theirs, and so is the memory beside the network's.

    Args:
        network: the trained network, left exactly as it was.
        tasks: for each task's name its own arguments of :func:`fit`: ``batches`` and ``loss`` at least, and any other
            in place of what ``settings`` says, as in ``{"add": {"batches": f, "loss": g, "seed": 1}}``.
        **settings: arguments of :func:`fit` that all tasks have. Each task's ``folder`` is the subfolder of its name.
            A resumed call goes on with every task from where it was.

    Returns:
        name -> run, in the order of ``tasks``.

    Raises:
        SettingError: there is no task, a task lacks ``batches`` or ``loss``, an argument is unknown or impossible, a
            name cannot be that of a folder, or two tasks draw their batches from the same iterator or generator.
        NonFiniteError: a task met NaN or infinity. The others are saved in their folders, and can be resumed.
        Exception: whatever :func:`fit` raises.
    """
    check_named("tasks", tasks, "{'add': {'batches': f, 'loss': g}}")
    arguments = {name: _arguments(network, name, own, settings) for name, own in tasks.items()}
    _check_tasks(arguments)
    with random_state_kept(), sharing(settings.get("progress", True)) as bar:
        fittings = {}
        for name, given in arguments.items():
            with _naming(name):
                fittings[name] = fitting(bar, **given)
        runs: dict[str, Run] = {}
        with contextlib.ExitStack() as stack:
            for each in fittings.values():
                # Whoever stands between two turns writes a checkpoint, as on Ctrl-C, also if another one cannot.
                stack.callback(each.close)
            while len(runs) < len(fittings):
                for name in [name for name in fittings if name not in runs]:
                    try:
                        with _naming(name):
                            next(fittings[name])
                    except StopIteration as ended:
                        runs[name] = ended.value
    return {name: runs[name] for name in tasks}


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Note the task in whatever goes wrong with it."""
    try:
        yield
    except StopIteration:
        raise
    except Exception as error:
        error.add_note(f"This was the task {name!r}.")
        raise


def _arguments(network: nn.Module, name: str, own: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of :func:`fit` for one of several tasks."""
    check_named(f"Task {name!r}", own, "{'batches': f, 'loss': g}")
    known = inspect.signature(fit).parameters
    given = {**settings, **own}
    if unknown := sorted(set(given) - set(known) | set(given) & {"network"}):
        raise SettingError(f"Task {name!r}: {unknown[0]!r} is none of its arguments. They are those of sublens.fit.")
    for needed in ("batches", "loss"):
        if needed not in given:
            raise SettingError(f"Task {name!r} has no {needed!r}. Each task needs at least batches and loss.")
    if given.get("folder") is not None and "folder" not in own:
        if not re.fullmatch(r"[A-Za-z0-9._-]*[A-Za-z0-9_-]", name):
            raise SettingError(
                f"{name!r} cannot be the name of a task's folder. Use letters, digits, '_', '-' and '.', or give the "
                "task a 'folder' of its own."
            )
        given["folder"] = os.path.join(given["folder"], name)
    if given.get("progress", True) is True:
        given["progress"] = name
    defaults = {name: parameter.default for name, parameter in known.items()}
    return {**defaults, **given, "network": network}


def _check_tasks(arguments: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse tasks that would disturb each other."""
    if not arguments:
        raise SettingError("tasks is empty. Give at least one, as in {'add': {'batches': batches, 'loss': loss}}.")
    owners: dict[int, str] = {}
    folders: dict[str, str] = {}
    for name, given in arguments.items():
        for source in moving_parts(given["batches"]):
            if (other := owners.setdefault(id(source), name)) != name:
                raise SettingError(
                    f"The tasks {other!r} and {name!r} draw batches from the same {type(source).__name__}, and would "
                    "take them from each other. Give each task its own iterator, or its own DataLoader and generator."
                )
        if (
            given["folder"] is not None
            and (other := folders.setdefault(os.path.abspath(given["folder"]), name)) != name
        ):
            raise SettingError(f"The tasks {other!r} and {name!r} have the same folder, {given['folder']}.")
