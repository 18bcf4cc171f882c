"""The page: one HTML file that holds everything it shows, with no script and nothing to fetch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sublens.answers import Answer, Matrix
from sublens.errors import FileError
from sublens.report import figures, sentences
from sublens.report.answer_figures import draw
from sublens.report.drawing import COLOURS, Drawing, inline
from sublens.report.run_folder import Chance, Overlap, RunFolder, printable, read


def write_report(folder: Path | str) -> Path:
    """Write ``report.html``, and every figure as ``figures/*.svg`` and ``*.pdf``, into a run folder.

    Args:
        folder: folder of a finished run; ``result.json`` must be there, ``history.jsonl`` may be.

    Returns:
        Path of the page.

    Raises:
        FileError: a file of the run is missing or damaged, or the folder cannot be written to.
    """
    folder = Path(folder)
    run = read(folder)
    drawn = _draw(run)
    page = _render(run, drawn)
    target = folder / "report.html"
    try:
        write_figures(drawn, folder)
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise FileError(f"The report cannot be written to {folder}: {error.strerror}.") from error
    return target


def write_figures(drawings: Mapping[str, Drawing], folder: Path) -> None:
    """Write every figure as ``figures/NAME.svg`` and ``.pdf``.

    Raises:
        OSError: the folder cannot be written to.
    """
    (folder / "figures").mkdir(exist_ok=True)
    for name, drawing in drawings.items():
        (folder / "figures" / f"{name}.svg").write_text(drawing.svg, encoding="utf-8")
        (folder / "figures" / f"{name}.pdf").write_bytes(drawing.pdf)


def template_environment() -> Environment:
    """Return what all pages are rendered with: everything is escaped, and a name that is missing is an error."""
    environment = Environment(
        loader=PackageLoader("sublens.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=sentences.percent, number=sentences.number, capitalised=sentences.capitalised)
    return environment


def _draw(run: RunFolder) -> dict[str, Drawing]:
    """Return the figures that the run has numbers for: file name without its ending -> figure."""
    drawn = {
        "kept-per-layer": figures.kept_per_layer({name: mask.kept_per_layer for name, mask in run.masks.items()}),
        "curves": figures.curves(run.history),
    }
    if len(run.overlaps) > sentences.MOST_PAIRS:
        drawn["overlaps"] = draw(_overlap_matrix(run.overlaps), "overlaps")
    for index, pair in enumerate(_told_one_by_one(run)):
        name = _overlap_name(index)
        drawn[name] = figures.overlap_per_layer(pair, name, _repeats_of(run, pair))
    for kind, answers in (("answer", run.answers), ("analysis", run.analysis)):
        for question, answer in answers.items():
            for index, figure in enumerate(answer.figures):
                name = _answer_name(kind, question, index)
                drawn[name] = draw(figure, name)
    return {name: drawing for name, drawing in drawn.items() if drawing is not None}


def _answer_name(kind: str, question: str, index: int) -> str:
    # No other figure's name begins so; what a file may name its question is checked on reading.
    return f"{kind}-{question}-{index + 1}"


def _repeats_of(run: RunFolder, pair: Overlap) -> dict[str, Overlap]:
    return {task: repeat for task, repeat in run.repeats.items() if task in (pair.first, pair.second)}


def _told_one_by_one(run: RunFolder) -> Sequence[Overlap]:
    return run.overlaps if len(run.overlaps) <= sentences.MOST_PAIRS else ()


def _overlap_matrix(pairs: Sequence[Overlap]) -> Matrix:
    names = list(dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second)))
    iou = {frozenset((pair.first, pair.second)): pair.total.measures.get("iou") for pair in pairs}
    return Matrix(
        title="IoU of each pair of masks, over all layers",
        row_label="mask",
        column_label="mask",
        rows=names,
        columns=names,
        values=[[iou.get(frozenset((row, column))) for column in names] for row in names],
        unit="number",
    )


def _all_pairs(run: RunFolder, figure: Callable[[str, str], Markup | None]) -> dict[str, Any]:
    (sentence,) = sentences.overlaps(run.overlaps)
    title = _overlap_matrix(run.overlaps).title
    return {
        "title": "Overlap of all masks",
        "sentence": sentence,
        "figures": [(title, figure("overlaps", title))],
        "tables": [],
    }


def _overlap_name(index: int) -> str:
    # Numbered, not named after the masks: names in files may hold anything.
    return "overlap-per-layer" if index == 0 else f"overlap-per-layer-{index + 1}"


def _render(run: RunFolder, drawn: Mapping[str, Drawing]) -> str:
    environment = template_environment()
    environment.filters.update(duration=_duration, setting=_setting)

    def figure(name: str, sentence: str) -> Markup | None:
        # The only text that is not escaped by the template: an XML writer has escaped what is in it.
        return Markup(inline(drawn[name].svg, f"figure-{list(drawn).index(name)}", sentence)) if name in drawn else None

    texts = {
        "accuracy": sentences.accuracy(run),
        "inverse": sentences.inverse(run),
        "kept": sentences.kept(run),
        "curves": sentences.curves(run.history),
    }
    pairs = []
    for index, pair in enumerate(_told_one_by_one(run)):
        text = sentences.overlap(pair, _repeats_of(run, pair))
        pairs.append({"pair": pair, "sentence": text, "figure": figure(_overlap_name(index), text)})
    return environment.get_template("page.html.j2").render(
        run=run,
        texts=texts,
        units="weights" if run.settings.get("groups") in (None, "weight") else "groups",
        groups=_accuracy_groups(run),
        confusions=[
            {"who": who, "table": table, "columns": _columns(table), "sentence": sentences.confusion(table, who)}
            for who, table in run.confusion.items()
        ],
        kept_figure=figure("kept-per-layer", texts["kept"]),
        curves_figure=figure("curves", texts["curves"]),
        pairs=pairs,
        all_pairs=_all_pairs(run, figure) if "overlaps" in drawn else None,
        answers=[_answer("answer", question, answer, figure) for question, answer in run.answers.items()],
        analysis=[_answer("analysis", question, answer, figure) for question, answer in run.analysis.items()],
        colours=COLOURS,
    )


def _answer(kind: str, question: str, answer: Answer, figure: Callable[[str, str], Markup | None]) -> dict[str, Any]:
    """Return what the template shows of an answer."""
    return {
        "title": answer.title,
        "sentence": answer.sentence,
        "figures": [
            (entry.title, figure(_answer_name(kind, question, index), entry.title))
            for index, entry in enumerate(answer.figures)
        ],
        "tables": answer.tables,
    }


def _accuracy_groups(run: RunFolder) -> list[list[dict[str, Any]]]:
    """Return the accuracy table in groups of rows: the network; each mask, its inverse, its halves and random masks."""
    groups: list[list[dict[str, Any]]] = [[{"name": "whole network", "kept": 1.0, "values": run.network}]]
    for name, mask in run.masks.items():
        rows = (
            (f"{name} mask", mask.accuracy, mask.kept),
            ("its inverse", mask.inverse_accuracy, 1 - mask.kept),
            ("in the first half of the layers only", mask.half_accuracy, None),
            ("in the second half only", mask.late_half_accuracy, None),
            ("random masks of its layer sizes, mean", _means(mask.random_accuracy), mask.kept),
        )
        groups.append([{"name": label, "kept": kept, "values": values} for label, values, kept in rows if values])
    return groups


def _means(chances: Mapping[str, Chance]) -> dict[str, float]:
    return {task: chance.mean for task, chance in chances.items()}


def _columns(table: Mapping[str, Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(answered for answers in table.values() for answered in answers))


def _duration(seconds: float) -> str:
    """Write a time for people: "12 s", "4 min 05 s", "2 h 03 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _setting(value: Any, *, nested: bool = False) -> str:
    """Write a setting as it would be typed: no quotes, lists with commas. Only one level of nesting is shown."""
    if isinstance(value, (list, dict)):
        if nested:
            return "…"
        if isinstance(value, list):
            return ", ".join(_setting(entry, nested=True) for entry in value) or "none"
        return ", ".join(f"{printable(key)}: {_setting(entry, nested=True)}" for key, entry in value.items()) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else printable(value)
