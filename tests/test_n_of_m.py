"""N of every M: what is particular to that gate. Its samples and gradients are in the tables of gates and groups."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sublens as sl
from sublens.errors import SettingError


@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.integers(1, 11), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_every_run_keeps_n(n: int, more: int, outputs: int, inputs: int, seed: int) -> None:
    gate = sl.NOfM(n, n + more)
    logits = torch.randn(outputs, inputs, 2, generator=torch.Generator().manual_seed(seed)).round()  # with ties
    kept = gate.decision(logits) > 0
    for run, scores in zip(kept.split(n + more, 1), logits.split(n + more, 1), strict=True):
        if inputs > 1:
            assert bool((run.sum(1) == min(n, run.shape[1])).all())
            lowest_kept = torch.where(run, scores, torch.inf).amin(1)
            highest_removed = torch.where(run, -torch.inf, scores).amax(1)
            assert bool((lowest_kept >= highest_removed).all())


def test_a_trained_mask_keeps_two_of_four_and_finds_the_inputs_that_count() -> None:
    torch.manual_seed(0)
    network = nn.Linear(8, 3)
    with torch.no_grad():
        network.weight.fill_(0.1)[:, [1, 2, 4, 7]] = 2.0

    def batch(step: int) -> torch.Tensor:
        return torch.randn(64, 8)

    def loss(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (net(x) - network(x).detach()).square().mean()

    def sgd(logits: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(logits, lr=0.1)

    run = sl.fit(network, batch, loss, steps=30, gate=sl.NOfM(2, 4), optimizer=sgd, progress=False)
    assert run.mask["weight"].tolist() == [[i in (1, 2, 4, 7) for i in range(8)]] * 3


def test_a_penalty_is_refused() -> None:
    with pytest.raises(SettingError, match=r"NOfM\(n=2, m=4\) keeps 2 of 4 .* Set alpha=0"):
        sl.MaskedNetwork(nn.Linear(6, 5), gate=sl.NOfM()).penalty(1e-3)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 2), (1.0, 2), (True, 2), (2, None)])
def test_impossible_numbers_are_refused(n: Any, m: Any) -> None:
    with pytest.raises(SettingError, match="whole numbers with 1 <= n <= m"):
        sl.NOfM(n, m)
