"""The command line. It reads options, calls :func:`sublens.inspect`, and shows what came out; nothing is decided here.

Torch is loaded when a study is, not before: ``sublens --help`` answers at once.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from sublens import __version__, studies
from sublens.errors import SublensError

BAD_INPUT = 2
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
    preset: Annotated[
        str | None, typer.Option(help="A study's preset; add-mul has quick and paper.", show_default="the study's")
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(help="Widths of the hidden layers, such as 400,400,200.", show_default="the study's"),
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
    chosen = studies.load(study, preset=preset, widths=_whole_numbers(widths))
    from sublens.inspection import default_folder, inspect

    folder = default_folder(chosen, seed) if out is None else out
    try:
        inspect(
            chosen, out=folder, seed=seed, steps=steps, samples=samples, alpha=alpha, resume=resume, network=network
        )
    except KeyboardInterrupt:
        options = {
            "--out": out,
            "--seed": seed or None,
            "--steps": steps,
            "--samples": samples,
            "--alpha": alpha,
            "--preset": preset,
            "--widths": widths,
            "--network": network,
        }
        given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
        command = shlex.join(["sublens", "inspect", study, *given, "--resume"])
        typer.echo(f"\nInterrupted. The run in {folder} can be resumed: {command}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    _show(folder)


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
    percent = sentences.percent
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("weights used")
    for column in (*run.network, "kept"):
        table.add_column(column, justify="right")
    table.add_row("whole network", *map(percent, run.network.values()), percent(1.0))
    for name, mask in run.masks.items():
        for label, accuracy, kept in (
            (f"{name} mask", mask.accuracy, mask.kept),
            ("  its inverse", mask.inverse_accuracy, 1 - mask.kept),
        ):
            figures = [percent(accuracy[task]) if task in accuracy else "n/a" for task in run.network]
            table.add_row(label, *figures, percent(kept))
    console = _console()
    console.print(f"{run.study}, seed {run.seed}: accuracy on each task\n")
    console.print(table)
    for pair in run.overlaps:
        console.print(f"\n{sentences.overlap(pair, {})}")
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


def run(arguments: list[str]) -> int:
    """Run the command line; return its exit code: 0, 2 for bad input (stderr says what), or 130 for Ctrl-C."""
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


def _refuse(error: object) -> int:
    message = error.format_message() if isinstance(error, TyperException) else error
    typer.echo(f"Error: {' '.join(str(message).split())}", err=True)
    return BAD_INPUT


def main() -> None:
    """Entry point of the command ``sublens``."""
    sys.exit(run(sys.argv[1:]))
