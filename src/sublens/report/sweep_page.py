"""The page over many runs: one table and, for each setting that was swept, figures against it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sublens.report import figures
from sublens.report.drawing import COLOURS, Drawing, inline
from sublens.report.page import template_environment
from sublens.report.run_folder import PROPERTIES, printable
from sublens.report.sentences import percent
from sublens.report.sweep_table import CALLED, Measure, Row, Spread, as_text, described


@dataclass(frozen=True)
class SweepPage:
    """The page over many runs: HTML that holds everything it shows, and its figures by file name without ending."""

    html: str
    figures: dict[str, Drawing]


def sweep_page(title: str, rows: Sequence[Row], failed: Sequence[tuple[str, str]] = ()) -> SweepPage:
    """Return the page over many runs.

    Args:
        title: the study's name.
        rows: the table.
        failed: of each run that is not among them its settings, and why it failed.
    """
    setting = _across(rows)
    charts = [] if setting is None else _charts(rows, setting)
    html = (
        template_environment()
        .get_template("sweep.html.j2")
        .render(
            title=printable(title),
            rows=rows,
            runs=sum(len(row.seeds) for row in rows),
            failed=[(printable(name), printable(reason)) for name, reason in failed],
            setting=setting,
            charts=charts,
            properties=PROPERTIES,
            written=written,
            interval=_interval,
            numbers=NUMBERS,
            as_text=as_text,
            colours=COLOURS,
        )
    )
    return SweepPage(html, {chart["file"]: chart["drawing"] for chart in charts if chart["drawing"] is not None})


NUMBERS = ("iou", "iomin", "index", "reused")
"""The measures that are written as numbers; all others are shares, written in percent."""


def written(spread: Spread | None, what: str) -> str:
    """Write mean and standard deviation as a table shows them: ``99.1 ± 0.4 %``, ``0.378 ± 0.010``."""
    if spread is None:
        return "n/a"
    if what in NUMBERS:
        return f"{spread.mean:.3f}" + ("" if spread.sd is None else f" ± {spread.sd:.3f}")
    text = percent(spread.mean)
    return text if spread.sd is None else text.replace("\u00a0%", f" ± {100 * spread.sd:.1f}\u00a0%")


def _interval(spread: Spread, what: str) -> str:
    """Write the interval of the mean."""
    if spread.interval is None:
        return "\u2013"
    low, high = spread.interval
    if what in NUMBERS:
        return f"{low:.3f} to {high:.3f}"
    return f"{100 * low:.1f} to {100 * high:.1f}\u00a0%"


def _swept(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return the settings that have several values, with these."""
    values = {
        name: list({as_text(row.settings[name]): row.settings[name] for row in rows if name in row.settings}.values())
        for name in dict.fromkeys(name for row in rows for name in row.settings)
    }
    return {name: found for name, found in values.items() if len(found) > 1}


def _across(rows: Sequence[Row]) -> str | None:
    """Return the setting to draw against: the first with several numbers, else the first with several values."""
    swept = {name: values for name, values in _swept(rows).items() if name not in ("study", "preset")}
    numeric = [name for name, values in swept.items() if all(map(_is_number, values))]
    return next(iter((*numeric, *swept)), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _charts(rows: Sequence[Row], setting: str) -> list[dict[str, Any]]:
    """Return a figure for each combination of the settings that are not on its axis."""
    others = _swept(rows).keys() - {setting}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if setting not in row.settings:  # a run of another study, which differs from its like in other settings
            continue
        rest = {name: value for name, value in row.settings.items() if name in others}
        groups.setdefault(described(rest), []).append(row)
    charts = []
    for index, (name, members) in enumerate(groups.items()):
        if all(_is_number(row.settings.get(setting)) for row in members):
            members = sorted(members, key=lambda row: row.settings[setting])
        prefix, sentence = f"sweep-{index + 1}", _sentence(members, setting)
        several = len({as_text(row.settings.get(setting)) for row in members}) > 1
        drawing = figures.against_setting(members, setting, prefix) if several else None
        figure = None if drawing is None else Markup(inline(drawing.svg, prefix, sentence))
        charts.append({"name": name, "sentence": sentence, "figure": figure, "file": prefix, "drawing": drawing})
    return charts


def _sentence(rows: Sequence[Row], setting: str) -> str:
    """Say what becomes of each measure from the first value of the setting to the last."""
    first, last = rows[0], rows[-1]
    if first is last:
        return f"Only one value of {setting} has finished runs here."
    told: dict[str, list[tuple[Measure, Measure]]] = {}
    for before in first.measures:
        after = last.find((before.what, before.of, before.on))
        own = before.what in ("kept", "iou", "index", "reused") or before.on == before.of
        if after is not None and own:
            told.setdefault(before.what, []).append((before, after))
    parts = []
    for what, pairs in told.items():
        if len(pairs) <= figures.APART:
            parts += [f"{before.name} {_with_chance(before)} to {_with_chance(after)}" for before, after in pairs]
        else:
            means = [_value(sum(pair[side].seen.mean for pair in pairs) / len(pairs), what) for side in (0, 1)]
            parts.append(f"{CALLED[what]}, mean of {len(pairs)}: {' to '.join(means)}")
    start, end = as_text(first.settings.get(setting)), as_text(last.settings.get(setting))
    return f"From {setting} {start} to {end}: {'; '.join(parts)}."


def _with_chance(measure: Measure) -> str:
    text = _number(measure.seen, measure.what)
    return text if measure.chance is None else f"{text} (random masks {_number(measure.chance, measure.what)})"


def _number(spread: Spread, what: str) -> str:
    return _value(spread.mean, what)


def _value(value: float, what: str) -> str:
    return f"{value:.3f}" if what in NUMBERS else percent(value)
