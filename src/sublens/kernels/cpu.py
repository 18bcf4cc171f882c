"""The fused CPU path: the reference's results in one pass over memory (:mod:`sublens.kernels.loops`)."""

import functools
import importlib
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sublens.kernels import reference, threads
from sublens.kernels.reference import LOGIT_BOUND, SIGMOID, Curve
from sublens.noise import Draw

_SMALL = 32_768
"""Draws below which one thread is faster than waking the others."""

log = logging.getLogger("sublens.kernels")


@functools.cache
def compiled(module: str = "loops") -> Any:
    """A module of compiled loops, such as ``"loops"`` or ``"linear_loops"``."""
    # Imported at first use: Numba takes a second to load, and the first time ever some ten to compile.
    _announce()
    return importlib.import_module(f"sublens.kernels.{module}")


@functools.cache
def _announce() -> None:
    log.info(
        "sublens: loading the fused CPU kernels. The first time on a machine they are compiled, which takes up to half "
        "a minute, and then kept."
    )


def name(p: "np.ndarray | list[int]", draw: Draw) -> None:
    """Write what names a draw into the fields that a loop is given."""
    loops = compiled()
    p[loops.KEY : loops.KEY + 4] = draw.key()
    p[loops.COUNTER : loops.COUNTER + 3] = (draw.sample, *draw.counter()[1:])


@functools.cache
def agrees() -> bool:
    """Whether the loops, as they are compiled here, give the reference's samples bit for bit.

    They are checked once in each process: code that was compiled on another processor or from other files and then
    found in a cache, or a compiler that fuses what must be rounded, would otherwise change masks without a word.
    """
    draw = Draw(seed=1, step=2, sample=3, parameter=4)
    logits = torch.linspace(-LOGIT_BOUND, LOGIT_BOUND, 1500, dtype=torch.float32, device="cpu")
    weight = torch.linspace(1, 2, 1500, dtype=torch.float32, device="cpu")
    found = torch.empty_like(weight)
    walk(weight, logits, draw, masked=found)
    same = torch.equal(found, reference.masked(weight, logits, draw)) and sys.byteorder == "little"
    if not same:
        log.warning(
            "sublens: the fused CPU kernels do not give the reference's samples on this machine and are not used. "
            "Remove Numba's cache (the __pycache__ of sublens/kernels) if another version of sublens was here before."
        )
    return same


def applies(weight: Tensor, logits: Tensor) -> bool:
    """Whether the fused path can take this parameter (or its gradient) and its logits: float32 data on the CPU.

    Other dtypes, layouts and devices, and tensors whose memory is not what they show (subclasses, fake ones, those
    inside a function transform, lazily negated ones), go the reference's way.
    """
    return (
        not torch.compiler.is_compiling()
        and weight.numel() > 0
        and has_plain_data(weight)
        and has_plain_data(logits)
        and agrees()
    )


def has_plain_data(tensor: Tensor) -> bool:
    """Whether a tensor is float32 data on the CPU, at an address, and nothing but that."""
    if (
        type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.device.type != "cpu"
        or tensor.dtype != torch.float32
        or tensor.layout is not torch.strided
        or tensor.is_neg()
    ):
        return False
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:  # wrapped by a function transform
        return False


@threads.untraced
def walk(
    weight: Tensor,
    logits: Tensor,
    draw: Draw,
    *,
    masked: Tensor | None = None,
    gradient: Tensor | None = None,
    result: Tensor | None = None,
    begin: int = 0,
    samples: int = 1,
    before: int = 0,
) -> None:
    """Walk once over a run of elements, for ``samples`` samples from ``draw.sample`` on.

    Args:
        weight: contiguous float32, whole parameter or its elements from ``before`` on.
        logits: contiguous float32, same number of elements.
        draw: names the first sample.
        masked: written, shape (samples, count, ...) or (count, ...): the masked weights. Contiguous float32.
        gradient: read, same shape: gradient of each masked weight. Contiguous float32.
        result: written, shape (count, ...): gradient of the logits. Contiguous float32.
        begin: first element of the run; the run's length is that of ``masked`` or ``gradient`` over ``samples``.
        samples: number of samples K.
        before: number of the parameter's elements before the first of ``weight`` and ``logits``.
    """
    loops = compiled()
    like = masked if masked is not None else gradient
    if like is None:
        raise ValueError("walk() has nothing to do: give masked, or gradient and result.")
    count = like.numel() // samples
    p = np.empty(loops.FIELDS, np.int64)
    p[:10] = (
        0,
        weight.data_ptr() + 4 * begin,
        logits.data_ptr() + 4 * begin,
        0 if masked is None else masked.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        0 if result is None else result.data_ptr(),
        before + begin,
        count,
        samples,
        count,
    )
    name(p, draw)
    threads.run(loops.walk.address, p.ctypes.data, parallel=count * samples >= _SMALL)


def masked(weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
    """As :func:`sublens.kernels.reference.masked`."""
    out = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    walk(weight.contiguous(), logits.contiguous(), draw, masked=out)
    return out


def scaled(weight: Tensor, logits: Tensor, draw: Draw, curve: Curve) -> Tensor:
    """As :func:`sublens.kernels.reference.scaled`."""
    out = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    soften(weight.contiguous(), logits.contiguous(), draw, curve, scaled=out)
    return out


def logit_gradient(
    gradient: Tensor, weight: Tensor, logits: Tensor, draw: Draw | None, curve: Curve = SIGMOID
) -> Tensor:
    """As :func:`sublens.kernels.reference.logit_gradient`."""
    out = torch.empty(logits.shape, dtype=torch.float32, device="cpu")
    whole = gradient.resolve_neg().contiguous()
    if curve == SIGMOID and draw is not None:
        walk(weight.contiguous(), logits.contiguous(), draw, gradient=whole, result=out)
    else:
        soften(weight.contiguous(), logits.contiguous(), draw, curve, gradient=whole, result=out)
    return out


@functools.cache
def _noise_of_levels() -> Tensor:
    return reference.noise_of_levels()


@threads.untraced
def soften(
    weight: Tensor,
    logits: Tensor,
    draw: Draw | None,
    curve: Curve,
    *,
    scaled: Tensor | None = None,
    gradient: Tensor | None = None,
    result: Tensor | None = None,
) -> None:
    """Walk once over a parameter for one relaxed sample, or for s without noise if there is no draw.

    Args:
        weight: contiguous float32.
        logits: likewise, same number of elements.
        draw: names the sample.
        curve: what is made of it.
        scaled: written: the weight times the sample.
        gradient: read: gradient of that.
        result: written, where ``gradient`` is given: gradient of the logits.
    """
    loops = compiled("soft_loops")
    p = np.zeros(loops.SOFT_FIELDS, np.int64)
    p[loops.WEIGHT], p[loops.LOGITS], p[loops.COUNT] = weight.data_ptr(), logits.data_ptr(), weight.numel()
    for field, tensor in ((loops.MASKED, scaled), (loops.GRADIENT, gradient), (loops.RESULT, result)):
        p[field] = 0 if tensor is None else tensor.data_ptr()
    if draw is not None:
        p[loops.NOISE] = _noise_of_levels().data_ptr()
        name(p, draw)
    f = p.view(np.float64)
    f[loops.TAU], f[loops.LOW], f[loops.HIGH] = curve.tau, curve.low, curve.high
    threads.run(loops.soften.address, p.ctypes.data, parallel=weight.numel() >= _SMALL)


@threads.untraced
def uniform(draw: Draw, count: int) -> Tensor:
    """As :func:`sublens.noise.uniform`, bit for bit; ``count`` is at least 1."""
    loops = compiled("soft_loops")
    out = torch.empty(count, dtype=torch.float32, device="cpu")
    p = np.zeros(loops.SOFT_FIELDS, np.int64)
    p[loops.MASKED], p[loops.COUNT] = out.data_ptr(), count
    name(p, draw)
    threads.run(loops.uniform.address, p.ctypes.data, parallel=count >= _SMALL)
    return out


@functools.lru_cache(maxsize=16)
def _chunked(sizes: tuple[int, ...]) -> np.ndarray:
    """The table of an update of parameters of those sizes, without addresses and numbers."""
    updates = compiled("updates")
    table = np.zeros((len(sizes), updates.UPDATE_FIELDS), np.int64)
    table[:, updates.SIZE] = sizes
    table[:, updates.END] = np.cumsum(-(-table[:, updates.SIZE] // updates.CHUNK))
    table[1:, updates.FIRST] = table[:-1, updates.END]
    table[:, updates.ALL] = table[-1, updates.END]
    return table


def _updates(sizes: tuple[int, ...], **fields: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The table of an update of parameters of those sizes, and memory for the sums of their chunks."""
    updates = compiled("updates")
    table = _chunked(sizes).copy()
    sums = np.empty(table[-1, updates.END])
    table[:, updates.SUMS] = sums.ctypes.data
    for name, addresses in fields.items():
        table[:, getattr(updates, name)] = addresses
    return table, sums


def _sizes(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.numel() for tensor in tensors)


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _update(loop: Any, table: np.ndarray, sums: np.ndarray) -> list[float]:
    updates = compiled("updates")
    threads.run(loop.address, table.ctypes.data, parallel=bool(table[:, updates.SIZE].sum() >= _SMALL))
    found: list[float] = np.add.reduceat(sums, table[:, updates.FIRST]).tolist()
    return found


@threads.untraced
def squares(gradients: Sequence[Tensor], constants: Sequence[float]) -> list[float]:
    """Sum of the squares of each gradient, with a constant added to each of its numbers.

    Args:
        gradients: contiguous float32, none empty.
        constants: one for each, in float32.

    Returns:
        the sums, to some 1e-5 of each. They are the same for any number of threads.
    """
    updates = compiled("updates")
    table, sums = _updates(_sizes(gradients), SLOPES=_addresses(gradients))
    table.view(np.float64)[:, updates.CONSTANT] = constants
    return _update(updates.squares, table, sums)


@threads.untraced
def totals(values: Sequence[Tensor]) -> list[float]:
    """Sum of each tensor of contiguous float32 numbers, none empty.

    Returns:
        the sums, to some 1e-5 of those of their sizes; the same for any number of threads.
    """
    return _update(compiled("updates").sums, *_updates(_sizes(values), VALUES=_addresses(values)))


@threads.untraced
def adam(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    mean_squares: Sequence[Tensor],
    *,
    steps: Sequence[int],
    lr: float,
    betas: tuple[float, float],
    epsilon: float,
    constants: Sequence[float],
    factor: float,
) -> list[float]:
    """One step of Adam (Kingma and Ba, 2015, algorithm 1), in place, for gradients ``(gradient + constant) factor``.

    What is trained are logits: they are put back within their bound of -10 to 10.

    Args:
        values: what is trained; each contiguous float32, none empty.
        gradients: likewise; read only.
        means: running averages of the gradients; likewise, written.
        mean_squares: those of their squares; likewise, written.
        steps: number of this step for each, from 1.
        lr: learning rate.
        betas: decay of the two averages.
        epsilon: added to the root of the second.
        constants: for each, what is added to each number of the gradient.
        factor: what the sum is multiplied by.

    Returns:
        The new values' :func:`totals`.
    """
    updates = compiled("updates")
    table, sums = _updates(_sizes(values))
    # In the order of the fields, and in two assignments: each of them takes time of a small step.
    of_each = zip(*map(_addresses, (values, gradients, means, mean_squares)), strict=True)
    table[:, updates.VALUES : updates.MEAN_SQUARES + 1] = list(of_each)
    table.view(np.float64)[:, updates.RATE : updates.ROOT + 1] = [
        (lr / (1 - betas[0] ** step), factor, constant, *betas, epsilon, (1 - betas[1] ** step) ** 0.5)
        for step, constant in zip(steps, constants, strict=True)
    ]
    return _update(updates.adam, table, sums)
