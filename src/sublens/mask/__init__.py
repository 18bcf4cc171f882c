"""The binary result: which weights of a network are kept; its algebra, its numbers, and how it is put on."""

from sublens.mask.identity import binarise, fingerprint
from sublens.mask.mask import Mask, check_mask

__all__ = ["Mask", "binarise", "check_mask", "fingerprint"]
