"""Seeds made from names and numbers, so that every part of a run has random numbers of its own."""

import hashlib


def seed_from(*parts: object) -> int:
    """Return a seed in 0..2**63-1 that is a pure function of ``parts``, the same in every process and on every machine.

    ``torch.Generator().manual_seed(seed_from(seed, step))`` gives each step of each run random numbers of its own,
    unlike ``seed + step``, where neighbouring seeds share almost all of their steps.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
