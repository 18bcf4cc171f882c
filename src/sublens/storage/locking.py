"""One process at a time writes a run's folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sublens.errors import FileError

LOCK = ".lock"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold ``folder``, which must exist, against every other process and every other run of this one.

    The lock goes with its process, however that ends. Where the file system knows none, nothing is held.

    Raises:
        FileError: someone else holds it.
    """
    path = folder / LOCK
    lock = FileLock(path, timeout=0, is_singleton=False, thread_local=False)
    locked = False
    try:
        lock.acquire()
        locked = True
    except Timeout:
        raise FileError(
            f"Another run is writing in {folder} now (it holds {path}). Wait until it has ended, or give another"
            " folder. (Only if its machine has gone, so that nothing can write there any more, delete that file.)"
        ) from None
    except OSError:
        pass  # no locks there, or no writing: the first file that is written will say so
    owner = os.getpid()
    try:
        yield
    finally:
        if locked and os.getpid() == owner:  # a forked child that ends here holds nothing
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # while it is held: who comes now locks a new file
            lock.release()
