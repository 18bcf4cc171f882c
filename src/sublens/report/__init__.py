"""The report: figures and HTML pages, made from run folders' files alone. It needs neither torch nor the study."""

from sublens.report.comparing import compare
from sublens.report.duel_page import duel_figure, duel_page
from sublens.report.duel_table import (
    Between,
    DuelRow,
    DuelTable,
    accuracy_text,
    duel_csv,
    duel_json,
    memory_text,
    stability_text,
)
from sublens.report.page import write_figures, write_report
from sublens.report.run_folder import RunFolder, read, refuse_a_run
from sublens.report.sweep_page import sweep_page, written
from sublens.report.sweep_table import Row, as_csv, as_json, as_text, described, tabulate

__all__ = [
    "Between",
    "DuelRow",
    "DuelTable",
    "Row",
    "RunFolder",
    "accuracy_text",
    "as_csv",
    "as_json",
    "as_text",
    "compare",
    "described",
    "duel_csv",
    "duel_figure",
    "duel_json",
    "duel_page",
    "memory_text",
    "read",
    "refuse_a_run",
    "stability_text",
    "sweep_page",
    "tabulate",
    "write_figures",
    "write_report",
    "written",
]
