"""The answer to one question of a study, in plain numbers: a sentence, and the figures and tables that show it.

A figure says what is drawn, not how: it goes to ``result.json`` and back, and the report draws it from there, without
the study and without torch. What is impossible is refused where it is made; what is read from a file is checked by the
same rules.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NamedTuple, TypeVar

from sublens.errors import StudyError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a study, a task, a mask or a question may be called: it becomes part of file names."""

LARGEST_PICTURE = 512  # rows, and columns
LARGEST_MATRIX = 200
MOST_PICTURED = 4  # masks of one picture: one hexadecimal digit says which of them keep an element


def percent(fraction: float) -> str:
    """Write a fraction of 1 in percent, with one decimal; "n/a" if it is not a finite number."""
    if not math.isfinite(fraction):
        return "n/a"
    text = f"{100 * fraction:.1f}"
    # Rounding must not turn "almost all" into "all", nor "hardly any" into "none".
    if text == "100.0" and fraction < 1:
        text = ">99.9"
    elif text == "0.0" and fraction > 0:
        text = "<0.1"
    elif text == "-0.0":
        text = ">-0.1" if fraction < 0 else "0.0"
    return f"{text}\u00a0%"  # no line break between a number and its unit


def span(values: Sequence[float]) -> str:
    """Write how far some fractions reach: one percentage, or the lowest and the highest."""
    low, high = percent(min(values)), percent(max(values))
    return low if low == high else f"{low} to {high}"


class Spread(NamedTuple):
    """A value with its uncertainty: mean, and lower and upper edge of a band. The title says which band."""

    mean: float
    low: float
    high: float


Value = float | Spread | None
"""What is drawn at one place: a number, one with its spread, or nothing there."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One set of bars, or one line.

    Attributes:
        name: as the legend has it.
        values: one for each group, place or bin. Finite; ``None`` where there is none.
        chance: what chance gives at each of them, such as random masks of the same layer sizes; drawn beside the
            values. Empty if there is no such level.

    Raises:
        StudyError: at construction, as for every class of this module, saying which value is wrong and how.
    """

    name: str
    values: Sequence[Value]
    chance: Sequence[Value] = ()

    def __post_init__(self) -> None:
        _check_texts(self, "name")
        _set(self, "values", [_value(self, value) for value in _listed(self, "values")])
        _set(self, "chance", [_value(self, value) for value in _listed(self, "chance")])
        if self.chance and len(self.chance) != len(self.values):
            raise _wrong(self, f"has {len(self.values)} values and {len(self.chance)} chance levels")


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Bars in groups: each group has one of every series.

    Attributes:
        title: what is shown, and what spreads and chance levels are.
        label: of the axis of values.
        groups: their names.
        series: each with a value for every group.
        unit: ``"percent"`` (values are fractions of 1) or ``"number"``.
    """

    title: str
    label: str
    groups: Sequence[str]
    series: Sequence[Series]
    unit: str = "percent"

    def __post_init__(self) -> None:
        _check_texts(self, "title", "label")
        _names(self, "groups")
        _check_series(self, len(self.groups))


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Lines over numbers, or over names in their order.

    Attributes:
        title: what is shown.
        label: of the axis of values.
        x_label: of the other axis, with its unit.
        x: numbers that rise, or names.
        series: each with a value for every ``x``.
        unit: of the values: ``"percent"`` (fractions of 1) or ``"number"``.
        log: ``x`` on a logarithmic axis.
    """

    title: str
    label: str
    x_label: str
    x: Sequence[float | str]
    series: Sequence[Series]
    unit: str = "percent"
    log: bool = False

    def __post_init__(self) -> None:
        _check_texts(self, "title", "label", "x_label")
        x = _listed(self, "x")
        if x and all(isinstance(place, str) for place in x):
            _names(self, "x")
        else:
            _set(self, "x", _rising(self, "x", x))
        if not isinstance(self.log, bool) or (self.log and any(isinstance(p, str) or p <= 0 for p in self.x)):
            raise _wrong(self, f"log={self.log!r}: a logarithmic axis needs numbers above 0")
        _check_series(self, len(self.x))


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How values are distributed over bins.

    Attributes:
        title: what is shown.
        label: of the axis of counts or shares.
        x_label: of the axis of bins, with its unit.
        edges: of the bins, rising; one more than there are bins.
        series: each with a value for every bin.
        unit: of the values: ``"percent"`` (fractions of 1) or ``"number"``.
    """

    title: str
    label: str
    x_label: str
    edges: Sequence[float]
    series: Sequence[Series]
    unit: str = "percent"

    def __post_init__(self) -> None:
        _check_texts(self, "title", "label", "x_label")
        _set(self, "edges", _rising(self, "edges", _listed(self, "edges")))
        if len(self.edges) < 2:
            raise _wrong(self, "needs at least two edges")
        _check_series(self, len(self.edges) - 1)


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A number for each row and column, as colour and as text.

    Attributes:
        title: what is shown.
        row_label: what the rows are.
        column_label: what the columns are.
        rows: their names.
        columns: their names.
        values: one list for each row, one value for each column. Finite, or ``None``.
        unit: ``"percent"`` (fractions of 1) or ``"number"``.
        diverging: the values are differences: two colours, which meet at 0.
    """

    title: str
    row_label: str
    column_label: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: str = "percent"
    diverging: bool = False

    def __post_init__(self) -> None:
        _check_texts(self, "title", "row_label", "column_label")
        _check_unit(self, self.unit)
        _names(self, "rows")
        _names(self, "columns")
        if max(len(self.rows), len(self.columns)) > LARGEST_MATRIX:
            raise _wrong(self, f"is {len(self.rows)} x {len(self.columns)}; at most {LARGEST_MATRIX} can be read")
        if not isinstance(self.diverging, bool):
            raise _wrong(self, f"diverging={self.diverging!r} must be true or false")
        grid = [_sequence(self, "values", row) for row in _listed(self, "values")]
        if len(grid) != len(self.rows) or any(len(row) != len(self.columns) for row in grid):
            raise _wrong(self, f"needs {len(self.rows)} rows of {len(self.columns)} values")
        for value in (value for row in grid for value in row):
            if value is not None and not _is_number(value):
                raise _wrong(self, f"{_short(value)} is not a finite number")
        _set(self, "values", [tuple(None if value is None else float(value) for value in row) for row in grid])


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A weight matrix in which each element's colour says which masks keep it.

    Attributes:
        title: what is shown.
        row_label: what the rows are.
        column_label: what the columns are.
        masks: their names, at most four.
        cells: one text for each row, one hexadecimal digit for each column: bit i (of value 2**i) is set if mask i
            keeps that element. At most 512 x 512.
    """

    title: str
    row_label: str
    column_label: str
    masks: Sequence[str]
    cells: Sequence[str]

    def __post_init__(self) -> None:
        _check_texts(self, "title", "row_label", "column_label")
        _names(self, "masks")
        if not 1 <= len(self.masks) <= MOST_PICTURED:
            raise _wrong(self, f"can show 1 to {MOST_PICTURED} masks, not {len(self.masks)}")
        _set(self, "cells", _listed(self, "cells"))
        digits = set("0123456789abcdef"[: 2 ** len(self.masks)])
        wide = len(self.cells[0]) if self.cells and isinstance(self.cells[0], str) else 0
        if not (0 < len(self.cells) <= LARGEST_PICTURE and 0 < wide <= LARGEST_PICTURE):
            raise _wrong(self, f"needs 1 to {LARGEST_PICTURE} rows and columns; it has {len(self.cells)} and {wide}")
        if any(not isinstance(row, str) or len(row) != wide or not digits.issuperset(row) for row in self.cells):
            raise _wrong(self, f"needs rows of {wide} digits of 0 to {max(digits)}")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers and texts in rows.

    Attributes:
        title: what is shown.
        columns: their names.
        rows: one list for each; a cell is a text, a finite number, or ``None``. The first cell of a row is its name.
        percent: the columns whose numbers are fractions of 1, shown in percent.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    percent: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check_texts(self, "title")
        _names(self, "columns")
        _names(self, "percent")
        unknown = [name for name in self.percent if name not in self.columns]
        if unknown:
            raise _wrong(self, f"has no column {_short(unknown[0])} to show in percent")
        _set(self, "rows", [tuple(_sequence(self, "rows", row)) for row in _listed(self, "rows")])
        for row in self.rows:
            if len(row) != len(self.columns):
                raise _wrong(self, f"has {len(self.columns)} columns and a row of {len(row)} cells")
            for cell in row:
                if not (cell is None or isinstance(cell, str) or _is_number(cell)):
                    raise _wrong(self, f"{_short(cell)} is neither text nor a finite number")


Figure = Bars | Lines | Histogram | Matrix | Picture

_FIGURES: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in (Bars, Lines, Histogram, Matrix, Picture)}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a question was answered with.

    Attributes:
        title: the question, as the heading of its section.
        sentence: what the numbers say, in one plain sentence made from them.
        figures: shown beside the sentence.
        tables: shown under the figures.
        numbers: those that the sentence rests on, by name, for programs that read ``result.json``. Finite, or
            ``None`` for one that could not be had.
    """

    title: str
    sentence: str
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    numbers: Mapping[str, float | None] | None = None

    def __post_init__(self) -> None:
        _check_texts(self, "title", "sentence")
        for name, kinds in (("figures", tuple(_FIGURES.values())), ("tables", (Table,))):
            _set(self, name, _listed(self, name))
            for entry in getattr(self, name):
                if not isinstance(entry, kinds):
                    raise _wrong(self, f"{name}: {_short(entry)} is none of {', '.join(k.__name__ for k in kinds)}")
        numbers = {} if self.numbers is None else self.numbers
        if not isinstance(numbers, Mapping):
            raise _wrong(self, "numbers must be a mapping from names to numbers")
        for name, value in numbers.items():
            if not isinstance(name, str) or not (value is None or _is_number(value)):
                raise _wrong(self, f"numbers: {_short(name)} is {_short(value)}, not a finite number")
        object.__setattr__(self, "numbers", dict(numbers))

    def as_json(self) -> dict[str, Any]:
        """Return the answer as JSON values; :meth:`from_json` reads them."""
        figures = [{"kind": type(figure).__name__.lower(), **asdict(figure)} for figure in self.figures]
        plain: dict[str, Any] = json.loads(json.dumps({**asdict(self), "figures": figures}))
        return plain

    @classmethod
    def from_json(cls, value: Any) -> "Answer":
        """Return the answer that :meth:`as_json` wrote.

        Raises:
            StudyError: ``value`` is something else.
        """
        answer = _entries(cls, value)
        figures = []
        for entry in _sequence(cls, "figures", answer.get("figures", ())):
            kind = entry.get("kind") if isinstance(entry, Mapping) else None
            if not isinstance(kind, str) or kind not in _FIGURES:
                raise _wrong(cls, f"knows no kind of figure {_short(kind)}; the kinds are {', '.join(_FIGURES)}")
            figures.append(_made(_FIGURES[kind], {key: part for key, part in entry.items() if key != "kind"}))
        tables = [_made(Table, entry) for entry in _sequence(cls, "tables", answer.get("tables", ()))]
        return cls(**{**answer, "figures": figures, "tables": tables})


_T = TypeVar("_T")


def _made(kind: type[_T], value: Any) -> _T:
    entries = _entries(kind, value)
    if "series" in entries:
        entries["series"] = [_made(Series, entry) for entry in _sequence(kind, "series", entries["series"])]
    return kind(**entries)


def _entries(kind: type[Any], value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(kind, f"must be an object, not {_short(value)}")
    known = {entry.name: entry.default is MISSING for entry in fields(kind)}
    lacks = [name for name, needed in known.items() if needed and name not in value]
    extra = [name for name in value if name not in known]
    if lacks or extra:
        raise _wrong(kind, f"lacks {', '.join(lacks)}" if lacks else f"has no field {_short(extra[0])}")
    return dict(value)


def _check_texts(what: Any, *names: str) -> None:
    for name in names:
        text = getattr(what, name)
        if not isinstance(text, str) or not text.strip():
            raise StudyError(f"{type(what).__name__}: {name} must be a text, not {_short(text)}.")


def _check_unit(what: Any, unit: object) -> None:
    if unit not in ("percent", "number"):
        raise _wrong(what, f"unit={_short(unit)} must be 'percent' or 'number'")


def _check_series(what: Any, length: int) -> None:
    _check_unit(what, what.unit)
    _set(what, "series", _listed(what, "series"))
    for series in what.series:
        if not isinstance(series, Series):
            raise _wrong(what, f"series: {_short(series)} is not a Series")
        if len(series.values) != length:
            raise _wrong(what, f"needs {length} values in each series; {series.name!r} has {len(series.values)}")
    names = [series.name for series in what.series]
    if not names or not length or len(set(names)) < len(names):
        raise _wrong(what, "needs at least one value, and a name of its own for each series")


def _names(what: Any, name: str) -> None:
    texts = _listed(what, name)
    if not all(isinstance(text, str) for text in texts) or len(set(texts)) < len(texts):
        raise _wrong(what, f"{name} must be texts, each of them once")
    _set(what, name, texts)


def _rising(what: Any, name: str, numbers: Sequence[Any]) -> list[float]:
    for index, number in enumerate(numbers):
        if not _is_number(number) or (index and number <= numbers[index - 1]):
            raise _wrong(what, f"{name}: {_short(number)}; it must hold finite numbers, each above the one before it")
    return [float(number) for number in numbers]


def _value(what: Any, value: Any) -> Value:
    if value is None or _is_number(value):
        return None if value is None else float(value)
    if isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_number, value)):
        spread = Spread(*map(float, value))
        if spread.low <= spread.high:
            return spread
    raise _wrong(what, f"{_short(value)} is neither a finite number nor a Spread (mean, low, high) with low <= high")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _listed(what: Any, name: str) -> Sequence[Any]:
    return _sequence(what, name, getattr(what, name))


def _sequence(what: Any, name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _wrong(what, f"{name} must be a list, not {_short(value)}")
    return value


def _set(what: Any, name: str, value: Sequence[Any]) -> None:
    object.__setattr__(what, name, tuple(value))


def _wrong(what: Any, text: str) -> StudyError:
    kind = what if isinstance(what, type) else type(what)
    title = getattr(what, "title", getattr(what, "name", None))
    return StudyError(f"{kind.__name__}{f' {title!r}' if isinstance(title, str) else ''}: {text}.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
