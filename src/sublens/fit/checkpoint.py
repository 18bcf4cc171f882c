"""What a run leaves in its folder, and how it is taken up again.

``history.jsonl`` holds one JSON record a line. ``checkpoint.safetensors`` holds the logits, the optimizer's state, the
counters and the settings, and how many bytes of the history belong to it: records written after the checkpoint are cut
off on resuming, because the steps behind them are done again. The checkpoint is replaced atomically and the history
reaches the disk before it, so that every moment at which a run can die leaves a pair that fits together.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sublens.errors import FileError, MismatchError, SettingError
from sublens.fit.settings import Record
from sublens.fit.strength import Steered
from sublens.storage import load_tensors, save_tensors


@dataclass(slots=True)
class State:
    """Everything about a run, beside logits and optimizer, that its future depends on."""

    step: int = 0  # steps done, so the number of the next step
    forwards: int = 0  # MaskedNetwork.step: number of the next draw of gates
    epoch: int = -1
    epoch_start: int = 0
    recorded: int = 0  # the step of the last record
    position: int = 0  # bytes of history.jsonl that belong to this state
    count: int = 0  # steps since the last record, and the sums of what is reported as their mean
    loss: float = 0.0
    penalty: float = 0.0
    alpha: float = 0.0
    norm: float = 0.0
    seen: list[list[float | None]] = field(default_factory=list)  # per evaluation: kept fraction, then the metrics
    steered: list[Steered] = field(default_factory=list)  # per group of layers, where a kept fraction is asked for
    batch: list[Any] | None = None  # number and hash of the last batch
    seconds: float = 0.0  # wall time spent; no result depends on it


class RunFolder:
    """The files of one run, opened to begin it or, with ``resume``, to continue it.

    Where several processes train one mask, all read the folder and one of them ``writes``.

    Raises:
        SettingError: the folder already holds a run and ``resume`` is false.
        FileError: checkpoint or history cannot be read, or do not fit together.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume: bool, writes: bool = True) -> None:
        self._writes = writes
        self.path = Path(folder)
        self.checkpoint_step: int | None = None
        self._history = self.path / "history.jsonl"
        self._checkpoint = self.path / "checkpoint.safetensors"
        self._tensors: dict[str, Tensor] = {}
        self._metadata: dict[str, Any] = {}
        if not os.fspath(folder):
            raise SettingError("folder='' names no folder; give its path, or None to write nothing.")
        if writes:  # before anything is trained
            _make(self.path)
        records = self._history.exists() and self._history.stat().st_size > 0
        if not resume and (records or self._checkpoint.exists()):
            raise SettingError(
                f"{self.path} already holds a run. Pass resume=True to continue it, or use another folder."
            )
        if self._checkpoint.exists():
            self._tensors, self._metadata = load_tensors(self._checkpoint, "checkpoint")

    def restore(self, settings: Mapping[str, Any], logits: Mapping[str, Tensor], optimizer: Optimizer) -> State | None:
        """Put the checkpoint's values into ``logits`` and ``optimizer``; ``None`` if there is no checkpoint.

        Raises:
            MismatchError: the checkpoint was made under other settings; the message names the first that differs.
        """
        if not self._metadata:
            return None
        _compare(self._checkpoint, self._metadata.get("settings"), settings)
        try:
            state = State(**self._metadata["state"])
            state.steered = [Steered(**memory) for memory in self._metadata["state"].get("steered", [])]
            with torch.no_grad():
                for name, logit in logits.items():
                    logit.copy_(self._tensors[f"logit.{name}"])
            optimizer.load_state_dict(_decode(self._metadata["optimizer"], self._tensors))
        except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as error:
            raise FileError(
                f"{self._checkpoint} is not the checkpoint of a run: {error!r}. Use another folder."
            ) from error
        self.checkpoint_step = state.step
        self._tensors = {}
        return state

    def open_history(self, state: State) -> list[Record]:
        """Cut the history to what ``state`` covers, and return those records."""
        if not self._writes:
            return self._records(state)
        # A process that was killed while it wrote could not take its temporary file away.
        for left in self.path.glob(f".{self._checkpoint.name}.*.tmp"):
            left.unlink(missing_ok=True)
        with open(self._history, "ab") as file:
            size = file.tell()
            if size < state.position:
                raise FileError(
                    f"{self._history} has {size} bytes, but the checkpoint beside it counts {state.position}. The "
                    "history was shortened after the run; put it back, or start anew in another folder."
                )
            file.truncate(state.position)
        return self._records(state)

    def _records(self, state: State) -> list[Record]:
        if not state.position:
            return []
        try:
            return [json.loads(line) for line in self._history.read_bytes()[: state.position].splitlines()]
        except ValueError as error:
            raise FileError(f"{self._history} is not a history of records, one JSON object a line: {error}.") from error

    def append(self, record: Record) -> int:
        """Write one record, and return the history's new length in bytes (0 where another process writes it)."""
        if not self._writes:
            return 0
        line = json.dumps(record, allow_nan=False) + "\n"
        with open(self._history, "ab") as file:
            file.write(line.encode())
            return file.tell()

    def save(
        self, state: State, settings: Mapping[str, Any], logits: Mapping[str, Tensor], optimizer: Optimizer
    ) -> None:
        """Replace the checkpoint, after the history it counts on has reached the disk."""
        if not self._writes:
            self.checkpoint_step = state.step
            return
        with open(self._history, "ab") as file:
            os.fsync(file.fileno())
        tensors = {f"logit.{name}": logit.detach() for name, logit in logits.items()}
        metadata = {
            "kind": "checkpoint",
            "state": asdict(state),
            "settings": dict(settings),
            "optimizer": _encode(optimizer.state_dict(), "optimizer", tensors),
        }
        save_tensors(self._checkpoint, tensors, metadata)
        self.checkpoint_step = state.step


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"Cannot make the folder {folder}: {error.strerror or error}. Give another one.") from error


def _compare(checkpoint: Path, written: object, asked: Mapping[str, Any]) -> None:
    if not isinstance(written, dict):
        raise FileError(f"{checkpoint} is not the checkpoint of a run: it holds no settings. Use another folder.")
    for name in sorted(written.keys() | asked.keys()):
        before, now = written.get(name), asked.get(name)
        if before != now:
            raise MismatchError(
                f"The run of {checkpoint} was made with another {name}: {_brief(before)}, where this call has "
                f"{_brief(now)}. Resume it with the same settings, or start anew in another folder."
            )


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


# An optimizer's state is a tree of dicts, lists, tuples, numbers and tensors. Tensors go into the safetensors file
# under their path; the rest becomes JSON in which each node says what it was, so that tuples and integer keys return.


def check_storable(optimizer: Optimizer) -> None:
    """Fail before training, rather than at the first checkpoint, if the optimizer's settings cannot be stored."""
    _encode(optimizer.state_dict(), "optimizer", {})


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # JSON has no infinities; float.hex has, and is exact.
        return value if math.isfinite(value) else {"float": value.hex()}
    if isinstance(value, Mapping) and all(isinstance(key, (int, str)) for key in value):
        return {"dict": [[key, _encode(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
        return {type(value).__name__: items} if type(value) in (list, tuple) else {"list": items}
    raise SettingError(
        f"The optimizer keeps a {type(value).__name__} in its state ({path}), which a checkpoint cannot hold without "
        "pickle. Use another optimizer, or no folder."
    )


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "float":
        return float.fromhex(value)
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in value}
    items = [_decode(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items
