"""``inspect`` from end to end, on a study that takes seconds."""

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sublens.answers import Answer, Bars, Histogram, Spread
from sublens.errors import BatchError, FileError, MismatchError, NonFiniteError, SettingError, StudyError
from sublens.inspection import default_folder, inspect, inspecting, judging
from sublens.inspection import network as network_module
from sublens.mask import Mask
from sublens.masked_network import MaskedNetwork
from sublens.questions import BINS, stability_of
from sublens.storage import held, load_weights
from sublens.study import Asked, Study, Task, seed_from

STEPS = 60


def task(name: str, outputs: list[int], at_batch: Callable[[], object] = lambda: None) -> Task:
    """Return the task of copying some of four inputs to the outputs."""
    x_test = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))

    def batches(step: int, seed: int) -> Tensor:
        at_batch()
        return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed_from(seed, step)))

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return mse_loss(net(x)[:, outputs], x[:, outputs])

    def metric(net: nn.Module) -> float:
        return float(((net(x_test) - x_test)[:, outputs].abs() < 0.5).double().mean())

    return Task(name=name, batches=batches, loss=loss, metric=metric)


def make_study(at_batch: Callable[[], object] = lambda: None, **changes: Any) -> Study:
    def network(seed: int) -> nn.Module:
        # With dropout, whose random numbers a resumed run must draw again.
        return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 4))

    settings: dict[str, Any] = {
        "name": "copy",
        "preset": "tiny",
        "network": network,
        "tasks": [task("low", [0, 1], at_batch), task("high", [2, 3], at_batch)],
        "control": task("both", [0, 1, 2, 3], at_batch),
        "batch_size": 16,
        "network_steps": STEPS,
        "network_lr": 1e-2,
        "mask_steps": STEPS,
        "mask_lr": 0.1,
        "alpha": 0.05,
        "evaluate_every": 20,
        "repeated": ["low"],
        "random_masks": 2,
        "confusion": lambda net: {"told": {"right": 1.0}},
    }
    return Study(**{**settings, **changes})


def run(out: Path, study: Study | None = None, **arguments: Any) -> dict[str, Any]:
    return inspect(study or make_study(), out=out, **{"progress": False, "report": False, **arguments})


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspecting, "CHECKPOINT_EVERY", 7)
    monkeypatch.setattr(network_module, "CHECKPOINT_EVERY", 7)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run(out)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a run by name; of result.json all but the wall times."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    result = json.loads(found["result.json"])
    assert set(result.pop("seconds")) == {"network", "both", "low", "high", "low-repeat", "analysis", "total"}
    found["result.json"] = json.dumps(result).encode()
    parts = json.loads(found["parts.json"])
    assert all(part.pop("seconds") >= 0 for part in parts.values())
    found["parts.json"] = json.dumps(parts).encode()
    return found


def test_the_run_folder_holds_what_it_should(finished: Path) -> None:
    assert set(contents(finished)) == {
        "config.json",
        "history.jsonl",
        "network.safetensors",
        "parts.json",
        "result.json",
        *(f"masks/{name}.safetensors" for name in ("both", "low", "high", "low-repeat")),
    }
    result = json.loads((finished / "result.json").read_text())
    config = json.loads((finished / "config.json").read_text())
    assert {key: result[key] for key in config} == config
    assert set(result["network"]["accuracy"]) == {"low", "high"}
    assert list(result["masks"]) == ["both", "low", "high"]
    assert result["overlap"]["masks"] == ["low", "high"]
    assert result["repeats"]["low"]["overlap"]["masks"] == ["low", "low-repeat"]
    assert set(result["confusion"]) == {"network", "both", "low", "high"}
    assert set(result["verdict"]) == {"specialize", "reuse", "pairs", "excluded", "reused"}
    assert [pair["tasks"] for pair in result["verdict"]["pairs"]] == [["low", "high"]]
    counts = Answer.from_json(result["analysis"]["gates"]).figures[0]
    assert isinstance(counts, Histogram)
    assert [series.name for series in counts.series] == ["both", "low", "high"]
    # A mask keeps the gates whose keep probability is above a half.
    above = [sum(series.values[BINS // 2 :]) for series in counts.series]
    assert above == pytest.approx([entry["kept"] for entry in result["masks"].values()])


def test_the_result_is_that_of_the_files(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    study = make_study()
    network = study.network(0)
    network.load_state_dict(load_weights(finished / "network.safetensors"))
    network.eval()
    masks = {name: Mask.load(finished / "masks" / f"{name}.safetensors", network) for name in result["masks"]}
    with torch.no_grad():
        assert result["network"]["accuracy"] == {part.name: part.metric(network) for part in study.tasks}
        for name, mask in masks.items():
            assert result["masks"][name]["accuracy"] == {
                part.name: part.metric(mask.apply(network)) for part in study.tasks
            }
            assert result["masks"][name]["kept"] == mask.kept
    assert result["overlap"]["iou"] == masks["low"].iou(masks["high"])
    assert masks["low"] != Mask.load(finished / "masks" / "low-repeat.safetensors", network)


def test_the_masks_say_which_outputs_a_task_needs(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    network = make_study().network(0)
    network.load_state_dict(load_weights(finished / "network.safetensors"))
    low = Mask.load(finished / "masks" / "low.safetensors", network)
    kept = low["3.weight"].double().mean(1)
    assert kept[2:].max() < kept[:2].min()
    assert result["masks"]["low"]["accuracy"]["low"] > result["masks"]["low"]["inverse_accuracy"]["low"]


def test_the_history_has_every_part(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(record["part"] for record in records)) == ["network", "both", "low", "high", "low-repeat"]
    network = [record for record in records if record["part"] == "network"]
    assert [record["step"] for record in network] == [20, 40, 60]
    assert network[-1]["loss"] < network[0]["loss"]
    last = [record for record in records if record["part"] == "low"][-1]
    result = json.loads((finished / "result.json").read_text())
    assert last["step"] == STEPS
    assert last["low"] == result["masks"]["low"]["accuracy"]["low"]
    assert last["kept"] == result["masks"]["low"]["kept"]


def test_the_same_command_gives_the_same_bits_and_another_seed_others(finished: Path, tmp_path: Path) -> None:
    torch.manual_seed(12345)
    run(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(finished)
    run(tmp_path / "other", seed=1)
    other = contents(tmp_path / "other")
    same = [name for name, content in contents(finished).items() if other[name] == content]
    assert same == []


def test_the_network_trains_in_training_mode_and_is_masked_in_evaluation_mode(tmp_path: Path) -> None:
    seen: dict[str, set[bool]] = {"whole": set(), "masked": set()}

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                part = "whole" if x.shape[0] == 16 else "masked"  # 16 examples, or 4 for each of 4 samples
                seen[part].add(self.training)
            return super().forward(x)

    run(tmp_path / "run", make_study(network=lambda seed: Watched(4, 4).eval(), network_steps=3, mask_steps=2))
    assert seen == {"whole": {True}, "masked": {False}}


def test_a_study_asks_questions_of_its_own(tmp_path: Path) -> None:
    seen: list[Asked] = []

    def question(asked: Asked) -> Answer:
        seen.append(asked)
        x = torch.rand(()).item()
        return Answer(
            title="How much is kept?", sentence="This much.", numbers={"x": x, "kept": asked.masks["low"].kept}
        )

    study = make_study(mask_steps=2, network_steps=2, questions={"first": question, "second": question})
    result = run(tmp_path / "run", study)
    assert result["answers"] == json.loads((tmp_path / "run" / "result.json").read_text())["answers"]
    assert list(result["answers"]) == ["first", "second"]
    first, second = (Answer.from_json(answer).numbers for answer in result["answers"].values())
    assert first and second and first["kept"] == result["masks"]["low"]["kept"]
    assert first["x"] != second["x"]
    assert list(seen[0].masks) == ["both", "low", "high", "low-repeat"]
    assert set(seen[0].metrics) == {"low", "high"}
    assert not any(module.training for module in seen[0].network.modules())
    assert (seen[0].seed, seen[0].study.mask_steps) == (0, 2)
    assert run(tmp_path / "again", study)["answers"] == result["answers"]
    with pytest.raises(StudyError, match="second returned a str, not a"):
        run(tmp_path / "wrong", dataclasses.replace(study, questions={"first": question, "second": lambda asked: "x"}))


def test_stability_varies_one_seed_at_a_time(tmp_path: Path) -> None:
    drawn: list[tuple[int, ...]] = []
    plain = task("low", [0, 1])
    at = plain.batches

    def batches(step: int, seed: int) -> Tensor:
        drawn.append((step, seed))
        assert callable(at)
        return cast(Tensor, at(step, seed))

    watched = dataclasses.replace(plain, batches=batches)
    study = make_study(
        tasks=[watched, task("high", [2, 3])],
        network_steps=3,
        mask_steps=30,
        random_masks=0,
        questions={"luck": stability_of("low", masks=3)},
    )
    answer = Answer.from_json(run(tmp_path / "run", study)["answers"]["luck"])
    _, *seeds = [seed for step, seed in drawn if step == 0]  # the first is tried before anything is trained
    assert len(seeds) == 2 + 4  # the mask, its repeat, and twice two for the question
    assert seeds[0] == seeds[2] == seeds[3]  # other noise: the mask's own batches
    assert len({seeds[0], seeds[1], seeds[4], seeds[5]}) == 4
    (bars,) = answer.figures
    assert isinstance(bars, Bars)
    assert bars.groups == ("other noise", "other batches", "both")
    values = bars.series[0].values
    assert isinstance(values[0], Spread) and values[0].low <= values[0].mean <= values[0].high < 1
    assert values[2] == answer.numbers["both"]  # type: ignore[index]
    with pytest.raises(StudyError, match="no task 'middle'"):
        run(tmp_path / "wrong", make_study(mask_steps=1, network_steps=1, questions={"x": stability_of("middle")}))
    with pytest.raises(SettingError, match="at least 2"):
        stability_of("low", masks=1)


def test_masks_take_layers_over_from_the_control(tmp_path: Path) -> None:
    run(tmp_path / "run", make_study(mask_steps=40, network_steps=2, from_control=["3.weight"]))
    masks = {path.stem: Mask.load(path) for path in (tmp_path / "run" / "masks").iterdir()}
    others = ("low", "high", "low-repeat")
    for name in others:
        assert torch.equal(masks[name]["3.weight"], masks["both"]["3.weight"])
        assert masks[name].network == masks["both"].network
    assert not all(torch.equal(masks[name]["0.weight"], masks["both"]["0.weight"]) for name in others)


def test_layers_of_the_control_are_in_place_while_the_others_are_trained(tmp_path: Path) -> None:
    seen: list[tuple[set[str], Tensor]] = []

    def watched(name: str, outputs: list[int]) -> Task:
        plain = task(name, outputs)

        def loss(net: nn.Module, x: Tensor) -> Tensor:
            if isinstance(net, MaskedNetwork):
                seen.append((set(net.logits), net.network.get_parameter("3.weight").detach().clone()))
            return plain.loss(net, x)

        return dataclasses.replace(plain, loss=loss)

    study = make_study(
        tasks=[watched("low", [0, 1])],
        control=watched("both", [0, 1, 2, 3]),
        repeated=(),
        mask_steps=40,
        network_steps=2,
        where=["0", "3.weight"],
        from_control=["3"],
    )
    run(tmp_path / "run", study)
    control = Mask.load(tmp_path / "run" / "masks" / "both.safetensors")["3.weight"]
    assert 0 < control.float().mean() < 1
    of_control, of_task = seen[2], seen[-1]  # both losses are tried before anything is trained
    assert of_control[0] == {"0.weight", "3.weight"}
    assert of_task[0] == {"0.weight"}
    assert torch.equal(of_task[1], torch.where(control, of_control[1], 0.0))


def test_a_network_is_prepared_once_before_its_masks_are_trained(tmp_path: Path) -> None:
    calls = 0

    def prepare(network: nn.Module) -> nn.Module:
        nonlocal calls
        calls += 1
        last = network.get_submodule("3")
        assert isinstance(last, nn.Linear)
        last.weight[2:] = last.weight[:2]  # no gradient is asked for here
        return network

    out, study = tmp_path / "run", make_study(mask_steps=2, network_steps=2, prepare=prepare)
    run(out, study)
    weights = load_weights(out / "network.safetensors")
    assert torch.equal(weights["3.weight"][2:], weights["3.weight"][:2])
    (out / "result.json").unlink()
    run(out, study, resume=True)
    assert calls == 1
    with pytest.raises(StudyError, match="changed the names or shapes"):
        run(tmp_path / "other", dataclasses.replace(study, prepare=lambda network: nn.Linear(4, 4)))
    with pytest.raises(StudyError, match="returned a NoneType"):
        run(tmp_path / "none", dataclasses.replace(study, prepare=lambda network: None))


def test_without_its_result_a_finished_run_is_asked_anew(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    (again / "result.json").unlink()
    masks = {path.name: path.stat().st_mtime_ns for path in (again / "masks").iterdir()}
    run(again, resume=True)
    assert masks == {path.name: path.stat().st_mtime_ns for path in (again / "masks").iterdir()}
    result = json.loads((again / "result.json").read_text())
    # Also what is known of the gates alone, whose logits are gone.
    assert result["analysis"]["gates"] == json.loads((finished / "result.json").read_text())["analysis"]["gates"]
    before, after = (json.loads((folder / "result.json").read_text())["seconds"] for folder in (finished, again))
    assert {**before, "analysis": 0, "total": 0} == {**after, "analysis": 0, "total": 0}
    assert contents(again) == contents(finished)


def question(value: float) -> Callable[[Asked], Answer]:
    return lambda asked: Answer(title="How many?", sentence=f"So many: {value}.", numbers={"x": value})


def test_questions_can_be_mended_when_everything_is_trained(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, version = tmp_path / "run", "settings.study.file_sha256"

    def asking(value: float, file: str, **arguments: Any) -> dict[str, Any]:
        study = make_study(questions={"many": question(value)}, random_masks=3, settings={"file_sha256": file})
        return run(folder, study, resume=True, **arguments)

    shutil.copytree(finished, folder)
    before = contents(folder)
    result = asking(0.25, "ab", report=True)
    assert contents(folder)["config.json"] == before["config.json"]
    assert {name: before[name] for name in before if "safetensors" in name or name == "history.jsonl"}.items() <= (
        contents(folder).items()
    )
    assert result["settings"]["random_masks"] == 3 and result["answers"]["many"]["numbers"] == {"x": 0.25}
    assert result["trained_with"] == {"settings.random_masks": 2, "settings.questions": [], version: None}
    assert "with settings.random_masks = 2" in " ".join((folder / "report.html").read_text("utf-8").split())
    (told,) = [record.getMessage() for record in caplog.records if "asked anew" in record.getMessage()]
    assert "file_sha256" in told and "--out" in told

    # The same again has nothing to ask, and another version of the file asks another time.
    written = contents(folder)["result.json"]
    asking(0.5, "ab")
    assert contents(folder)["result.json"] == written
    assert asking(0.5, "cd")["answers"]["many"]["numbers"] == {"x": 0.5}
    assert "trained_with" not in run(folder, resume=True)
    assert contents(folder) == {**before, "report.html": contents(folder)["report.html"]} | {
        name: content for name, content in contents(folder).items() if name.startswith("figures")
    }


def test_a_run_that_is_not_trained_yet_is_another_one_with_other_questions(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    with pytest.raises(MismatchError, match=r"mask_steps was 60 and is now 70; .*\(--out\)\.$"):
        run(folder, make_study(random_masks=3), steps=70, resume=True)
    (folder / "masks" / "high.safetensors").unlink()
    with pytest.raises(MismatchError, match=r"random_masks was 2 and is now 3.*once everything is trained"):
        run(folder, make_study(random_masks=3), resume=True)
    run(folder, resume=True)


def test_the_verdict_says_in_which_layers_masks_were_compared(finished: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "run", make_study(compared=["3.weight"], random_masks=0))
    (pair,) = result["verdict"]["pairs"]
    assert pair["index"] is not None
    reasons = [result["verdict"][key]["because"] for key in ("specialize", "reuse")]
    assert all("share in 3.weight " in because for because in reasons if "share" in because)
    assert "share in" not in json.dumps(json.loads((finished / "result.json").read_text())["verdict"])


def test_layers_that_share_their_logits_can_be_named(tmp_path: Path) -> None:
    names = list(MaskedNetwork(make_study().network(0), biases=True, groups="row").groupings)
    shared = [name for name in names if name.endswith("bias")]
    study = make_study(network_steps=1, mask_steps=1, repeated=(), biases=True, groups="row")
    run(
        tmp_path / "run",
        dataclasses.replace(study, compared=shared[:1], first_half=shared[:1], from_control=shared[:1]),
    )


def test_what_a_run_has_not_noted_of_its_gates_is_told(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    for name in ("result.json", "parts.json"):
        (again / name).unlink()
    run(again, resume=True)
    assert any("how sure the gates of both, low, high" in record.getMessage() for record in caplog.records)


def test_one_name_is_no_list_of_names() -> None:
    with pytest.raises(StudyError, match=r"repeated=\['low'\]"):
        make_study(repeated="low")


@pytest.mark.parametrize("found", [92.2, -0.5, math.nan, None, "0.5", 10**400, torch.zeros(2)])
def test_a_metric_that_is_no_share_is_refused_before_anything_is_trained(tmp_path: Path, found: Any) -> None:
    drawn: list[int] = []
    study = make_study(network_steps=1, mask_steps=1, repeated=())
    control = dataclasses.replace(study.control, batches=lambda step: drawn.append(step))
    for what in ("metric", "held_back", "left_out"):
        other = dataclasses.replace(study.tasks[1], **{what: lambda net: found})
        with pytest.raises(StudyError, match=rf"Task '{other.name}': {what} returned .* in 0\.\.1"):
            run(tmp_path / "run", dataclasses.replace(study, tasks=[study.tasks[0], other], control=control))
    assert not drawn
    assert not (tmp_path / "run").exists()


def test_a_batch_smaller_than_the_samples_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match=r"batch of \d+ cannot be split for 4000 samples"):
        run(tmp_path / "run", make_study(network_steps=1, mask_steps=1), samples=4000)
    assert not (tmp_path / "run").exists()


def test_what_the_network_has_not_learned_is_told_before_its_masks_are_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = make_study(network_steps=1, mask_steps=1, repeated=())
    knows, not_yet = (
        dataclasses.replace(study.tasks[k], metric=metric)
        for k, metric in ((0, lambda net: 0.5), (1, lambda net: 0.102))
    )
    run(tmp_path / "run", dataclasses.replace(study, tasks=[knows, not_yet]))
    (said,) = [record.getMessage() for record in caplog.records if record.name == "sublens.inspection"]
    assert f"the network answers only {not_yet.name} in 10.2" in said
    caplog.clear()
    run(tmp_path / "other", dataclasses.replace(study, tasks=[knows]))
    assert not [record for record in caplog.records if record.name == "sublens.inspection"]


def test_nothing_global_is_changed(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    run(tmp_path / "run", make_study(mask_steps=2, network_steps=2))
    assert torch.equal(torch.get_rng_state(), state)


TRIED = 3  # each task's loss, before anything is trained


@pytest.mark.parametrize("stop", [5, 33, STEPS + 59, 4 * STEPS + 30])
def test_a_run_stopped_by_ctrl_c_resumes_to_the_same_bits(finished: Path, tmp_path: Path, stop: int) -> None:
    calls = 0

    def at_batch() -> None:
        nonlocal calls
        calls += 1
        if calls == TRIED + stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", make_study(at_batch))
    assert not (tmp_path / "run" / "result.json").exists()
    run(tmp_path / "run", make_study(at_batch), resume=True)
    assert contents(tmp_path / "run") == contents(finished)
    # Ctrl-C leaves a checkpoint of the very step; its batch is drawn once more, to be compared.
    assert calls == TRIED + 5 * STEPS + 2


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_inspection as tests
from sublens.inspection import inspecting, network

inspecting.CHECKPOINT_EVERY = network.CHECKPOINT_EVERY = 7
calls = 0

def at_batch():
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

tests.run(Path(sys.argv[2]), tests.make_study(at_batch), resume=True)
"""


def test_a_run_that_is_killed_again_and_again_resumes_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    out = tmp_path / "run"
    for stop in (25, STEPS + 20, 2 * STEPS + 40):
        done = subprocess.run(
            [sys.executable, str(script), str(Path(__file__).parent), str(out), str(stop)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    calls = 0

    def at_batch() -> None:
        nonlocal calls
        calls += 1

    run(out, make_study(at_batch), resume=True)
    assert contents(out) == contents(finished)
    assert calls < 4 * STEPS  # what was finished is not done again


def test_a_kill_while_the_result_is_made_costs_no_training(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(inspecting, "_answers", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run")
    calls: list[int] = []
    run(tmp_path / "run", make_study(lambda: calls.append(1)), resume=True)
    assert calls == []
    assert contents(tmp_path / "run") == contents(finished)


def test_resuming_a_finished_run_returns_its_result(finished: Path) -> None:
    before = contents(finished)
    calls: list[int] = []
    result = run(finished, make_study(lambda: calls.append(1)), resume=True)
    assert result == json.loads((finished / "result.json").read_text())
    assert calls == []
    assert contents(finished) == before


def test_a_folder_in_use_is_refused(finished: Path, tmp_path: Path) -> None:
    before = contents(finished)
    with pytest.raises(SettingError, match="is not empty"):
        run(finished)
    with pytest.raises(MismatchError, match="seed was 0 and is now 1"):
        run(finished, seed=1, resume=True)
    with pytest.raises(MismatchError, match=r"settings\.mask_steps was 60 and is now 70; settings\.alpha was 0\.05"):
        run(finished, steps=70, alpha=0.1, resume=True)
    with pytest.raises(MismatchError, match='study was "copy" and is now "other"'):
        run(finished, make_study(name="other"), resume=True)
    assert contents(finished) == before
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(SettingError, match="no run of sublens"):
        run(tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    with pytest.raises(FileError, match=r"letter\.txt"):
        run(tmp_path / "letter.txt")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    with pytest.raises(FileError, match="cannot be read as JSON"):
        run(tmp_path / "damaged", resume=True)


def test_a_folder_in_which_another_run_writes_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = contents(folder)
    with held(folder), pytest.raises(FileError, match="Another run is writing"):
        run(folder, resume=True)
    assert contents(folder) == before
    run(folder, resume=True)
    assert not (folder / ".lock").exists()


def in_any_order(found: dict[str, bytes]) -> dict[str, Any]:
    """A part that is made again has its records at the history's end."""
    return {**found, "history.jsonl": sorted(found["history.jsonl"].splitlines()), "parts.json": None}


def test_a_part_that_is_missing_is_made_again_even_with_a_result(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for gone in ("masks/high.safetensors", "network.safetensors"):
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        (folder / gone).unlink()
        run(folder, resume=True)
        assert in_any_order(contents(folder)) == in_any_order(contents(finished))


@pytest.mark.parametrize("name", ["masks/high.safetensors", "network.safetensors", "result.json", "parts.json"])
def test_what_is_damaged_is_made_again_when_it_is_deleted(finished: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    damaged = folder / name
    damaged.write_bytes((finished / name).read_bytes()[:40])
    with pytest.raises(FileError, match=re.escape(f"{damaged}") + ".* --resume makes it again"):
        run(folder, resume=True)
    damaged.unlink()
    run(folder, resume=True)
    if name != "parts.json":  # of which wall times and histograms are lost for good
        assert in_any_order(contents(folder)) == in_any_order(contents(finished))


def test_a_line_of_the_history_that_is_no_record_is_named(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "masks" / "high.safetensors").unlink()
    with open(folder / "history.jsonl", "a") as file:
        file.write('{"part')
    with pytest.raises(FileError, match=r"holds a line that is no record: '{\"part'"):
        run(folder, resume=True)


@pytest.mark.parametrize(
    ("field", "function", "said"),
    [
        ("batches", lambda seed: None, r"batches is called as batches\(step, seed=...\), which does not fit \(seed\)"),
        ("batches", lambda: None, r"batches\(step\), which does not fit \(\): too many positional arguments"),
        ("loss", lambda net: None, r"loss\(net, batch\), which does not fit \(net\)"),
        ("metric", lambda net, data: None, r"metric\(net\), which does not fit .*missing a required argument: 'data'"),
        ("left_out", lambda: 0.0, r"Task 'low': left_out is called as left_out\(net\)"),
    ],
)
def test_a_function_of_a_task_that_cannot_be_called_as_it_will_be(field: str, function: Any, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        dataclasses.replace(task("low", [0]), **{field: function})


@pytest.mark.parametrize(
    ("field", "function", "said"),
    [
        ("network", lambda: nn.Linear(4, 4), r"Study 'copy': network is called as network\(seed\)"),
        ("confusion", lambda: {}, r"confusion\(net\), which does not fit \(\)"),
        ("questions", {"why": lambda: None}, r"the question why is called as why\(asked\)"),
    ],
)
def test_a_function_of_a_study_that_cannot_be_called_as_it_will_be(field: str, function: Any, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        make_study(**{field: function})
    assert make_study(network=lambda *seeds, width=4: nn.Linear(4, width)).name == "copy"


def test_a_decorator_may_give_a_function_what_it_needs() -> None:
    def with_data(function: Callable[[nn.Module, Tensor], float]) -> Callable[[nn.Module], float]:
        @functools.wraps(function)
        def inner(net: nn.Module) -> float:
            return function(net, torch.ones(2))

        return inner

    @with_data
    def metric(net: nn.Module, data: Tensor) -> float:
        return float(data.mean())

    assert dataclasses.replace(task("low", [0]), metric=metric).measure(nn.Identity()) == 1


def test_what_can_be_iterated_is_no_function() -> None:
    class Loader(list[Tensor]):
        def __call__(self) -> None:
            raise AssertionError("called")

    batches = Loader([torch.randn(16, 4)])
    assert dataclasses.replace(task("low", [0]), batches=batches).batches_for(3) is batches


def test_an_empty_folder_and_a_new_one_can_be_resumed_into(tmp_path: Path) -> None:
    study = make_study(mask_steps=2, network_steps=2)
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty", study)
    run(tmp_path / "new", study, resume=True)
    assert contents(tmp_path / "empty") == contents(tmp_path / "new")


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_masks_on_weights_already_trained(finished: Path, tmp_path: Path, kind: str) -> None:
    weights = finished / "network.safetensors"
    if kind == "pt":
        weights = tmp_path / "weights.pt"
        torch.save(load_weights(finished / "network.safetensors"), weights)
    run(tmp_path / "run", network=weights)
    mine, theirs = contents(tmp_path / "run"), contents(finished)
    for name in theirs:
        if name.endswith(".safetensors"):
            assert mine[name] == theirs[name], name
    with pytest.raises(MismatchError, match="network_file_sha256"):
        run(tmp_path / "run", resume=True)


def test_weights_of_another_network_are_refused(finished: Path, tmp_path: Path) -> None:
    study = make_study(network=lambda seed: nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 5)))
    with pytest.raises(MismatchError, match=r"do not fit.*2\.weight is missing.*3\.weight is not in the network"):
        run(tmp_path / "run", study, network=finished / "network.safetensors")
    wide = make_study(network=lambda seed: nn.Sequential(nn.Linear(4, 13), nn.ReLU(), nn.ReLU(), nn.Linear(13, 4)))
    with pytest.raises(MismatchError, match=r"0\.weight has shape \(12, 4\) instead of \(13, 4\)"):
        run(tmp_path / "wide", wide, network=finished / "network.safetensors")
    with pytest.raises(FileError, match="nothing"):
        run(tmp_path / "none", network=tmp_path / "nothing.pt")
    assert not (tmp_path / "none").exists()


def test_arguments_replace_the_studys_settings(tmp_path: Path) -> None:
    result = run(tmp_path / "run", make_study(network_steps=2), steps=3, samples=2, alpha=0.5)
    settings = result["settings"]
    assert (settings["mask_steps"], settings["samples"], settings["alpha"]) == (3, 2, 0.5)


def test_alpha_is_divided_by_the_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fit = inspecting.fit

    def watched(*arguments: Any, **settings: Any) -> Any:
        seen.append(settings["alpha"])
        return fit(*arguments, **settings)

    monkeypatch.setattr(inspecting, "fit", watched)
    run(tmp_path / "run", make_study(network_steps=1, mask_steps=1, repeated=()), alpha=0.5)
    assert seen == [0.5 / 16] * 3


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True])
def test_an_impossible_seed_is_refused(tmp_path: Path, seed: Any) -> None:
    with pytest.raises(SettingError, match="must be a whole number"):
        run(tmp_path / "run", seed=seed)
    assert not (tmp_path / "run").exists()


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="not a str"):
        inspect("add-mul")  # type: ignore[arg-type]
    with pytest.raises(StudyError, match=r"network\(seed\) returned a int"):
        run(tmp_path / "run", make_study(network=lambda seed: 3))


def test_a_network_that_diverges_is_named(tmp_path: Path) -> None:
    broken = task("both", [0, 1, 2, 3])
    study = make_study(
        control=Task(
            name="both",
            batches=broken.batches,
            loss=lambda net, x: broken.loss(net, x) * float("nan"),
            metric=broken.metric,
        )
    )
    with pytest.raises(NonFiniteError, match="loss of the network is nan at step 0") as caught:
        run(tmp_path / "run", study)
    assert caught.value.step == 0


def test_three_tasks_are_compared_in_pairs_and_one_with_none(tmp_path: Path) -> None:
    tasks = [task("a", [0]), task("b", [1]), task("c", [2])]
    settings: dict[str, Any] = {"mask_steps": 2, "network_steps": 2, "repeated": ()}
    three = run(tmp_path / "three", make_study(tasks=tasks, **settings))
    assert [one["masks"] for one in three["overlaps"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert three["overlap"] == three["overlaps"][0]
    one = run(tmp_path / "one", make_study(tasks=tasks[:1], confusion=None, **settings))
    assert one["overlap"] is None
    assert "confusion" not in one


def test_the_default_folder_names_study_preset_and_seed() -> None:
    assert default_folder(make_study(), 3) == Path("runs/copy-tiny-seed3")
    assert default_folder(make_study(preset=None), 0) == Path("runs/copy-seed0")


def test_the_report_is_written_and_again_when_resumed(finished: Path) -> None:
    run(finished, resume=True, report=True)
    assert (finished / "report.html").exists()


def test_what_a_task_excludes_is_measured_and_judged(tmp_path: Path) -> None:
    low, high = task("low", [0, 1]), task("high", [2, 3])
    # The other outputs are held back from the one, and left out by the other.
    study = make_study(
        tasks=[dataclasses.replace(low, held_back=high.metric), dataclasses.replace(high, left_out=low.metric)],
        functions={},
        mask_steps=200,
    )
    result = run(tmp_path / "run", study)
    held_back, left_out = result["excluded"]
    assert (held_back["task"], held_back["kind"]) == ("low", "held_back")
    assert (left_out["task"], left_out["kind"]) == ("high", "left_out")
    for found, mask, other in ((held_back, "low", "high"), (left_out, "high", "low")):
        assert found["network"] == result["network"]["accuracy"][other]
        assert found["mask"] == result["masks"][mask]["accuracy"][other]
        assert found["control"] == result["masks"]["both"]["accuracy"][other]
        assert found["random"]["low"] <= found["random"]["mean"] <= found["random"]["high"]
    of_low, of_high = result["verdict"]["excluded"]
    chance = held_back["random"]["mean"]
    assert of_low["same_function"]
    assert of_low["left"] == pytest.approx((held_back["mask"] - chance) / (held_back["control"] - chance))
    assert not of_high["same_function"]
    assert of_high["left"] == pytest.approx(left_out["mask"] / left_out["control"])
    assert (
        "low holds back" in result["verdict"]["reuse"]["because"] or "low mask" in result["verdict"]["reuse"]["because"]
    )


def test_random_masks_beside_what_is_excluded_keep_whole_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Mask] = []
    original = judging.accuracies

    def watched(net: nn.Module, metrics: Any, mask: Mask | None = None) -> dict[str, float]:
        drawn.extend([mask] if mask is not None else [])
        return original(net, metrics, mask)

    monkeypatch.setattr(judging, "accuracies", watched)
    low, high = task("low", [0, 1]), task("high", [2, 3])
    study = make_study(tasks=[dataclasses.replace(low, left_out=high.metric)], repeated=[], groups="row")
    run(tmp_path / "run", study)
    assert len(drawn) == 12  # ten random ones, the control's, and the task's
    for mask in drawn:
        for name in mask:
            rows = mask[name].flatten(1)
            assert torch.equal(rows.all(1), rows.any(1)), name


def test_what_excludes_must_be_a_function() -> None:
    with pytest.raises(StudyError, match="held_back must be a function, not a float"):
        dataclasses.replace(task("low", [0]), held_back=0.5)  # type: ignore[arg-type]
