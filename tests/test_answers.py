"""Answers of a study: what they refuse, and that they survive the way through a file."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sublens.answers import Answer, Bars, Histogram, Lines, Matrix, Picture, Series, Spread, Table
from sublens.errors import StudyError

NUMBERS = st.floats(-1e6, 1e6)
SPREADS = st.tuples(NUMBERS, NUMBERS, NUMBERS).map(lambda s: Spread(s[0], min(s[1:]), max(s[1:])))
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda text: text.strip())


@st.composite
def series(draw: st.DrawFn, length: int) -> list[Series]:
    values = st.lists(st.none() | NUMBERS | SPREADS, min_size=length, max_size=length)
    names = draw(st.lists(TEXTS, min_size=1, max_size=3, unique=True))
    return [Series(name=name, values=draw(values), chance=draw(st.just(()) | values)) for name in names]


@st.composite
def figures(draw: st.DrawFn) -> Any:
    names = draw(st.lists(TEXTS, min_size=1, max_size=4, unique=True))
    rising = sorted(draw(st.lists(NUMBERS, min_size=2, max_size=5, unique=True)))
    unit, title, label = draw(st.sampled_from(["percent", "number"])), draw(TEXTS), draw(TEXTS)
    common: dict[str, Any] = {"title": title, "label": label, "unit": unit}
    match draw(st.sampled_from(["bars", "lines", "named", "histogram", "matrix", "picture"])):
        case "bars":
            return Bars(**common, groups=names, series=draw(series(len(names))))
        case "lines":
            log = rising[0] > 0 and draw(st.booleans())
            return Lines(**common, x_label="x", x=rising, log=log, series=draw(series(len(rising))))
        case "named":
            return Lines(**common, x_label="x", x=names, series=draw(series(len(names))))
        case "histogram":
            return Histogram(**common, x_label="x", edges=rising, series=draw(series(len(rising) - 1)))
        case "matrix":
            row = st.lists(st.none() | NUMBERS, min_size=len(names), max_size=len(names))
            values = [draw(row) for _ in range(2)]
            return Matrix(title=title, row_label="r", column_label="c", rows=["1", "2"], columns=names, values=values)
    row = st.text("0123456789abcdef"[: 2 ** len(names)], min_size=3, max_size=3)
    cells = draw(st.lists(row, min_size=1, max_size=4))
    return Picture(title=title, row_label="r", column_label="c", masks=names, cells=cells)


@settings(max_examples=60, deadline=None)
@given(st.lists(figures(), max_size=3), st.dictionaries(TEXTS, st.none() | NUMBERS), TEXTS)
def test_an_answer_comes_back_from_json_as_it_was(drawn: Any, numbers: Any, text: str) -> None:
    table = Table(title=text, columns=["a", "b"], rows=[[text, 0.5], ["x", None]], percent=["b"])
    answer = Answer(title=text, sentence=text, figures=drawn, tables=[table], numbers=numbers)
    assert Answer.from_json(json.loads(json.dumps(answer.as_json(), allow_nan=False))) == answer


def bars(**changes: Any) -> Bars:
    parts = {"title": "t", "label": "l", "groups": ["a", "b"], "series": [Series(name="s", values=[1, 2])]}
    return Bars(**{**parts, **changes})


def matrix(**changes: Any) -> Matrix:
    parts = {"title": "t", "row_label": "r", "column_label": "c", "rows": ["a"], "columns": ["x"], "values": [[1]]}
    return Matrix(**{**parts, **changes})


def picture(**changes: Any) -> Picture:
    parts = {"title": "t", "row_label": "r", "column_label": "c", "masks": ["a", "b"], "cells": ["03", "21"]}
    return Picture(**{**parts, **changes})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Series(name="s", values=[math.nan]), "nan is neither a finite number"),
        (lambda: Series(name="s", values=[True]), "True is neither a finite number"),
        (lambda: Series(name="s", values=[(0.5, 0.6, 0.4)]), "low <= high"),
        (lambda: Series(name="s", values="abc"), "values must be a list"),
        (lambda: Series(name="", values=[1]), "name must be a text"),
        (lambda: Series(name="s", values=[1, 2], chance=[1]), "2 values and 1 chance levels"),
        (lambda: bars(unit="metres"), "unit='metres'"),
        (lambda: bars(groups=["a", "a"]), "each of them once"),
        (lambda: bars(groups=["a"]), "needs 1 values in each series; 's' has 2"),
        (lambda: bars(series=[]), "at least one value"),
        (lambda: bars(series=[{"name": "s"}]), "is not a Series"),
        (lambda: Lines(title="t", label="l", x_label="x", x=[1, 1], series=[]), "each above the one before"),
        (
            lambda: Lines(
                title="t", label="l", x_label="x", x=[0, 1], series=[Series(name="s", values=[1, 2])], log=True
            ),
            "logarithmic axis needs numbers above 0",
        ),
        (
            lambda: Histogram(title="t", label="l", x_label="x", edges=[0], series=[Series(name="s", values=[])]),
            "two edges",
        ),
        (lambda: matrix(values=[[1, 2]]), "needs 1 rows of 1 values"),
        (lambda: matrix(values=[[math.inf]]), "inf is not a finite number"),
        (lambda: matrix(rows=[str(i) for i in range(201)], values=[[1]] * 201), "at most 200"),
        (lambda: picture(cells=["04"]), "digits of 0 to 3"),
        (lambda: picture(cells=["03", "1"]), "needs rows of 2"),
        (lambda: picture(cells=[]), "1 to 512"),
        (lambda: picture(masks=list("abcde")), "1 to 4 masks, not 5"),
        (lambda: Table(title="t", columns=["a"], rows=[["x", 1]]), "1 columns and a row of 2 cells"),
        (lambda: Table(title="t", columns=["a"], rows=[[math.nan]]), "neither text nor a finite number"),
        (lambda: Table(title="t", columns=["a"], rows=[], percent=["b"]), "no column 'b'"),
        (lambda: Answer(title="t", sentence=""), "sentence must be a text"),
        (lambda: Answer(title="t", sentence="s", figures=[3]), "3 is none of Bars"),
        (lambda: Answer(title="t", sentence="s", numbers={"a": math.nan}), "'a' is nan, not a finite number"),
    ],
)
def test_what_cannot_be_drawn_is_refused_where_it_is_made(make: Any, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        make()


def damaged(change: Any) -> Any:
    value = Answer(title="t", sentence="s", figures=[bars(), picture()]).as_json()
    change(value)
    return value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "Answer: must be an object"),
        ({}, "Answer: lacks title, sentence"),
        (damaged(lambda v: v.update(script="x")), "no field 'script'"),
        (damaged(lambda v: v.update(figures=3)), "figures must be a list"),
        (damaged(lambda v: v["figures"][0].update(kind="pie")), "no kind of figure 'pie'"),
        (damaged(lambda v: v["figures"][0].update(kind=["bars"])), "no kind of figure"),
        (damaged(lambda v: v["figures"][0].update(series=[[]])), "Series: must be an object"),
        (damaged(lambda v: v["figures"][0]["series"][0].update(values=[[1, 2]])), "neither a finite number"),
        (damaged(lambda v: v["figures"][1].update(cells=[["0"]])), "rows"),
        (damaged(lambda v: v.update(numbers=[1])), "numbers must be a mapping"),
    ],
)
def test_a_damaged_answer_is_refused(value: Any, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        Answer.from_json(value)
