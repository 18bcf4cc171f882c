"""The report: figures and one HTML page, made from a run folder's files alone. It needs neither torch nor the study."""

from sublens.report.page import write_report
from sublens.report.run_folder import RunFolder, read

__all__ = ["RunFolder", "read", "write_report"]
