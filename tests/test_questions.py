"""What every run asks of its masks: the answers follow the numbers, and stay drawable whatever the study is like."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from sublens.analysis import accuracies, interrogate
from sublens.answers import Answer, Bars, Histogram, Lines, Matrix, Picture
from sublens.mask import Mask, fingerprint
from sublens.questions import BINS, Found, ask, asking, keep_histogram
from sublens.study import Asked, Study, Task


def asked_of(tasks: list[str], random_masks: int = 2) -> tuple[Asked, Found]:
    """A network that nobody trained, random masks, and metrics that look at the weights only."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 8)).eval()
    generator = torch.Generator().manual_seed(1)

    def metric_of(place: int) -> Any:
        return lambda net: float((net[2].weight[place] != 0).double().mean())

    def mask(share: float) -> Mask:
        kept = {name: torch.rand(network.get_parameter(name).shape, generator=generator) < share
                for name in ("0.weight", "2.weight")}  # fmt: skip
        return Mask(kept, fingerprint(network))

    made = [Task(name=name, batches=[1], loss=lambda net, batch: torch.zeros(()), metric=metric_of(place))
            for place, name in enumerate(tasks)]  # fmt: skip
    control = Task(name="all", batches=[1], loss=lambda net, batch: torch.zeros(()), metric=metric_of(0))
    study = Study(name="s", network=lambda seed: network, tasks=made, control=control, batch_size=1,
                  random_masks=random_masks, repeated=tasks[:1])  # fmt: skip
    masks = {"all": mask(0.8), **{name: mask(0.3) for name in tasks}, f"{tasks[0]}-repeat": mask(0.3)}
    metrics = {task.name: task.metric for task in made}
    shown = {name: mask for name, mask in masks.items() if not name.endswith("-repeat")}
    found = Found(
        network=accuracies(network, metrics),
        masks={name: interrogate(network, mask, metrics, draws=random_masks) for name, mask in shown.items()},
        repeats={tasks[0]: accuracies(network, metrics, masks[f"{tasks[0]}-repeat"])},
        confusion={"network": {"x": {"x": 1.0}}, "all": {"x": {"x": 0.9, "y": 0.1}, "y": {"y": 1.0}},
                   tasks[0]: {"x": {"x": 0.5, "y": 0.5}, "y": {"y": 0.25}}},
        keep_probabilities={name: [0] * 5 + [3] * (BINS - 5) for name in shown},
    )  # fmt: skip
    return Asked(network=network, masks=masks, metrics=metrics, study=study, seed=0), found


@pytest.fixture(scope="module")
def both() -> tuple[Asked, Found]:
    return asked_of(["a", "b"])


@pytest.fixture(scope="module")
def answers(both: tuple[Asked, Found]) -> dict[str, Answer]:
    return ask(*both)


def test_every_question_is_answered_and_the_same_again(both: Any, answers: dict[str, Answer]) -> None:
    assert list(answers) == list(asking._QUESTIONS)
    assert ask(*both) == answers
    for name, answer in answers.items():
        assert Answer.from_json(json.loads(json.dumps(answer.as_json(), allow_nan=False))) == answer, name
        assert answer.figures or answer.tables


def test_transfer_holds_every_mask_on_every_task(both: Any, answers: dict[str, Answer]) -> None:
    _, found = both
    matrix = answers["accuracy"].figures[1]
    assert isinstance(matrix, Matrix)
    assert matrix.columns == ("a", "b")
    rows = dict(zip(matrix.rows, matrix.values, strict=True))
    assert rows["whole network"] == (1.0, 1.0)
    assert rows["b mask"] == tuple(found.masks["b"]["accuracy"].values())
    assert rows["a mask, another seed"] == tuple(found.repeats["a"].values())
    assert set(rows) == {
        "whole network",
        "all mask",
        "a mask",
        "a mask, another seed",
        "b mask",
        "random masks of the tasks' sizes",
    }


def test_the_change_of_answers_is_to_the_control(answers: dict[str, Answer]) -> None:
    (matrix,) = answers["confusion-change"].figures
    assert isinstance(matrix, Matrix) and matrix.diverging
    assert dict(zip(matrix.rows, matrix.values, strict=True)) == {
        "x": pytest.approx((-0.4, 0.4)),
        "y": (0.0, -0.75),
    }
    assert "told y, the network answers y 75.0 points less often" in answers["confusion-change"].sentence


def test_weights_are_counted_by_who_keeps_them(both: Any, answers: dict[str, Answer]) -> None:
    asked, _ = both
    a, b = asked.masks["a"], asked.masks["b"]
    numbers = answers["weights"].numbers
    assert numbers is not None
    assert numbers["only_a"] == (a - b).kept
    assert numbers["all"] == (a & b).kept
    assert numbers["none"] == 1 - (a | b).kept
    assert numbers["all_by_chance"] == pytest.approx(0.09, abs=0.01)
    bars, first, _ = answers["weights"].figures
    assert isinstance(bars, Bars) and isinstance(first, Picture)
    assert bars.series[2].values == tuple((a & b).kept_per_layer().values())
    assert first.title.endswith("Shown: every 3rd row.")
    assert len(first.cells) == 134
    for row, column in ((0, 0), (5, 7), (133, 19)):
        code = int(a["0.weight"][3 * row, column]) + 2 * int(b["0.weight"][3 * row, column])
        assert first.cells[row][column] == str(code)


def test_checks_measure_the_own_task_beside_chance(both: Any, answers: dict[str, Answer]) -> None:
    _, found = both
    (lines,) = answers["minimality"].figures
    assert isinstance(lines, Lines)
    series = {entry.name: entry for entry in lines.series}
    assert series["b"].values[0] == found.masks["b"]["accuracy"]["b"]
    assert [value[0] for value in series["all"].values[1:]] == pytest.approx(
        [0.8 * left for left in (0.95, 0.8, 0.5)], abs=0.05
    )
    (bars,) = answers["completeness"].figures
    assert isinstance(bars, Bars)
    inverse = dict(zip(bars.groups, bars.series[0].values, strict=True))
    assert inverse["a, inverse"] == found.masks["a"]["inverse_accuracy"]["a"]
    table = answers["faithfulness"].tables[0]
    assert table.rows[0][3] == found.masks["all"]["accuracy"]["a"] - 1
    worst = min(found.masks["all"]["accuracy"].values())
    assert f"its accuracy is {100 * (1 - worst):.1f} points below the network's" in answers["faithfulness"].sentence
    layers = answers["layers"].figures[1]
    assert isinstance(layers, Lines)
    assert layers.x == ("0.weight", "2.weight")
    zero = {entry.name: entry for entry in layers.series}["zero"]
    assert zero.values[0][0] == 1.0  # the metric looks at the last layer only
    assert zero.values[1][0] == pytest.approx(1 - found.masks["b"]["accuracy"]["b"])


def test_gates_are_counted_in_equal_bins(answers: dict[str, Answer]) -> None:
    logits = {"w": torch.logit(torch.tensor([0.01, 0.04, 0.06, 0.97, 1.0, 0.0]))}
    counts = keep_histogram(logits)
    assert (counts[0], counts[1], counts[-1], sum(counts)) == (3, 1, 2, 6)
    (histogram,) = answers["gates"].figures
    assert isinstance(histogram, Histogram)
    assert sum(histogram.series[0].values) == pytest.approx(1)
    assert answers["gates"].numbers is not None and answers["gates"].numbers["unsure_a"] == pytest.approx(13 / 15)


def test_many_tasks_are_put_together_and_no_random_masks_leave_the_checks_out() -> None:
    asked, found = asked_of(["a", "b", "c", "d", "e"], random_masks=0)
    answers = ask(asked, found)
    assert set(answers) == set(asking._QUESTIONS) - {"minimality", "completeness", "layers"}
    bars, picture = answers["accuracy"].figures[0], answers["weights"].figures[0]
    assert isinstance(bars, Bars) and isinstance(picture, Picture)
    assert len(bars.series) == 2
    assert bars.series[1].values[2] == pytest.approx(
        sum(value for task, value in found.masks["a"]["accuracy"].items() if task != "a") / 4
    )
    assert picture.masks == ("a", "b", "c", "d")
    own = [found.masks[name]["accuracy"][name] for name in "abcde"]
    assert (
        f"a task has {100 * min(own):.1f}\u00a0% to {100 * max(own):.1f}\u00a0%; under" in answers["accuracy"].sentence
    )
