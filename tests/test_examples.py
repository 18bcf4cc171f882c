"""The scripts in examples/: each runs, finds a mask that does its task, and is short enough to read."""

import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = {  # fewer steps than the scripts', and no worker processes where the test needs none
    "accelerate_loop": {"epochs": 2},
    "checkpointing": {"steps": 40},
    "compiled": {"steps": 40, "backend": "aot_eager"},  # the default, inductor, needs a C++ compiler and a minute
    "huggingface_trainer": {"steps": 60},
    "lightning_fabric": {"epochs": 1},
    "lightning_trainer": {"epochs": 1},
    "plain_loop": {"steps": 40, "workers": 1},
    "tracking": {"steps": 50},
}
NEEDS = {
    "accelerate_loop": "accelerate",
    "huggingface_trainer": "transformers",
    "lightning_fabric": "lightning",
    "lightning_trainer": "lightning",
    "tracking": "tensorboard",
}


def test_every_example_is_run_here():
    elsewhere = {"gradient_leak", "digits", "bfloat16"}  # test_gradient_leak.py, test_duel.py, test_study_add_mul.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHORT) | elsewhere


@pytest.mark.filterwarnings("ignore", "error:::sublens")  # theirs are not our mistakes
@pytest.mark.parametrize("name", sorted(SHORT))
def test_an_example_runs_and_its_mask_does_the_task(name, tmp_path, monkeypatch, capsys):
    needed = NEEDS.get(name)
    if needed is not None and find_spec(needed) is None:
        pytest.skip(f"needs the package {needed}: python -m pip install 'sublens[examples]'")
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    main(**SHORT[name])
    printed = capsys.readouterr().out
    found = re.search(
        r"([\d.]+)% of the weights kept, (?:accuracy (?P<accuracy>[\d.]+)|loss (?P<loss>[\d.]+))", printed
    )
    assert found, printed
    assert 1 < float(found[1]) < 99.9
    if found["accuracy"]:
        assert float(found["accuracy"]) > 0.45  # of four classes, by networks that were never trained
    else:
        assert float(found["loss"]) < 0.68  # ln 2 is 0.693


@pytest.mark.parametrize("name", sorted(SHORT))
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60


def test_tensorboard_has_what_the_callback_logged(tmp_path, monkeypatch):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs the package tensorboard: python -m pip install 'sublens[examples]'",
    )
    monkeypatch.chdir(tmp_path)
    run = runpy.run_path(str(EXAMPLES / "tracking.py"))["main"](steps=50)
    events = accumulator.EventAccumulator(str(tmp_path / "runs" / "mask"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("kept")]
    assert logged == [(record["step"], pytest.approx(record["kept"])) for record in run.history]
