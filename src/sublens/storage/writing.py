"""Writes that cannot be half done."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from sublens.errors import FileError
from sublens.storage.words import first_line, named


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` so that ``path`` holds, at every moment, all of the old content or all of the new.

    Raises:
        FileError: the file cannot be written. An older file there is unharmed.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """:func:`atomic_write_bytes` for text, as UTF-8."""
    atomic_write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it when the block ends well, and vanishes when it does not."""
    target = Path(path)
    if not os.path.isdir(target.parent):
        raise FileError(f"{named(path)} cannot be written: its folder does not exist; make the folder first")
    if not target.name or os.path.isdir(target):
        raise FileError(f"{named(path)} cannot be written: it is a folder; pass the path of a file")
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
        raise FileError(f"{named(path)} cannot be written: {first_line(error)}; nothing there was changed") from error
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
