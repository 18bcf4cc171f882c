"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, nothing when told so."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sublens.fit.settings import OWN_FIELDS, Record

BAR_SECONDS = 0.1
LINE_SECONDS = 10.0


@contextlib.contextmanager
def sharing(progress: bool | str) -> Iterator[Progress | None]:
    """One block of bars for the displays of several runs: a terminal shows no two at once. ``None`` elsewhere."""
    console = Console(stderr=True)
    if progress is False or not console.is_terminal:
        yield None
        return
    with _bar(console) as bar:
        yield bar


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
    )


class Display:
    """Shows how far a run has come, on standard error so that a program's own output stays clean.

    Args:
        progress: ``False`` for silence, ``True``, or a label to show before the numbers.
        steps: the number of steps of the run.
        done: steps already done when the display begins (a resumed run).
        console: where to write; standard error by default.
        bar: what :func:`sharing` gave, where several runs are shown together.
    """

    def __init__(
        self,
        progress: bool | str,
        steps: int,
        done: int = 0,
        console: Console | None = None,
        bar: Progress | None = None,
    ) -> None:
        self._label = progress if isinstance(progress, str) else "mask"
        self._steps = steps
        self._done = done
        self._shown = progress is not False
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._shared = bar
        self._text = ""
        self._began = self._next = time.monotonic()
        self._first: tuple[int, float] | None = None  # step that was done first, and when

    def __enter__(self) -> Display:
        if self._shown and self._console.is_terminal:
            self._bar = self._shared or _bar(self._console)
            self._task = self._bar.add_task(self._label, total=self._steps, completed=self._done, text="")
            if self._shared is None:
                self._bar.start()
        else:
            self._next += LINE_SECONDS
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.update(self._task, text=self._text)
            if self._shared is None:
                self._bar.stop()

    def step(self, step: int) -> None:
        """``step`` steps are done. Called at every step, so it looks at the clock and nearly always returns."""
        if self._first is None:
            self._first = step, time.monotonic()
        if not self._shown or time.monotonic() < self._next:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._text)
            self._next = time.monotonic() + BAR_SECONDS
        else:
            self._line(step)

    def record(self, record: Record, *, evaluated: bool) -> None:
        """A record was made. Plain lines appear for those with an evaluation."""
        if not self._shown:
            return
        metrics = [f"{name} {_short(value)}" for name, value in record.items() if name not in OWN_FIELDS]
        kept = [f"kept {record['kept']:.1%}"] if "kept" in record else []  # a network in training has no mask
        self._text = ", ".join([f"loss {record['loss']:.4g}", *kept, *metrics])
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], text=self._text)
        elif evaluated:
            self._line(record["step"])

    def _line(self, step: int) -> None:
        now = time.monotonic()
        left = f"{now - self._began:.0f} s"
        if step < self._steps:
            # Not by the first step, in which code may be compiled.
            done, since = self._first or (self._done, self._began)
            left = f"{(now - since) / (step - done) * (self._steps - step):.0f} s left" if step > done else ""
        parts = [f"{self._label}: step {step}/{self._steps}", self._text, left]
        self._console.print(", ".join(filter(None, parts)), markup=False, highlight=False, soft_wrap=True)
        self._next = now + LINE_SECONDS


def _short(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"
