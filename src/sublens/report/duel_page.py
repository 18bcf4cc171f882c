"""The page and the figure of a duel."""

import statistics
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from sublens.report.drawing import (
    COLOURS,
    DASHES,
    MARKERS,
    WIDTH,
    Drawing,
    add_legend,
    canvas,
    drawn,
    inline,
    legend_label,
    series_colour,
)
from sublens.report.duel_table import Between, DuelTable, accuracy_text, interval, memory_text, stability_text
from sublens.report.page import template_environment
from sublens.report.run_folder import printable


def duel_figure(table: DuelTable) -> Drawing:
    """Draw accuracy and stability against the kept fraction: a column for each task, a line for each contestant."""
    tasks = list(dict.fromkeys(row.task for row in table.rows))
    names = list(dict.fromkeys(row.contestant for row in table.rows))
    with canvas(WIDTH, 6.2) as figure:
        grid = figure.subplots(2, len(tasks), sharex=True, sharey="row", squeeze=False)
        for column, task in enumerate(tasks):
            above, below = grid[:, column]
            for index, name in enumerate(names):
                rows = sorted((r for r in table.rows if (r.task, r.contestant) == (task, name)), key=lambda r: r.asked)
                look: dict[str, Any] = {
                    "color": series_colour(index),
                    "linestyle": DASHES[(index + index // len(DASHES)) % len(DASHES)],
                    "marker": MARKERS[(index + index // len(MARKERS)) % len(MARKERS)],
                    "markersize": 4.5,
                    "linewidth": 1.3,
                    "clip_on": False,
                }
                # Side by side, by a hundredth, so that no bar hides another.
                places = [100 * row.asked * 1.012 ** (index - (len(names) - 1) / 2) for row in rows]
                found = [interval(row.accuracy) for row in rows]
                above.errorbar(
                    places,
                    [100 * statistics.fmean(row.accuracy) for row in rows],
                    yerr=[[0 if each is None else 100 * (each[0] - max(0.0, each[1])) for each in found],
                          [0 if each is None else 100 * (min(1.0, each[2]) - each[0]) for each in found]],
                    elinewidth=1, capsize=2, label=legend_label(name), **look,
                )  # fmt: skip
                steady = [(place, statistics.fmean(row.stability)) for place, row in zip(places, rows, strict=True)
                          if row.stability]  # fmt: skip
                below.plot([place for place, _ in steady], [value for _, value in steady], **look)
            above.axhline(100 * table.network[task], color=COLOURS["quiet"], linewidth=0.8)
            above.set_title(f"{printable(task)} (the line is the whole network)")
            above.set_ylim(0, 102)
            below.set_ylim(0, 1)
            asked = sorted({row.asked for row in table.rows})
            below.set_xscale("log")
            below.set_xticks([100 * each for each in asked], [f"{100 * each:g}" for each in asked], minor=False)
            below.minorticks_off()
            below.set_xlabel("kept (%)")
            for axes in (above, below):
                axes.grid(axis="y")
                axes.set_axisbelow(True)
        grid[0, 0].set_ylabel("accuracy (%)")
        grid[1, 0].set_ylabel("IoU between seeds")
        add_legend(figure, grid[0, 0])
        return drawn(figure, "duel")


def duel_page(table: DuelTable, drawing: Drawing) -> str:
    """Return one HTML page that holds everything it shows."""
    sentence = (
        "Accuracy (mean over the seeds, with its 95 % interval) and IoU between seeds, against the kept fraction, for "
        + ", ".join(dict.fromkeys(row.contestant for row in table.rows))
        + "."
    )
    return (
        template_environment()
        .get_template("duel.html.j2")
        .render(
            table=table,
            title=printable(table.study),
            figure=Markup(inline(drawing.svg, "duel", sentence)),
            sentence=sentence,
            tasks=list(dict.fromkeys(row.task for row in table.rows)),
            accuracy=accuracy_text,
            stability=stability_text,
            memory=memory_text,
            mean=lambda values: f"{statistics.fmean(values):.3f}" if values else "n/a",
            seconds=lambda row: f"{statistics.median(row.seconds):.1f} s",
            matrices=_matrices(table.between),
            colours=COLOURS,
        )
    )


def _matrices(between: Sequence[Between]) -> list[dict[str, Any]]:
    """Return for each task and kept fraction the names and the IoU of each pair, with chance's in the other half."""
    found = []
    for task, asked in dict.fromkeys((pair.task, pair.asked) for pair in between):
        pairs = [pair for pair in between if (pair.task, pair.asked) == (task, asked)]
        names = list(dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second)))
        cells = {(pair.first, pair.second): f"{statistics.fmean(pair.iou):.3f}" for pair in pairs}
        cells |= {(pair.second, pair.first): f"{statistics.fmean(pair.by_chance):.3f}" for pair in pairs}
        lines = [(name, [cells.get((name, other), "") for other in names]) for name in names]
        found.append({"task": task, "asked": asked, "names": names, "lines": lines})
    return found
