"""The documentation is true: every piece of its code runs, and every public name has its entry in the reference."""

import contextlib
import importlib
import io
import math
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sublens as sl

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = sorted(path.name for path in DOCS.glob("*.md") if BLOCK.search(path.read_text(encoding="utf-8")))
STEPS = 3  # of every training: pages say what a user would write, such as steps=20_000
OPTIONAL = {"tensorboard": "examples", "transformers": "transformers"}


class Attend(nn.Module):
    """Attention of each example to itself alone: a module with heads, for the page on groups."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.attn(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]
        return out


def given() -> dict[str, Any]:
    """What a page takes for granted: a network and a task of the reader's own, and a loop."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), Attend(64), nn.Linear(64, 4))
    x = torch.randn(32, 2)
    y = torch.arange(32) % 4
    masked = sl.MaskedNetwork(network)
    logits = dict(masked.logits)

    def loss(net: nn.Module, batch: Any) -> torch.Tensor:
        return cross_entropy(net(batch[0]), batch[1])

    def accuracy(net: nn.Module) -> float:
        with torch.no_grad():
            return (net(x).argmax(1) == y).float().mean().item()

    full = sl.Mask.full(network)
    return {
        "torch": torch, "nn": nn, "math": math, "sl": sl, "cross_entropy": cross_entropy,
        "network": network, "x": x, "y": y, "batches": lambda step: (x, y), "add_batches": lambda step: (x, y),
        "mul_batches": lambda step: (x, y), "loss": loss, "alpha": 1e-6,
        "evaluate": lambda net: {"accuracy": accuracy(net)}, "metrics": {"add": accuracy, "mul": accuracy},
        "masked": masked, "logits": logits, "optimizer": torch.optim.Adam(logits.values()), "forward": masked,
        "penalty": masked.penalty(1e-6), "add_loss": loss, "mul_loss": loss, "control": full,
        **{name: sl.random_mask(network, 0.5, seed=seed)
           for seed, name in enumerate(("add", "mul", "add_1", "add_2", "add_3"))},
        "make_network": lambda seed: network,
    }  # fmt: skip


@pytest.fixture
def in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of a few steps, and studies too."""
    fit, fit_tasks, study = sl.fit, sl.fit_tasks, sl.Study

    def short_fit(*args: Any, **settings: Any) -> sl.Run:
        return fit(*args, **{**settings, "steps": min(settings.get("steps", STEPS), STEPS), "progress": False})

    def short_tasks(*args: Any, **settings: Any) -> dict[str, sl.Run]:
        return fit_tasks(*args, **{**settings, "steps": min(settings.get("steps", STEPS), STEPS), "progress": False})

    def short_study(**settings: Any) -> sl.Study:
        return study(**{**settings, "network_steps": STEPS, "mask_steps": STEPS})

    monkeypatch.setattr(sl, "fit", short_fit)
    monkeypatch.setattr(sl, "fit_tasks", short_tasks)
    monkeypatch.setattr(sl, "Study", short_study)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("in_short")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # those of optional packages
def test_every_piece_of_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")  # a dataclass looks its module up
    monkeypatch.setitem(importlib.import_module("sys").modules, "page", module)
    module.__dict__.update(given())
    text = (DOCS / page).read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        # "..." among arguments stands for more of them, which the reader knows.
        code = re.sub(r", \.\.\.(?=[,)])", "", found[1])
        line = text[: found.start()].count("\n") + 2
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile("\n" * (line - 1) + code, page, "exec"), module.__dict__)
        except ModuleNotFoundError as error:
            extra = OPTIONAL.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            pytest.skip(f"{page}, line {line}: needs {error.name}: python -m pip install 'sublens[{extra}]'")


def test_the_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\.\. auto\w+:: sublens\.(\w+)$", text, re.MULTILINE))
    errors = {name for name in sl.__all__ if name.endswith("Error")}
    assert ".. automodule:: sublens.errors" in text
    assert set(sl.__all__) == (named | errors) - {"answers", "errors"}


def test_every_page_is_in_the_contents():
    contents = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^([\w-]+)$", contents, re.MULTILINE))
    assert {path.stem for path in DOCS.glob("*.md")} - {"index"} <= listed
