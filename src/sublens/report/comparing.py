"""Several finished runs side by side, whatever they are: a table of what they found, by what sets them apart."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sublens.errors import FileError, SettingError
from sublens.report.page import write_figures
from sublens.report.run_folder import RunFolder, read, refuse_a_run
from sublens.report.sweep_page import sweep_page
from sublens.report.sweep_table import Row, as_csv, as_json, tabulate


def compare(folders: Sequence[Path], out: Path) -> tuple[Row, ...]:
    """Write ``comparison.json``, ``.csv`` and ``.html`` over finished runs; return the table.

    Runs that differ in nothing but their seeds are put together, as in a sweep.

    Args:
        folders: the run folders.
        out: folder to write into; it is made if it does not exist.

    Raises:
        SettingError: fewer than two runs, or one of them twice, if only as a copy; or ``out`` is the folder of a run.
        FileError: a run cannot be read, or the comparison not written.
    """
    places = [folder.resolve() for folder in folders]
    twice = [folder for index, folder in enumerate(folders) if places[index] in places[:index]]
    if len(folders) < 2 or twice:
        what = f"{twice[0]} is given twice" if twice else f"{len(folders)} is given"
        raise SettingError(f"A comparison needs two or more different runs; {what}.")
    refuse_a_run(out, "comparison")
    runs = [read(folder) for folder in folders]
    _refuse_the_same(folders, runs)
    rows = tabulate(zip(apart(runs), runs, strict=True))
    title = ", ".join(dict.fromkeys(run.study for run in runs))
    table = {"runs": [str(folder) for folder in folders], "table": as_json(rows)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.json").write_text(json.dumps(table, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (out / "comparison.csv").write_text(as_csv(rows), encoding="utf-8")
        page = sweep_page(title, rows)
        write_figures(page.figures, out)
        (out / "comparison.html").write_text(page.html, encoding="utf-8")
    except OSError as error:
        raise FileError(f"The comparison cannot be written to {out}: {error.strerror}.") from error
    except ValueError as error:  # JSON has no NaN, which sublens never writes
        raise FileError(f"A setting of a run is not a finite number; its result.json is damaged ({error}).") from error
    return rows


def _refuse_the_same(folders: Sequence[Path], runs: Sequence[RunFolder]) -> None:
    """Runs of the same seed and settings are one run: counted as two, they would have no spread."""
    for i, (folder, run) in enumerate(zip(folders, runs, strict=True)):
        for other, earlier in zip(folders[:i], runs[:i], strict=True):
            mine, its = ((each.study, each.preset, each.seed, each.settings) for each in (run, earlier))
            if mine == its and run.seed is not None:
                raise SettingError(
                    f"{other} and {folder} are the same run: the study {run.study} with the same settings and seed"
                    f" {run.seed}. It would be counted twice, as if there were no spread. Compare runs of other seeds."
                )


def apart(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Return of each run what sets it apart from the others; the seed does not.

    Runs of several studies, or presets, are named by these, since next to all settings differ then; and by the settings
    in which runs of one study and preset differ.
    """
    kinds = [(run.study, run.preset) for run in runs]
    flat = [_flat(run.settings) for run in runs]
    found: list[dict[str, Any]] = []
    for (study, preset), settings in zip(kinds, flat, strict=True):
        like = [other for kind, other in zip(kinds, flat, strict=True) if kind == (study, preset)]
        names = dict.fromkeys(name for other in like for name in other)
        differing = [name for name in names if any(other.get(name) != like[0].get(name) for other in like)]
        named = {
            **({"study": study} if len({kind[0] for kind in kinds}) > 1 else {}),
            **({"preset": preset} if len({kind[1] for kind in kinds}) > 1 else {}),
        }
        found.append({**named, **{name: _short(name, settings.get(name)) for name in differing}})
    return found


def _short(name: str, value: Any) -> Any:
    """A file's hash as it stands in a heading."""
    return value[:12] if name.endswith("_sha256") and isinstance(value, str) else value


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Put the study's own settings (``settings.study``) among the others, which come first where names are the same."""
    own = settings.get("study")
    rest = {name: value for name, value in settings.items() if name != "study"}
    return {**({str(name): value for name, value in own.items()} if isinstance(own, dict) else {}), **rest}
