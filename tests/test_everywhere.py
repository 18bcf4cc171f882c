"""Other devices, precisions, and what a user does with the network meanwhile.

The meta device stands in for an accelerator: a tensor made on the CPU where the network is elsewhere fails there as
it would on one.
"""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sublens as sl

# TopK is not here: which elements rank highest depends on data, which the meta device has none of.
GATES = [
    sl.GumbelSigmoid(), sl.GumbelSigmoid(tau=0.7), sl.HardConcrete(), sl.Bernoulli(), sl.Threshold(),
    sl.ContinuousSparsification(steps=10),
]  # fmt: skip


class Several(nn.Module):
    """Convolution with BatchNorm, attention, recurrence and a linear layer, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1, groups=2), nn.BatchNorm1d(8), nn.ReLU())
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.attention(self.conv(x).transpose(1, 2)).mean(1))
        return scores


def several(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Several().to(dtype)


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@pytest.mark.parametrize("gate", GATES, ids=repr)
def test_a_step_of_training_makes_no_tensor_on_another_device(gate: sl.Gate) -> None:
    samples = 4 if isinstance(gate, sl.GumbelSigmoid | sl.HardConcrete | sl.Bernoulli) else 1
    masked = sl.MaskedNetwork(several(), gate=gate, samples=samples, biases=True).to("meta")
    optimizer = torch.optim.Adam(masked.parameters())
    loss = masked(inputs(device="meta")).square().mean() + masked.penalty(1e-3, kind="expected")
    loss.backward()
    optimizer.step()
    assert loss.device.type == "meta"
    assert all(logits.grad is not None and logits.grad.device.type == "meta" for logits in masked.parameters())
    assert masked.eval()(inputs(device="meta")).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mask_trains_in_every_precision_of_the_network(dtype: torch.dtype) -> None:
    network, x = several(dtype), inputs(dtype)
    y = torch.arange(8) % 3

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(net(x).float(), y)

    run = sl.fit(network, lambda step: None, loss, steps=60, alpha=0.0, lr=0.1, record_every=20, progress=False)
    assert run.history[-1]["loss"] < 0.95 * run.history[1]["loss"]
    assert all(logits.dtype == torch.float32 for logits in run.logits.values())
    assert all(tensor.dtype == dtype for tensor in network.parameters())
    pruned = run.mask.apply(network).eval()
    assert pruned(x).dtype == dtype
    with run.mask.applied(network.eval()):
        assert torch.equal(network(x), pruned(x))


def saved(network: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(network, buffer)
    return buffer.getvalue()


def test_the_users_network_is_copied_pickled_and_saved_during_and_after_masking() -> None:
    network, x = several().eval(), inputs()
    before = network(x)
    masked = sl.MaskedNetwork(network, keep=0.6)
    made: list[nn.Module] = []

    def copies(net: nn.Module) -> list[nn.Module]:
        loaded = torch.load(io.BytesIO(saved(net)), weights_only=False)
        return [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), loaded]

    optimizer = torch.optim.Adam(masked.parameters())
    for _ in range(2):
        masked(x).square().mean().backward()
        made += copies(network)  # between the passes of a step, while its graph still lives or has just gone
        optimizer.step()
    made += copies(network)
    mask = masked.mask()
    for made_of_it in made:
        assert torch.equal(made_of_it.eval()(x), before)
        assert sl.fingerprint(made_of_it) == mask.network
        assert not any("mask" in name or "logit" in name for name, _ in made_of_it.named_parameters())

    half = sl.Mask.random_like(mask, seed=1)
    with half.applied(network):
        inside = [again(x) for again in copies(network)]
        expected = network(x)
    assert all(torch.equal(output, expected) for output in inside)
    assert torch.equal(network(x), before)
