"""The run folder: what lies where, when a folder may be used, and which parts of a run are already finished.

While a run is going on, ``unfinished/`` holds the checkpoints. A part of the run is finished when its file is there:
``network.safetensors``, or ``masks/NAME.safetensors``. Every file appears whole or not at all.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sublens.errors import FileError, MismatchError, SettingError
from sublens.fit.settings import Record
from sublens.storage import atomic_write_text, held
from sublens.storage.locking import LOCK
from sublens.study import Study


def default_folder(study: Study, seed: int) -> Path:
    """Return ``runs/STUDY-PRESET-seedSEED``."""
    return Path("runs") / "-".join(filter(None, (study.name, study.preset, f"seed{seed}")))


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        FileError: it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error


def is_used(path: Path) -> bool:
    """Return whether the folder is there and holds anything.

    Raises:
        FileError: it is not a folder, or cannot be read.
    """
    try:
        return path.exists() and any(file.name != LOCK for file in path.iterdir())
    except OSError as error:
        raise FileError(f"Cannot use {path} as a run folder: {error.strerror or error}.") from error


class Folder:
    """A run's folder, opened to begin it or, with ``resume``, to go on with it.

    Args:
        path: the folder; it is made if it does not exist.
        config: what the run is made of (JSON values). A run is only resumed with the same.
        resume: whether what is there may be gone on with.
        answers: the entries of ``config``, such as ``settings.questions``, on which nothing depends that is trained.
            If only these differ from what the folder holds, it is opened, and ``changed`` is not empty.

    Attributes:
        changed: entry of ``config`` -> its value in the run that the folder holds, of those that differ.

    Raises:
        SettingError: the folder is not empty and ``resume`` is false, or it holds something else than a run.
        MismatchError: it holds another run; the differences are named.
        FileError: it cannot be used.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, resume: bool, answers: Collection[str] = ()) -> None:
        self.path = path
        self.changed: dict[str, Any] = {}
        self._differences: list[str] = []
        occupied = is_used(path)
        if occupied:
            self._check(config, resume, answers)
        try:
            self.masks.mkdir(parents=True, exist_ok=True)
            if not occupied:
                self.write_json("config.json", config)
        except OSError as error:
            raise FileError(f"Cannot make the run folder {path}: {error.strerror or error}.") from error

    def _check(self, config: Mapping[str, Any], resume: bool, answers: Collection[str]) -> None:
        if not resume:
            raise SettingError(
                f"The folder {self.path} is not empty. Give another folder (--out), or resume the run in it (--resume)."
            )
        written = self.read_json("config.json")
        if written is None:
            raise SettingError(
                f"The folder {self.path} holds files but no run of sublens (no config.json)."
                " Give another folder (--out)."
            )
        if not isinstance(written, dict):
            raise self._another(["its config.json is not that of a run"])
        differing = dict(_differing(written, config))
        differences = [f"{key} was {_short(was)} and is now {_short(now)}" for key, (was, now) in differing.items()]
        if not all(any(f"{key}.".startswith(f"{entry}.") for entry in answers) for key in differing):
            raise self._another(differences)
        self._differences = differences
        self.changed = {key: was for key, (was, _) in differing.items()}

    def refuse_changes(self) -> None:
        """Raise MismatchError if the run that the folder holds differs in anything."""
        if self._differences:
            raise self._another(self._differences)

    def _another(self, differences: list[str]) -> MismatchError:
        hint = ""
        if self._differences:
            hint = " (What only the answers depend on may change once everything is trained.)"
        return MismatchError(
            f"The run in {self.path} is another one: {'; '.join(differences)}. Resume it with what it was started"
            f" with, or give another folder (--out).{hint}"
        )

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Hold the folder while the run goes on, so that no other process works in it.

        Raises:
            FileError: one does.
        """
        return held(self.path)

    @property
    def masks(self) -> Path:
        """The folder of the masks."""
        return self.path / "masks"

    @property
    def network(self) -> Path:
        """The file of the network's weights."""
        return self.path / "network.safetensors"

    def mask(self, name: str) -> Path:
        """Return the file of a mask."""
        return self.masks / f"{name}.safetensors"

    def network_of(self, task: str) -> Path:
        """Return the file of the weights that a task left, where weights and masks train together."""
        folder = self.path / "networks"
        folder.mkdir(exist_ok=True)
        return folder / f"{task}.safetensors"

    def holds(self, masks: Iterable[str], *, together: bool) -> bool:
        """Return whether the masks of these names are there, and the network or networks that they belong to."""
        names = list(masks)
        networks = [self.network_of(name) for name in names] if together else [self.network]
        return all(path.exists() for path in (*networks, *map(self.mask, names)))

    def checkpoints(self, part: str) -> Path:
        """Return the folder of a part's checkpoint while it is being trained."""
        return self.path / "unfinished" / part

    def forget(self, part: str) -> None:
        """Remove a finished part's checkpoint, which may be many times larger than its mask."""
        shutil.rmtree(self.checkpoints(part), ignore_errors=True)

    def finish(self, part: str, history: list[Record], seconds: float) -> None:
        """Write down a part's history and wall time, before its own file says that it is finished."""
        lines = [json.dumps({"part": part, **record}, allow_nan=False) for record in history]
        earlier = [line for line in self._history() if self._part_of(line) != part]
        atomic_write_text(self.path / "history.jsonl", "".join(f"{line}\n" for line in (*earlier, *lines)))
        self._note(part, "seconds", seconds)

    def keep_probabilities(self) -> dict[str, list[int]]:
        """Return of every finished mask the histogram of its gates' keep probabilities."""
        return self._noted("keep_probabilities")

    def note_keep_probabilities(self, part: str, counts: list[int]) -> None:
        """Write down a mask's histogram, before the mask itself, since its logits are not kept."""
        self._note(part, "keep_probabilities", counts)

    def seconds(self) -> dict[str, float]:
        """Return the wall time of every part finished so far."""
        return self._noted("seconds")

    def _note(self, part: str, what: str, value: Any) -> None:
        parts = self._parts()
        self.write_json("parts.json", {**parts, part: {**parts.get(part, {}), what: value}})

    def _noted(self, what: str) -> dict[str, Any]:
        return {part: known[what] for part, known in self._parts().items() if what in known}

    def _parts(self) -> dict[str, dict[str, Any]]:
        found = self.read_json("parts.json")
        return found if isinstance(found, dict) else {}

    def _history(self) -> list[str]:
        path = self.path / "history.jsonl"
        return path.read_text("utf-8").splitlines() if path.exists() else []

    def _part_of(self, line: str) -> Any:
        try:
            return json.loads(line)["part"]
        except (ValueError, KeyError, TypeError):
            raise FileError(
                f"{self.path / 'history.jsonl'} holds a line that is no record: {line[:60]!r}. Delete the line, and"
                " resume the run (--resume)."
            ) from None

    @contextlib.contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Say what to do if the file of a finished part turns out to be damaged. (The run writes files whole.)"""
        try:
            yield
        except FileError as error:
            if isinstance(error.__cause__, OSError):  # it may be whole, and only not for us
                raise
            raise FileError(f"{error}. Delete {path}, and --resume makes it again.") from error

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file, atomically."""
        atomic_write_text(self.path / name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Return what a JSON file of the folder holds, or ``None`` if it is not there.

        Raises:
            FileError: it is there but is not JSON.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            # Settings cannot be made again; everything else can.
            cure = "Give another folder (--out)" if name == "config.json" else "Delete it, and --resume makes it again"
            raise FileError(f"{path} cannot be read as JSON: {error}. {cure}.") from error

    def tidy(self) -> None:
        """Remove the checkpoints of a finished run."""
        shutil.rmtree(self.path / "unfinished", ignore_errors=True)


def _differing(
    written: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the name of each entry that differs, with what was written and what is asked."""
    for key in (*asked, *(key for key in written if key not in asked)):
        name, before, now = f"{prefix}{key}", written.get(key), asked.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differing(before, now, f"{name}.")
        elif before != now:
            yield name, (before, now)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
