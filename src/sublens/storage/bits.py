"""Eight booleans in a byte."""

import math

import numpy as np
import torch
from torch import Tensor

from sublens.errors import FileError


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans into bytes: element ``i`` (row-major) becomes bit ``i % 8`` of byte ``i // 8``.

    Args:
        bits: bool tensor of any shape and device, n elements.

    Returns:
        uint8 tensor of shape (ceil(n / 8),) on the CPU; the bits beyond the last element are 0.
    """
    flat = bits.detach().to("cpu").reshape(-1)
    return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`pack_bits`: a bool tensor of ``shape`` on the CPU, which owns its memory.

    Raises:
        FileError: ``packed`` is not what :func:`pack_bits` gives for this shape: dtype, length, or a set padding bit.
    """
    check_packed(packed, shape)
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).reshape(shape)


def check_packed(packed: Tensor, shape: tuple[int, ...]) -> None:
    """Check, without unpacking, that ``packed`` holds exactly the bits of a tensor of ``shape``.

    Raises:
        FileError: wrong dtype, number of dimensions or length, or a padding bit that is set.
    """
    size = math.prod(shape)
    needed = (size + 7) // 8
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise FileError(f"packed bits must be one row of uint8, not {packed.dtype} of shape {tuple(packed.shape)}")
    if packed.numel() != needed:
        raise FileError(f"shape {tuple(shape)} needs {needed} bytes of packed bits, but there are {packed.numel()}")
    if size % 8 and int(packed[-1]) >> (size % 8):
        raise FileError(f"padding bits after the last of {size} elements are set")
