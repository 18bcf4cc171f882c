"""The straightforward PyTorch implementation of the method, the honest rival of the fused path.

Two uniforms for each gate and sample, the difference of two Gumbel variables, a sigmoid, a straight-through threshold,
and a batched matrix product over the samples; everything by autograd.
"""

import torch
from torch import Tensor, nn


class TextbookMasks(nn.Module):
    """A masked chain of linear layers with ReLU between them.

    Args:
        layers: the frozen linear layers, in order.
        samples: number K of samples; it divides the batch.
        start: logit that all gates start from.
    """

    def __init__(self, layers: list[nn.Linear], samples: int, start: float) -> None:
        super().__init__()
        self.layers = layers  # a list, not a ModuleList: the weights are not ours
        self.samples = samples
        self.logits = nn.ParameterList(torch.full_like(layer.weight, start) for layer in layers)

    def sample(self, logits: Tensor) -> Tensor:
        """(K, out, in) hard samples with soft gradients."""
        shape = (self.samples, *logits.shape)
        u1 = torch.rand(shape).clamp_(1e-10, 1 - 1e-7)
        u2 = torch.rand(shape).clamp_(1e-10, 1 - 1e-7)
        soft = torch.sigmoid(logits - torch.log(torch.log(u1) / torch.log(u2)))
        hard = (soft > 0.5).to(soft.dtype)
        return hard - soft.detach() + soft

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) to (B, out)."""
        x = x.unflatten(0, (self.samples, -1))
        for i, (layer, logits) in enumerate(zip(self.layers, self.logits, strict=True)):
            weight = layer.weight.detach() * self.sample(logits)
            x = torch.baddbmm(layer.bias.detach()[None, None], x, weight.transpose(1, 2))
            x = torch.relu(x) if i + 1 < len(self.layers) else x
        return x.flatten(0, 1)

    def penalty(self, alpha: float) -> Tensor:
        """The paper's sum of logits."""
        return alpha * torch.stack([logits.sum() for logits in self.logits]).sum()
