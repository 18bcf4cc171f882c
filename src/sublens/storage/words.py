"""Paths, values and other libraries' messages, made fit for one line of an error message."""

import os
import re


def named(path: str | os.PathLike[str]) -> str:
    """A path, quoted."""
    return f"'{_printable(os.fspath(path))}'"


def short(value: object) -> str:
    """A value out of a file for a message: one line, no control characters, not long."""
    text = _printable(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def first_line(error: BaseException) -> str:
    """The first line of another library's message."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = _printable(text.strip())
    return text if len(text) <= 200 else text[:197] + "..."


def _printable(text: object) -> str:
    return re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "?", str(text))
