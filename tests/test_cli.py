"""The command line: its surface, what it says about bad input, and that an interrupted run can be resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer

from sublens import cli

STUDY = """
import torch
from torch import nn
import sublens as sl

def task(name, columns):
    def batches(step, seed):
        x = torch.rand(16, 3, generator=torch.Generator().manual_seed(seed + step))
        return x, x[:, :2]
    def loss(net, batch):
        return (net(batch[0]) - batch[1])[:, columns].square().mean()
    def metric(net):
        return 1 / (1 + float(loss(net, batches(0, 1))))
    return sl.Task(name=name, batches=batches, loss=loss, metric=metric)

def study():
    return sl.Study(name="tiny", network=lambda seed: nn.Linear(3, 2), tasks=[task("left", [0]), task("right", [1])],
                    control=task("all", [0, 1]), batch_size=16, network_steps=10, mask_steps=10, random_masks=1)
"""

# Python run with -m ends by the signal itself, which a shell reports as 130 too, if a Ctrl-C came while it executed a
# string, as where a dataclass is made: it then takes the exception for unhandled, though it was caught.
INTERRUPTED = (cli.INTERRUPTED, -signal.SIGINT)


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("study.py").write_text(STUDY, encoding="utf-8")
    return "study.py"


def in_a_process(*arguments, **keywords):
    return subprocess.Popen(
        [sys.executable, "-m", "sublens", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **keywords,
    )


def test_commands_and_options_are_these():
    surface = {
        name: sorted(option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts))
        for name, command in typer.main.get_command(cli.app).commands.items()
    }
    assert surface == {
        "compare": ["--out", "runs"],
        "duel": [
            "--gates", "--kept", "--network", "--out", "--preset", "--samples", "--seeds", "--steps", "--tasks",
            "--widths", "study",
        ],
        "inspect": [
            "--alpha", "--groups", "--network", "--out", "--preset", "--resume", "--samples", "--seed", "--set",
            "--steps", "--widths", "study",
        ],
        "studies": [],
        "show": ["run"],
        "sweep": [
            "--alpha", "--engine", "--groups", "--jobs", "--network", "--out", "--preset", "--resume", "--samples",
            "--seeds", "--set", "--steps", "--widths", "study",
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["inspect", "--help"], ["sweep", "--help"], ["studies"], ["--version"], ["inspect", "nope"]],
)
def test_torch_is_not_loaded_before_a_study_is(arguments):
    program = f"import sys; from sublens import cli; cli.run({arguments!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == "sublens 0.1.0\n"


def test_studies_lists_every_built_in_study(capsys):
    assert cli.run(["studies"]) == 0
    printed = capsys.readouterr().out
    assert "add-mul " in printed
    assert "add-mul-lstm" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "add-mull"], "Did you mean add-mul"),
        (["inspect", "nowhere/study.py"], "nowhere/study.py"),
        (["inspect", "add-mul", "--widths", "400,wide"], "400,wide"),
        (["inspect", "add-mul", "--widths", "0"], "widths"),
        (["inspect", "add-mul", "--preset", "slow"], "slow"),
        (["inspect", "study.py", "--widths", "3"], "widths"),
        (["inspect", "study.py", "--steps", "0"], "steps"),
        (["inspect", "study.py", "--steps", "many"], "--steps"),
        (["inspect", "study.py", "--samples", "-1"], "samples"),
        (["inspect", "study.py", "--alpha", "nan"], "alpha"),
        (["inspect", "study.py", "--seed", "-1"], "seed"),
        (["inspect", "study.py", "--network", "missing.safetensors"], "missing.safetensors"),
        (["inspect", "study.py", "--network", "study.py"], "study.py"),
        (["inspect", "study.py", "--network", "."], "."),
        (["inspect", "study.py", "--out", "study.py"], "study.py"),
        (["inspect", "study.py", "--out", "."], "not empty"),
        (["inspect", "study.py", "--out", ".", "--resume"], "config.json"),
        (["inspect", "."], "."),
        (["inspect", "study.py", "--bogus"], "--bogus"),
        (["inspect", "study.py", "--set", "keep"], "NAME=VALUE"),
        (["inspect", "study.py", "--set", "keep=1.5"], "keep=1.5"),
        (["inspect", "study.py", "--set", "depth=3"], "has no setting 'depth'"),
        (["inspect", "study.py", "--set", "mask_lrr=3"], "Did you mean 'mask_lr'"),
        (["inspect", "study.py", "--set", "mask_steps=3"], "--steps"),
        (["inspect", "study.py", "--set", "keep=0.5", "--set", "keep=0.6"], "keep"),
        (["inspect", "study.py", "--set", "alpha=1"], "--alpha"),
        (["inspect", "class-removal", "--set", "folder=nowhere"], "nowhere does not exist"),
        (["inspect", "class-removal", "--set", "dropout=perhaps"], "dropout='perhaps'"),
        (["inspect", "permuted-digits", "--set", "permutations=1"], "permutations=1"),
        (["inspekt"], "inspekt"),
        (["show", "missing"], "missing"),
        (["show", "study.py"], "study.py"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(study, capsys, arguments, said):
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    ("changed", "arguments", "said"),
    [
        ("", ["--groups", "head"], "groups='head'"),
        ("", ["--network", "bad.pt"], "do not fit the network"),
        ("compared=['9'],", [], "compared must name masked layers: '9'"),
        ("first_half=['9'],", [], "first_half names 9"),
        ("from_control=['9'],", [], "from_control must name masked layers: '9'"),
        ("where='9',", [], "where='9'"),
    ],
)
def test_what_cannot_work_is_refused_before_there_is_a_folder(study, capsys, changed, arguments, said):
    torch.save({"weight": torch.ones(3)}, "bad.pt")
    text = STUDY.replace("batch_size=16,", f"batch_size=16, {changed}")
    Path("changed.py").write_text(text, encoding="utf-8")
    assert cli.run(["inspect", "changed.py", "--out", "one", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert not Path("one").exists()


def test_tables_of_many_runs_do_not_go_among_the_files_of_one(study, capsys):
    for folder in ("one", "two"):
        assert cli.run(["inspect", study, "--out", folder]) == 0
    before = sorted(Path("one").rglob("*"))
    capsys.readouterr()
    for arguments in (["sweep", study, "--seeds", "2"], ["compare", "one", "two"]):
        assert cli.run([*arguments, "--out", "one"]) == 2
        assert "The folder one holds a run" in capsys.readouterr().err
    assert sorted(Path("one").rglob("*")) == before


def test_a_run_is_made_shown_and_its_weights_used_again(study, capsys):
    assert cli.run(["inspect", study, "--out", "one", "--seed", "3"]) == 0
    made = capsys.readouterr().out
    assert "left mask" in made
    assert "P_specialize (different functions use different weights): undecided." in made
    assert Path("one/report.html").is_file()
    assert cli.run(["show", "one"]) == 0
    assert capsys.readouterr().out == made
    assert cli.run(["inspect", study, "--out", "two", "--network", "one/network.safetensors"]) == 0
    assert Path("two/network.safetensors").read_bytes() == Path("one/network.safetensors").read_bytes()


def test_many_tasks_fit_on_a_terminal(study, capsys):
    tasks = ", ".join(f'task("task-with-a-name-{i}", [{i % 2}])' for i in range(7))
    text = STUDY.replace('tasks=[task("left", [0]), task("right", [1])]', f"tasks=[{tasks}]")
    Path("seven.py").write_text(text, encoding="utf-8")
    assert cli.run(["inspect", "seven.py", "--out", "one"]) == 0
    lines = capsys.readouterr().out.splitlines()
    masks = json.loads(Path("one/result.json").read_text(encoding="utf-8"))["masks"]
    (row,) = [line for line in lines if line.startswith("task-with-a-name-3 mask")]
    found = masks["task-with-a-name-3"]["accuracy"]
    others = [100 * value for name, value in found.items() if name != "task-with-a-name-3"]
    assert f"{100 * found['task-with-a-name-3']:.1f}\u00a0%" in row
    assert f"{min(others):.1f}\u00a0% to {max(others):.1f}\u00a0%" in row
    assert max(map(len, lines[: lines.index("")])) <= 80


def test_settings_reach_the_study(study, capsys):
    text = STUDY.replace("def study():", "def study(depth=1):").replace(
        "batch_size=16,", "batch_size=16, settings={'depth': depth},"
    )
    Path("deep.py").write_text(text, encoding="utf-8")
    assert cli.run(["inspect", "deep.py", "--out", "one", "--set", "depth=3", "--set", "keep=0.75"]) == 0
    settings = json.loads(Path("one/config.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["study"]["depth"], settings["keep"]) == (3, 0.75)


def test_ctrl_c_leaves_a_run_that_the_printed_command_finishes(study):
    Path("slow.py").write_text(STUDY.replace("mask_steps=10", "mask_steps=400_000"), encoding="utf-8")
    process = in_a_process("inspect", "slow.py", "--out", "a run", "--seed", "5", "--set", "keep=0.7")
    deadline = time.monotonic() + 120
    while not list(Path("a run").glob("unfinished/all/*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in INTERRUPTED, err
    assert "Traceback" not in err
    assert "sublens inspect slow.py --out 'a run' --seed 5 --set keep=0.7 --resume" in err
    # The command is accepted as it was printed: with one more option it is another run, and refused by name.
    printed = ["inspect", "slow.py", "--out", "a run", "--seed", "5", "--set", "keep=0.7", "--resume"]
    assert cli.run([*printed, "--samples", "2"]) == 2
    again = in_a_process(*printed)
    with pytest.raises(subprocess.TimeoutExpired):  # it goes on training
        again.communicate(timeout=15)
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=60)
    assert again.returncode in INTERRUPTED


def test_names_in_a_run_are_no_markup(study, capsys):
    assert cli.run(["inspect", study, "--out", "one"]) == 0
    result = json.loads(Path("one/result.json").read_text(encoding="utf-8"))
    result["study"] = "[red]x[/red]\x1b[2J"
    Path("one/result.json").write_text(json.dumps(result), encoding="utf-8")
    capsys.readouterr()
    assert cli.run(["show", "one"]) == 0
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out
    assert "\x1b[2J" not in out


def test_module_is_the_command():
    process = in_a_process("--version", env={**os.environ})
    assert process.communicate(timeout=60)[0] == "sublens 0.1.0\n"
    assert process.returncode == 0


def test_it_is_said_once_that_loops_are_compiled(study):
    process = in_a_process("inspect", study)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    told = [line for line in errors.splitlines() if "compiled" in line]
    assert len(told) == 1
    assert told[0].startswith("sublens: loading the fused CPU kernels")
