"""Many runs as one table: what each setting gave, over its seeds, beside what chance gives."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sublens.intervals import t_interval
from sublens.report.run_folder import Chance, OverlapValues, RunFolder, printable

SEED = "seed"
"""The setting that is no setting: runs that differ in nothing else are drawn together, and give the spread."""


@dataclass(frozen=True)
class Spread:
    """Several runs' values of one measure.

    Attributes:
        n: number of runs.
        mean: their mean.
        sd: the sample's standard deviation; one run has none.
        low: lowest value.
        high: highest value.
        interval: Student's 95 % interval of the mean, cut to 0..1 where no value can leave that; one run has none.
    """

    n: int
    mean: float
    sd: float | None
    low: float
    high: float
    interval: tuple[float, float] | None


UNBOUNDED = ("index", "reused")
"""The measures that may leave 0..1: chance is 0 for them, and their 1 is that of another comparison."""

CALLED = {
    "accuracy": "accuracy",
    "kept": "kept",
    "iou": "IoU",
    "iomin": "IoMin",
    "index": "sharing index",
    "reused": "reused share",
}


@dataclass(frozen=True)
class Measure:
    """One measure over the runs of one setting. All values are fractions in 0..1, but for two.

    Attributes:
        what: ``"accuracy"``, ``"kept"``, ``"iou"``, ``"iomin"``, or ``"index"``, the sharing index, or ``"reused"``,
            the reused share (see :mod:`sublens.analysis.verdict`). The last two may leave 0..1.
        of: the mask, or the two masks, it is a measure of.
        on: the task that an accuracy was measured on, else empty.
        values: one for each run, in the order of the runs.
        seen: their spread.
        chance: the same for random masks that keep as many weights in each layer: the spread of the runs' means.
    """

    what: str
    of: str
    on: str
    values: tuple[float, ...]
    seen: Spread
    chance: Spread | None

    @property
    def name(self) -> str:
        """What it is called in a table."""
        what = CALLED[self.what]
        on = f" on {self.on}" if self.on and self.on != self.of else ""
        return f"{self.of}: {what}{on}"


@dataclass(frozen=True)
class Row:
    """One setting: the runs that differ in nothing but their seeds.

    Attributes:
        settings: what sets it apart.
        seeds: of its runs.
        measures: what they found.
        verdicts: property of the paper -> verdict -> number of runs that came to it.
        one_network: whether all its runs were given the same trained weights, so that only masks vary between them.
    """

    settings: dict[str, Any]
    seeds: tuple[Any, ...]
    measures: tuple[Measure, ...]
    verdicts: dict[str, dict[str, int]]
    one_network: bool

    @property
    def name(self) -> str:
        """The setting as it would be typed."""
        return described(self.settings) or "as the study has it"

    def find(self, key: tuple[str, str, str]) -> Measure | None:
        """Return the measure with this ``(what, of, on)``, if it was taken."""
        return next((measure for measure in self.measures if (measure.what, measure.of, measure.on) == key), None)


def described(settings: Mapping[str, Any]) -> str:
    """Write settings as a person would: ``alpha 1e-05, widths 400,400,200``."""
    return ", ".join(f"{printable(name)} {as_text(value)}" for name, value in settings.items())


def as_text(value: Any) -> str:
    """Write one setting's value: floats as short as they can be read back, lists with commas."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(as_text, value)) or "none"
    return "none" if value is None else printable(value)


def tabulate(runs: Iterable[tuple[Mapping[str, Any], RunFolder]]) -> tuple[Row, ...]:
    """Return one row for each setting, in the order in which the settings first appear.

    Args:
        runs: of each run the settings that set it apart, ``seed`` among them or not, and what it found.
    """
    groups: dict[str, tuple[dict[str, Any], list[Any], list[RunFolder]]] = {}
    for settings, run in runs:
        shared = {name: value for name, value in settings.items() if name != SEED}
        _, seeds, members = groups.setdefault(repr(shared), (shared, [], []))
        seeds.append(settings.get(SEED, run.seed))
        members.append(run)
    return tuple(
        Row(settings, tuple(seeds), _measures(members), _verdicts(members), _one_network(members))
        for settings, seeds, members in groups.values()
    )


def _one_network(runs: Sequence[RunFolder]) -> bool:
    given = {run.settings.get("network_file_sha256") for run in runs}
    return len(runs) > 1 and len(given) == 1 and None not in given


def _verdicts(runs: Sequence[RunFolder]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for run in runs:
        for key, verdict in run.verdict.items():
            of = counts.setdefault(key, {"holds": 0, "fails": 0, "undecided": 0})
            of[verdict.outcome] += 1
    return counts


def _measures(runs: Sequence[RunFolder]) -> tuple[Measure, ...]:
    collected: dict[tuple[str, str, str], tuple[list[float], list[float]]] = {}
    for run in runs:
        for key, value, chance in _taken(run):
            if math.isfinite(value):
                values, chances = collected.setdefault(key, ([], []))
                values.append(value)
                if chance is not None and math.isfinite(chance):
                    chances.append(chance)
    return tuple(
        Measure(*key, tuple(values), _spread(values, key[0]), _spread(chances, key[0]) if chances else None)
        for key, (values, chances) in collected.items()
    )


def _taken(run: RunFolder) -> Iterator[tuple[tuple[str, str, str], float, float | None]]:
    """Yield what is compared between runs: its key, its value, and chance's mean if there is one."""
    for name, mask in run.masks.items():
        # A mask that is no task's (the control) has no own task: it is asked all of them.
        for task in [name] if name in mask.accuracy else list(mask.accuracy):
            yield ("accuracy", name, task), mask.accuracy[task], _mean(mask.random_accuracy.get(task))
    for name, mask in run.masks.items():
        yield ("kept", name, ""), mask.kept, None
    for pair in run.overlaps:
        yield from _overlap(f"{pair.first} and {pair.second}", pair.total)
    for pair_name, index in run.sharing.items():
        yield ("index", pair_name, ""), index, 0.0  # that of random masks, by its definition
    for task, share in run.reused.items():
        yield ("reused", task, ""), share, 0.0  # by its definition too
    for name, again in run.repeats.items():
        yield from _overlap(f"{name} and {name} again", again.total)


def _overlap(of: str, total: OverlapValues) -> Iterator[tuple[tuple[str, str, str], float, float | None]]:
    for what in ("iou", "iomin"):
        if what in total.measures:
            yield (what, of, ""), total.measures[what], _mean(total.chance.get(what))


def _mean(chance: Chance | None) -> float | None:
    return None if chance is None else chance.mean


def _spread(values: Sequence[float], what: str) -> Spread:
    sd = statistics.stdev(values) if len(values) > 1 else None
    mean, low, high = t_interval(values)
    if what not in UNBOUNDED:  # Student's interval knows no bounds
        low, high = max(0.0, low), min(1.0, high)
    return Spread(len(values), mean, sd, min(values), max(values), None if sd is None else (low, high))


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the table as JSON values."""
    return [
        {
            "settings": row.settings,
            "seeds": list(row.seeds),
            "verdicts": row.verdicts,
            "one_network": row.one_network,
            "measures": [
                {
                    "measure": measure.what,
                    "of": measure.of,
                    "on": measure.on or None,
                    **vars(measure.seen),
                    "values": list(measure.values),
                    "chance": None if measure.chance is None else vars(measure.chance),
                }
                for measure in row.measures
            ],
        }
        for row in rows
    ]


def as_csv(rows: Sequence[Row]) -> str:
    """Return the table as CSV: one line for each setting and measure, fractions in 0..1."""
    settings = list(dict.fromkeys(name for row in rows for name in row.settings))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["measure", "of", "on", "n", "mean", "sd", "low", "high", "t_low", "t_high", "chance_mean", "chance_sd"]
    writer.writerow([*settings, *columns])
    for row in rows:
        front = [as_text(row.settings.get(name)) for name in settings]
        for measure in row.measures:
            seen, chance = measure.seen, measure.chance
            beside = ("", "") if chance is None else (chance.mean, _or_empty(chance.sd))
            writer.writerow(
                [*front, measure.what, measure.of, measure.on, seen.n, seen.mean, _or_empty(seen.sd), seen.low,
                 seen.high, *(seen.interval or ("", "")), *beside]
            )  # fmt: skip
    return text.getvalue()


def _or_empty(value: float | None) -> float | str:
    return "" if value is None else value
