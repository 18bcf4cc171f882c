"""The report: figures and HTML pages, made from run folders' files alone. It needs neither torch nor the study."""

from sublens.report.comparing import compare
from sublens.report.page import write_figures, write_report
from sublens.report.run_folder import RunFolder, read
from sublens.report.sweep_page import sweep_page, written
from sublens.report.sweep_table import Row, as_csv, as_json, as_text, described, tabulate

__all__ = [
    "Row",
    "RunFolder",
    "as_csv",
    "as_json",
    "as_text",
    "compare",
    "described",
    "read",
    "sweep_page",
    "tabulate",
    "write_figures",
    "write_report",
    "written",
]
