"""Files: tensors with metadata, bits packed eight to a byte, writes that cannot be half done.

The format is specified in ``docs/file-format.md``. Nothing here unpickles, and nothing here knows what a mask is.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from sublens.errors import FileError, MismatchError, SettingError

VERSION = 1
MAX_HEADER_BYTES = 2**24
MAX_DIMENSIONS = 64

_ENTRY = "sublens"
_METADATA = "__metadata__"
_STAMP = ("version", "checksum", "tensors")


# --- bits


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


# --- hash


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
        digest.update(_canonical(title).encode() + b"\n")
        plain = _plain(name, tensor)
        # Not reshape(-1): tensors of one or no element count as contiguous with any stride, which view() then refuses.
        digest.update(plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(name: str, tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, with its values as its bytes."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise SettingError(
            f"tensor {_short(name)} ({tensor.dtype}, {tensor.layout}, on {tensor.device}) has no plain bytes; "
            "make it a dense tensor on a real device first"
        )
    # Lazy conjugation and negation are views whose bytes are not their values.
    return tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()


# --- sublens files


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
    if reserved := sorted(set(_STAMP) & set(entry)):
        raise SettingError(f"metadata must not contain {', '.join(reserved)}: sublens writes these itself")
    if _METADATA in tensors:
        raise SettingError(f"a tensor cannot be called {_METADATA}: safetensors reserves that name")
    # A copy of what shares memory, as tied weights do: safetensors refuses it.
    seen: set[int] = set()
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = _plain(name, tensor)
        address = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if address in seen else plain
        seen.add(address)
    entry |= {"version": VERSION, "tensors": list(stored)}
    try:
        text = _canonical(entry)
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingError(f"metadata is not JSON: {_line(error)}") from error
    text = _canonical(entry | {"checksum": hash_tensors(stored, text)})
    with _replacing(path) as temporary:
        try:
            safetensors.torch.save_file(stored, temporary, {_ENTRY: text})
        except safetensors.SafetensorError as error:  # the disk is full, for example
            raise FileError(f"{_name(path)} cannot be written: {_line(error)}; nothing there was changed") from error
        except (UnicodeError, KeyError, ValueError) as error:
            raise SettingError(f"safetensors cannot store these names or dtypes: {_line(error)}") from error
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
    tensors, entry = _read_safetensors(path)
    if entry is None:
        raise FileError(f"{_name(path)} is a safetensors file, but not one of sublens: it has no metadata '{_ENTRY}'")
    found = entry.get("kind")
    if kind is not None and found != kind:
        raise FileError(f"{_name(path)} holds {_short(found)}, not '{kind}'; pass the file that holds '{kind}'")
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
        tensors, entry = _read_safetensors(path)
        if entry is not None and entry.get("kind") in ("mask", "logits", "checkpoint"):
            raise FileError(f"{_name(path)} holds '{entry['kind']}', not the weights of a network")
        return tensors
    if suffix not in (".pt", ".pth"):
        raise FileError(f"{_name(path)}: weights are read from .safetensors, .pt or .pth files, not from '{suffix}'")
    with _opened(path) as file:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a hostile file may raise anything inside torch's reader
            raise FileError(
                f"{_name(path)} is no plain state_dict that can be read without running code ({_line(error)}); "
                "write one with torch.save(network.state_dict(), path)"
            ) from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        found = f"keys {_short(list(loaded)[:5])}" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise FileError(
            f"{_name(path)} holds {found}, not a plain state_dict of tensors; "
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
            raise FileError(f"{_name(path)}: logits must be float32, but {_short(name)} is {tensor.dtype}")
    found = fingerprint_entry(path, entry)
    if network is not None and found != network:
        raise MismatchError(
            f"{_name(path)} holds logits of network {found[:12]}, not of {network[:12]}: the weights differ"
        )
    return tensors, found


def fingerprint_entry(path: str | os.PathLike[str], entry: Mapping[str, Any]) -> str:
    """The network's fingerprint from the metadata of the file ``path``.

    Raises:
        FileError: there is none.
    """
    found = entry.get("network")
    if not isinstance(found, str) or not found:
        raise FileError(f"{_name(path)} does not say to which network it belongs ('network' is {_short(found)})")
    return found


def shape_entry(path: str | os.PathLike[str], name: str, value: object) -> tuple[int, ...]:
    """A shape from the metadata of the file ``path``, checked before anything is allocated.

    Raises:
        FileError: not an array of at most 64 non-negative integers whose product is below 2^63.
    """
    fits = isinstance(value, list) and len(value) <= MAX_DIMENSIONS and all(type(size) is int for size in value)
    if fits and isinstance(value, list) and min(value, default=0) >= 0 and math.prod(max(n, 1) for n in value) < 2**63:
        return tuple(value)
    raise FileError(f"{_name(path)}: {_short(value)} is no possible shape for {_short(name)}")


# --- reading


def _read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and checked sublens entry (``None`` where there is none) of a safetensors file."""
    with _opened(path) as file:
        # Read, not mapped: a mapped file that somebody truncates kills the process.
        try:
            data = file.read()
        except OSError as error:
            raise FileError(f"{_name(path)} cannot be read: {_line(error)}") from error
    _check_header_length(path, data)
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # besides its own, the reader lets KeyError, RuntimeError and others through
        raise FileError(f"{_name(path)} is not a whole safetensors file: {_line(error)}") from error
    # The library lets repeated names pass.
    header = _parse_json(path, data[8 : 8 + int.from_bytes(data[:8], "little")])
    if not isinstance(header, dict):
        raise FileError(f"{_name(path)} is not a safetensors file: its header is not a JSON object")
    texts = header.get(_METADATA)
    if not isinstance(texts, dict) or _ENTRY not in texts:
        return tensors, None
    entry = _parse_json(path, texts[_ENTRY])
    if not isinstance(entry, dict):
        raise FileError(f"{_name(path)}: the metadata '{_ENTRY}' is not a JSON object")
    if type(entry.get("version")) is not int or entry["version"] != VERSION:
        raise FileError(
            f"{_name(path)} has format version {_short(entry.get('version'))}; this sublens reads version {VERSION}"
        )
    checksum, names = entry.pop("checksum", None), entry.get("tensors")
    try:
        # Canonical text only: otherwise a changed file could say the same in another spelling.
        same = texts[_ENTRY] == _canonical(entry | {"checksum": checksum})
        same = same and checksum == hash_tensors(tensors, _canonical(entry))
    except RecursionError:
        same = False
    if not same:
        raise FileError(f"{_name(path)} is damaged: its content does not have its checksum; fetch or make it again")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FileError(f"{_name(path)}: the metadata 'tensors' is not a list of names")
    if len(names) != len(tensors) or set(names) != set(tensors):
        raise FileError(f"{_name(path)}: the names in the metadata 'tensors' are not the names of its tensors")
    return {name: tensors[name] for name in names}, {key: entry[key] for key in entry if key not in _STAMP}


def _check_header_length(path: str | os.PathLike[str], data: bytes) -> None:
    if len(data) < 8:
        raise FileError(f"{_name(path)} is not a safetensors file: it has only {len(data)} bytes")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES or length > len(data) - 8:
        raise FileError(
            f"{_name(path)} is not a whole safetensors file: it announces a header of {length} bytes, "
            f"has {len(data) - 8}, and at most {MAX_HEADER_BYTES} are read"
        )


def _parse_json(path: str | os.PathLike[str], text: str | bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, TypeError, RecursionError) as error:
        raise FileError(f"{_name(path)} has a header that cannot be read: {_line(error)}") from error


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a regular file for reading; a folder, a pipe or a device is refused instead of waited for."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise FileError(f"{_name(path)} is {kind}; pass the path of a file")
        file = open(path, "rb")  # noqa: SIM115 - closed below; only the opening belongs into this try
    except FileNotFoundError as error:
        raise FileError(f"{_name(path)} does not exist") from error
    except (OSError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{_name(path)} cannot be opened: {_line(error)}") from error
    with file:
        yield file


# --- writing


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` so that ``path`` holds, at every moment, all of the old content or all of the new.

    Raises:
        FileError: the file cannot be written. An older file there is unharmed.
    """
    with _replacing(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """:func:`atomic_write_bytes` for text, as UTF-8."""
    atomic_write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it when the block ends well, and vanishes when it does not."""
    target = Path(path)
    if not os.path.isdir(target.parent):
        raise FileError(f"{_name(path)} cannot be written: its folder does not exist; make the folder first")
    if not target.name or os.path.isdir(target):
        raise FileError(f"{_name(path)} cannot be written: it is a folder; pass the path of a file")
    temporary = target.parent / f".{target.name[:50]}.{secrets.token_hex(4)}.tmp"
    try:
        # Made here first, so that it gets the permissions that the user's umask gives to new files.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = stat.S_IMODE(os.stat(temporary).st_mode)
        yield temporary
        os.chmod(temporary, mode)
        _flush(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise FileError(f"{_name(path)} cannot be written: {_line(error)}; nothing there was changed") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    # Not every file system can flush a folder; the file itself is in place already.
    with contextlib.suppress(OSError):
        _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header_length(path: Path) -> int:
    with open(path, "rb") as file:
        return int.from_bytes(file.read(8), "little")


# --- words for messages


def _name(path: str | os.PathLike[str]) -> str:
    return f"'{_printable(os.fspath(path))}'"


def _short(value: object) -> str:
    """A value out of a file for a message: one line, no control characters, not long."""
    text = _printable(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _line(error: BaseException) -> str:
    """The first line of another library's message."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = _printable(text.strip())
    return text if len(text) <= 200 else text[:197] + "..."


def _printable(text: object) -> str:
    return re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "?", str(text))


def _canonical(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, sort_keys=True, separators=(",", ":"))
