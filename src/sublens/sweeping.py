"""A sweep: a study run once for every combination of settings, each run in a folder of its own, and one table of all.

A run of a sweep is :func:`sublens.inspect` with the same arguments: the same masks, bit for bit, with as many threads.
What has become of a sweep is read from its folders alone, so that it can be killed at any moment, and go on.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import joblib
import torch

from sublens import studies
from sublens.errors import FileError, SettingError, SublensError
from sublens.inspection import inspect, progress_of
from sublens.report import (
    Row,
    as_csv,
    as_json,
    as_text,
    described,
    read,
    refuse_a_run,
    sweep_page,
    tabulate,
    write_figures,
)
from sublens.storage import atomic_write_text
from sublens.study import Study

_INSPECT = ("seed", "steps", "samples", "alpha")  # what inspect() takes by itself; all others are the study's
_LONGEST = 150  # characters of a folder's name; file systems allow 255 bytes


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
        settings: the swept settings' values.
        folder: its run folder.
        status: ``"done"``, ``"skipped"`` (it was finished before) or ``"failed"``.
        reason: why it failed, in one line; else empty.
    """

    settings: dict[str, Any]
    folder: Path
    status: Literal["done", "skipped", "failed"]
    reason: str = ""

    @property
    def name(self) -> str:
        """Its settings as one would type them."""
        return described(self.settings)


@dataclass(frozen=True)
class Sweep:
    """A sweep that has come to its end: every run's outcome, and the table of those that are finished."""

    folder: Path
    outcomes: tuple[Outcome, ...]
    rows: tuple[Row, ...]

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The runs that are not finished."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")


def sweep(
    study: str | Path,
    settings: Mapping[str, Sequence[Any]],
    *,
    out: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    engine: str | None = None,
    resume: bool = False,
    network: str | os.PathLike[str] | None = None,
    report: bool = True,
    told: Callable[[Outcome, int, int], None] | None = None,
) -> Sweep:
    """Run a study with every combination of ``settings``, and write ``sweep.json``, ``.csv`` and ``.html`` over all.

    Every combination is built before the first one runs, so that a setting no study can have stops nothing halfway.
    A run that fails stops no other.

    Args:
        study: name of a built-in study, or path of a Python file: other processes must find it too.
        settings: name -> values. ``seed``, ``steps``, ``samples`` and ``alpha`` are those of :func:`sublens.inspect`,
            the numbers of a :class:`sublens.Study` go by their names there (``keep``, ``mask_lr``, ...), and all
            others (``preset``, ``widths``, ...) are settings of the study's own function.
        out: the sweep's folder, by default ``sweeps/STUDY``. Runs that are finished there are not done again, also if
            an earlier sweep made them.
        jobs: processes that run at a time. They share the cores: each has as many threads as PyTorch has here,
            divided by ``jobs``. One is this process itself.
        engine: ``"ray"`` or ``"dask"`` for the processes of such a cluster (the one that ``RAY_ADDRESS`` or
            ``DASK_SCHEDULER_ADDRESS`` names, or a local one), each with one thread; ``None`` for processes of this
            machine. A cluster's machines must see the same files. On a Dask cluster all workers are used, whatever
            ``jobs`` is.
        resume: go on with the runs that were begun and failed, or were killed.
        network: file of weights; no run then trains a network.
        report: whether each run gets a report of its own.
        told: called after each run with its outcome, the number of runs that have ended, and that of all.

    Raises:
        SettingError: a setting is impossible, or ``out`` is the folder of a run.
        StudyError: the study does not exist, or refuses a setting.
        MismatchError: a run's folder holds another run.
        FileError: a file cannot be read or written.
    """
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
        raise SettingError(f"jobs={jobs!r} must be a whole number from 1: the processes that run at a time.")
    combinations = _combinations(settings)
    built = [_study(study, combination) for combination in combinations]
    folder = Path("sweeps") / built[0][0].name if out is None else Path(out)
    refuse_a_run(folder, "sweep")
    folders = [folder / "runs" / _folder_name(combination) for combination in combinations]
    progress = [
        progress_of(made, path, network=network, **arguments)
        for (made, arguments), path in zip(built, folders, strict=True)
    ]
    outcomes: dict[int, Outcome] = {}

    def end(index: int, status: Literal["done", "skipped", "failed"], reason: str = "") -> None:
        outcomes[index] = Outcome(combinations[index], folders[index], status, reason)
        if told is not None:
            told(outcomes[index], len(outcomes), len(combinations))

    with _engine(engine, jobs) as workers:
        try:
            (folder / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"Cannot make the sweep's folder {folder}: {error.strerror or error}.") from error
        waiting = []
        for index, state in enumerate(progress):
            if state == "finished":
                end(index, "skipped")
            elif state == "begun" and not resume:
                end(index, "failed", _earlier(folders[index]))
            else:
                waiting.append(index)
        runs = {
            index: _Run(study, combinations[index], folders[index], network, report, Path.cwd()) for index in waiting
        }
        for index, failure in _ended(runs, workers):
            end(index, "done" if failure is None else "failed", failure or "")
    ordered = tuple(outcomes[index] for index in range(len(combinations)))
    rows = tabulate((each.settings, read(each.folder)) for each in ordered if each.status != "failed")
    found = Sweep(folder, ordered, rows)
    _write(found, built[0][0].name)
    return found


def _combinations(settings: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    for name, values in settings.items():
        if not values:
            raise SettingError(f"The setting {name} has no value. Give one or more, with commas between.")
        twice = [value for index, value in enumerate(values) if value in values[:index]]
        if twice:
            raise SettingError(f"The setting {name} has the value {as_text(twice[0])} twice. Leave one out.")
    return [dict(zip(settings, values, strict=True)) for values in itertools.product(*settings.values())]


def _study(study: str | Path, settings: Mapping[str, Any]) -> tuple[Study, dict[str, Any]]:
    """Return the study with its settings put in, and the arguments left for ``inspect``."""
    arguments = {name: value for name, value in settings.items() if name in _INSPECT}
    others = {name: value for name, value in settings.items() if name not in arguments}
    return studies.configured(study, others), arguments


def _folder_name(settings: Mapping[str, Any]) -> str:
    """Return a name that says what the run is, and is one file system's and one shell's word."""
    text = "_".join(f"{name}={as_text(value)}" for name, value in settings.items()) or "run"
    safe = re.sub(r"[^A-Za-z0-9._=,+-]", "-", text)[:_LONGEST]
    # What was lost tells runs apart no longer, nor may a name be "..".
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class _Run:
    """All that a process needs to make one run: studies hold functions, which do not travel, so it goes by its name."""

    study: str | Path
    settings: dict[str, Any]
    folder: Path
    network: str | os.PathLike[str] | None
    report: bool
    home: Path

    @property
    def under_way(self) -> bool:
        return (self.folder / "config.json").exists() and not (self.folder / "result.json").exists()

    def __call__(self, threads: int) -> str | None:
        """Make the run; return ``None``, or why it failed."""
        try:
            torch.set_num_threads(threads)
            # Processes outlive a call, and paths are relative to where the command was given.
            with contextlib.chdir(self.home):
                made, arguments = _study(self.study, self.settings)
                inspect(
                    made,
                    out=self.folder,
                    resume=True,
                    network=self.network,
                    progress=False,
                    report=self.report,
                    **arguments,
                )
                _error_file(self.folder).unlink(missing_ok=True)
        except (Exception, SystemExit) as error:
            return self._failed(error)
        return None

    def _failed(self, error: BaseException) -> str:
        said = " ".join(str(error).split())
        reason = said if isinstance(error, SublensError) else f"{type(error).__name__}: {said}"
        if self.home.joinpath(self.folder).is_dir():
            trace = "".join(traceback.format_exception(error))
            with contextlib.suppress(OSError):  # a full disk: the reason is reported all the same
                _error_file(self.home / self.folder).write_text(f"{reason}\n\n{trace}", encoding="utf-8")
        return reason


def _error_file(folder: Path) -> Path:
    return folder / "error.txt"


def _earlier(folder: Path) -> str:
    """Say what became of a run that was begun."""
    try:
        reason = _error_file(folder).read_text(encoding="utf-8").splitlines()[0]
    except (OSError, ValueError, IndexError):
        return "It was begun and not finished, or with other questions. Resume the sweep (--resume) to go on with it."
    return f"It failed before: {reason}"


@dataclass(frozen=True)
class _Workers:
    """How runs are made: how many at a time, each with how many threads, and what says that a process died."""

    jobs: int
    threads: int
    died: type[BaseException]
    streams: bool  # whether results can be had one by one

    def make(self, runs: Mapping[int, _Run], jobs: int) -> Iterator[tuple[int, str | None]]:
        """Make the runs; yield each one's number, and why it failed."""
        parallel = joblib.Parallel(
            n_jobs=jobs, batch_size=1, return_as="generator_unordered" if self.streams else "list"
        )
        calls = [joblib.delayed(_numbered)(index, run, self.threads) for index, run in runs.items()]
        yield from parallel(calls)


@contextlib.contextmanager
def _engine(name: str | None, jobs: int) -> Iterator[_Workers]:
    if name is None:
        yield _Workers(jobs, max(1, torch.get_num_threads() // jobs), BrokenProcessPool, streams=True)
        return
    if name not in _CLUSTERS:
        raise SettingError(
            f"engine={name!r} is unknown. Beside this machine's processes there are {' and '.join(_CLUSTERS)}."
        )
    try:
        cluster = _CLUSTERS[name](jobs)
        with cluster as workers, joblib.parallel_config(backend=name):
            yield workers
    except ImportError as error:
        if error.name not in ("ray", "distributed", "dask"):
            raise
        raise SettingError(
            f"The engine {name} is not installed. Install it: python -m pip install 'sublens[{name}]'."
        ) from error


@contextlib.contextmanager
def _ray(jobs: int) -> Iterator[_Workers]:
    import ray
    from ray.util.joblib import register_ray

    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    _check_processors(jobs, int(ray.cluster_resources().get("CPU", 0)), "Ray")
    register_ray()
    yield _Workers(jobs, 1, ray.exceptions.RayError, streams=False)


@contextlib.contextmanager
def _dask(jobs: int) -> Iterator[_Workers]:
    from distributed import Client, LocalCluster
    from distributed.scheduler import KilledWorker

    with contextlib.ExitStack() as stack:
        where = os.environ.get("DASK_SCHEDULER_ADDRESS")
        if where is None:
            where = stack.enter_context(
                LocalCluster(n_workers=jobs, threads_per_worker=1, processes=True, dashboard_address=None)
            )
        client = stack.enter_context(Client(where))
        threads = client.nthreads()
        if any(count > 1 for count in threads.values()):
            raise SettingError(
                "A worker of the Dask cluster has several threads, but runs in one process share torch's random "
                "numbers and would no longer be reproducible. Start workers with --nthreads 1."
            )
        _check_processors(jobs, len(threads), "Dask")
        yield _Workers(jobs, 1, KilledWorker, streams=False)


_CLUSTERS = {"ray": _ray, "dask": _dask}


def _check_processors(jobs: int, processors: int, cluster: str) -> None:
    if jobs > processors:
        raise SettingError(
            f"jobs={jobs} is more than the {processors} processors of the {cluster} cluster. Give fewer."
        )


def _ended(runs: Mapping[int, _Run], workers: _Workers) -> Iterator[tuple[int, str | None]]:
    """Make all runs; yield each one's number, and why it failed, as it ends."""
    left = dict(runs)
    while left:
        try:
            for index, failure in workers.make(dict(left), workers.jobs):
                del left[index]
                yield index, failure
        except workers.died:
            # One process died without a word (killed for its memory, say), and took the others along. Which one is not
            # known: the runs that were under way go on one by one, and the one that is to blame dies alone.
            for index in [index for index, run in left.items() if run.under_way] or list(left):
                try:
                    # Two, since joblib makes the runs of a single one in this process.
                    ((_, failure),) = workers.make({index: left[index]}, 2)
                except workers.died:
                    failure = "Its process died, perhaps for want of memory. Try fewer --jobs, then --resume."
                del left[index]
                yield index, failure


def _numbered(index: int, run: _Run, threads: int) -> tuple[int, str | None]:
    return index, run(threads)


def _write(found: Sweep, study: str) -> None:
    runs = [
        {
            "settings": each.settings,
            "folder": str(each.folder.relative_to(found.folder)),
            "status": each.status,
            "reason": each.reason or None,
        }
        for each in found.outcomes
    ]
    table = {"study": study, "runs": runs, "table": as_json(found.rows)}
    atomic_write_text(found.folder / "sweep.json", json.dumps(table, indent=1, allow_nan=False) + "\n")
    atomic_write_text(found.folder / "sweep.csv", as_csv(found.rows))
    failed = [(each.name, each.reason) for each in found.failed]
    page = sweep_page(study, found.rows, failed)
    write_figures(page.figures, found.folder)
    atomic_write_text(found.folder / "sweep.html", page.html)
