"""The figures of a study's answers, drawn from what they declare (``sublens.answers``)."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.colors import LinearSegmentedColormap, ListedColormap, to_hex, to_rgb
from matplotlib.patches import Patch

from sublens.answers import Bars, Figure, Histogram, Lines, Matrix, Picture, Spread, Value
from sublens.report.drawing import (
    COLOURS,
    DASHES,
    HATCHES,
    MARKERS,
    WIDTH,
    Drawing,
    add_legend,
    canvas,
    drawn,
    legend_label,
    series_colour,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BY_CHANCE = "by chance"
_LETTER = 0.075  # inches that a letter at an axis takes
# One hue that gets darker, and two that meet in white: both read in grey by their numbers, and to any eye.
_HEAT = LinearSegmentedColormap.from_list("heat", ["#f4f8fb", "#9cc7e4", "#3f8fc7", "#0b4f80"])
_DIVERGING = LinearSegmentedColormap.from_list("diverging", ["#9a4a00", "#e79a5b", "#f7f7f7", "#7db2d9", "#0b5a92"])
# Of a picture: kept by none, by one mask alone (in its series' colour, from dark to light, so that they differ in grey
# too), by several. Of more than two masks only their number is shown: sixteen colours could not be told apart.
_NONE = "#eef0f2"
_LIGHTER = (0.04, 0.45, 0.25, 0.65)
# By number of masks, all of them last: the darkest, and yet no black, which a dark page would swallow.
_SEVERAL = ("#7a6a94", "#5d4486", "#3f1f6b")


def draw(figure: Figure, name: str) -> Drawing:
    """Draw one figure of an answer.

    Args:
        figure: what it declares.
        name: unique name of the figure in its page; letters, digits and "-".
    """
    if isinstance(figure, Bars):
        return _bars(figure, name)
    if isinstance(figure, Lines):
        return _lines(figure, name)
    if isinstance(figure, Histogram):
        return _histogram(figure, name)
    return _matrix(figure, name) if isinstance(figure, Matrix) else _picture(figure, name)


def _bars(bars: Bars, name: str) -> Drawing:
    """Draw bars from left to right, one row for each: names of groups may be long, and there may be many."""
    factor = _factor(bars.unit)
    each = min(0.8 / len(bars.series), 0.3)
    height = 1.0 + len(bars.groups) * max(0.32, 0.19 * len(bars.series) + 0.1)
    with canvas(WIDTH, height) as figure:
        axes = figure.subplots()
        chance_named = False
        for index, series in enumerate(bars.series):
            offset = (index - (len(bars.series) - 1) / 2) * each
            means, below, above = _errors(series.values, factor)
            rows = [row + offset for row in range(len(bars.groups))]
            axes.barh(
                rows,
                means,
                height=0.86 * each,
                color=series_colour(index),
                edgecolor="white",
                linewidth=0,
                hatch=HATCHES[index % len(HATCHES)],
                label=legend_label(series.name),
            )
            if any(below) or any(above):
                axes.errorbar(means, rows, xerr=[below, above], **_ERROR_BARS)
            for row, chance in zip(rows, series.chance, strict=False):
                if chance is not None:
                    mean, low, high = _spread(chance, factor)
                    axes.barh(row, high - low, left=low, height=0.98 * each, color=COLOURS["chance"], alpha=0.8)
                    axes.plot(
                        [mean] * 2,
                        [row - each / 2, row + each / 2],
                        color=COLOURS["ink"],
                        linewidth=1.3,
                        label=None if chance_named else _BY_CHANCE,
                    )
                    chance_named = True
        axes.set_yticks(range(len(bars.groups)), [shorten(group) for group in bars.groups])
        axes.set_ylim(len(bars.groups) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        _value_axis(axes, "x", bars.label, bars.unit, [value for series in bars.series for value in series.values])
        add_legend(figure, axes)
        return drawn(figure, name)


_ERROR_BARS: dict[str, Any] = {
    "fmt": "none",
    "ecolor": COLOURS["ink"],
    "elinewidth": 1,
    "capsize": 2.5,
}


def _lines(lines: Lines, name: str) -> Drawing:
    factor = _factor(lines.unit)
    named = isinstance(lines.x[0], str)
    with canvas(WIDTH, 3.2) as figure:
        axes = figure.subplots()
        places = [float(index if isinstance(x, str) else x) for index, x in enumerate(lines.x)]
        chance_named = False
        for index, series in enumerate(lines.series):
            look = {"color": series_colour(index), "linestyle": DASHES[index % len(DASHES)]}
            means, below, above = _errors(series.values, factor)
            axes.errorbar(
                places,
                means,
                yerr=[below, above] if any(below) or any(above) else None,
                marker=MARKERS[index % len(MARKERS)],
                markersize=4.5,
                linewidth=1.4,
                elinewidth=1,
                capsize=2.5,
                label=legend_label(series.name),
                clip_on=False,
                **look,
            )
            if any(chance is not None for chance in series.chance):
                means, below, above = _errors(series.chance, factor)
                axes.errorbar(
                    places,
                    means,
                    yerr=[below, above] if any(below) or any(above) else None,
                    color=COLOURS["quiet"],
                    linestyle=(0, (1, 2)),
                    linewidth=1,
                    elinewidth=0.8,
                    capsize=2,
                    marker=MARKERS[index % len(MARKERS)],
                    markersize=4.5,
                    markerfacecolor="none",
                    label=None if chance_named else _BY_CHANCE,
                    zorder=1.5,
                )
                chance_named = True
        if named:
            every = -(-len(places) // 12)
            shown = [shorten(str(x), 18) for x in lines.x[::every]]
            # Side by side they take this much of a line of text.
            long = len(shown) * (max(map(len, shown), default=0) + 2) * _LETTER > 0.85 * WIDTH
            axes.set_xticks(places[::every], shown, rotation=30 if long else 0, ha="right" if long else "center")
        elif lines.log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(lines.x_label)
        _value_axis(axes, "y", lines.label, lines.unit, [value for series in lines.series for value in series.values])
        add_legend(figure, axes)
        return drawn(figure, name)


def _histogram(histogram: Histogram, name: str) -> Drawing:
    factor = _factor(histogram.unit)
    with canvas(WIDTH, 2.8) as figure:
        axes = figure.subplots()
        chance_named = False
        for index, series in enumerate(histogram.series):
            axes.stairs(
                [_spread(value, factor)[0] for value in series.values],
                histogram.edges,
                color=series_colour(index),
                linestyle=DASHES[index % len(DASHES)],
                linewidth=1.5,
                label=legend_label(series.name),
            )
            if any(chance is not None for chance in series.chance):
                axes.stairs(
                    [_spread(value, factor)[0] for value in series.chance],
                    histogram.edges,
                    color=COLOURS["quiet"],
                    linestyle=(0, (1, 2)),
                    label=None if chance_named else _BY_CHANCE,
                )
                chance_named = True
        axes.set_xlabel(histogram.x_label)
        axes.margins(x=0.01)
        _value_axis(
            axes,
            "y",
            histogram.label,
            histogram.unit,
            [value for series in histogram.series for value in series.values],
        )
        add_legend(figure, axes)
        return drawn(figure, name)


def _matrix(matrix: Matrix, name: str) -> Drawing:
    factor = _factor(matrix.unit)
    values = [[math.nan if value is None else factor * value for value in row] for row in matrix.values]
    known = [value for row in values for value in row if not math.isnan(value)]
    largest = max(map(abs, known), default=0) or 1
    if matrix.diverging:
        colours, low, high = _DIVERGING, -largest, largest
    elif matrix.unit == "percent":
        colours, low, high = _HEAT, 0.0, max(100.0, max(known, default=0))
    else:
        colours, low, high = _HEAT, min(0.0, min(known, default=0)), largest
    cell = min(0.62, 5.0 / max(len(matrix.columns), 1))
    tall = max(0.24, min(0.36, cell)) if len(matrix.rows) <= 30 else 0.14
    with canvas(min(WIDTH, 2.4 + cell * len(matrix.columns) + 0.6), 1.2 + tall * len(matrix.rows)) as figure:
        axes = figure.subplots()
        # Cells as shapes: they stay sharp at any size, and the page needs no picture.
        axes.pcolormesh(values, cmap=colours, vmin=low, vmax=high, edgecolors="white", linewidth=0.6)
        if len(matrix.columns) <= 14 and len(matrix.rows) <= 40:
            for row, entries in enumerate(values):
                for column, value in enumerate(entries):
                    shade = colours((value - low) / (high - low)) if not math.isnan(value) else (1, 1, 1, 1)
                    axes.text(
                        column + 0.5,
                        row + 0.5,
                        "n/a" if math.isnan(value) else _written(value, matrix.unit, matrix.diverging),
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="#000000" if _light(shade) else "#ffffff",
                    )
        rows, columns = list(map(shorten, matrix.rows)), [shorten(column, 18) for column in matrix.columns]
        every_row, every = -(-len(rows) // 40), -(-len(columns) // 30)
        axes.set_yticks([place + 0.5 for place in range(len(rows))][::every_row], rows[::every_row])
        long = max(map(len, columns), default=0) > max(2, round(cell / _LETTER))
        axes.set_xticks(
            [place + 0.5 for place in range(len(columns))][::every],
            columns[::every],
            rotation=45 if long else 0,
            ha="left" if long else "center",
        )
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.invert_yaxis()
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel(matrix.column_label)
        axes.set_ylabel(matrix.row_label)
        return drawn(figure, name)


def _light(colour: Sequence[float]) -> bool:
    red, green, blue = colour[:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue > 0.55


def _written(value: float, unit: str, signed: bool) -> str:
    text = f"{value:+.1f}" if signed else f"{value:.1f}" if unit == "percent" else f"{value:.3g}"
    return text.replace("-", "\u2212")


def _picture(picture: Picture, name: str) -> Drawing:
    kinds, colours = _kinds(picture.masks)
    codes = [[kinds[int(digit, 16)] for digit in row] for row in picture.cells]
    tall, wide = len(codes), len(codes[0])
    # The longer side fills the figure; a very long or very flat matrix is stretched, so that its lines can be seen.
    ratio = min(max(tall / wide, 0.15), 0.7)
    with canvas(WIDTH, 0.9 + 4.6 * ratio) as figure:
        axes = figure.subplots()
        axes.imshow(
            codes,
            cmap=ListedColormap([colour for _, colour in colours]),
            vmin=-0.5,
            vmax=len(colours) - 0.5,
            interpolation="none",
            aspect="auto",
        )
        handles = [
            Patch(
                facecolor=colour,
                edgecolor=COLOURS["quiet"],
                linewidth=0.4,
                label=f"{label}: {100 * sum(row.count(kind) for row in codes) / (tall * wide):.1f} %",
            )
            for kind, (label, colour) in enumerate(colours)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)))
        axes.set_xlabel(picture.column_label)
        axes.set_ylabel(picture.row_label)
        axes.set_xticks([])  # what is shown may be a part of the rows and columns, so that their numbers mean nothing
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(True)
        return drawn(figure, name)


def _kinds(masks: Sequence[str]) -> tuple[list[int], list[tuple[str, str]]]:
    """Return of every combination of masks which kind of element it is, and each kind's name and colour."""
    count = len(masks)
    alone = [f"{mask} only" if count > 1 else mask for mask in masks]
    several = [
        (" and ".join(masks) if count == 2 else f"all {count}" if number == count else f"{number} of them",
         _SEVERAL[number - count - 1])
        for number in range(2, count + 1)
    ]  # fmt: skip
    colours = [("none", _NONE), *((label, _lighter(bit)) for bit, label in enumerate(alone)), *several]
    kinds = []
    for code in range(2**count):
        number = code.bit_count()
        kinds.append(0 if not number else code.bit_length() if number == 1 else count + number - 1)
    return kinds, colours


def _lighter(bit: int) -> str:
    share = _LIGHTER[bit]
    red, green, blue = (share + (1 - share) * channel for channel in to_rgb(series_colour(bit)))
    return to_hex((red, green, blue))


def _factor(unit: str) -> float:
    return 100 if unit == "percent" else 1


def _spread(value: Value, factor: float) -> tuple[float, float, float]:
    if value is None:
        return (math.nan,) * 3
    mean, low, high = value if isinstance(value, Spread) else (value,) * 3
    return factor * mean, factor * low, factor * high


def _errors(values: Sequence[Value], factor: float) -> tuple[list[float], list[float], list[float]]:
    """Return means and the lengths of the bars below and above; a mean outside its own band has a bar on one side."""
    spreads = [_spread(value, factor) for value in values]
    return (
        [mean for mean, _, _ in spreads],
        [max(0.0, mean - low) if mean == mean else 0.0 for mean, low, _ in spreads],
        [max(0.0, high - mean) if mean == mean else 0.0 for mean, _, high in spreads],
    )


def _value_axis(axes: "Axes", which: str, label: str, unit: str, values: Sequence[Value]) -> None:
    numbers = [part for value in values if value is not None for part in _spread(value, _factor(unit))]
    low = min(numbers, default=0)
    text = f"{label} (%)" if unit == "percent" else label
    high = 100 if unit == "percent" and max(numbers, default=0) > 50 and max(numbers) <= 100 else None
    if which == "x":
        axes.set_xlabel(text)
        axes.set_xlim(0 if low >= 0 else None, high)
        axes.grid(axis="x")
    else:
        axes.set_ylabel(text)
        axes.set_ylim(0 if low >= 0 else None, high)
        axes.grid(axis="y")
    axes.set_axisbelow(True)
