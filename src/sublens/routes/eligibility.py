"""Which networks can go a faster route than chunk by chunk: named predicates over what a network is made of."""

import sys
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules import module as modules

from sublens import kernels, recomputation
from sublens.gates import Gate
from sublens.kernels import blocked, cpu

_LINEAR = {
    (nn.Linear, "weight"),
    (nn.Linear, "bias"),
    (nn.modules.linear.NonDynamicallyQuantizableLinear, "weight"),  # of nn.MultiheadAttention
    (nn.modules.linear.NonDynamicallyQuantizableLinear, "bias"),
    (nn.MultiheadAttention, "in_proj_weight"),
    (nn.MultiheadAttention, "in_proj_bias"),
    (nn.MultiheadAttention, "q_proj_weight"),
    (nn.MultiheadAttention, "k_proj_weight"),
    (nn.MultiheadAttention, "v_proj_weight"),
}
"""Which parameters of which modules are used by ``torch.nn.functional.linear`` and nothing else."""


def _linear_only(module: nn.Module, name: str) -> bool:
    """Whether a module's own parameter is used for nothing else than products with what goes through a layer."""
    if type(module) is nn.LSTM:
        return module.proj_size == 0 and name.startswith("weight_")
    return (type(module), name) in _LINEAR or (stores_transposed(module) and name in ("weight", "bias"))


def stores_transposed(module: nn.Module) -> bool:
    """Whether it is a linear layer of Hugging Face's that stores its weight as inputs by outputs, as GPT-2's do."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(module) is getattr(library, "Conv1D", None)


def applies(network: nn.Module, logits: Mapping[str, Tensor], gate: Gate) -> bool:
    """Whether all that is masked are float32 CPU weights of linear layers, attention or LSTMs, under a fused gate."""
    if not (gate.fused and kernels.fused() and blocked.agrees()) or is_compiled(network):
        return False
    parameters = dict(network.named_parameters())
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    return all(
        cpu.applies(parameter, scores)
        and parameter.is_contiguous()
        and all(_linear_only(module, own) for module, own in owners[id(parameter)])
        for parameter, scores in ((parameters[name], scores) for name, scores in logits.items())
    )


_BY_EXAMPLE = (
    nn.CELU, nn.Dropout, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.Linear, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign,
    nn.Tanh, nn.Tanhshrink,
)  # fmt: skip


def per_example(network: nn.Module) -> bool:
    """Whether the network is a chain of modules that act on each example of a batch alone, and nothing watches it.

    Such a network gives each chunk the same outputs whether it is called on chunks or on the whole batch. Only modules
    of torch's own classes are taken at their word, and none with hooks, which would see another batch.
    """

    def acts_alone(module: nn.Module) -> bool:
        if hooked(module) or "forward" in module.__dict__:
            return False
        if type(module) is nn.Sequential:
            return all(acts_alone(part) for part in module)
        if type(module) is nn.LayerNorm:
            return len(module.normalized_shape) == 1
        if type(module) is nn.Flatten:
            return module.start_dim == 1
        return type(module) in _BY_EXAMPLE

    return type(network) is nn.Sequential and not hooked_everywhere() and acts_alone(network)


def vectorised(network: nn.Module) -> bool:
    """Whether :func:`torch.func.vmap` takes the network without loops, and each chunk is seen by whoever watches it.

    It has no rules for attention and LSTMs, and hooks of backward passes would see the gradients of all chunks at once.
    """
    return not (modules._global_backward_hooks or modules._global_backward_pre_hooks) and not any(
        isinstance(module, nn.MultiheadAttention | nn.LSTM) or module._backward_hooks or module._backward_pre_hooks
        for module in network.modules()
    )


def watched(network: nn.Module) -> bool:
    """Whether hooks watch a part of the network: they would see calls that serve to compare two routes."""
    return hooked_everywhere() or any(map(hooked, network.modules()))


def hooked(module: nn.Module) -> bool:
    """Whether hooks watch the calls of a module, or their backward passes."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hooked_everywhere() -> bool:
    """Whether hooks watch the calls of all modules, or their backward passes. Our own, in first calls, do not count."""
    if modules._global_backward_hooks or modules._global_backward_pre_hooks or modules._global_forward_hooks:
        return True
    hooks = modules._global_forward_pre_hooks.values()
    return any(getattr(hook, "__module__", None) != recomputation.__name__ for hook in hooks)


def is_compiled(network: nn.Module) -> bool:
    """Whether a part of the network is compiled: its code wants weights that are ordinary tensors."""
    compiler = sys.modules.get("torch._dynamo")
    return compiler is not None and any(isinstance(module, compiler.OptimizedModule) for module in network.modules())
