"""Files: tensors with metadata, bits packed eight to a byte, writes that cannot be half done.

The format is specified in ``docs/file-format.md``. Nothing here unpickles, and nothing here knows what a mask is.
"""

from sublens.storage.bits import check_packed, pack_bits, unpack_bits
from sublens.storage.files import (
    fingerprint_entry,
    load_logits,
    load_tensors,
    load_weights,
    save_logits,
    save_tensors,
    shape_entry,
)
from sublens.storage.hashing import hash_tensors
from sublens.storage.locking import held
from sublens.storage.writing import atomic_write_bytes, atomic_write_text

__all__ = [
    "atomic_write_bytes",
    "atomic_write_text",
    "check_packed",
    "fingerprint_entry",
    "hash_tensors",
    "held",
    "load_logits",
    "load_tensors",
    "load_weights",
    "pack_bits",
    "save_logits",
    "save_tensors",
    "shape_entry",
    "unpack_bits",
]
