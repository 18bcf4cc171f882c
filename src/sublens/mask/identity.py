"""The two rules that others must share with masks: what is kept, and which network is meant."""

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sublens.errors import SettingError
from sublens.storage import hash_tensors


def binarise(logit: Tensor) -> Tensor:
    """The one rule that turns logits into a mask: an element is kept iff its logit is above 0.

    Args:
        logit: float tensor of any shape and device.

    Returns:
        bool tensor of the same shape and device; ``False`` at 0 and at NaN.
    """
    return logit.detach() > 0


def fingerprint(network: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a network's ``state_dict`` (see ``docs/file-format.md``).

    It changes with one bit of one weight or buffer. It does not change with device, memory layout, ``requires_grad`` or
    the training flag.

    Returns:
        64 lowercase hexadecimal digits.

    Raises:
        SettingError: a tensor has no bytes to read (lazy, sparse, quantized, on the meta device).
    """
    entries = network.state_dict()
    for name, tensor in entries.items():
        if isinstance(tensor, Tensor) and is_lazy(tensor):
            raise SettingError(f"'{name}' has no shape yet; run one batch through the network first")
    return hash_tensors({name: tensor for name, tensor in entries.items() if isinstance(tensor, Tensor)})
