"""How a study's network is trained: on what, and at which rate, beside a plain loop of PyTorch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sublens.errors import StudyError
from sublens.inspection.network import train_network
from sublens.study import Study, Task


def task(name: str, factor: float) -> Task:
    def batches(step: int) -> Tensor:
        return factor * torch.linspace(-1, 1, 12).view(4, 3) + 0.1 * step

    return Task(name=name, batches=batches, loss=lambda net, x: mse_loss(net(x), x), metric=lambda net: 0.5)


def study(**changes: object) -> Study:
    parts: dict[str, object] = {
        "name": "s",
        "network": lambda seed: nn.Linear(3, 3),
        "tasks": [task("one", 1)],
        "control": task("all", 1),
        "batch_size": 4,
        "network_steps": 12,
        "network_lr": 0.05,
    }
    return Study(**{**parts, **changes})  # type: ignore[arg-type]


def by_hand(start: nn.Module, factor: float, betas: tuple[float, float], rates: list[float]) -> dict[str, Tensor]:
    net = nn.Linear(3, 3)
    net.load_state_dict(start.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=1.0, betas=betas)
    batches = task("x", factor).batches
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        x = batches(step)  # type: ignore[operator]
        mse_loss(net(x), x).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.state_dict()


@pytest.mark.parametrize(
    ("changes", "factor", "betas", "rates"),
    [
        ({}, 1, (0.9, 0.999), [0.05] * 12),
        ({"network_task": task("other", 3)}, 3, (0.9, 0.999), [0.05] * 12),
        ({"network_betas": (0.8, 0.995)}, 1, (0.8, 0.995), [0.05] * 12),
        ({"network_warmup": 5}, 1, (0.9, 0.999), [0.01, 0.02, 0.03, 0.04, *[0.05] * 8]),
        ({"network_warmup": 4, "network_milestones": (6,)}, 1, (0.9, 0.999),
         [0.0125, 0.025, 0.0375, 0.05, 0.05, 0.05, *[0.005] * 6]),
    ],
)  # fmt: skip
def test_a_network_is_trained_as_its_study_says(
    tmp_path: Path, changes: dict[str, object], factor: float, betas: tuple[float, float], rates: list[float]
) -> None:
    start, _, _ = train_network(study(network_steps=0), 0, tmp_path / "start", False)
    trained, _, _ = train_network(study(**changes), 0, tmp_path / "run", False)
    for name, value in by_hand(start, factor, betas, rates).items():
        torch.testing.assert_close(trained.state_dict()[name], value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_task": "all"}, "network_task must be a Task, not a str"),
        ({"network_betas": (0.9,)}, r"network_betas=\(0\.9,\) must be two numbers"),
        ({"network_betas": (0.9, 1.0)}, r"network_betas=\(0\.9, 1\.0\) must be two numbers"),
        ({"network_warmup": -1}, "network_warmup=-1 must be a whole number, at least 0"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        study(**changes)
