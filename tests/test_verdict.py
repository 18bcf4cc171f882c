"""The verdict: the sharing index on masks whose sharing is known, and the rule on every kind of evidence."""

import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sublens.analysis import Evidence, Excluded, Reused, gather, judge, retention, reused_share, sharing_index
from sublens.mask import Mask

ROWS, COLUMNS = 200, 50


def made(*parts: torch.Tensor) -> Mask:
    return Mask({f"{index}": part for index, part in enumerate(parts)}, "network")


def random(share: float, seed: int, rows: int = ROWS) -> torch.Tensor:
    return torch.rand(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) < share


def noisy(mask: torch.Tensor, changed: float, seed: int) -> torch.Tensor:
    """The same mask, with some elements drawn anew."""
    share = mask.double().mean().item()
    return torch.where(random(changed, seed, len(mask)), random(share, seed + 1, len(mask)), mask)


def test_the_index_is_1_for_the_same_task_and_0_for_chance() -> None:
    truth = random(0.3, 0)
    first, again, third = (made(noisy(truth, 0.4, seed)) for seed in (1, 3, 5))
    other = made(random(0.3, 9))
    index = sharing_index(first, third, [(first, again)])
    assert index is not None and index[1] < 1 < index[2] and abs(index[0] - 1) < 0.1
    index = sharing_index(first, other, [(first, again)])
    assert index is not None and index[1] < 0 < index[2] and abs(index[0]) < 0.1


def test_the_index_is_its_definition() -> None:
    first, second = made(random(0.2, 0), random(0.5, 1, 40)), made(random(0.3, 2) | random(0.1, 0), random(0.4, 1, 40))
    again = made(random(0.2, 0) ^ random(0.05, 4), random(0.5, 1, 40) ^ random(0.05, 5, 40))

    def sharing(a: Mask, b: Mask) -> float:
        sizes, mine, others = a.sizes(), a.kept_counts(), b.kept_counts()
        chance = sum(mine[name] * others[name] / sizes[name] for name in sizes)
        return ((a & b).kept_count - chance) / (min(a.kept_count, b.kept_count) - chance)

    index = sharing_index(first, second, [(first, again)])
    assert index is not None
    assert index[0] == pytest.approx(sharing(first, second) / sharing(first, again))
    assert index[1] < index[0] < index[2]
    only = sharing_index(first, second, [(first, again)], layers=["1"])
    assert only is not None and only[0] != pytest.approx(index[0])
    assert sharing_index(first, second, [(first, again)]) == index


def test_a_smaller_mask_within_a_larger_one_shares_all_that_it_can() -> None:
    large = random(0.6, 0)
    small = large & random(0.3, 1)
    index = sharing_index(made(small), made(large), [(made(large), made(large))])
    assert index is not None and index[0] == pytest.approx(1)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Rows share one of two amounts, so that they differ more than by chance; the expected index is 0.5.

    Of 60 intervals of 95 % the expected number that miss is 3; more than 9 have a probability of 0.07 %.
    """
    misses = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        first, other = (torch.rand(100, 40, generator=generator) < 0.3 for _ in range(2))
        same = torch.rand(100, 1, generator=generator) < 0.5
        second = torch.where(same, first, other)
        index = sharing_index(made(first), made(second), [(made(first), made(first))], seed=seed)
        assert index is not None
        misses += not index[1] <= 0.5 <= index[2]
    assert misses <= 9


def test_without_a_second_mask_or_with_one_by_chance_there_is_no_index() -> None:
    first, second = made(random(0.3, 0)), made(random(0.3, 1))
    assert sharing_index(first, second, []) is None
    empty = made(torch.zeros(ROWS, COLUMNS, dtype=torch.bool))
    assert sharing_index(first, empty, [(first, first)]) is None
    worse = made(~random(0.3, 0))
    assert sharing_index(first, second, [(first, worse)]) is None


def test_masks_of_few_rows_are_measured_without_a_warning() -> None:
    first, second, again = (
        torch.tensor(bits).view(3, 4) == 1
        for bits in (
            [1, 1, 0, 0, 0, 1, 0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 0],
            [0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0],
        )
    )  # fmt: skip
    # In some resamples of three rows the first and the third share exactly what random masks do.
    index = sharing_index(made(first), made(second), [(made(first), made(again))])
    assert index is not None and index[1] < index[0] < index[2]


def test_the_reused_share_is_its_definition() -> None:
    used = made(random(0.2, 0), random(0.5, 1, 40))
    mask = made((used["0"] & random(0.5, 2)) | random(0.1, 3), random(0.3, 4, 40))
    sizes, mine, before = mask.sizes(), mask.kept_counts(), used.kept_counts()
    chance = sum(mine[name] * before[name] / sizes[name] for name in sizes)
    share = reused_share(mask, used)
    assert share is not None
    assert share[0] == pytest.approx(((mask & used).kept_count - chance) / (mask.kept_count - chance))
    assert share[1] < share[0] < share[2]
    assert reused_share(mask, used) == share
    of_one = reused_share(mask, used, layers=["1"])
    assert of_one is not None and of_one[1] < 0 < of_one[2]  # drawn with no regard to what was used


def test_the_reused_share_is_1_within_what_was_used_and_0_by_chance() -> None:
    used = random(0.4, 0)
    assert reused_share(made(used & random(0.2, 1)), made(used)) == pytest.approx((1, 1, 1))
    by_chance = reused_share(made(random(0.2, 1)), made(used))
    assert by_chance is not None and by_chance[1] < 0 < by_chance[2] and abs(by_chance[0]) < 0.05
    nothing, everything = made(torch.zeros(ROWS, COLUMNS, dtype=torch.bool)), made(~(used & ~used))
    assert reused_share(nothing, made(used)) is None
    assert reused_share(made(used), everything) is None


def test_the_interval_of_a_reused_share_holds_the_truth_about_as_often_as_it_says() -> None:
    """Half of the rows keep what was used, the others other weights, so that 0.5 is reused on average, less chance.

    Of 60 intervals of 95 % the expected number that miss is 3; more than 9 have a probability of 0.07 %.
    """
    misses = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        used, other = (torch.rand(100, 40, generator=generator) < 0.3 for _ in range(2))
        reuses = torch.rand(100, 1, generator=generator) < 0.5
        share = reused_share(made(torch.where(reuses, used, other)), made(used), seed=seed)
        assert share is not None
        misses += not share[1] <= 0.5 <= share[2]
    assert misses <= 9


GOOD = Evidence(tasks=("a", "b"), same_function=False, own=(1.0, 0.98), other=(0.01, 0.0), index=(0.4, 0.35, 0.45))
SHARED = (0.9, 0.85, 0.95)
BETWEEN = (0.75, 0.7, 0.8)


def outcome(*evidence: Evidence, of: str) -> str:
    return str(judge(evidence)[of]["verdict"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "holds"),
        ({"own": (1.0, 0.7)}, "undecided"),
        ({"own": (None, 1.0)}, "undecided"),
        ({"other": (0.8, 0.0)}, "fails"),
        ({"other": (0.0, 0.76)}, "fails"),
        ({"other": (0.5, 0.0)}, "undecided"),
        ({"other": (None, 0.0)}, "undecided"),
        ({"index": SHARED}, "undecided"),
        ({"index": BETWEEN}, "undecided"),
        ({"index": None}, "undecided"),
        ({"index": None, "other": (0.9, 0.0)}, "fails"),
        ({"other": (0.9, 0.0), "own": (0.1, 1.0)}, "undecided"),
        ({"other": (0.9, 0.0), "unsure": (0.1, 0.5)}, "undecided"),
        ({"unsure": (0.1, 0.5)}, "undecided"),
        ({"unsure": (0.1, None)}, "holds"),
        ({"able": (0.5, 1.0)}, "holds"),
        ({"able": (1.0, 0.49)}, "undecided"),
        ({"other": (0.9, 0.0), "able": (0.1, 1.0)}, "undecided"),
    ],
)
def test_specialisation_by_its_rule(changes: dict[str, Any], expected: str) -> None:
    assert outcome(replace(GOOD, **changes), of="specialize") == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"index": SHARED}, "holds"),
        ({}, "fails"),
        ({"index": BETWEEN}, "undecided"),
        ({"index": None}, "undecided"),
        ({"index": SHARED, "own": (0.5, 1.0)}, "undecided"),
        ({"index": SHARED, "unsure": (0.2, 0.41)}, "undecided"),
        ({"index": SHARED, "able": (1.0, 0.09)}, "undecided"),
        ({"able": (1.0, 0.09)}, "undecided"),
    ],
)
def test_reuse_by_its_rule(changes: dict[str, Any], expected: str) -> None:
    assert outcome(replace(GOOD, same_function=True, **changes), of="reuse") == expected


def test_a_function_that_the_network_never_learned_is_no_evidence() -> None:
    # The network is right in one of ten, a mask of nothing much as well: a retention of 1, of nothing.
    masks = {name: made(random(0.3, seed)) for seed, name in enumerate(("a", "b"))}
    accuracy = {"a": {"a": 1.0, "b": 0.01}, "b": {"a": 0.01, "b": 0.1}}
    chance = {name: {"a": 0.01, "b": 0.01} for name in masks}
    again = {"a": made(noisy(masks["a"]["0"], 0.1, 7))}
    found = gather({"a": "f", "b": "f"}, masks, again, accuracy, {"a": 1.0, "b": 0.1}, chance)
    assert found[0].own[1] == pytest.approx(1.0)
    verdict = judge(found)["reuse"]
    assert verdict["verdict"] == "undecided"
    assert verdict["because"].startswith("b is answered under its own mask only 9.1")


def test_one_pair_that_fails_decides_and_one_that_is_open_leaves_it_open() -> None:
    open_, bad = replace(GOOD, index=BETWEEN), replace(GOOD, other=(0.9, 0.9))
    assert outcome(GOOD, open_, of="specialize") == "undecided"
    assert outcome(GOOD, open_, bad, of="specialize") == "fails"
    assert "1 more of 3)" in judge([bad, bad, GOOD])["specialize"]["because"]


def test_what_a_study_does_not_ask_is_undecided() -> None:
    verdict = judge([GOOD])
    assert verdict["reuse"] == {"verdict": "undecided", "because": "the study has no two tasks of the same function."}
    assert judge([])["specialize"]["verdict"] == "undecided"


HELD = Excluded(task="a", same_function=True, own=1.0, control=0.9, left=0.9)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "holds"),
        ({"left": 0.75}, "holds"),
        ({"left": 0.74}, "undecided"),
        ({"left": 0.5}, "undecided"),
        ({"left": 0.49}, "fails"),
        ({"left": -0.1}, "fails"),
        ({"left": 0.1, "own": 0.7}, "undecided"),
        ({"left": 0.1, "own": None}, "undecided"),
        ({"left": 0.1, "control": 0.7}, "undecided"),
        ({"left": 0.1, "control": None}, "undecided"),
        ({"left": None}, "undecided"),
        ({"left": 0.1, "unsure": 0.41}, "undecided"),
        ({"left": 0.1, "unsure": 0.4}, "fails"),
        ({"left": 0.1, "able": (0.49, 1.0)}, "undecided"),
        ({"left": 0.1, "able": (1.0, 0.49)}, "undecided"),
        ({"left": 0.1, "able": (0.5, 0.5)}, "fails"),
    ],
)
def test_reuse_by_what_is_held_back(changes: dict[str, Any], expected: str) -> None:
    verdict = judge([], [replace(HELD, **changes)])
    assert verdict["reuse"]["verdict"] == expected
    assert verdict["specialize"]["verdict"] == "undecided"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "fails"),
        ({"left": 0.75}, "fails"),
        ({"left": 0.74}, "undecided"),
        ({"left": 0.25}, "holds"),
        ({"left": 0.26}, "undecided"),
        ({"left": 0.1, "own": 0.7}, "undecided"),
        ({"left": 0.1, "control": 0.7}, "undecided"),
    ],
)
def test_specialisation_by_what_is_left_out(changes: dict[str, Any], expected: str) -> None:
    verdict = judge([], [replace(HELD, same_function=False, **changes)])
    assert verdict["specialize"]["verdict"] == expected
    assert verdict["reuse"]["verdict"] == "undecided"


UP = Reused(task="a", same_function=True, share=(0.85, 0.8, 0.9), unsure=0.1, able=0.9)
DOUBTS: list[dict[str, Any]] = [{"able": 0.49}, {"unsure": 0.41}, {"share": None}]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "holds"),
        ({"share": (0.8, 0.74, 0.9)}, "undecided"),
        ({"share": (0.4, 0.3, 0.49)}, "fails"),
        ({"share": (0.4, 0.3, 0.5)}, "undecided"),
        ({"unsure": None, "able": None}, "holds"),
        *((doubt, "undecided") for doubt in DOUBTS),
    ],
)
def test_reuse_by_what_a_task_takes_up(changes: dict[str, Any], expected: str) -> None:
    verdict = judge([], reused=[replace(UP, **changes)])
    assert verdict["reuse"]["verdict"] == expected
    assert verdict["specialize"]["verdict"] == "undecided"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "fails"),
        ({"share": (0.8, 0.74, 0.9)}, "undecided"),
        ({"share": (0.2, 0.15, 0.25)}, "holds"),
        ({"share": (0.2, 0.15, 0.26)}, "undecided"),
        *((doubt, "undecided") for doubt in DOUBTS),
    ],
)
def test_specialisation_by_what_another_function_takes_up(changes: dict[str, Any], expected: str) -> None:
    verdict = judge([], reused=[replace(UP, same_function=False, **changes)])
    assert verdict["specialize"]["verdict"] == expected
    assert verdict["reuse"]["verdict"] == "undecided"
    assert verdict["reused"][0]["task"] == "a"


def test_pairs_and_what_is_excluded_are_judged_together() -> None:
    alike = replace(GOOD, same_function=True, index=SHARED)
    assert judge([alike], [HELD])["reuse"]["verdict"] == "holds"
    verdict = judge([alike], [HELD, replace(HELD, task="b", left=0.2)])
    assert verdict["reuse"]["verdict"] == "fails"
    assert "of what b holds back, its mask has 20.0\u00a0%" in verdict["reuse"]["because"]
    assert [one["task"] for one in verdict["excluded"]] == ["a", "b"]


EVIDENCE = st.builds(
    Evidence,
    tasks=st.just(("a", "b")),
    same_function=st.booleans(),
    own=st.tuples(*[st.none() | st.floats(-0.2, 1.1)] * 2),
    other=st.tuples(*[st.none() | st.floats(-0.2, 1.1)] * 2),
    index=st.none() | st.tuples(*[st.floats(-1, 2)] * 3).map(sorted).map(lambda x: (x[1], x[0], x[2])),
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(EVIDENCE, max_size=4))
def test_every_evidence_has_a_verdict_and_a_reason(evidence: list[Evidence]) -> None:
    verdict = judge(evidence)
    for key in ("specialize", "reuse"):
        assert verdict[key]["verdict"] in ("holds", "fails", "undecided")
        assert verdict[key]["because"].endswith(".")


def test_evidence_is_gathered_from_masks_and_accuracies() -> None:
    masks = {name: made(random(0.3, seed)) for seed, name in enumerate(("a", "b", "c", "left out"))}
    accuracy = {name: {"a": 0.9, "b": 0.5, "c": 0.1, "left out": 0.0} for name in masks}
    whole = {"a": 1.0, "b": 0.9, "c": 0.1, "left out": 1.0}
    chance = {name: {"a": 0.5, "b": 0.1, "c": 0.1} for name in ("a", "b", "c")}
    found = gather(
        {"a": "f", "b": "f", "c": "g"}, masks, {"b": made(noisy(masks["b"]["0"], 0.1, 7))}, accuracy, whole, chance
    )
    assert [(pair.tasks, pair.same_function) for pair in found] == [
        (("a", "b"), True),
        (("a", "c"), False),
        (("b", "c"), False),
    ]
    assert found[0].own == (pytest.approx(0.8), pytest.approx(0.5))
    assert found[0].other == (pytest.approx(0.5), pytest.approx(0.8))
    assert found[0].able == (pytest.approx(0.8), pytest.approx(0.4 / 0.9))
    assert found[1].own[1] is None  # the network itself does no better than random masks
    assert all(pair.index is not None and math.isfinite(pair.index[0]) for pair in found)
    assert retention(0.3, 0.3, 0.3) is None


@pytest.mark.parametrize(
    ("layers", "said"), [(None, "share 0.40"), (("x",), "share in x 0.40"), (("x", "y"), "share in x and y 0.40"),
                         (tuple("wxyz"), "share in 4 of the layers 0.40")]
)  # fmt: skip
def test_the_reason_names_the_layers_that_were_compared(layers: tuple[str, ...] | None, said: str) -> None:
    assert f"a and b {said} (" in judge([dataclasses.replace(GOOD, layers=layers)])["specialize"]["because"]
