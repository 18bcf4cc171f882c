"""What sublens stores: tensors with metadata, logits, weights."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sublens.errors import FileError, MismatchError, SettingError
from sublens.storage.hashing import canonical, hash_tensors, plain_tensor
from sublens.storage.reading import ENTRY, MAX_HEADER_BYTES, METADATA, STAMP, VERSION, opened, read_safetensors
from sublens.storage.words import first_line, named, short
from sublens.storage.writing import replacing

MAX_DIMENSIONS = 64


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write tensors and metadata into one sublens file, atomically and with a checksum.

    Args:
        path: the file. Its folder must exist; an older file there is replaced at the end or not at all.
        tensors: name -> dense tensor. Their order is kept.
        metadata: what ``json`` can write. ``kind`` says what the file is, see ``docs/file-format.md``.

    Raises:
        SettingError: a tensor or the metadata cannot be stored.
        FileError: the file cannot be written. An older file there is unharmed.
    """
    entry = dict(metadata or {})
    if reserved := sorted(set(STAMP) & set(entry)):
        raise SettingError(f"metadata must not contain {', '.join(reserved)}: sublens writes these itself")
    if METADATA in tensors:
        raise SettingError(f"a tensor cannot be called {METADATA}: safetensors reserves that name")
    # A copy of what shares memory, as tied weights do: safetensors refuses it.
    seen: set[int] = set()
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = plain_tensor(name, tensor)
        address = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if address in seen else plain
        seen.add(address)
    entry |= {"version": VERSION, "tensors": list(stored)}
    try:
        text = canonical(entry)
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingError(f"metadata is not JSON: {first_line(error)}") from error
    text = canonical(entry | {"checksum": hash_tensors(stored, text)})
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(stored, temporary, {ENTRY: text})
        except safetensors.SafetensorError as error:  # the disk is full, for example
            raise FileError(
                f"{named(path)} cannot be written: {first_line(error)}; nothing there was changed"
            ) from error
        except (UnicodeError, KeyError, ValueError) as error:
            raise SettingError(f"safetensors cannot store these names or dtypes: {first_line(error)}") from error
        if _header_length(temporary) > MAX_HEADER_BYTES:
            raise SettingError(f"names and metadata take more than {MAX_HEADER_BYTES} bytes; store fewer tensors")


def load_tensors(path: str | os.PathLike[str], kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a sublens file, check all of it, and return its tensors (on the CPU) and its metadata.

    Args:
        path: a file written by :func:`save_tensors`.
        kind: if given, the metadata's ``kind`` must be this.

    Raises:
        FileError: the file is missing, no regular file, no sublens file, of another kind or version, truncated or
            changed since it was written.
    """
    tensors, entry = read_safetensors(path)
    if entry is None:
        raise FileError(f"{named(path)} is a safetensors file, but not one of sublens: it has no metadata '{ENTRY}'")
    found = entry.get("kind")
    if kind is not None and found != kind:
        raise FileError(f"{named(path)} holds {short(found)}, not '{kind}'; pass the file that holds '{kind}'")
    return tensors, entry


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights of a network, from sublens or from elsewhere, without running any code in the file.

    Args:
        path: ``.safetensors``, or ``.pt`` / ``.pth`` holding a plain ``state_dict``.

    Returns:
        name -> tensor on the CPU, as for ``network.load_state_dict``.

    Raises:
        FileError: unreadable, damaged, not weights, or in need of code to be opened.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".safetensors":
        tensors, entry = read_safetensors(path)
        if entry is not None and entry.get("kind") in ("mask", "logits", "checkpoint"):
            raise FileError(f"{named(path)} holds '{entry['kind']}', not the weights of a network")
        return tensors
    if suffix not in (".pt", ".pth"):
        raise FileError(f"{named(path)}: weights are read from .safetensors, .pt or .pth files, not from '{suffix}'")
    with opened(path) as file:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a hostile file may raise anything inside torch's reader
            raise FileError(
                f"{named(path)} is no plain state_dict that can be read without running code ({first_line(error)}); "
                "write one with torch.save(network.state_dict(), path)"
            ) from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        found = f"keys {short(list(loaded)[:5])}" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise FileError(
            f"{named(path)} holds {found}, not a plain state_dict of tensors; "
            "write one with torch.save(network.state_dict(), path)"
        )
    return dict(loaded)


def save_logits(path: str | os.PathLike[str], logits: Mapping[str, Tensor], network: str) -> None:
    """Write logits (name -> float32 tensor) and the fingerprint of their network. Raises as :func:`save_tensors`."""
    plain = {name: logit.detach().to(torch.float32) for name, logit in logits.items()}
    save_tensors(path, plain, {"kind": "logits", "network": network})


def load_logits(path: str | os.PathLike[str], network: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Read logits: name -> float32 tensor on the CPU, and the fingerprint of their network.

    Args:
        path: a file written by :func:`save_logits`.
        network: if given, the fingerprint that the file must carry.

    Raises:
        FileError: as :func:`load_tensors`.
        MismatchError: the logits belong to another network than ``network``.
    """
    tensors, entry = load_tensors(path, "logits")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise FileError(f"{named(path)}: logits must be float32, but {short(name)} is {tensor.dtype}")
    found = fingerprint_entry(path, entry)
    if network is not None and found != network:
        raise MismatchError(
            f"{named(path)} holds logits of network {found[:12]}, not of {network[:12]}: the weights differ"
        )
    return tensors, found


def fingerprint_entry(path: str | os.PathLike[str], entry: Mapping[str, Any]) -> str:
    """The network's fingerprint from the metadata of the file ``path``.

    Raises:
        FileError: there is none.
    """
    found = entry.get("network")
    if not isinstance(found, str) or not found:
        raise FileError(f"{named(path)} does not say to which network it belongs ('network' is {short(found)})")
    return found


def shape_entry(path: str | os.PathLike[str], name: str, value: object) -> tuple[int, ...]:
    """A shape from the metadata of the file ``path``, checked before anything is allocated.

    Raises:
        FileError: not an array of at most 64 non-negative integers whose product is below 2^63.
    """
    fits = isinstance(value, list) and len(value) <= MAX_DIMENSIONS and all(type(size) is int for size in value)
    if fits and isinstance(value, list) and min(value, default=0) >= 0 and math.prod(max(n, 1) for n in value) < 2**63:
        return tuple(value)
    raise FileError(f"{named(path)}: {short(value)} is no possible shape for {short(name)}")


def _header_length(path: Path) -> int:
    with open(path, "rb") as file:
        return int.from_bytes(file.read(8), "little")
