"""Objectives beside a task's loss: their values, what they leave alone, and that a mask trained for one has it."""

import math

import pytest
import torch
from torch import Tensor, nn

import sublens as sl
from sublens.errors import SettingError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_kl_is_that_of_the_definition(shape: tuple[int, ...]) -> None:
    teacher, student = nn.Linear(6, 4), nn.Linear(6, 4)
    x = normal(*shape)
    loss = sl.agree(teacher)(student, (x, "labels that nobody needs"))
    p, q = (torch.softmax(each(x).detach().double(), -1).reshape(-1, 4) for each in (teacher, student))
    expected = sum(float(p[i, j] * torch.log(p[i, j] / q[i, j])) for i in range(len(p)) for j in range(4)) / len(p)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(sl.agree(teacher)(teacher, x).detach()) == pytest.approx(0, abs=1e-7)
    loss.backward()
    assert teacher.weight.grad is None
    assert student.weight.grad is not None


def test_mse_of_a_chosen_output() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(6, 4), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"one": self.one(x), "other": self.other(x)}

    teacher, student, x = Two(), Two(), normal(5, 6)
    loss = sl.agree(teacher, measure="mse", inputs=lambda batch: batch["x"], output=lambda out: out["other"])
    expected = (teacher.other(x) - student.other(x)).detach().double().square().mean()
    assert float(loss(student, {"x": x}).detach()) == pytest.approx(float(expected), rel=1e-5)


def test_the_network_agreed_with_runs_as_it_is_and_stays_as_it_is() -> None:
    teacher, x = net(0).train(), normal(5, 6)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    masked = sl.MaskedNetwork(teacher, keep=0.9, samples=1).eval()
    # All gates are open, and both run in evaluation mode.
    assert float(sl.agree(teacher)(masked, x)) == pytest.approx(0, abs=1e-7)
    assert all(module.training for module in teacher.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_contrast_and_forget_are_bounded_sums() -> None:
    network, x = nn.Linear(6, 4), normal(5, 6)
    student = nn.Linear(6, 4)

    def solve(net: nn.Module, batch: Tensor) -> Tensor:
        return net(batch).square().mean()

    def avoid(net: nn.Module, batch: Tensor) -> Tensor:
        return net(batch).abs().mean()

    low = float(avoid(student, 2 * x).detach())
    for until, pushed in ((low + 0.5, 0.5), (low - 0.1, 0.0)):
        found = sl.contrast(solve, avoid, until=until, weight=3.0)(student, (x, 2 * x))
        assert float(found.detach()) == pytest.approx(float(solve(student, x).detach()) + 3 * pushed, rel=1e-5)
        found = sl.forget(network, avoid, until=until, measure="mse")(student, (x, 2 * x))
        agreed = float(sl.agree(network, measure="mse")(student, x).detach())
        assert float(found.detach()) == pytest.approx(agreed + pushed, rel=1e-5)


def test_impossible_objectives_are_refused() -> None:
    network, x = nn.Linear(6, 4), normal(5, 6)
    with pytest.raises(SettingError, match="measure='l1' is unknown"):
        sl.agree(network, measure="l1")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="but the output is a list"):
        sl.agree(network, output=lambda out: [out])(network, x)  # type: ignore[arg-type,return-value]
    with pytest.raises(SettingError, match=r"the network's is \(5, 4\), the masked network's \(5, 3\)"):
        sl.agree(network)(nn.Linear(6, 3), x)
    loss = sl.agree(network)
    for settings in ({"until": 0.0}, {"until": math.inf}, {"until": 1.0, "weight": -1.0}):
        with pytest.raises(SettingError, match="must be finite and above 0"):
            sl.contrast(loss, loss, **settings)
    with pytest.raises(SettingError, match="This loss takes pairs"):
        sl.contrast(loss, loss, until=1.0)(network, x)


def parity_of_halves() -> tuple[nn.Module, Tensor]:
    """A network that sums its first three inputs into output 0, and the others into output 1, by weights of 1."""
    network = nn.Linear(6, 2, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 1, 1, 0.2, 0, 0], [0, 0, 0.2, 1, 1, 1]]))
    return network, normal(64, 6)


def test_masks_trained_for_them_agree_contrast_and_forget() -> None:
    network, x = parity_of_halves()

    def one(net: nn.Module, batch: Tensor) -> Tensor:
        return (net(batch)[:, 0] - batch[:, :3].sum(1)).square().mean()

    def other(net: nn.Module, batch: Tensor) -> Tensor:
        return (net(batch)[:, 1] - batch[:, 3:].sum(1)).square().mean()

    def trained(loss: object, batches: object) -> Tensor:
        run = sl.fit(network, batches, loss, steps=150, lr=0.1, alpha=2e-3, progress=False)  # type: ignore[arg-type]
        return run.mask["weight"]

    agreed = trained(sl.agree(network, measure="mse"), [x])
    assert agreed.tolist() == (network.weight != 0).tolist()
    contrasted = trained(sl.contrast(one, other, until=2.0), [(x, x)])
    assert contrasted[0].tolist() == [True, True, True, False, False, False]
    with torch.no_grad():
        left = (x * (network.weight[1] * contrasted[1])).sum(1)
        assert float((left - x[:, 3:].sum(1)).square().mean()) > 1.9
    forgotten = trained(sl.forget(network, other, until=2.0, measure="mse", output=lambda out: out[:, :1]), [(x, x)])
    assert forgotten[0, :4].all()
    with torch.no_grad():
        left = (x * (network.weight[1] * forgotten[1])).sum(1)
        assert float((left - x[:, 3:].sum(1)).square().mean()) > 1.9


def test_agreement_of_single_numbers_is_not_measured_by_softmax() -> None:
    network, x = nn.Linear(4, 1), torch.randn(8, 4)
    with pytest.raises(SettingError, match=r"shape is \(8, 1\).*measure='mse'"):
        sl.agree(network)(network, x)
    assert sl.agree(network, measure="mse")(network, x).item() == 0.0
