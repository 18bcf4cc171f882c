"""Uniform random choices of bits, the same on every machine, in little memory."""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_CHUNK = 2**20
_BINS = 2**12


def random_bits(size: int, count: int, key: str) -> Tensor:
    """``count`` of ``size`` bits, chosen uniformly, packed as by :func:`sublens.storage.pack_bits`.

    Each element gets a random 64-bit number, and the ``count`` smallest are chosen. The numbers of a large layer take
    too much memory, so they are drawn again for each pass, a chunk at a time: to find the bin in which the last chosen
    number lies, to sort that bin, and to choose. NumPy promises the same raw numbers in every version,
    unlike the same permutations.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")

    def chunks() -> Iterator[np.ndarray]:
        source = np.random.Philox(key=seed)
        for start in range(0, size, _CHUNK):
            yield source.random_raw(min(_CHUNK, size - start))

    shift = np.uint64(64 - (_BINS - 1).bit_length())
    counts = np.zeros(_BINS, np.int64)
    for chunk in chunks():
        counts += np.bincount((chunk >> shift).astype(np.int64), minlength=_BINS)
    below = np.cumsum(counts)
    last = int(np.searchsorted(below, count)) if count else 0
    sure = int(below[last - 1]) if last else 0
    in_last = np.concatenate([np.empty(0, np.uint64), *(c[(c >> shift) == last] for c in chunks())])
    # Stable, so that equal numbers (one in 2^64) are chosen in their order.
    chosen_in_last = np.zeros(len(in_last), bool)
    chosen_in_last[np.argsort(in_last, kind="stable")[: count - sure]] = True
    packed, used = [np.empty(0, np.uint8)], 0
    for chunk in chunks():
        bins = chunk >> shift
        bits, border = bins < last, bins == last
        bits[border] = chosen_in_last[used : used + int(border.sum())]
        used += int(border.sum())
        packed.append(np.packbits(bits, bitorder="little"))
    return torch.from_numpy(np.concatenate(packed))
