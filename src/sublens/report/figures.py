"""The figures of a run and of a sweep: curves, what masks keep, and what they share."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import LogLocator, NullLocator

from sublens.report.drawing import (
    COLOURS,
    DASHES,
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
from sublens.report.sweep_table import as_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sublens.report.run_folder import Overlap, OverlapValues, Record
    from sublens.report.sweep_table import Row, Spread

_CURVES = (("loss", "loss", "log"), ("kept", "kept (%)", "linear"), ("gradient_norm", "gradient norm", "log"))
_POINTS = 400  # points of a curve: more than can be seen apart at this size, few enough for a small page


def curves(history: Mapping[str, Sequence["Record"]]) -> Drawing | None:
    """Draw loss, kept share and gradient norm of each mask over its training steps; ``None`` if nothing was recorded.

    Args:
        history: mask name -> its records in order of steps. A record may lack a quantity.
    """
    shown = [curve for curve in _CURVES if any(_series(records, curve[0])[0] for records in history.values())]
    if not shown:
        return None
    with canvas(WIDTH, 1.75 * len(shown) + 0.5) as figure:
        grid = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (key, label, scale) in zip(grid, shown, strict=True):
            for index, (name, records) in enumerate(history.items()):
                steps, values = _series(records, key)
                factor = 100 if key == "kept" else 1
                axes.plot(
                    steps,
                    [factor * value for value in values],
                    color=series_colour(index),
                    linestyle=DASHES[index % len(DASHES)],
                    label=legend_label(name),
                )
            if scale == "log" and all(v > 0 for records in history.values() for v in _series(records, key)[1]):
                axes.set_yscale("log")
                # Few plain numbers: "0.02", not powers of ten.
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axes.yaxis.set_minor_locator(NullLocator())
            if key == "kept":
                axes.set_ylim(0, None)
            axes.set_ylabel(label)
            axes.grid(axis="y")
        grid[-1].set_xlabel("training step")
        grid[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        grid[0].margins(x=0.01)
        add_legend(figure, grid[0])
        return drawn(figure, "curves")


def kept_per_layer(kept: Mapping[str, Mapping[str, float]]) -> Drawing | None:
    """Draw the share of weights that each mask keeps in each layer (in percent); ``None`` if there are no layers.

    Args:
        kept: mask name -> layer name -> kept fraction in 0..1.
    """
    layers = list(dict.fromkeys(layer for per_layer in kept.values() for layer in per_layer))
    if not layers:
        return None
    with canvas(WIDTH, _rows_height(layers, 0.34 + 0.04 * len(kept))) as figure:
        axes = figure.subplots()
        spread = 0.5 / max(len(kept) - 1, 1)
        for index, (name, per_layer) in enumerate(kept.items()):
            offset = (index - (len(kept) - 1) / 2) * spread
            present = [(row + offset, 100 * per_layer[layer]) for row, layer in enumerate(layers) if layer in per_layer]
            rows, values = zip(*present, strict=True) if present else ((), ())
            axes.hlines(rows, 0, values, color=series_colour(index), linewidth=1.1)
            axes.plot(
                values,
                rows,
                linestyle="none",
                marker=MARKERS[index % len(MARKERS)],
                markersize=5.5,
                color=series_colour(index),
                label=legend_label(name),
            )
        _layer_rows(axes, layers)
        axes.set_xlim(0, None)
        axes.margins(x=0.04)
        axes.set_xlabel("weights kept (%)")
        add_legend(figure, axes)
        return drawn(figure, "kept-per-layer")


def overlap_per_layer(overlap: "Overlap", name: str, repeats: Mapping[str, "Overlap"]) -> Drawing | None:
    """Draw IoU and IoMin of two masks in each layer beside what random masks have; ``None`` if there are no layers.

    Args:
        overlap: the two masks' overlap; for each measure the mean and the 95 % band of random masks that keep as many
            weights in each layer.
        name: unique name of the figure in its page.
        repeats: task -> overlap of its mask with one of the same task and another seed; may be empty.
    """
    if not overlap.layers:
        return None
    rows = {"all layers": overlap.total} | overlap.layers
    with canvas(WIDTH, _rows_height(list(rows), 0.36)) as figure:
        pair = figure.subplots(1, 2, sharey=True)
        for axes, key, title in zip(pair, ("iou", "iomin"), ("IoU", "IoMin"), strict=True):
            for row, values in enumerate(rows.values()):
                chance = values.chance.get(key)
                if chance is not None:
                    # A band of random masks can be narrower than a hair; its outline keeps it visible.
                    axes.barh(
                        row,
                        chance.high - chance.low,
                        left=chance.low,
                        height=0.62,
                        color=COLOURS["chance"],
                        edgecolor=COLOURS["chance"],
                        linewidth=2.5,
                        label="random masks: 95 % band" if row == 0 else None,
                    )
                    axes.plot(
                        [chance.mean] * 2,
                        [row - 0.31, row + 0.31],
                        color=COLOURS["quiet"],
                        linewidth=1,
                        label="random masks: mean" if row == 0 else None,
                    )
            _overlap_points(axes, rows, key, "o", COLOURS["series-0"], f"{overlap.first} and {overlap.second}")
            for index, (task, repeat) in enumerate(repeats.items(), start=1):
                again = {"all layers": repeat.total} | repeat.layers
                same_rows = {row: again[row] for row in rows if row in again}
                marker, colour = MARKERS[index % len(MARKERS)], series_colour(index)
                _overlap_points(axes, same_rows, key, marker, colour, f"{task} and {task}, another seed", hollow=True)
            _layer_rows(axes, list(rows))
            axes.axhline(0.5, color=COLOURS["quiet"], linewidth=0.8)
            axes.set_xlim(0, 1)
            axes.set_xlabel(title)
        add_legend(figure, pair[0])
        return drawn(figure, name)


def _overlap_points(
    axes: "Axes",
    rows: Mapping[str, "OverlapValues"],
    key: str,
    marker: str,
    colour: str,
    label: str,
    hollow: bool = False,
) -> None:
    present = [(row, values.measures[key]) for row, values in enumerate(rows.values()) if key in values.measures]
    axes.plot(
        [value for _, value in present],
        [row for row, _ in present],
        linestyle="none",
        marker=marker,
        markersize=5.5,
        markerfacecolor="none" if hollow else colour,
        markeredgewidth=1.2,
        color=colour,
        label=label,
        clip_on=False,  # 0 and 1 lie on the edge
    )


APART = 8
"""How many series of a panel can be told apart, and have room for their names beside it."""
_PANELS = (
    # measure, label of the axis, factor, whether it lies in 0..1
    ("accuracy", "accuracy (%)", 100, True),
    ("kept", "kept (%)", 100, False),
    ("iou", "IoU", 1, True),
    ("iomin", "IoMin", 1, True),
    ("index", "sharing index", 1, False),
    ("reused", "reused share", 1, False),
)


def against_setting(rows: Sequence["Row"], setting: str, name: str) -> Drawing | None:
    """Draw accuracy, kept share and IoU against a setting, mean and spread over the seeds; ``None`` without runs.

    Args:
        rows: runs that differ in this setting, in the order in which a setting without numbers is drawn.
        setting: its name.
        name: unique name of the figure in its page.
    """
    places, labels = _places([row.settings.get(setting) for row in rows])
    panels = []
    for what, label, factor, bounded in _PANELS:
        keys = list(dict.fromkeys((m.what, m.of, m.on) for row in rows for m in row.measures if m.what == what))
        if what == "accuracy" and len(keys) > APART:  # drawn together: each mask on its own task, if there are such
            keys = [key for key in keys if key[1] == key[2]] or keys
        if keys:
            panels.append((keys, label, factor, bounded))
    if not panels:
        return None
    # A mask looks the same in every panel; what only one panel has comes after the masks.
    masks = [m.of for row in rows for m in row.measures if m.what == "kept"]
    series = [_series_of(key) for keys, *_ in panels for key in keys]
    looks = {name: look for look, name in enumerate(dict.fromkeys((*masks, *series)))}
    with canvas(WIDTH, 2.1 * len(panels) + 0.4) as figure:
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (keys, label, factor, bounded) in zip(grid, panels, strict=True):
            # Series stand side by side: nearly all masks solve their own task, and would hide each other.
            step = (max(places) - min(places) or 1) * 0.012
            chance_named = False
            if len(keys) > APART:
                _together(axes, places, rows, keys, factor)
            for index, key in enumerate(keys if len(keys) <= APART else ()):
                look = looks[_series_of(key)]
                found = [(place, row.find(key)) for place, row in zip(places, rows, strict=True)]
                taken = [(place + (index - (len(keys) - 1) / 2) * step, m) for place, m in found if m is not None]
                by_chance = [(place, m.chance) for place, m in taken if m.chance is not None]
                if by_chance:
                    _spreads(axes, by_chance, factor, look, COLOURS["quiet"], hollow=True,
                             label=None if chance_named else "random masks")  # fmt: skip
                    chance_named = True
                _spreads(
                    axes,
                    [(place, m.seen) for place, m in taken],
                    factor,
                    look,
                    series_colour(look),
                    label=_series_of(key),
                )
            axes.set_ylabel(label)
            axes.set_ylim(0 if _not_below_0(rows, keys) else None, 1.04 * factor if bounded else None)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=2.6)
        every = -(-len(labels) // 9)  # about as many labels as there is room for
        grid[-1].set_xticks(places[::every], labels[::every])
        grid[-1].set_xlabel(setting)
        return drawn(figure, name)


def _together(
    axes: "Axes", places: Sequence[float], rows: Sequence["Row"], keys: Sequence[tuple[str, str, str]], factor: int
) -> None:
    """Draw more measures than can be told apart: each as a thin line, and their mean, beside that of random masks."""
    for index, key in enumerate(keys):
        found = [(place, row.find(key)) for place, row in zip(places, rows, strict=True)]
        axes.plot(
            [place for place, measure in found if measure is not None],
            [factor * measure.seen.mean for _, measure in found if measure is not None],
            color=series_colour(0), linewidth=0.8, alpha=0.35, marker=".", markersize=3, clip_on=False,
            label=f"each of {len(keys)}" if index == 0 else None,
        )  # fmt: skip
    for label, hollow in ((f"mean of {len(keys)}", False), ("random masks", True)):
        means = []
        for place, row in zip(places, rows, strict=True):
            measures = [measure for measure in map(row.find, keys) if measure is not None]
            spreads = [m.chance if hollow else m.seen for m in measures]
            values = [spread.mean for spread in spreads if spread is not None]
            if values:
                means.append((place, factor * sum(values) / len(values)))
        if means:
            axes.plot(
                *zip(*means, strict=True),
                color=COLOURS["quiet"] if hollow else series_colour(0), linestyle=(0, (1, 2)) if hollow else "-",
                linewidth=1 if hollow else 2, marker=MARKERS[0], markersize=5, clip_on=False, label=label,
                markerfacecolor="none" if hollow else series_colour(0),
            )  # fmt: skip


def _not_below_0(rows: Sequence["Row"], keys: Sequence[tuple[str, str, str]]) -> bool:
    found = [row.find(key) for row in rows for key in keys]
    return all(measure.seen.low >= 0 for measure in found if measure is not None)


def _series_of(key: tuple[str, str, str]) -> str:
    _, of, on = key
    return f"{of} on {on}" if on and on != of else of


def _spreads(
    axes: "Axes",
    points: Sequence[tuple[float, "Spread"]],
    factor: int,
    index: int,
    colour: str,
    *,
    label: str | None,
    hollow: bool = False,
) -> None:
    """Draw means with their standard deviations as bars."""
    axes.errorbar(
        [place for place, _ in points],
        [factor * spread.mean for _, spread in points],
        yerr=[factor * (spread.sd or 0) for _, spread in points],
        color=colour,
        linestyle=(0, (1, 2)) if hollow else DASHES[index % len(DASHES)],
        linewidth=1 if hollow else 1.4,
        marker=MARKERS[index % len(MARKERS)],
        markersize=4.5,
        markerfacecolor="none" if hollow else colour,
        elinewidth=1,
        capsize=2.5,
        label=None if label is None else legend_label(label),
        zorder=2 if hollow else 3,
        clip_on=False,  # 0 and 100 % lie on the edge
    )


def _places(values: Sequence[Any]) -> tuple[list[float], list[str]]:
    """Return where on the axis each value of a setting stands, and how it is written there."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    labels = [f"{value:g}" if isinstance(value, float) else as_text(value) for value in values]
    steps = [math.log10(number) if number > 0 else math.nan for number in numbers]
    if len(numbers) < len(values):
        return [float(place) for place in range(len(values))], labels
    low, high = min(number for number in (*numbers, math.inf) if number > 0), max(numbers)
    if high < 20 * low:
        return [float(number) for number in numbers], labels
    if min(numbers) > 0:
        return steps, labels
    # Some decades, and zero, which lies infinitely far from them: side by side in order.
    return [float(sorted(set(numbers)).index(number)) for number in numbers], labels


def _series(records: Sequence["Record"], key: str) -> tuple[list[float], list[float]]:
    """Return steps and values of what was recorded under ``key``, in at most ``_POINTS`` means of equal length."""
    points = [(record["step"], record[key]) for record in records if key in record]
    length = -(-len(points) // _POINTS) or 1
    groups = [points[start : start + length] for start in range(0, len(points), length)]
    return [group[-1][0] for group in groups], [sum(value for _, value in group) / len(group) for group in groups]


def _rows_height(rows: Sequence[str], row: float) -> float:
    return 1.0 + row * len(rows)


def _layer_rows(axes: "Axes", layers: Sequence[str]) -> None:
    axes.set_yticks(range(len(layers)), [shorten(layer) for layer in layers])
    axes.set_ylim(len(layers) - 0.5, -0.5)  # first layer on top
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
