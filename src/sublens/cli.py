"""The command line. It reads options, makes a run or a sweep, and shows what came out; nothing is decided here.

Torch is loaded when a study is, not before: ``sublens --help`` answers at once.
"""

import json
import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from sublens import __version__, studies
from sublens.answers import percent, span
from sublens.errors import SublensError

if TYPE_CHECKING:
    from sublens.report import Row
    from sublens.sweeping import Outcome

SOME_FAILED = 1
BAD_INPUT = 2
MOST_SEEDS = 10_000  # more is a seed given where a number of seeds is meant
_MANY_TASKS = 6  # more columns than that are too narrow to be read on a terminal
INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended

app = typer.Typer(
    name="sublens",
    help="Find subnetworks: learn a binary mask over a frozen network's weights, and say what the mask means.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sublens {__version__}")
        raise typer.Exit


@app.callback()
def _sublens(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command("inspect")
def _inspect(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A built-in study, or a Python file with study().")],
    out: Annotated[
        Path | None, typer.Option(help="Run folder. By default runs/STUDY-PRESET-seedSEED.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the network, the data order and the gates.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps of each mask.", show_default="the study's")] = None,
    samples: Annotated[int | None, typer.Option(help="Draws per step.", show_default="the study's")] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Weight of the penalty, before the division by the batch size.", show_default="the study's"),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            help="What shares a logit: weight, row, column, channel, kernel, head, layer, or blocks such as 16x16.",
            show_default="the study's",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A study's preset; add-mul has quick and paper.", show_default="the study's")
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(help="Widths of the hidden layers, such as 400,400,200.", show_default="the study's"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other setting: keep=0.9, or one of the study's own, folder=images. Give it again for each.",
        ),
    ] = None,
    network: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights already trained (.safetensors, .pt): the network is not trained.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in its folder.")] = False,
) -> None:
    """Train a study's network and its masks, analyse them, and write a run folder with a report."""
    asked = {"preset": preset, "widths": _whole_numbers(widths)}
    asked = {name: value for name, value in asked.items() if value is not None}
    for name, value in map(_setting, settings or ()):
        if name in ("seed", "steps", "samples", "alpha", "groups", "network", "out"):
            raise typer.BadParameter(f"--set {name}={value}: {name} has an option of its own. Say --{name} {value}.")
        if name in asked:
            raise typer.BadParameter(f"--set {name}=... is given twice ({asked[name]}, {value}). Leave one out.")
        asked[name] = _plain(value)
    chosen = studies.configured(study, asked)
    from sublens.inspection import default_folder, inspect

    folder = default_folder(chosen, seed) if out is None else out
    try:
        inspect(
            chosen,
            out=folder,
            seed=seed,
            steps=steps,
            samples=samples,
            alpha=alpha,
            groups=groups,
            resume=resume,
            network=network,
        )
    except KeyboardInterrupt:
        options = {
            "--out": out,
            "--seed": seed or None,
            "--steps": steps,
            "--samples": samples,
            "--alpha": alpha,
            "--groups": groups,
            "--preset": preset,
            "--widths": widths,
            "--network": network,
        }
        given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
        given += [text for setting in settings or () for text in ("--set", setting)]
        command = shlex.join(["sublens", "inspect", study, *given, "--resume"])
        typer.echo(f"\nInterrupted. The run in {folder} can be resumed: {command}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    _show(folder)


@app.command("sweep")
def _sweep(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A built-in study, or a Python file with study().")],
    seeds: Annotated[
        str | None,
        typer.Option(
            help="How many seeds, from 0 on; or the seeds themselves: 3,5,8, or one of them: 3,", show_default="1"
        ),
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="LIST", help="Training steps of each mask.")] = None,
    samples: Annotated[str | None, typer.Option(metavar="LIST", help="Draws per step.")] = None,
    alpha: Annotated[
        str | None, typer.Option(metavar="LIST", help="Weights of the penalty, such as 1e-5,1e-4,1e-3.")
    ] = None,
    groups: Annotated[
        str | None, typer.Option(metavar="LIST", help="What shares a logit, such as weight,row,16x16.")
    ] = None,
    preset: Annotated[str | None, typer.Option(metavar="LIST", help="The study's presets.")] = None,
    widths: Annotated[
        list[str] | None,
        typer.Option(help="Widths of the hidden layers, such as 400,400,200. Give it again for each network."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=LIST",
            help="Any other setting: keep=0.5,0.9, or one of the study's own. Give it again for each.",
        ),
    ] = None,
    network: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights already trained: no run trains the network.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The sweep's folder. By default sweeps/STUDY.", show_default=False)
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes at a time. They share the cores.")] = 1,
    engine: Annotated[
        str | None, typer.Option(help="ray or dask: the processes of such a cluster.", show_default="this machine's")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the runs that failed, or were interrupted.")
    ] = False,
) -> int:
    """Run a study with every combination of settings, each in a run folder of its own, and put all in one table."""
    swept: dict[str, list[Any]] = {}
    for name, text, kind in (
        ("preset", preset, str),
        ("steps", steps, int),
        ("samples", samples, int),
        ("alpha", alpha, float),
        ("groups", groups, str),
    ):
        if text is not None:
            swept[name] = _list(f"--{name}", text, kind)
    if widths:
        swept["widths"] = [_whole_numbers(text) for text in widths]
    for text in settings or ():
        name, values = _setting(text)
        if name in swept or name == "seed":
            raise typer.BadParameter(
                f"--set {text!r} must be NAME=VALUE,VALUE with a name that is not given already; seeds go to --seeds."
            )
        swept[name] = _list(f"--set {name}", values, _plain)
    swept["seed"] = _seeds(seeds)
    from sublens.sweeping import sweep

    try:
        found = sweep(study, swept, out=out, jobs=jobs, engine=engine, resume=resume, network=network, told=_tell)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command with --resume goes on with the sweep.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    _show_rows(found.rows, found.folder, "sweep")
    if not found.failed:
        return 0
    typer.echo(f"\n{len(found.failed)} of {len(found.outcomes)} runs are not finished:", err=True)
    for outcome in found.failed:
        typer.echo(f"  {outcome.name}: {outcome.reason}", err=True)
    typer.echo("The same command with --resume tries them again.", err=True)
    return SOME_FAILED


def _tell(outcome: "Outcome", ended: int, total: int) -> None:
    status = {"skipped": "finished before", "failed": "failed"}.get(outcome.status, "done")
    typer.echo(f"{ended} of {total}: {outcome.name}: {status}", err=True)


def _show_rows(rows: "Sequence[Row]", folder: Path, files: str) -> None:
    from sublens.report import written

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("setting, and what was measured")
    for column in ("mean ± sd", "random masks", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name, "", "", str(len(row.seeds)))
        for measure in row.measures:
            seen, chance = (written(spread, measure.what) for spread in (measure.seen, measure.chance))
            table.add_row(f"  {measure.name}", seen, chance, str(measure.seen.n))
    console = _console()
    console.print(table)
    if any(row.one_network for row in rows):
        console.print(
            "\nRuns were given the same trained weights: their spread is that of masks of this one network.",
            soft_wrap=True,
        )
    console.print()
    for kind in ("json", "csv", "html"):
        console.print(f"{kind:>5}: {folder / f'{files}.{kind}'}", soft_wrap=True)


@app.command("duel")
def _duel(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A built-in study, or a Python file with study().")],
    gates: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Contestants: names of gates, magnitude, magnitude-per-layer, attribution, random, or FILE.py:GATE.",
        ),
    ] = "GumbelSigmoid,HardConcrete,Bernoulli,Threshold,ContinuousSparsification,TopK,magnitude,attribution,random",
    kept: Annotated[str, typer.Option(metavar="LIST", help="Fractions of the weights to keep.")] = "0.5,0.2,0.1,0.05",
    seeds: Annotated[
        str, typer.Option(help="How many seeds, from 0 on; or the seeds themselves: 3,5,8, or one of them: 3,")
    ] = "3",
    tasks: Annotated[
        str | None, typer.Option(metavar="LIST", help="Names of tasks.", show_default="all of the study's")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of each mask.", show_default="the study's")] = None,
    samples: Annotated[int | None, typer.Option(help="Draws per step.", show_default="the study's")] = None,
    preset: Annotated[str | None, typer.Option(help="A study's preset.", show_default="the study's")] = None,
    widths: Annotated[
        str | None,
        typer.Option(help="Widths of the hidden layers, such as 400,400,200.", show_default="the study's"),
    ] = None,
    network: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights already trained: the network is not trained.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The duel's folder. By default duels/STUDY.", show_default=False)
    ] = None,
) -> None:
    """Compare gates on one frozen network at the same kept fractions. What its folder holds is not done again."""
    fractions = _list("--kept", kept, float)
    chosen = studies.load(study, preset=preset, widths=_whole_numbers(widths))
    from sublens.dueling import duel, from_file

    contestants = [from_file(name) if ":" in name else name for name in _list("--gates", gates, str)]
    try:
        found = duel(
            chosen,
            contestants,
            fractions,
            out=out,
            seeds=_seeds(seeds),
            tasks=None if tasks is None else _list("--tasks", tasks, str),
            steps=steps,
            samples=samples,
            network=network,
            progress=False,
            told=lambda bout, ended, total: typer.echo(f"{ended} of {total}: {bout.name}", err=True),
        )
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command goes on with the duel.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    from sublens.report import accuracy_text, memory_text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("contestant", no_wrap=True)
    for column in ("kept", "accuracy, 95 %", "IoU", "time", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.table.rows:
        stable = f"{sum(row.stability) / len(row.stability):.2f}" if row.stability else "n/a"
        name = row.contestant if len(found.table.network) == 1 else f"{row.task}: {row.contestant}"
        time = f"{sorted(row.seconds)[len(row.seconds) // 2]:.0f} s"
        table.add_row(name, f"{100 * row.asked:g} %", accuracy_text(row), stable, time, memory_text(row))
    console = _console()
    console.print(table)
    console.print("\nAccuracy: mean over the seeds and its interval. IoU: of the masks of two seeds.\n", soft_wrap=True)
    for kind in ("json", "csv", "html"):
        console.print(f"{kind:>5}: {found.folder / f'duel.{kind}'}", soft_wrap=True)


@app.command("compare")
def _compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(help="Folder to write the table and the page into.")] = Path("comparison"),
) -> None:
    """Put several finished runs in one table and one page, by the settings in which they differ."""
    from sublens.report import compare

    _show_rows(compare(runs, out), out, "comparison")


@app.command("studies")
def _studies() -> None:
    """List the built-in studies."""
    table = Table("study", "what it asks", box=None, pad_edge=False, header_style="bold")
    for name, description in studies.descriptions().items():
        table.add_row(name, description)
    console = _console()
    console.print(table)
    console.print("\nA study of your own is a Python file that defines study(): sublens inspect study.py")


@app.command("show")
def _show_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
) -> None:
    """Print what a finished run found."""
    _show(run)


def _show(folder: Path) -> None:
    from sublens.report import read, sentences

    run = read(folder)
    many = len(run.network) > _MANY_TASKS
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("weights used", no_wrap=True)
    for column in (*(["own task", "the other tasks"] if many else run.network), "kept"):
        table.add_column(column, justify="right", no_wrap=many)

    def add(label: str, own: str, accuracy: Mapping[str, float], kept: float) -> None:
        figures = [percent(accuracy[task]) if task in accuracy else "n/a" for task in run.network]
        if many:
            others = [value for task, value in accuracy.items() if task != own]
            figures = [percent(accuracy[own]) if own in accuracy else "", span(others) if others else "n/a"]
        table.add_row(label, *figures, percent(kept))

    add("whole network", "", run.network, 1.0)
    for name, mask in run.masks.items():
        add(f"{name} mask", name, mask.accuracy, mask.kept)
        add("  its inverse", name, mask.inverse_accuracy, 1 - mask.kept)
    console = _console()
    console.print(f"{run.study}, seed {run.seed}: accuracy on each task\n")
    console.print(table)
    for sentence in sentences.overlaps(run.overlaps):
        console.print(f"\n{sentence}")
    for answer in run.answers.values():
        console.print(f"\n{answer.title}\n{answer.sentence}")
    for verdict in run.verdict.values():
        console.print(f"\n{verdict.name}: {verdict.outcome}. {sentences.capitalised(verdict.because)}")
    if (folder / "report.html").is_file():
        console.print(f"\nReport: {folder / 'report.html'}", soft_wrap=True)


def _console() -> Console:
    # Names come from files: nothing in them is markup.
    return Console(markup=False, highlight=False, emoji=False)


def _whole_numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"--widths {text!r} must be whole numbers with commas between, as in 400,400,200."
        ) from None


def _list(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        what = {int: "whole numbers", float: "numbers"}.get(kind, "values")  # type: ignore[call-overload]
        raise typer.BadParameter(f"{option} {text!r} must be {what} with commas between.") from None


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"--set {text!r} must be NAME=VALUE.")
    return name, value


def _plain(text: str) -> Any:
    """Read a number or truth value as JSON writes them; anything else is text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (int, float)) else text


def _seeds(text: str | None) -> list[int]:
    if text is None:
        return [0]
    if "," in text:
        return _list("--seeds", text.removesuffix(","), int)
    (number,) = _list("--seeds", text, int)
    if not 1 <= number <= MOST_SEEDS:
        raise typer.BadParameter(
            f"--seeds {text} must be how many seeds, from 1 to {MOST_SEEDS:,}. One seed of your own is written {text},"
            " with a comma."
        )
    return list(range(number))


def run(arguments: list[str]) -> int:
    """Run the command line; return its exit code.

    0, 1 if runs of a sweep failed, 2 for bad input (stderr says what), or 130 for Ctrl-C.
    """
    _speak_up()
    try:
        code: Any = app(args=arguments, prog_name="sublens", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except TyperException as error:
        if not arguments:  # the help has been printed instead
            return BAD_INPUT
        return _refuse(error)
    except SublensError as error:
        return _refuse(error)
    except OSError as error:
        return _refuse(f"{error.filename or 'A file'}: {error.strerror or error}.")
    return code if isinstance(code, int) else 0


def _speak_up() -> None:
    """Let it be said on stderr that loops are compiled (half a minute without a word looks like a fault), and what
    makes a run's masks worthless."""
    for name in ("sublens.kernels", "sublens.inspection"):
        log = logging.getLogger(name)
        if not log.handlers:
            log.addHandler(_ToStderr())
            log.setLevel(logging.INFO)


class _ToStderr(logging.Handler):
    """Writes where a progress bar, if there is one, makes room."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


def _refuse(error: object) -> int:
    message = error.format_message() if isinstance(error, TyperException) else error
    typer.echo(f"Error: {' '.join(str(message).split())}", err=True)
    return BAD_INPUT


def main() -> None:
    """Entry point of the command ``sublens``."""
    sys.exit(run(sys.argv[1:]))
