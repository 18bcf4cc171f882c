"""Sweeps: which runs are made, that each is the run it would be alone, what becomes of failures, and the table."""

import csv
import dataclasses
import json
import re
import statistics
from pathlib import Path

import pytest
import torch

import sublens as sl
from sublens import cli, studies
from sublens.report import RunFolder, as_text, read, sweep_page, tabulate
from sublens.report.comparing import apart
from sublens.report.run_folder import Chance, MaskResult, Overlap, OverlapValues, Verdict
from sublens.sweeping import sweep

STUDY = """
import os
from pathlib import Path
import torch
from torch import nn
import sublens as sl

def study(preset="small", *, width=4):
    def task(name, columns):
        def batches(step, seed):
            x = torch.rand(16, 3, generator=torch.Generator().manual_seed(seed + step))
            return x, x[:, :2]
        def loss(net, batch):
            if width == 5 and Path("broken").exists():
                raise ArithmeticError("five is\\nright out")
            if Path("once").exists():
                Path("once").unlink()
                os._exit(7)
            if width == 5 and Path("deadly").exists():
                os._exit(7)
            return (net(batch[0]) - batch[1])[:, columns].square().mean()
        def metric(net):
            return 1 / (1 + float(loss(net, batches(0, 1))))
        return sl.Task(name=name, batches=batches, loss=loss, metric=metric)

    return sl.Study(name="tiny", network=lambda seed: nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2)),
                    tasks=[task("left", [0]), task("right", [1])], control=task("all", [0, 1]), batch_size=16,
                    network_steps=10, mask_steps=10, mask_lr=0.5, keep=0.6, random_masks=1, preset=preset)
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("study.py").write_text(STUDY, encoding="utf-8")
    return "study.py"


def masks(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder, "masks").iterdir())}


def test_every_combination_is_a_run_of_its_own_and_the_table_is_over_the_seeds(study):
    assert not sweep(study, {"alpha": [1e-3, 2.0], "seed": [0, 1]}, out="all", report=False).failed
    found = [json.loads(path.read_text()) for path in Path("all/runs").glob("*/result.json")]
    assert sorted((run["settings"]["alpha"], run["seed"]) for run in found) == [
        (alpha, seed) for alpha in (0.001, 2.0) for seed in range(2)
    ]
    with open("all/sweep.csv", newline="") as file:
        lines = {(row["alpha"], row["measure"], row["of"]): row for row in csv.DictReader(file)}
    kept = {run["seed"]: run["masks"]["left"]["kept"] for run in found if run["settings"]["alpha"] == 2}
    line = lines["2.0", "kept", "left"]
    assert float(line["mean"]) == pytest.approx(statistics.fmean(kept.values()))
    assert float(line["sd"]) == pytest.approx(statistics.stdev(kept.values()))
    assert line["n"] == "2"
    chances = [run["overlap"]["chance"]["iou"]["mean"] for run in found if run["settings"]["alpha"] == 2]
    assert float(lines["2.0", "iou", "left and right"]["chance_mean"]) == pytest.approx(statistics.fmean(chances))
    table = json.loads(Path("all/sweep.json").read_text())["table"]
    assert [(row["settings"], row["seeds"]) for row in table] == [
        ({"alpha": 0.001}, [0, 1]),
        ({"alpha": 2.0}, [0, 1]),
    ]
    (measure,) = (m for m in table[1]["measures"] if (m["measure"], m["of"]) == ("kept", "left"))
    assert measure["values"] == [kept[0], kept[1]]
    page = Path("all/sweep.html").read_text(encoding="utf-8")
    assert "Against alpha" in page
    assert "<svg" in page


def test_processes_make_the_masks_that_a_run_has_alone_and_one_that_dies_takes_no_other_along(study):
    Path("deadly").touch()
    settings = {"width": [5, 4], "keep": [0.7], "seed": [1]}
    torch.set_num_threads(2)
    try:
        found = sweep(study, settings, out="all", jobs=2, report=False)
    finally:
        torch.set_num_threads(1)
    assert [outcome.status for outcome in found.outcomes] == ["failed", "done"]
    assert "process died" in found.failed[0].reason
    Path("deadly").unlink()
    assert not sweep(study, settings, out="all", resume=True, report=False).failed
    for width in (4, 5):
        chosen = dataclasses.replace(studies.load(study, width=width), keep=0.7)
        alone = sl.inspect(chosen, out=f"alone{width}", seed=1, progress=False, report=False)
        folder = Path(f"all/runs/width={width}_keep=0.7_seed=1")
        # Two threads were shared by two processes.
        assert json.loads((folder / "result.json").read_text())["versions"] == alone["versions"] | {"threads": "1"}
        assert (folder / "config.json").read_text() == Path(f"alone{width}/config.json").read_text()
        assert masks(folder) == masks(f"alone{width}")


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_on_ray_a_worker_that_is_killed_takes_no_run_along(study):
    ray = pytest.importorskip("ray")
    Path("once").touch()
    try:
        ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
        found = sweep(study, {"width": [5, 4], "seed": [0]}, out="all", jobs=2, engine="ray", report=False)
    finally:
        ray.shutdown()
    assert not found.failed
    assert not Path("once").exists()
    for width in (4, 5):
        sl.inspect(studies.load(study, width=width), out=f"alone{width}", progress=False, report=False)
        assert masks(f"all/runs/width={width}_seed=0") == masks(f"alone{width}")


@pytest.mark.filterwarnings("ignore")  # Dask's own
def test_on_dask_a_worker_that_is_killed_takes_no_run_along(study):
    pytest.importorskip("distributed")
    Path("once").touch()
    found = sweep(study, {"width": [5, 4], "seed": [0]}, out="all", jobs=2, engine="dask", report=False)
    assert not found.failed
    assert not Path("once").exists()
    for width in (4, 5):
        sl.inspect(studies.load(study, width=width), out=f"alone{width}", progress=False, report=False)
        assert masks(f"all/runs/width={width}_seed=0") == masks(f"alone{width}")


@pytest.mark.filterwarnings("ignore")
def test_dask_workers_with_several_threads_are_refused(study, monkeypatch):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", cluster.scheduler_address)
        with pytest.raises(sl.SettingError, match="--nthreads 1"):
            sweep(study, {"width": [5, 4], "seed": [0]}, out="all", jobs=1, engine="dask", report=False)


def test_a_failing_run_stops_no_other_and_is_made_again_only_with_resume(study, capsys):
    Path("broken").touch()
    command = ["sweep", study, "--set", "width=5,4", "--seeds", "2,", "--out", "all"]
    assert cli.run(command) == 1
    out, err = capsys.readouterr()
    assert re.search(r"^width 4 +1$", out, re.MULTILINE)
    assert "2 of 2: width 4, seed 2: done" in err
    assert "1 of 2 runs are not finished:\n  width 5, seed 2: ArithmeticError: five is right out\n" in err
    assert "--resume" in err
    assert "in loss" in Path("all/runs/width=5_seed=2/error.txt").read_text()
    runs = json.loads(Path("all/sweep.json").read_text())["runs"]
    assert [(run["settings"]["width"], run["status"], run["reason"]) for run in runs] == [
        (5, "failed", "ArithmeticError: five is right out"),
        (4, "done", None),
    ]
    assert "five is right out" in Path("all/sweep.html").read_text(encoding="utf-8")

    Path("broken").unlink()
    good = Path("all/runs/width=4_seed=2/result.json")
    good.write_text(good.read_text() + "\n")  # would be gone if the run were made again
    assert cli.run(command) == 1
    _, err = capsys.readouterr()
    assert "width 4, seed 2: finished before" in err
    assert "It failed before: ArithmeticError: five is right out" in err
    assert not Path("all/runs/width=5_seed=2/result.json").exists()

    assert cli.run([*command, "--resume"]) == 0
    assert good.read_text().endswith("\n\n")
    assert not Path("all/runs/width=5_seed=2/error.txt").exists()
    (row, _) = json.loads(Path("all/sweep.json").read_text())["table"]
    assert (row["settings"], row["seeds"]) == ({"width": 5}, [2])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "nope"),
        (["study.py", "--seeds", "0"], "--seeds 0"),
        (["study.py", "--seeds", "123456789"], "how many seeds"),
        (["study.py", "--seeds", "-1,2"], "seed=-1"),
        (["study.py", "--seeds", "few"], "few"),
        (["study.py", "--alpha", "1e-3,much"], "much"),
        (["study.py", "--alpha", "1e-3,1e-3"], "0.001 twice"),
        (["study.py", "--alpha", "1,-1"], "alpha=-1"),
        (["study.py", "--groups", "row,rwo"], "groups='rwo'"),
        (["study.py", "--steps", "1.5"], "1.5"),
        (["study.py", "--samples", "2,0"], "samples=0"),
        (["study.py", "--preset", "small", "--widths", "3"], "widths"),
        (["study.py", "--set", "widht=3"], "Did you mean 'width'"),
        (["study.py", "--set", "width"], "NAME=VALUE"),
        (["study.py", "--set", "seed=3"], "--seeds"),
        (["study.py", "--set", "biases=maybe"], "biases='maybe'"),
        (["study.py", "--set", "keep=0.5,1.5"], "keep=1.5"),
        (["study.py", "--jobs", "0"], "jobs=0"),
        (["study.py", "--engine", "rya"], "rya"),
        (["study.py", "--network", "missing.pt"], "missing.pt"),
        (["study.py", "--out", "study.py"], "study.py"),
    ],
)
def test_a_bad_setting_is_one_line_before_anything_runs(study, capsys, arguments, said):
    assert cli.run(["sweep", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert said in err
    assert sorted(path.name for path in Path().iterdir()) == ["study.py"]


def test_an_edited_study_is_not_taken_for_the_finished_one(study, capsys):
    assert cli.run(["sweep", study]) == 0
    trained = {path: path.read_bytes() for path in Path("sweeps").rglob("*.safetensors")}
    Path(study).write_text(STUDY + "\n", encoding="utf-8")
    # All is trained, so its questions are asked anew, and it says so. (A run on its own is never begun again unasked.)
    assert cli.run(["sweep", study, "--resume"]) == 0
    assert "asked anew" in capsys.readouterr().err
    assert trained == {path: path.read_bytes() for path in Path("sweeps").rglob("*.safetensors")}
    next(iter(trained)).unlink()
    Path(study).write_text(STUDY + "\n\n", encoding="utf-8")
    assert cli.run(["sweep", study, "--resume"]) == 2
    assert "file_sha256" in capsys.readouterr().err


def test_names_that_no_folder_can_have_stay_apart(study):
    found = sweep(study, {"preset": ["a/b", "a:b"], "seed": [0]}, out="all", report=False)
    assert not found.failed
    assert len(list(Path("all/runs").glob("*/result.json"))) == 2


def run_with(seed, accuracy, iou, *, study="s", preset="quick", settings=None, masks=("t",), **changes):
    band = Chance(0.25, 0.2, 0.3)
    values = OverlapValues({"iou": iou}, {"iou": band}, 10)
    values_of = {"first": {"t": accuracy, "u": 0.5}, "control": {"t": 0.75, "u": 0.5}}
    return RunFolder(
        study=study, preset=preset, seed=seed, settings=settings or {}, versions={}, seconds={},
        network={"t": 1.0, "u": 1.0},
        masks={
            name: MaskResult(of, {}, {}, {}, {"t": Chance(0.125, 0.1, 0.2)}, 0.5, {})
            for name, of in (*((mask, values_of["first"]) for mask in masks), ("all", values_of["control"]))
        },
        overlaps=(Overlap("t", "u", values, {}),), repeats={}, confusion={}, history={}, answers={}, analysis={},
        sharing={"t and u": accuracy - 1}, reused={"t": accuracy / 2},
        verdict={"reuse": Verdict("P", "holds" if iou == 0.25 else "fails", "so")}, **changes,
    )  # fmt: skip


def test_the_table_by_hand():
    runs = [
        ({"size": 1, "seed": 0}, run_with(0, 0.5, 0.25)),
        ({"size": 2, "seed": 0}, run_with(0, 0.25, 0.5)),
        ({"size": 1, "seed": 1}, run_with(1, 1.0, float("nan"))),
    ]
    one, two = tabulate(runs)
    assert (one.settings, one.seeds, two.settings, two.seeds) == ({"size": 1}, (0, 1), {"size": 2}, (0,))
    own = one.find(("accuracy", "t", "t"))
    assert (own.seen.n, own.seen.mean, own.seen.low, own.seen.high) == (2, 0.75, 0.5, 1.0)
    assert own.seen.sd == pytest.approx(0.125**0.5)
    assert own.chance.mean == 0.125
    assert one.find(("accuracy", "t", "u")) is None  # not its own task
    assert one.find(("accuracy", "all", "u")).seen.mean == 0.5  # a control has none
    assert one.find(("iou", "t and u", "")).values == (0.25,)
    assert two.find(("iou", "t and u", "")).seen.sd is None
    assert two.find(("iou", "t and u", "")).chance.mean == 0.25
    assert one.find(("index", "t and u", "")).values == (-0.5, 0.0)
    assert one.find(("index", "t and u", "")).chance.mean == 0
    reused = one.find(("reused", "t", ""))
    assert (reused.values, reused.chance.mean, reused.name) == ((0.25, 0.5), 0, "t: reused share")
    assert one.verdicts == {"reuse": {"holds": 1, "fails": 1, "undecided": 0}}
    # Student's t with one degree of freedom: 12.7062 standard errors (0.25) either way; accuracies lie in 0..1.
    index = one.find(("index", "t and u", ""))
    assert index.seen.interval == pytest.approx((-0.25 - 12.7062 * 0.25, -0.25 + 12.7062 * 0.25), abs=1e-4)
    assert own.seen.interval == (0.0, 1.0)
    assert not one.one_network
    assert two.find(("kept", "t", "")).seen.interval is None


def test_runs_on_one_network_say_so():
    given, other = {"network_file_sha256": "ab"}, {"network_file_sha256": "cd"}
    rows = tabulate([
        ({"size": 1, "seed": 0}, run_with(0, 0.5, 0.25, settings=given)),
        ({"size": 1, "seed": 1}, run_with(1, 0.5, 0.25, settings=given)),
        ({"size": 2, "seed": 0}, run_with(0, 0.5, 0.25, settings=given)),
        ({"size": 2, "seed": 1}, run_with(1, 0.5, 0.25, settings=other)),
    ])  # fmt: skip
    assert [row.one_network for row in rows] == [True, False]
    assert "Under size 1 all runs were given the same trained weights" in sweep_page("s", rows).html
    assert '<p class="note">All runs were given' in sweep_page("s", rows[:1]).html
    assert "trained weights" not in sweep_page("s", rows[1:]).html


def test_the_page_needs_nothing_else_and_believes_no_name():
    evil = "<script>alert(1)</script>"
    rows = tabulate(
        ({"alpha": alpha, "mode": mode, "seed": 0}, run_with(0, 0.5, 0.5))
        for alpha in (0, 1e-5, 1e-3)
        for mode in (evil, "other")
    )
    page = sweep_page(evil, rows, [(evil, evil)]).html
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page
    assert page.count("<svg") == 2  # one for each mode
    assert re.search(r"P_reuse: holds, fails, undecided.*alpha 0.*0, 1, 0", page, re.DOTALL)
    assert "From alpha 0 to 0.001" in page
    assert "No run has finished" in sweep_page("s", ()).html


def test_runs_of_several_studies_are_named_by_these():
    long = {"alpha": 1e-4, "file_sha256": "a" * 64, "study": {"width": 4}}
    runs = [
        run_with(0, 0.5, 0.5, study="one", settings=long),
        run_with(0, 0.5, 0.5, study="one", settings={**long, "alpha": 1e-3, "file_sha256": "b" * 64}),
        run_with(0, 0.5, 0.5, study="two", settings={"steps": 3}),
        run_with(0, 0.5, 0.5, study="two", preset="paper", settings={"steps": 5}),
    ]
    assert apart(runs) == [
        {"study": "one", "preset": "quick", "alpha": 1e-4, "file_sha256": "a" * 12},
        {"study": "one", "preset": "quick", "alpha": 1e-3, "file_sha256": "b" * 12},
        {"study": "two", "preset": "quick"},
        {"study": "two", "preset": "paper"},
    ]
    page = sweep_page("one, two", tabulate(zip(apart(runs[2:]), runs[2:], strict=True)))
    assert "study two" not in page.html  # both are of that study
    assert "preset paper" in page.html
    assert not page.figures  # a study's name or a preset is no axis
    page = sweep_page("one, two", tabulate(zip(apart(runs[:3]), runs[:3], strict=True)))
    assert "Against alpha" in page.html
    rates = [run_with(0, 0.5, 0.5, study="one", settings={"alpha": a, "lr": r}) for a in (1, 2) for r in (3, 4)]
    mixed = [run_with(0, 0.5, 0.5, study="two"), *rates]  # whichever comes first
    both = sweep_page("two, one", tabulate(zip(apart(mixed), mixed, strict=True)))
    assert len(both.figures) == 2  # one for each lr
    assert "study one, lr 3" in both.html
    assert "alpha none" not in page.html  # the other study has no such setting
    assert as_text([]) == "none"


def test_many_masks_are_drawn_together_and_one_value_is_no_line():
    masks = [f"without-{index}" for index in range(12)]
    rows = tabulate(({"alpha": alpha}, run_with(0, 0.5, 0.5, masks=masks)) for alpha in (1e-4, 1e-3))
    drawn = sweep_page("s", rows)
    (drawing,) = drawn.figures.values()
    assert "kept, mean of 13: 50.0\xa0% to 50.0\xa0%" in drawn.html
    assert "mean of 13" in drawing.svg and "random masks" in drawing.svg
    assert "without-3" not in drawing.svg
    page = sweep_page("s", tabulate(({"alpha": 1, "mode": mode}, run_with(0, 0.5, 0.5)) for mode in ("a", "b")))
    assert page.figures  # along the mode
    alone = sweep_page(
        "s", tabulate(({"alpha": a, "mode": m}, run_with(0, 0.5, 0.5)) for a, m in ((1, "a"), (2, "b"), (3, "b")))
    )
    assert len(alone.figures) == 1
    assert "Only one value of alpha has finished runs here." in alone.html


def test_a_finished_run_of_a_sweep_reads_as_any_other(study):
    sweep(study, {"seed": [4]}, out="all", report=False)
    assert read(Path("all/runs/seed=4")).seed == 4


def test_runs_are_compared_by_what_sets_them_apart(study, capsys):
    Path("runs").mkdir()
    for name, width, seed in (("a", 4, 0), ("b", 4, 1), ("c", 6, 1)):
        chosen = dataclasses.replace(studies.load(study, width=width), settings={"width": width})
        sl.inspect(chosen, out=f"runs/{name}", seed=seed, progress=False, report=False)
    capsys.readouterr()
    assert cli.run(["compare", "runs/a", "runs/b", "runs/c", "--out", "both"]) == 0
    assert re.search(r"^width 4 +2$", capsys.readouterr().out, re.MULTILINE)
    table = json.loads(Path("both/comparison.json").read_text())["table"]
    assert [(row["settings"], row["seeds"]) for row in table] == [({"width": 4}, [0, 1]), ({"width": 6}, [1])]
    assert {path.name for path in Path("both/figures").iterdir()} == {"sweep-1.svg", "sweep-1.pdf"}
    assert "Against width" in Path("both/comparison.html").read_text(encoding="utf-8")
    assert Path("both/comparison.csv").read_text().startswith("width,measure,")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["."], "two or more"), ([".", "../{here}"], "twice"), ([".", "nowhere"], "result.json"), ([], "RUN")],
)
def test_what_cannot_be_compared_is_one_line(study, capsys, arguments, said):
    here = Path().resolve().name
    assert cli.run(["compare", *(argument.format(here=here) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert not Path("comparison").exists()
