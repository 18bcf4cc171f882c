"""The errors sublens raises for its users.

Each is a :class:`SublensError`, and also the builtin error that fits it, so that code which knows nothing of sublens
catches it too. Every message says what happened, with the values, and what to do next.
"""

from collections.abc import Mapping


class SublensError(Exception):
    """Base of every error that sublens raises on purpose."""


class SettingError(SublensError, ValueError):
    """A setting is impossible, for example a keep probability of 2.0."""


class SelectionError(SublensError, ValueError):
    """A selection of parameters matches nothing, or names what does not exist."""


class MismatchError(SublensError, ValueError):
    """Two things that must belong together do not: a mask and a network, two masks, a checkpoint and its settings."""


class FileError(SublensError, ValueError):
    """A file is missing, truncated, corrupted or not what it claims to be."""


class BatchError(SublensError, ValueError):
    """A batch cannot be split into the samples that were asked for."""


class StudyError(SublensError, ValueError):
    """A study does not exist, or its file does not define what a study needs."""


class CutGraphError(SublensError, RuntimeError):
    """The loss does not reach the logits, so no mask can be learned from it."""


class LostRankError(SublensError, RuntimeError):
    """Another process of a job that trains one mask together is gone.

    Attributes:
        ranks: those that no longer answer.
    """

    def __init__(self, message: str, *, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class NonFiniteError(SublensError, ArithmeticError):
    """NaN or infinity in the loss or in a gradient.

    Attributes:
        step: training step (counted from 0) at which it was seen, or ``None`` outside a training loop.
        parameter: dotted name of the parameter whose logits received it, or ``None`` if the loss itself was not finite.
    """

    def __init__(self, message: str, *, step: int | None = None, parameter: str | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.parameter = parameter


def check_named(what: str, given: object, example: str) -> None:
    """Raise SettingError unless ``given`` maps names to something, as ``example`` does."""
    if not isinstance(given, Mapping):
        raise SettingError(f"{what} is a {type(given).__name__}; it must be a dict with names, as in {example}.")
