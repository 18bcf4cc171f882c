"""The double-addition studies: their data against arithmetic, their networks and settings against the paper."""

import pytest
import torch
from torch import Tensor, nn

from sublens import studies
from sublens.errors import StudyError
from sublens.mask import Mask, fingerprint
from sublens.studies.addition import draw, loss, one_hot, right, rows, sums, task
from sublens.studies.double_addition import hidden_layers, inverse_masks
from sublens.study import Asked


def read(row: Tensor) -> list[list[int]]:
    """Read the numbers of both pairs off one-hot inputs."""
    assert row.sum() == 8
    digits = row.view(2, 2, 2, 10).argmax(-1)
    return (digits @ torch.tensor([10, 1])).tolist()


def test_problems_are_read_back_from_their_inputs_and_added_by_hand() -> None:
    numbers = torch.tensor([[[12, 34], [99, 1]], [[0, 7], [58, 67]]], dtype=torch.uint8)
    assert [read(row) for row in one_hot(numbers)] == numbers.tolist()
    assert sums(numbers).tolist() == [[[4, 6], [0, 0]], [[0, 7], [2, 5]]]
    drawn = draw(500, "test")
    results = sums(drawn) @ torch.tensor([10, 1])
    assert results.tolist() == [[(a + b) % 100, (c + d) % 100] for (a, b), (c, d) in drawn.tolist()]


def test_problems_are_drawn_evenly_and_by_their_seed_alone() -> None:
    torch.manual_seed(1)
    drawn = draw(20_000, 3, 4)
    torch.manual_seed(2)
    assert torch.equal(drawn, draw(20_000, 3, 4))
    assert not torch.equal(drawn, draw(20_000, 3, 5))
    assert not torch.equal(drawn, draw(20_000, 4, 4))
    assert drawn.shape == (20_000, 2, 2)
    # Each of the 4 x 100 counts is binomial with mean 200 and deviation 14.1; beyond 5 deviations about 1 time in 4,000
    # seeds, and the seed is fixed.
    counts = torch.stack([torch.bincount(column.long(), minlength=100) for column in drawn.flatten(1).T])
    assert counts.shape == (4, 100)
    assert (counts - 200).abs().max() < 71


def test_a_pair_alone_has_a_row_of_its_own_with_the_other_pairs_inputs_zero() -> None:
    numbers = draw(3, "rows")
    inputs, digits, asked = rows(numbers, [0, 1], alone=True)
    assert inputs.shape == (6, 80)
    full = one_hot(numbers)
    for problem in range(3):
        first, second = inputs[2 * problem], inputs[2 * problem + 1]
        assert torch.equal(first[:40], full[problem, :40])
        assert torch.equal(second[40:], full[problem, 40:])
        assert first[40:].sum() == second[:40].sum() == 0
        assert torch.equal(digits[2 * problem], digits[2 * problem + 1])
    assert asked.tolist() == [[True, False], [False, True]] * 3
    inputs, _, asked = rows(numbers, [1], alone=False)
    assert inputs[:, :40].sum() == 0
    assert torch.equal(inputs[:, 40:], full[:, 40:])
    assert asked.tolist() == [[False, True]] * 3


class Calculator(nn.Module):
    """Answers all pairs that it is shown right, but for those named; what it is not shown counts as 0 + 0."""

    def __init__(self, wrong: int | None = None) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        numbers = x.view(-1, 2, 2, 2, 10).argmax(-1) @ torch.tensor([10, 1])
        answers = sums(numbers)
        if self.wrong is not None:
            answers[:, self.wrong, 1] = (answers[:, self.wrong, 1] + 1) % 10
        return 50 * nn.functional.one_hot(answers, 10).flatten(1).float()


@pytest.mark.parametrize("alone", [True, False])
def test_a_calculator_scores_one_and_one_wrong_digit_is_a_wrong_answer(alone: bool) -> None:
    first, second, both = (
        task(name, asked, 128, alone=alone, train_samples=None)
        for name, asked in (("first", [0]), ("second", [1]), ("both", [0, 1]))
    )
    assert [made.metric(Calculator()) for made in (first, second, both)] == [1.0, 1.0, 1.0]
    assert [made.metric(Calculator(wrong=1)) for made in (first, second, both)] == [1.0, 0.0, 0.0]
    for made in (first, second, both):
        assert made.loss(Calculator(), made.batches_for(0)(0)).item() == pytest.approx(0, abs=1e-6)
    assert first.loss(Calculator(wrong=1), first.batches_for(0)(0)).item() == pytest.approx(0, abs=1e-6)
    assert second.loss(Calculator(wrong=1), second.batches_for(0)(0)).item() == pytest.approx(25, rel=1e-3)


def test_the_metric_shows_both_pairs_to_a_network_with_memory() -> None:
    class Blind(Calculator):
        """Answers only where both pairs are shown."""

        def forward(self, x: Tensor) -> Tensor:
            answer = super().forward(x)
            answer[x.sum(1) < 8] = 0
            return answer

    assert right(Blind(), draw(50, "blind"), alone=False).all()
    assert right(Blind(), draw(50, "blind"), alone=True).double().mean() < 0.2


@pytest.mark.parametrize("alone", [True, False])
def test_the_loss_is_the_mean_cross_entropy_of_the_digits_asked_for(alone: bool) -> None:
    torch.manual_seed(0)
    net = nn.Linear(80, 40)
    numbers = draw(6, "loss")
    digits = sums(numbers)
    by_hand = []
    for problem in range(6):
        for pair in range(2):
            inputs = one_hot(numbers)[problem]
            if alone:
                inputs[40 * (1 - pair) : 40 * (2 - pair)] = 0
            out = torch.log_softmax(net(inputs).view(2, 2, 10), -1)
            by_hand += [-out[pair, digit, digits[problem, pair, digit]].item() for digit in range(2)]
    assert loss(net, rows(numbers, [0, 1], alone=alone)).item() == pytest.approx(sum(by_hand) / 24, rel=1e-5)


def test_batches_depend_on_seed_and_step_alone_and_come_from_the_training_set() -> None:
    made = task("both", [0, 1], 32, alone=False, train_samples=10)
    inputs, _, _ = made.batches_for(7)(3)
    assert torch.equal(inputs, made.batches_for(7)(3)[0])
    assert not torch.equal(inputs, made.batches_for(8)(3)[0])
    assert not torch.equal(inputs, made.batches_for(7)(4)[0])
    assert {str(read(row)) for row in inputs} <= {str(problem) for problem in draw(10, "train").tolist()}
    anew = task("both", [0, 1], 32, alone=False, train_samples=None)
    assert torch.equal(anew.batches_for(7)(3)[0], one_hot(draw(32, 7, 3)))


def test_the_paper_preset_is_the_papers() -> None:
    study = studies.load("double-addition", preset="paper")
    assert (study.network_steps, study.network_lr, study.network_clip) == (20_000, 1e-3, 1.0)
    assert (study.mask_steps, study.mask_lr, study.mask_clip) == (20_000, 1e-2, 1.0)
    assert (study.alpha, study.batch_size, study.samples, study.biases) == (4e-4, 128, 4, False)
    shapes = [tuple(value.shape) for value in study.network(0).parameters() if value.dim() > 1]
    assert shapes == [(2000, 80), (2000, 2000), (2000, 2000), (2000, 2000), (40, 2000)]
    assert study.settings["train_samples"] == 1_000_000
    for mode in ("together", "turns"):
        lstm = studies.load("double-addition-lstm", preset="paper", mode=mode)
        assert (lstm.alpha, lstm.network_steps, lstm.mask_steps) == (1e-4, 20_000, 20_000)
        shapes = [tuple(value.shape) for value in lstm.network(0).parameters() if value.dim() > 1]
        assert shapes == [(1024, 80), (1024, 256), (1024, 256), (1024, 256), (40, 256)]


def test_the_lstm_sees_both_pairs_for_six_steps_or_each_for_three() -> None:
    x = one_hot(draw(4, "lstm"))
    together = studies.load("double-addition-lstm", width=20).network(0).eval()
    states, _ = together.lstm(x.unsqueeze(1).repeat(1, 6, 1))
    torch.testing.assert_close(together(x), together.output(states[:, 5]))
    turns = studies.load("double-addition-lstm", mode="turns").network(0).eval()
    first, second = x.clone(), x.clone()
    first[:, 40:] = 0
    second[:, :40] = 0
    states, _ = turns.lstm(torch.stack([first] * 3 + [second] * 3, 1))
    out = turns.output(states)
    torch.testing.assert_close(turns(x), torch.cat([out[:, 2, :20], out[:, 5, 20:]], 1))


def test_copied_ends_make_the_pairs_alike() -> None:
    study = studies.load("double-addition", widths=(30, 20), copied=True)
    torch.manual_seed(0)
    network = study.network(0)
    assert study.prepare is not None
    with torch.no_grad():
        made = study.prepare(network)
    x = one_hot(draw(5, "copied"))
    swapped = x.roll(40, 1)
    torch.testing.assert_close(made(x)[:, :20], made(swapped)[:, 20:], rtol=0, atol=1e-6)
    torch.testing.assert_close(made(x)[:, :20], made(x)[:, 20:])
    assert studies.load("double-addition", widths=(30, 20)).prepare is None


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(StudyError, match="mode='alone' must be together or turns"):
        studies.load("double-addition-lstm", mode="alone")
    with pytest.raises(StudyError, match="No preset 'fast'; the presets are paper, quick"):
        studies.load("double-addition", preset="fast")
    with pytest.raises(StudyError, match=r"widths=\(\) must be"):
        studies.load("double-addition", widths=())


def asked_of(network: nn.Module, kept: dict[str, dict[str, Tensor]]) -> Asked:
    study = studies.load("double-addition", widths=(4, 4))
    masks = {name: Mask(layers, fingerprint(network)) for name, layers in kept.items()}
    metrics = {made.name: made.metric for made in study.tasks}
    return Asked(network=network, masks=masks, metrics=metrics, study=study, seed=0)


def test_the_hidden_layers_are_compared_without_the_ends() -> None:
    network = studies.load("double-addition", widths=(4, 4)).network(0)
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters() if value.dim() > 1}
    ends, hidden = ["0.weight", "4.weight"], "2.weight"
    first = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    first[hidden].view(-1)[:8] = True
    second = {name: ~bits for name, bits in first.items()}
    second[hidden] = torch.zeros(4, 4, dtype=torch.bool)
    second[hidden].view(-1)[4:12] = True
    answer = hidden_layers(asked_of(network, {"first": first, "second": second, "both": first, "first-repeat": first}))
    assert answer.numbers["iou"] == pytest.approx(4 / 12)
    # X of 16 weights with 8 and 8 kept is hypergeometric; its mean IoU by summing over X.
    from math import comb

    mean = sum(comb(8, x) * comb(8, 8 - x) / comb(16, 8) * x / (16 - x) for x in range(9))
    assert answer.numbers["chance"] == pytest.approx(mean)
    assert answer.numbers["iou_first_repeated"] == 1.0
    bars = answer.figures[0]
    assert bars.series[0].values[0] == 0.0, ends
    assert "0.333" in answer.sentence


def test_the_inverse_is_measured_alone_and_between_the_controls_ends() -> None:
    network = studies.load("double-addition", widths=(4, 4)).network(0)
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters() if value.dim() > 1}
    full = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    first = {**full, "2.weight": torch.zeros(4, 4, dtype=torch.bool)}
    asked = asked_of(network, {"first": first, "second": full, "both": full})
    seen: list[dict[str, bool]] = []

    def metric(net: nn.Module) -> float:
        seen.append({name: bool(value.any()) for name, value in net.named_parameters() if value.dim() > 1})
        return 0.25

    answer = inverse_masks(Asked(network=network, masks=asked.masks, metrics={"first": metric, "second": metric},
                                 study=asked.study, seed=0))  # fmt: skip
    ends, middle = ("0.weight", "4.weight"), "2.weight"
    alone, joined = seen[4], seen[6]  # two metrics a kind; the first pair's kinds come first
    assert [alone[name] for name in (*ends, middle)] == [False, False, True]
    assert [joined[name] for name in (*ends, middle)] == [True, True, True]
    assert answer.numbers["first: inverse, ends of both: second"] == 0.25
