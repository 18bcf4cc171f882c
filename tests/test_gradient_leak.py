"""The script that shows the gradient leak: what it states, and that its two runs differ in the leak alone."""

import copy
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sublens.studies.arithmetic import problems


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "gradient_leak.py"
    spec = importlib.util.spec_from_file_location("gradient_leak", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_problems_are_those_of_the_study(script: ModuleType) -> None:
    inputs, digits = script.problems()
    assert torch.equal(inputs, problems().inputs)
    assert torch.equal(digits, problems().digits)


def test_only_with_the_leak_do_the_weights_gradients_pile_up_and_are_gradients_clipped(script: ModuleType) -> None:
    with torch.random.fork_rng():
        inputs, digits = script.problems()
        network = script.trained_network(inputs, digits, 60)
        script.EVERY = 10
        runs, piles = {}, {}
        for leak in (False, True):
            own = copy.deepcopy(network)
            runs[leak] = list(script.train_mask(own, inputs[:10_000], digits[:10_000], 40, leak=leak))
            piles[leak] = [weight.grad for weight in own.parameters()]
    assert all(pile is None for pile in piles[False])
    assert all(bool(pile.any()) for pile in piles[True])
    assert {point[3] for point in runs[False]} == {1.0}
    assert runs[True][-1][3] < 1.0
    assert [point[0] for point in runs[True]] == [0, 10, 20, 30, 40]
    assert runs[False][0][1] == runs[True][0][1] == 1.0
