"""What a duel found, as a table: each contestant at each kept fraction, with intervals over the seeds."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sublens.intervals import t_interval


@dataclass(frozen=True)
class DuelRow:
    """One contestant at one kept fraction, on one task.

    Attributes:
        task: the task.
        contestant: name of the gate, or of the way to make a mask without training.
        asked: the kept fraction asked for.
        kept: that of the masks; one value for each seed, as in the next three.
        accuracy: of the masks on the task.
        seconds: what making them took.
        memory: peak bytes beyond what the process held before; ``None`` where the system does not tell.
        stability: IoU of each pair of seeds.
        stability_by_chance: what random masks that keep as many weights in each layer have, a mean for each pair.
    """

    task: str
    contestant: str
    asked: float
    kept: tuple[float, ...]
    accuracy: tuple[float, ...]
    seconds: tuple[float, ...]
    memory: tuple[int | None, ...]
    stability: tuple[float, ...]
    stability_by_chance: tuple[float, ...]


@dataclass(frozen=True)
class Between:
    """IoU of two contestants' masks at one kept fraction: one value for each seed, and chance's mean for it."""

    task: str
    asked: float
    first: str
    second: str
    iou: tuple[float, ...]
    by_chance: tuple[float, ...]


@dataclass(frozen=True)
class DuelTable:
    """All that a duel found.

    Attributes:
        study: its name.
        network: accuracy of the whole network on each task.
        steps: training steps of each mask.
        seeds: the seeds of the masks.
        rows: in the order of tasks, kept fractions and contestants.
        between: every pair of contestants, in the same order.
    """

    study: str
    network: dict[str, float]
    steps: int
    seeds: tuple[int, ...]
    rows: tuple[DuelRow, ...]
    between: tuple[Between, ...]


def interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean and 95 % confidence interval of the mean by Student's t; ``None`` for one value, which has none.

    Accuracies near 1 are not normal, so their interval is a rough one.
    """
    return t_interval(values) if len(values) > 1 else None


def accuracy_text(row: DuelRow) -> str:
    """``99.1 % (98.7 to 99.5)``; the interval is cut at 0 and 100."""
    mean = statistics.fmean(row.accuracy)
    found = interval(row.accuracy)
    if found is None:
        return f"{100 * mean:.1f} %"
    low, high = (100 * min(1.0, max(0.0, value)) for value in found[1:])
    return f"{100 * mean:.1f} % ({low:.1f} to {high:.1f})"


def stability_text(row: DuelRow) -> str:
    """``0.412 (0.40 to 0.43)``, mean and range over the pairs of seeds; ``n/a`` with one seed."""
    if not row.stability:
        return "n/a"
    return f"{statistics.fmean(row.stability):.3f} ({min(row.stability):.3f} to {max(row.stability):.3f})"


def memory_text(row: DuelRow) -> str:
    """The median of the peaks, ``35 MB``."""
    known = [value for value in row.memory if value is not None]
    return f"{statistics.median(known) / 1e6:.0f} MB" if known else "n/a"


def duel_json(table: DuelTable) -> dict[str, Any]:
    """Return everything as JSON values."""
    return {
        "study": table.study,
        "network": table.network,
        "steps": table.steps,
        "seeds": list(table.seeds),
        "rows": [{**vars(row), "accuracy_interval": interval(row.accuracy)} for row in table.rows],
        "between": [vars(pair) for pair in table.between],
    }


def duel_csv(table: DuelTable) -> str:
    """Return the rows as CSV, fractions in 0..1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["task", "contestant", "asked", "kept", "n", "accuracy", "accuracy_low", "accuracy_high", "iou_between_seeds",
         "iou_by_chance", "seconds", "memory_bytes"]
    )  # fmt: skip
    for row in table.rows:
        found = interval(row.accuracy)
        low, high = ("", "") if found is None else (max(0.0, found[1]), min(1.0, found[2]))
        known = [value for value in row.memory if value is not None]
        writer.writerow(
            [row.task, row.contestant, row.asked, statistics.fmean(row.kept), len(row.accuracy),
             statistics.fmean(row.accuracy), low, high, _mean(row.stability), _mean(row.stability_by_chance),
             statistics.median(row.seconds), statistics.median(known) if known else ""]
        )  # fmt: skip
    return text.getvalue()


def _mean(values: Sequence[float]) -> float | str:
    return statistics.fmean(values) if values else ""
