"""Duels: the same network, data and budget for all, exact kept fractions, skipping, and the table, page and figure."""

import csv
import dataclasses
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

import sublens as sl
from sublens import dueling, studies
from sublens.cli import run
from sublens.dueling import duel
from sublens.errors import MismatchError, SettingError
from sublens.report.duel_table import interval
from sublens.study import seed_from

SEEN: list[tuple[int, int]] = []


def study(**settings: Any) -> sl.Study:
    def batches(step: int, seed: int) -> tuple[Tensor, Tensor]:
        SEEN.append((seed, step))
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed_from(seed, step)))
        return x, x[:, :3].argmax(1)

    held = batches(0, -1)

    def task(name: str) -> sl.Task:
        return sl.Task(
            name=name,
            batches=batches,
            loss=lambda net, batch: functional.cross_entropy(net(batch[0]), batch[1]),
            metric=lambda net: (net(held[0]).argmax(1) == held[1]).double().mean().item(),
        )

    base: dict[str, Any] = {"network_steps": 30, "network_lr": 3e-2, "mask_steps": 12, "mask_lr": 0.3, "samples": 2}
    return sl.Study(
        name="tiny",
        network=lambda seed: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)),
        tasks=[task("one"), task("two")],
        control=task("all"),
        batch_size=16,
        **base | settings,
    )


GATES = ["GumbelSigmoid", "TopK", "ContinuousSparsification"]


def test_all_contestants_meet_on_equal_terms(tmp_path: Path) -> None:
    class Mine(sl.Threshold):
        pass

    SEEN.clear()
    found = duel(
        study(), [*GATES, Mine, *dueling.REFERENCES], [0.5, 0.2], out=tmp_path, seeds=(0, 4), tasks=["one"],
        progress=False,
    )  # fmt: skip
    table = found.table
    names = [*GATES, "Mine", *dueling.REFERENCES]
    assert [(row.asked, row.contestant) for row in table.rows] == [
        (kept, name) for kept in (0.5, 0.2) for name in names
    ]
    # 108 weights; of each layer only where that is the contestant.
    for row in table.rows:
        wanted = round(row.asked * 72) + round(row.asked * 36) if "layer" in row.contestant else round(row.asked * 108)
        assert row.kept == (wanted / 108,) * 2
        assert all(0 <= value <= 1 for value in row.accuracy)
    # One frozen network; and for the same seed everyone sees the same batches.
    net = torch.nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    loaded = sl.inspection.network.load_network(study(), 0, tmp_path / "network.safetensors")  # type: ignore[attr-defined]
    assert {sl.Mask.load(file).network for file in (tmp_path / "masks").iterdir()} == {sl.fingerprint(loaded)}
    assert sl.fingerprint(net) != sl.fingerprint(loaded)
    seeds = {seed for seed, _ in SEEN if seed >= 0}
    assert seeds == {seed_from(0, "network"), *(seed_from(seed, "one") for seed in (0, 4))}
    # What the numbers are made of.
    gumbel = table.rows[0]
    masks = [sl.Mask.load(tmp_path / "masks" / f"one-GumbelSigmoid-0.5-seed{seed}.safetensors") for seed in (0, 4)]
    assert gumbel.stability == (masks[0].iou(masks[1]),)
    by_chance = statistics.fmean(
        sl.Mask.random_like(masks[0], seed).iou(sl.Mask.random_like(masks[1], seed + 1000)) for seed in range(300)
    )
    assert gumbel.stability_by_chance[0] == pytest.approx(by_chance, abs=0.02)
    (pair,) = (p for p in table.between if (p.asked, p.first, p.second) == (0.5, "GumbelSigmoid", "TopK"))
    others = [sl.Mask.load(tmp_path / "masks" / f"one-TopK-0.5-seed{seed}.safetensors") for seed in (0, 4)]
    assert pair.iou == tuple(a.iou(b) for a, b in zip(masks, others, strict=True))
    assert len(table.between) == 2 * math.comb(len(names), 2)
    # The mask is that of fit, asked for the same.
    again = sl.fit(
        loaded, study().tasks[0].batches_for(seed_from(4, "one")), study().tasks[0].loss, steps=12, kept=0.5, lr=0.3,
        samples=2, keep=study().keep, seed=seed_from(4, "one"), progress=False,
    )  # fmt: skip
    assert again.mask == masks[1]


def test_what_is_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = duel(study(), GATES[:2], [0.5], out=tmp_path, seeds=(0, 1), tasks=["one"], progress=False)
    made: list[str] = []
    fight = dueling._fight
    monkeypatch.setattr(dueling, "_fight", lambda *arguments: (made.append(arguments[4].name), fight(*arguments))[1])
    again = duel(study(), GATES[:2], [0.5], out=tmp_path, seeds=(0, 1), tasks=["one"], progress=False)
    assert made == []
    assert again.table == first.table
    # As if it had been killed while it made this one; and with one contestant more.
    (tmp_path / "results" / "one-TopK-0.5-seed1.json").unlink()
    more = duel(study(), [*GATES[:2], "random"], [0.5], out=tmp_path, seeds=(0, 1), tasks=["one"], progress=False)
    assert made == ["one-random-0.5-seed0", "one-TopK-0.5-seed1", "one-random-0.5-seed1"]
    for row, before in zip(more.table.rows, first.table.rows, strict=False):
        assert (row.accuracy, row.stability) == (before.accuracy, before.stability)
    with pytest.raises(MismatchError, match=r"mask_steps was 12 and is now 13"):
        duel(study(), GATES[:2], [0.5], out=tmp_path, steps=13, progress=False)
    assert not (tmp_path / "unfinished").exists()


def test_another_gate_of_the_same_name_is_noticed(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(sl.Threshold):
        strength: float = 1.0

    one = {"out": tmp_path, "seeds": (0,), "tasks": ["one"], "progress": False}
    duel(study(), [Mine], [0.5], **one)  # type: ignore[arg-type]
    other = dataclasses.make_dataclass("Mine", [("strength", float, 2.0)], bases=(sl.Threshold,), frozen=True)
    with pytest.raises(MismatchError, match=r"was made by .*Mine\(strength=1.0\), and is asked of .*strength=2.0"):
        duel(study(), [other], [0.5], **one)  # type: ignore[arg-type]


def test_table_page_and_figure_say_the_same(tmp_path: Path) -> None:
    found = duel(study(), ["Bernoulli", "magnitude"], [0.5, 0.1], out=tmp_path, seeds=(0, 1, 2), progress=False)
    told = json.loads((tmp_path / "duel.json").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "duel.csv").read_text())))
    page = (tmp_path / "duel.html").read_text()
    assert len(told["rows"]) == len(rows) == len(found.table.rows) == 8
    for row, line, entry in zip(found.table.rows, rows, told["rows"], strict=True):
        assert float(line["accuracy"]) == pytest.approx(statistics.fmean(row.accuracy))
        assert entry["accuracy"] == list(row.accuracy)
        mean, low, high = entry["accuracy_interval"]
        if row.contestant == "magnitude":
            assert (mean, low, high) == (row.accuracy[0],) * 3
            assert row.stability == (1.0, 1.0, 1.0)
        else:
            half = stats.t.ppf(0.975, 2) * stats.sem(row.accuracy)
            assert (mean - low, high - mean) == pytest.approx((half, half), rel=1e-3)
        assert f"{100 * mean:.1f} % (" in page
    for name in ("svg", "pdf"):
        assert (tmp_path / "figures" / f"duel.{name}").stat().st_size > 2000
    assert page.count("<svg") == 1
    assert "http" not in page.replace("http://www.w3.org", "")


def test_gates_whose_fraction_is_given_take_it() -> None:
    assert sl.TopK.for_run(steps=10, kept=0.1) == sl.TopK(0.1, per_layer=False)
    assert sl.NOfM.for_run(steps=10, kept=0.5) == sl.NOfM(1, 2)
    assert sl.NOfM.for_run(steps=10, kept=0.15) == sl.NOfM(3, 20)
    assert sl.ContinuousSparsification.for_run(steps=10, kept=0.1) == sl.ContinuousSparsification(10)
    assert [gate().takes_penalty for gate in (sl.TopK, sl.NOfM, sl.GumbelSigmoid)] == [False, False, True]


def test_one_seed_has_no_interval() -> None:
    assert interval([0.5]) is None
    assert interval([0.1, 0.3]) == pytest.approx((0.2, 0.2 - 1.2706, 0.2 + 1.2706), abs=1e-4)


def test_groups_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"masks groups \('row'\); a duel counts weights"):
        duel(study(groups="row"), ["TopK"], [0.5], out=tmp_path / "duel", progress=False)


def test_memory_is_the_peak_of_the_block() -> None:
    with dueling._peak_memory() as peak:
        kept = [torch.ones(2_000_000) for _ in range(3)]
        del kept
    found = peak()
    if found is None:
        pytest.skip("this system does not tell")
    assert 20e6 < found < 40e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contestants": ["Gumbel"]}, "No contestant 'Gumbel'. There are Bernoulli, "),
        ({"contestants": []}, "needs contestants"),
        ({"contestants": ["TopK", "TopK"]}, "TopK is given twice"),
        ({"kept": [0.5, 0.5]}, r"kept fractions \[0.5, 0.5\] must be one or more, each of them once"),
        ({"kept": [1.5]}, "neither a fraction above 0 and at most 1"),
        ({"seeds": ()}, r"seeds \[\] must be one or more"),
        ({"tasks": ["three"]}, "has no task three. Its tasks: one, two, all"),
    ],
)
def test_impossible_duels_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"contestants": ["TopK"], "kept": [0.5], "out": tmp_path / "duel", **arguments}
    with pytest.raises(SettingError, match=message):
        duel(study(), given.pop("contestants"), given.pop("kept"), progress=False, **given)
    assert not (tmp_path / "duel").exists()


GATE = """
from dataclasses import dataclass
import sublens as sl

@dataclass(frozen=True)
class Mine(sl.Threshold):
    pass

nothing = 3
"""

STUDY = """
import torch
import sublens as sl

def study():
    def batches(step):
        x = torch.randn(8, 4)
        return x, x.argmax(1)
    task = lambda name: sl.Task(
        name=name, batches=batches, loss=lambda net, b: torch.nn.functional.cross_entropy(net(b[0]), b[1]),
        metric=lambda net: (net(torch.eye(4)).argmax(1) == torch.arange(4)).double().mean().item())
    return sl.Study(name="small", network=lambda seed: torch.nn.Linear(4, 4), tasks=[task("a")], control=task("all"),
                    batch_size=8, network_steps=20, mask_steps=5, samples=2)
"""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.py").write_text(STUDY)
    (tmp_path / "mine.py").write_text(GATE)
    command = ["duel", str(tmp_path / "study.py"), "--kept", "0.5", "--seeds", "2", "--out", str(tmp_path / "duel")]
    assert run([*command, "--gates", f"TopK,random,{tmp_path / 'mine.py'}:Mine"]) == 0
    captured = capsys.readouterr()
    assert "6 of 6: a-Mine-0.5-seed1" in captured.err
    for name in ("TopK", "random", "Mine"):
        assert any(line.startswith(name) and "50 %" in line for line in captured.out.splitlines())
    assert "duel.html" in captured.out
    for gates, message in (
        ("nobody", "No contestant 'nobody'"),
        (f"{tmp_path / 'mine.py'}:nothing", "defines no gate 'nothing'"),
        (f"{tmp_path / 'none.py'}:Mine", "Cannot read the gates in"),
    ):
        assert run([*command, "--gates", gates]) == 2
        assert message in capsys.readouterr().err


def test_the_digits_of_the_examples_are_a_study(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    file = Path(__file__).parents[1] / "examples" / "digits.py"
    digits = dataclasses.replace(studies.load(file), network_steps=60)
    found = duel(digits, ["magnitude", "random"], [0.5], out=tmp_path, tasks=["all", "even"], progress=False)
    assert found.table.network["all"] > 0.6
    assert {row.task for row in found.table.rows} == {"all", "even"}
