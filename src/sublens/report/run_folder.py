"""What a run folder says, read and checked. Nothing in it is trusted: a file may be damaged, or from a stranger."""

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sublens.answers import NAME, Answer
from sublens.errors import FileError, SettingError, StudyError

Record = dict[str, float]
"""One line of the history: what was recorded at a step. ``step`` is always there."""

PROPERTIES = {
    "specialize": "P_specialize (different functions use different weights)",
    "reuse": "P_reuse (the same function uses the same weights)",
}

MEASURES = ("iou", "iomin", "shared")


@dataclass(frozen=True)
class Chance:
    """What random masks give that keep as many weights in each layer: mean, and lower and upper edge of a band."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class MaskResult:
    """One mask's numbers. Accuracies are task -> fraction in 0..1."""

    accuracy: dict[str, float]
    inverse_accuracy: dict[str, float]
    half_accuracy: dict[str, float]
    late_half_accuracy: dict[str, float]
    random_accuracy: dict[str, Chance]
    kept: float
    kept_per_layer: dict[str, float]


@dataclass(frozen=True)
class OverlapValues:
    """Overlap of two masks in one layer, or in all: measure (see ``MEASURES``) -> value in 0..1."""

    measures: dict[str, float]
    chance: dict[str, Chance]
    size: int | None


@dataclass(frozen=True)
class Overlap:
    """Overlap of two masks: in all layers together, and layer by layer."""

    first: str
    second: str
    total: OverlapValues
    layers: dict[str, OverlapValues]


@dataclass(frozen=True)
class Verdict:
    """What a run says of one property: "holds", "fails" or "undecided", and the sentence why."""

    name: str
    outcome: str
    because: str


@dataclass(frozen=True)
class Excluded:
    """Accuracy on what a task holds back (``"held_back"``) or leaves out (``"left_out"``)."""

    task: str
    kind: str
    network: float
    control: float
    mask: float
    chance: Chance | None


@dataclass(frozen=True)
class RunFolder:
    """A finished run.

    Attributes:
        network: task -> accuracy of the whole network.
        repeats: task -> overlap of its mask with a second one, trained with another seed.
        confusion: who was asked (a mask's name or "network") -> told -> answered -> share in 0..1.
        answers: name of a question of the study -> its answer.
        analysis: name of a question that every run asks -> its answer.
        sharing: names of two tasks ("add and mul") -> their sharing index.
        reused: task -> its reused share, of tasks that were trained beside frozen weights of earlier ones.
        verdict: on each property of the paper; empty if none was given.
        history: mask's name -> its records, in order of steps.
        excluded: accuracies of what tasks hold back or leave out.
        trained_with: setting -> its value when the masks were trained, of those that the questions were asked with
            another of, later.
    """

    study: str
    preset: str | None
    seed: int | None
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float]
    network: dict[str, float]
    masks: dict[str, MaskResult]
    overlaps: tuple[Overlap, ...]
    repeats: dict[str, Overlap]
    confusion: dict[str, dict[str, dict[str, float]]]
    answers: dict[str, Answer]
    analysis: dict[str, Answer]
    sharing: dict[str, float]
    reused: dict[str, float]
    verdict: dict[str, Verdict]
    history: dict[str, list[Record]]
    excluded: tuple[Excluded, ...] = ()
    trained_with: dict[str, Any] = field(default_factory=dict)


def refuse_a_run(folder: Path, what: str) -> None:
    """Raise SettingError if the folder is that of a run: ``what`` of several runs would lie among its files."""
    if (folder / "config.json").is_file():
        raise SettingError(f"The folder {folder} holds a run, and so no {what}. Give another folder (--out).")


def read(folder: Path) -> RunFolder:
    """Read ``result.json`` and ``history.jsonl`` of a run folder.

    Raises:
        FileError: a file is missing or unreadable, or does not hold what it must.
    """
    path = folder / "result.json"
    result = _json(path)
    if not isinstance(result, dict):
        raise FileError(f"{path} holds {_kind(result)} instead of an object: it is not a result of sublens.")
    missing = [key for key in ("study", "network", "masks") if key not in result]
    if missing:
        raise FileError(f"{path} lacks {', '.join(missing)}: it is not a result of sublens, or the run did not finish.")
    try:
        masks = {name: _mask(entry) for name, entry in _items(result["masks"], "masks")}
        verdict = _mapping(result.get("verdict") or {}, "verdict")
        return RunFolder(
            study=printable(result["study"]),
            preset=printable(result["preset"]) if isinstance(result.get("preset"), str) else None,
            seed=result.get("seed") if isinstance(result.get("seed"), int) else None,
            settings={key: value for key, value in _items(result.get("settings", {}), "settings")},
            versions={key: printable(value) for key, value in _items(result.get("versions", {}), "versions")},
            seconds=_seconds(result.get("seconds", {})),
            network=_numbers(_mapping(result["network"], "network").get("accuracy", {}), "network.accuracy"),
            masks=masks,
            overlaps=_overlaps(result),
            repeats=_repeats(result.get("repeats") or {}),
            confusion=_confusion(result.get("confusion") or {}),
            answers=_answers(result.get("answers") or {}),
            analysis=_answers(result.get("analysis") or {}),
            sharing=_sharing(verdict.get("pairs") or []),
            reused=_reused(verdict.get("reused") or []),
            verdict=_verdicts(verdict),
            history=_history(folder / "history.jsonl", list(masks)),
            excluded=_excluded(result.get("excluded") or []),
            trained_with=dict(_items(result.get("trained_with") or {}, "trained_with")),
        )
    except _Malformed as error:
        raise FileError(f"{path}: {error}; it is damaged, or not a result of sublens.") from None


class _Malformed(Exception):
    """A value that is not what it must be."""


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path} does not exist: {path.parent} is not the folder of a finished run.") from None
    except NotADirectoryError:
        raise FileError(f"{path.parent} is a file, not the folder of a finished run.") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not valid JSON: {str(error).splitlines()[0]}.") from None


def _mask(entry: Any) -> MaskResult:
    entry = _mapping(entry, "a mask")
    return MaskResult(
        accuracy=_numbers(entry.get("accuracy", {}), "accuracy"),
        inverse_accuracy=_numbers(entry.get("inverse_accuracy", {}), "inverse_accuracy"),
        half_accuracy=_numbers(entry.get("half_accuracy", {}), "half_accuracy"),
        late_half_accuracy=_numbers(entry.get("late_half_accuracy", {}), "late_half_accuracy"),
        random_accuracy=_chances(entry.get("random_accuracy", {}), "random_accuracy"),
        kept=_number(entry.get("kept"), "kept"),
        kept_per_layer=_numbers(entry.get("kept_per_layer", {}), "kept_per_layer"),
    )


def _overlaps(result: Mapping[str, Any]) -> tuple[Overlap, ...]:
    entries = result.get("overlaps") or ([result["overlap"]] if result.get("overlap") else [])
    if not isinstance(entries, list):
        raise _Malformed(f"overlaps is {_kind(entries)} instead of a list")
    return tuple(_overlap(_mapping(entry, "overlap")) for entry in entries)


def _repeats(value: Any) -> dict[str, Overlap]:
    return {
        name: _overlap(_mapping(_mapping(entry, name).get("overlap"), f"repeats.{name}.overlap"))
        for name, entry in _items(value, "repeats")
    }


def _overlap(entry: Mapping[str, Any]) -> Overlap:
    pair = entry.get("masks")
    if not isinstance(pair, list) or len(pair) != 2:
        raise _Malformed("an overlap does not name its two masks")
    layers = {name: _overlap_values(values, name) for name, values in _items(entry.get("per_layer", {}), "per_layer")}
    return Overlap(printable(pair[0]), printable(pair[1]), _overlap_values(entry, "overlap"), layers)


def _overlap_values(entry: Any, what: str) -> OverlapValues:
    entry = _mapping(entry, what)
    size = entry.get("size")
    return OverlapValues(
        measures={key: _number(entry[key], f"{what}.{key}") for key in MEASURES if key in entry},
        chance=_chances(entry.get("chance", {}), f"{what}.chance"),
        size=size if isinstance(size, int) else None,
    )


def _chances(value: Any, what: str) -> dict[str, Chance]:
    return {
        key: Chance(**{part: _number(_mapping(band, key).get(part), f"{what}.{key}.{part}") for part in _BAND})
        for key, band in _items(value, what)
    }


_BAND = ("mean", "low", "high")


def _confusion(value: Any) -> dict[str, dict[str, dict[str, float]]]:
    return {
        who: {
            told: _numbers(answers, f"confusion.{who}.{told}") for told, answers in _items(tables, f"confusion.{who}")
        }
        for who, tables in _items(value, "confusion")
    }


def _answers(value: Any) -> dict[str, Answer]:
    answers = {}
    for name, entry in _items(value, "answers"):
        if not NAME.fullmatch(name):
            raise _Malformed(f"{name!r} cannot be the name of a question")
        try:
            answers[name] = Answer.from_json(_printable_throughout(entry))
        except StudyError as error:
            raise _Malformed(f"the answer to {name} cannot be shown: {error}".rstrip(".")) from None
    return answers


def _verdicts(value: Mapping[str, Any]) -> dict[str, Verdict]:
    verdicts = {}
    for key, name in PROPERTIES.items():
        if key in value:
            entry = _mapping(value[key], f"verdict.{key}")
            outcome, because = entry.get("verdict"), entry.get("because")
            if outcome not in ("holds", "fails", "undecided") or not isinstance(because, str):
                raise _Malformed(f"verdict.{key} is none")
            verdicts[key] = Verdict(name, outcome, printable(because))
    return verdicts


def _sharing(value: Any) -> dict[str, float]:
    if not isinstance(value, list):
        raise _Malformed(f"verdict.pairs is {_kind(value)} instead of a list")
    found = {}
    for entry in value:
        pair = _mapping(entry, "verdict.pairs")
        tasks, index = pair.get("tasks"), pair.get("index")
        if not isinstance(tasks, list) or len(tasks) != 2:
            raise _Malformed("an entry of verdict.pairs does not name its two tasks")
        if index is not None:
            name = f"{printable(tasks[0])} and {printable(tasks[1])}"
            found[name] = _number(_mapping(index, "index").get("mean"), "index.mean")
    return found


def _reused(value: Any) -> dict[str, float]:
    if not isinstance(value, list):
        raise _Malformed(f"verdict.reused is {_kind(value)} instead of a list")
    entries = [_mapping(entry, "verdict.reused") for entry in value]
    return {
        printable(entry.get("task")): _number(_mapping(entry["share"], "share").get("mean"), "share.mean")
        for entry in entries
        if entry.get("share") is not None
    }


def _excluded(value: Any) -> tuple[Excluded, ...]:
    if not isinstance(value, list):
        raise _Malformed(f"excluded is {_kind(value)} instead of a list")
    found = []
    for each in value:
        entry = _mapping(each, "excluded")
        drawn = entry.get("random")
        network, control, mask = (
            _number(entry.get(name), f"excluded.{name}") for name in ("network", "control", "mask")
        )
        chance = None if drawn is None else _chances({"random": drawn}, "excluded")["random"]
        found.append(
            Excluded(printable(entry.get("task")), printable(entry.get("kind")), network, control, mask, chance)
        )
    return tuple(found)


def _printable_throughout(value: Any) -> Any:
    if isinstance(value, dict):
        return {printable(key): _printable_throughout(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_printable_throughout(entry) for entry in value]
    return printable(value) if isinstance(value, str) else value


def _history(path: Path, masks: Sequence[str]) -> dict[str, list[Record]]:
    """Return what was recorded of each mask; nothing if there is no such file: the other numbers still stand."""
    history: dict[str, list[Record]] = {name: [] for name in masks}
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise FileError(f"{path}, line {number} is not valid JSON.") from None
        if not isinstance(record, dict) or not _is_finite(record.get("step")):
            raise FileError(f"{path}, line {number} is not a record: it has no step.")
        name = printable(record.get("part", ""))
        if name in history:
            history[name].append({printable(key): float(value) for key, value in record.items() if _is_finite(value)})
    return {name: records for name, records in history.items() if records}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _seconds(value: Any) -> dict[str, float]:
    return {"total": float(value)} if _is_finite(value) else _numbers(value, "seconds")


def _numbers(value: Any, what: str) -> dict[str, float]:
    return {key: _number(number, f"{what}.{key}") for key, number in _items(value, what)}


def _items(value: Any, what: str) -> list[tuple[str, Any]]:
    return [(printable(key), entry) for key, entry in _mapping(value, what).items()]


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _Malformed(f"{what} is {_kind(value)} instead of an object")
    return value


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Malformed(f"{what} is {_kind(value)} instead of a number")
    return float(value)


def printable(value: Any) -> str:
    """Return ``value`` as text that is safe to lay out: no control characters, no half characters, no turned order."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in _TURNING else c for c in str(value))


_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "missing"}.get(
        type(value), "a number"
    )
