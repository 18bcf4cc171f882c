"""Gradient checkpointing is refused, inside a masked network and around it; other hooks on saved tensors are not."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sublens as sl


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None, *, convolution: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.middle = nn.Conv1d(1, 1, 3, padding=1) if convolution else nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)
        self.reentrant = reentrant

    def part(self, x: Tensor) -> Tensor:
        return torch.tanh(self.middle(x[:, None])[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = self.part(x) if self.reentrant is None else checkpoint(self.part, x, use_reentrant=self.reentrant)
        return self.last(x)


# Torch's own remark on a reentrant checkpoint without gradients, as in the call that looks where the batch is.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("convolution", [False, True])
def test_inside_the_network(reentrant: bool, samples: int, convolution: bool) -> None:
    masked = sl.MaskedNetwork(Checkpointed(reentrant, convolution=convolution), samples=samples)
    with pytest.raises(sl.SettingError, match="gradient_checkpointing_disable"):
        masked(torch.randn(8, 6))


def test_around_the_network() -> None:
    masked = sl.MaskedNetwork(Checkpointed(None))
    with pytest.raises(sl.SettingError, match=r"torch\.utils\.checkpoint"):
        checkpoint(masked, torch.randn(8, 6), use_reentrant=False)


def test_evaluation_is_not_concerned() -> None:
    masked = sl.MaskedNetwork(Checkpointed(False)).eval()
    assert masked(torch.randn(8, 6)).shape == (8, 3)


def test_other_hooks_on_saved_tensors_are_left_alone() -> None:
    masked, x = sl.MaskedNetwork(Checkpointed(None)), torch.randn(8, 6)
    with torch.autograd.graph.save_on_cpu():
        masked(x).sum().backward()
    assert all(bool(logits.grad.any()) for logits in masked.parameters())


def test_no_hook_stays_behind() -> None:
    masked = sl.MaskedNetwork(Checkpointed(False))
    with pytest.raises(sl.SettingError):
        masked(torch.randn(8, 6))
    plain = Checkpointed(False)
    plain(torch.randn(8, 6)).sum().backward()
    assert not torch.nn.modules.module._global_forward_pre_hooks
