"""Runs compiled loops on PyTorch's own threads.

A second thread pool beside PyTorch's (Numba's, say) makes both spin against each other for the same cores between two
calls. PyTorch's CPU builds for Linux use GNU OpenMP, whose entry point ``GOMP_parallel`` starts a parallel region on
the pool that already exists. Where it is not to be found (another platform, another OpenMP), plain Python threads do
the same work; the loops take their share from one atomic counter, so that either way gives the same result.
"""

import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


@functools.cache
def _gomp_parallel() -> Any | None:
    try:
        # RTLD_GLOBAL symbols of the process: PyTorch loads its OpenMP library that way.
        function = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sublens")


def untraced(function: F) -> F:
    """Decorator: keep ``torch.compile`` out of a function, such as one that hands addresses to compiled loops.

    Where a compiled network breaks its graph, PyTorch traces whatever Python runs next, ours included, and tensors then
    have no addresses. ``torch.compiler.disable`` loads the compiler, so it is used only once something else has.
    """

    @functools.cache
    def disabled() -> Any:
        return torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled()(*args, **kwargs) if "torch._dynamo" in sys.modules else function(*args, **kwargs)

    return cast(F, call)


class Scratch(threading.local):
    """Memory of a thread that is used again in every call, since the system clears what it hands out anew."""

    memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def of(self, size: int) -> torch.Tensor:
        """So many bytes, uint8, with what was last written there."""
        if self.memory.numel() < size:
            self.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self.memory[:size]


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(address: int, arguments: int, *, parallel: bool = True) -> None:
    """Call the C function at ``address`` with the pointer ``arguments`` once on every thread, and wait for all.

    Args:
        address: of a ``void f(void *)`` that is safe to run many times at once.
        arguments: address of what it reads.
        parallel: ``False`` runs it once, on this thread (work too small to share).
    """
    threads = torch.get_num_threads() if parallel else 1
    if threads == 1:
        _CALLBACK(address)(arguments)
        return
    gomp = _gomp_parallel()
    if gomp is not None:
        gomp(address, arguments, threads, 0)
        return
    for done in [_pool(threads).submit(_CALLBACK(address), arguments) for _ in range(threads)]:
        done.result()
