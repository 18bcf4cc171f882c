"""Reading safetensors files that may be damaged or hostile."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from typing import Any, NoReturn

import safetensors.torch
from torch import Tensor

from sublens.errors import FileError
from sublens.storage.hashing import canonical, hash_tensors
from sublens.storage.words import first_line, named, short

VERSION = 1
MAX_HEADER_BYTES = 2**24

ENTRY = "sublens"
METADATA = "__metadata__"
STAMP = ("version", "checksum", "tensors")


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and checked sublens entry (``None`` where there is none) of a safetensors file."""
    with opened(path) as file:
        # Read, not mapped: a mapped file that somebody truncates kills the process.
        try:
            data = file.read()
        except OSError as error:
            raise FileError(f"{named(path)} cannot be read: {first_line(error)}") from error
    _check_header_length(path, data)
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # besides its own, the reader lets KeyError, RuntimeError and others through
        raise FileError(f"{named(path)} is not a whole safetensors file: {first_line(error)}") from error
    # The library lets repeated names pass.
    header = _parse_json(path, data[8 : 8 + int.from_bytes(data[:8], "little")])
    if not isinstance(header, dict):
        raise FileError(f"{named(path)} is not a safetensors file: its header is not a JSON object")
    texts = header.get(METADATA)
    if not isinstance(texts, dict) or ENTRY not in texts:
        return tensors, None
    entry = _parse_json(path, texts[ENTRY])
    if not isinstance(entry, dict):
        raise FileError(f"{named(path)}: the metadata '{ENTRY}' is not a JSON object")
    if type(entry.get("version")) is not int or entry["version"] != VERSION:
        raise FileError(
            f"{named(path)} has format version {short(entry.get('version'))}; this sublens reads version {VERSION}"
        )
    checksum, names = entry.pop("checksum", None), entry.get("tensors")
    try:
        # Canonical text only: otherwise a changed file could say the same in another spelling.
        same = texts[ENTRY] == canonical(entry | {"checksum": checksum})
        same = same and checksum == hash_tensors(tensors, canonical(entry))
    except RecursionError:
        same = False
    if not same:
        raise FileError(f"{named(path)} is damaged: its content does not have its checksum; fetch or make it again")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FileError(f"{named(path)}: the metadata 'tensors' is not a list of names")
    if len(names) != len(tensors) or set(names) != set(tensors):
        raise FileError(f"{named(path)}: the names in the metadata 'tensors' are not the names of its tensors")
    return {name: tensors[name] for name in names}, {key: entry[key] for key in entry if key not in STAMP}


def _check_header_length(path: str | os.PathLike[str], data: bytes) -> None:
    if len(data) < 8:
        raise FileError(f"{named(path)} is not a safetensors file: it has only {len(data)} bytes")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES or length > len(data) - 8:
        raise FileError(
            f"{named(path)} is not a whole safetensors file: it announces a header of {length} bytes, "
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
        raise FileError(f"{named(path)} has a header that cannot be read: {first_line(error)}") from error


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a regular file for reading; a folder, a pipe or a device is refused instead of waited for."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise FileError(f"{named(path)} is {kind}; pass the path of a file")
        file = open(path, "rb")  # noqa: SIM115 - closed below; only the opening belongs into this try
    except FileNotFoundError as error:
        raise FileError(f"{named(path)} does not exist") from error
    except (OSError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{named(path)} cannot be opened: {first_line(error)}") from error
    with file:
        yield file
