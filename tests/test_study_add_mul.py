"""The add-mul study: its data against arithmetic, its settings against the paper."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sublens as sl
from sublens import studies
from sublens.errors import StudyError
from sublens.studies.arithmetic import OPERATIONS, confusion, loss, problems, task
from sublens.study import Study, Task, seed_from


def read(row: Tensor) -> tuple[int, int, str]:
    """Read a problem off its one-hot inputs."""
    assert row.sum() == 5
    tens, units, other_tens, other_units = row[:40].view(4, 10).argmax(1).tolist()
    return 10 * tens + units, 10 * other_tens + other_units, OPERATIONS[int(row[40:].argmax())]


def test_a_study_may_have_a_setting_called_mask_steps(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from sublens.studies.add_mul import study as other\n"
        "def study(mask_steps=5):\n"
        "    import dataclasses\n"
        "    return dataclasses.replace(other(widths=(4,)), mask_steps=mask_steps)\n"
    )
    assert studies.configured(path, {"mask_steps": 7}).mask_steps == 7
    with pytest.raises(StudyError, match="set by --steps"):
        studies.configured("add-mul", {"mask_steps": 7})


def test_every_problem_is_there_once_with_its_result() -> None:
    seen = set()
    for row, digits in zip(problems().inputs, problems().digits.tolist(), strict=True):
        first, second, operation = read(row)
        seen.add((first, second, operation))
        result = (first + second if operation == "add" else first * second) % 100
        assert digits == [result // 10, result % 10]
    assert len(seen) == 20_000


@pytest.mark.parametrize("name", ["all", "add", "mul"])
@pytest.mark.parametrize("samples", [None, 5000])
def test_a_task_draws_its_own_operations_only(name: str, samples: int | None) -> None:
    operations = OPERATIONS if name == "all" else (name,)
    made = task(name, operations, 128, samples, samples)
    inputs, digits = made.batches_for(7)(3)
    assert inputs.shape == (128, 42)
    assert digits.shape == (128, 2)
    assert {read(row)[2] for row in inputs} == set(operations)


def test_batches_depend_on_seed_and_step_alone() -> None:
    made = task("all", OPERATIONS, 128, None, None)
    torch.manual_seed(1)
    first = made.batches_for(0)(5)[0]
    torch.manual_seed(2)
    assert torch.equal(first, made.batches_for(0)(5)[0])
    assert torch.equal(first, task("all", OPERATIONS, 128, None, None).batches_for(0)(5)[0])
    assert not torch.equal(first, made.batches_for(0)(6)[0])
    assert not torch.equal(first, made.batches_for(1)(5)[0])


class Calculator(nn.Module):
    """Answers every problem right, or always as if told one operation."""

    def __init__(self, always: str | None = None) -> None:
        super().__init__()
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        first, second = (x[:, at : at + 20].view(-1, 2, 10).argmax(-1) @ torch.tensor([10, 1]) for at in (0, 20))
        told = x[:, 40:].argmax(1) if self.always is None else torch.tensor(OPERATIONS.index(self.always))
        result = torch.where(told == 0, first + second, first * second) % 100
        digits = torch.stack([result // 10, result % 10], 1)
        return 50 * nn.functional.one_hot(digits, 10).flatten(1).float()


def test_a_calculator_scores_one_and_an_adder_only_adds() -> None:
    add, mul = (task(name, (name,), 128, None, None) for name in OPERATIONS)
    assert (add.metric(Calculator()), mul.metric(Calculator())) == (1.0, 1.0)
    assert add.metric(Calculator("add")) == 1.0
    numbers = torch.arange(100)
    equal = ((numbers[:, None] + numbers) % 100 == (numbers[:, None] * numbers) % 100).double().mean().item()
    assert mul.metric(Calculator("add")) == pytest.approx(equal)
    assert add.loss(Calculator(), add.batches_for(0)(0)).item() == pytest.approx(0, abs=1e-6)


def test_one_wrong_digit_is_a_wrong_answer() -> None:
    class Units(Calculator):
        def forward(self, x: Tensor) -> Tensor:
            answer = super().forward(x).view(-1, 2, 10)
            answer[:, 0] = answer[:, 0].roll(1, -1)
            return answer.flatten(1)

    assert task("add", ["add"], 128, None, None).metric(Units()) == 0.0


def test_the_loss_is_the_mean_cross_entropy_of_both_digits() -> None:
    torch.manual_seed(0)
    net = nn.Linear(42, 20)
    inputs, digits = task("all", OPERATIONS, 16, None, None).batches_for(0)(0)
    out = net(inputs)
    by_hand = [
        -torch.log_softmax(out[i, 10 * d : 10 * d + 10], 0)[digits[i, d]].item() for i in range(16) for d in range(2)
    ]
    assert loss(net, (inputs, digits)).item() == pytest.approx(sum(by_hand) / 32, rel=1e-5)


def test_the_confusion_says_which_operation_was_done() -> None:
    with torch.no_grad():
        table = confusion()(Calculator("add"))
        assert table == {
            "add": {"sum": 1.0, "product": 0.0, "neither": 0.0},
            "mul": {"sum": 1.0, "product": 0.0, "neither": 0.0},
        }
        right = confusion()(Calculator())
        assert right["add"]["sum"] == right["mul"]["product"] == 1.0


def test_the_paper_preset_is_the_papers() -> None:
    study = studies.load("add-mul", preset="paper", widths=(800, 800, 800, 800))
    settings = (
        study.network_steps,
        study.network_lr,
        study.network_clip,
        study.mask_steps,
        study.mask_lr,
        study.mask_clip,
    )
    assert settings == (20_000, 1e-3, 1.0, 20_000, 1e-2, 1.0)
    assert (study.alpha, study.batch_size, study.samples, study.penalty, study.biases) == (
        1e-4,
        128,
        4,
        "logits",
        False,
    )
    assert torch.logit(torch.tensor(study.keep)).item() == pytest.approx(2.0)
    network = study.network(0)
    shapes = [tuple(value.shape) for value in network.parameters() if value.dim() > 1]
    assert shapes == [(800, 42), (800, 800), (800, 800), (800, 800), (20, 800)]
    assert study.settings["train_samples"] == 1_000_000
    assert study.settings["validation_samples"] == 10_000


def test_the_lstm_sees_its_input_three_times() -> None:
    study = studies.load("add-mul-lstm")
    network = study.network(0).eval()
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters() if value.dim() > 1}
    assert shapes == {
        "lstm.weight_ih_l0": (1024, 42),
        "lstm.weight_hh_l0": (1024, 256),
        "lstm.weight_ih_l1": (1024, 256),
        "lstm.weight_hh_l1": (1024, 256),
        "output.weight": (20, 256),
    }
    x = problems().inputs[:3]
    states, _ = network.lstm(torch.stack([x, x, x], dim=1))
    torch.testing.assert_close(network(x), network.output(states[:, 2]))
    assert study.first_half == ("lstm.weight_ih_l0", "lstm.weight_hh_l0")


def test_the_example_in_bfloat16_multiplies_in_it_and_trains_float32_logits() -> None:
    example = Path(__file__).parents[1] / "examples" / "bfloat16.py"
    made, plain = (studies.load(name, widths=(32, 32)) for name in (example, "add-mul"))
    assert [task.name for task in (made.control, *made.tasks)] == ["all", "add", "mul"]
    network, found = made.network(0), []
    for study in (made, plain):
        masked, dtypes = sl.MaskedNetwork(network), set()
        hooks = [layer.register_forward_hook(lambda *args, to=dtypes: to.add(args[2].dtype)) for layer in network]
        loss = study.tasks[0].loss(masked, study.tasks[0].batches_for(1)(0))
        loss.backward()
        for hook in hooks:
            hook.remove()
        found.append((loss.item(), dtypes, torch.cat([logits.grad.flatten() for logits in masked.logits.values()])))
    (reduced, dtypes, gradient), (full, whole, expected) = found
    assert dtypes == {torch.bfloat16}
    assert whole == {torch.float32}
    assert gradient.dtype == torch.float32
    # 8 bits of each product and sum; under other samples the gradients would have nothing in common.
    assert reduced == pytest.approx(full, rel=1e-2)
    assert not torch.equal(gradient, expected)
    assert float((gradient - expected).norm() / expected.norm()) < 0.05


def test_unknown_studies_presets_and_settings_are_named_with_near_misses(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"No study 'addmul'.*Did you mean add-mul"):
        studies.load("addmul")
    with pytest.raises(StudyError, match="No preset 'fast'; the presets are paper, quick"):
        studies.load("add-mul", preset="fast")
    with pytest.raises(StudyError, match=r"no setting 'width'\. Did you mean 'widths'"):
        studies.load("add-mul", width=3)
    with pytest.raises(StudyError, match="widths"):
        studies.load("add-mul", widths=(0,))
    (tmp_path / "study.py").write_text("")
    with pytest.raises(StudyError, match=r"Did you mean study\.py"):
        studies.load(tmp_path / "stuyd.py")


USER = """
from torch import nn
from torch.nn.functional import mse_loss
import torch
import sublens as sl

def study(preset="small", depth=1):
    task = sl.Task(name="one", batches=lambda step: torch.randn(8, 4), loss=lambda net, x: mse_loss(net(x), x),
                   metric=lambda net: 0.5)
    control = sl.Task(name="all", batches=task.batches, loss=task.loss, metric=task.metric)
    return sl.Study(name="mine", network=lambda seed: nn.Linear(4, 4), tasks=[task], control=control, batch_size=8,
                    preset=preset, settings={"depth": depth})
"""


def test_a_users_file_is_a_study_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "study.py"
    path.write_text(USER)
    study = studies.load(path, depth=3)
    assert isinstance(study, Study)
    assert (study.name, study.preset, study.settings["depth"]) == ("mine", "small", 3)
    before = study.settings["file_sha256"]
    path.write_text(USER + "# changed\n")
    assert studies.load(str(path)).settings["file_sha256"] != before
    with pytest.raises(StudyError, match=r"no setting 'detph'\. Did you mean 'depth'"):
        studies.load(path, detph=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n\ny = undefined\n", r"study\.py, line 3: NameError: name 'undefined'"),
        ("def study(:\n", r"study\.py, line 1: SyntaxError"),
        ("def study():\n    return 1 / 0\n", r"study\.py, line 2: ZeroDivisionError"),
        ("import nothing_called_this\n", r"study\.py, line 1: ModuleNotFoundError"),
        ("def studie(): pass\n", r"defines no function study\(\) \(it defines 'studie'\)"),
        ("def study(): return {}\n", r"returned a dict; it must return a sublens\.Study"),
    ],
)
def test_a_broken_users_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "study.py"
    path.write_text(text)
    with pytest.raises(StudyError, match=message):
        studies.load(path)


def make_task(name: str = "one", **changes: object) -> Task:
    parts: dict[str, object] = {
        "batches": lambda step: None,
        "loss": lambda net, batch: None,
        "metric": lambda net: 0.0,
    }
    return Task(name=name, **{**parts, **changes})  # type: ignore[arg-type]


def make_study(**changes: object) -> Study:
    parts: dict[str, object] = {
        "name": "s",
        "network": lambda seed: nn.Linear(1, 1),
        "tasks": [make_task()],
        "control": make_task("all"),
        "batch_size": 1,
    }
    return Study(**{**parts, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "cannot be the name of a study"),
        ({"tasks": []}, "at least one Task"),
        ({"tasks": [make_task(), make_task()]}, "several tasks are called one"),
        ({"tasks": [make_task("network")]}, "no task can be called network"),
        ({"tasks": [make_task(), make_task("one-repeat")], "repeated": ["one"]}, "no task can be called one-repeat"),
        ({"repeated": ["two"]}, "repeated names two; its tasks: all, one"),
        ({"control": None}, "control must be a Task, not None"),
        ({"keep": 2.0}, r"keep=2\.0 is a probability"),
        ({"keep": 0}, "keep=0 must be a number, above 0"),
        ({"alpha": -1e-4}, r"alpha=-0\.0001 must be a number, at least 0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"mask_steps": 0}, "mask_steps=0 must be a whole number, at least 1"),
        ({"mask_steps": 10.5}, r"mask_steps=10\.5 must be a whole number"),
        ({"samples": True}, "samples=True"),
        ({"penalty": "l1"}, "penalty='l1' must be 'logits' or 'expected'"),
        ({"network": nn.Linear(1, 1)}, "network is a module; give a function"),
    ],
)
def test_an_impossible_study_is_refused_at_construction(changes: dict[str, object], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        make_study(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../x"}, "cannot be the name of a task"),
        ({"name": 101 * "a"}, "use at most 100 letters"),
        ({"batches": 3}, "batches must be a function or something to iterate over, such as a DataLoader, not a int"),
        ({"metric": 0.5}, "metric must be a function, not a float"),
    ],
)
def test_an_impossible_task_is_refused_at_construction(changes: dict[str, object], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        make_task(**changes)


def test_studies_are_frozen() -> None:
    with pytest.raises(AttributeError):
        make_study().alpha = 1.0  # type: ignore[misc]


def test_batches_without_a_seed_are_left_as_they_are() -> None:
    data = [1, 2, 3]
    assert make_task(batches=data).batches_for(5) is data
    assert make_task(batches=lambda step: step).batches_for(5)(2) == 2
    assert make_task(batches=lambda step, seed: (step, seed)).batches_for(5)(2) == (2, 5)


def test_seeds_are_pure_and_apart() -> None:
    seeds = {seed_from(seed, step) for seed in range(30) for step in range(30)}
    assert len(seeds) == 900
    assert seed_from(1, "23") != seed_from(12, "3")
    assert seed_from(0, "network") == seed_from(0, "network") < 2**63


def test_what_a_file_is_asked_for_is_written_down_even_if_the_file_does_not(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch, sublens as sl\n"
        "from torch import nn\n"
        "def study(limit=64, widths=(3,), where=None):\n"
        "    t = lambda name: sl.Task(name=name, batches=lambda step: torch.randn(limit, 2),\n"
        "        loss=lambda net, x: net(x).mean(), metric=lambda net: 0.5)\n"
        "    return sl.Study(name='mine', network=lambda seed: nn.Linear(2, 2), tasks=[t('a')], control=t('b'),\n"
        "        batch_size=limit, settings={'widths': [9]})\n"
    )
    asked = studies.load(path, limit=16, widths=(4, 5), where=path)
    assert asked.settings["limit"] == 16
    assert asked.settings["where"] == str(path)
    assert asked.settings["widths"] == [9]  # what the file itself says of a setting comes first
    assert "limit" not in studies.load(path).settings
