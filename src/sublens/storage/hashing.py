"""The hash behind checksums and fingerprints."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from sublens.errors import SettingError
from sublens.storage.words import short


def hash_tensors(tensors: Mapping[str, Tensor], header: str | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors ("Hash of tensors" in ``docs/file-format.md``).

    Args:
        tensors: dense tensors of any dtype and device; their order does not matter.
        header: text that is hashed before them.

    Returns:
        64 lowercase hexadecimal digits.

    Raises:
        SettingError: a tensor has no bytes to read (sparse, quantized, on the meta device).
    """
    digest = hashlib.sha256()
    if header is not None:
        digest.update(header.encode() + b"\n")
    for name in sorted(tensors):
        tensor = tensors[name]
        title = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(canonical(title).encode() + b"\n")
        plain = plain_tensor(name, tensor)
        # Not reshape(-1): tensors of one or no element count as contiguous with any stride, which view() then refuses.
        digest.update(plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_tensor(name: str, tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, with its values as its bytes."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise SettingError(
            f"tensor {short(name)} ({tensor.dtype}, {tensor.layout}, on {tensor.device}) has no plain bytes; "
            "make it a dense tensor on a real device first"
        )
    # Lazy conjugation and negation are views whose bytes are not their values.
    return tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()


def canonical(value: object) -> str:
    """JSON in the one spelling that ``docs/file-format.md`` calls canonical text."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, sort_keys=True, separators=(",", ":"))
