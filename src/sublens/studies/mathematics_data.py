"""Questions of the Mathematics Dataset (Saxton et al., 2019), made by the package that defines it.

The package (``mathematics-dataset``, the extra ``mathematics``) is of 2020. What it needs of NumPy and SymPy has been
renamed since, so it is given the old names when it is loaded; NumPy and SymPy themselves stay as they are.

Shapes: N questions, S question characters, T answer characters, each row filled up with the end token.
"""

import contextlib
import importlib
import random
import string
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sublens.errors import StudyError
from sublens.study import seed_from

CHARACTERS = " " + string.ascii_letters + string.digits + string.punctuation
"""What questions and answers are written in: 95 characters, as the package has them."""

END = len(CHARACTERS)
LONGEST_QUESTION, LONGEST_ANSWER = 160, 30  # longer ones are left out, as in the published data

MODULES = {
    "add_or_sub": ("arithmetic", "add_or_sub"),
    "differentiate": ("calculus", "differentiate"),
    "linear_1d": ("algebra", "linear_1d"),
    "collect": ("polynomials", "collect"),
    "sort": ("comparison", "sort"),
}
DIFFICULTIES = ("easy", "medium", "hard")
_TRIES = 100  # to draw a question that is new

Question = tuple[str, str]
"""A question and its answer."""


def question(module: str, difficulty: str, *seed: object) -> Question:
    """Return one question, a pure function of its arguments.

    Args:
        module: of :data:`MODULES`.
        difficulty: of :data:`DIFFICULTIES`: the lowest, middle or highest third of the module's range of entropies.
        seed: any values.

    Raises:
        StudyError: the package is not installed.
    """
    make = _makers()[module, difficulty]
    with _seeded(seed_from("mathematics", module, difficulty, *seed)):
        while True:
            problem = make()
            text, answer = str(problem.question), str(problem.answer)
            if len(text) <= LONGEST_QUESTION and len(answer) <= LONGEST_ANSWER:
                return text, answer


@cache
def test_set(module: str, difficulty: str, count: int) -> tuple[Question, ...]:
    """Return the first ``count`` different questions that are tested on; none is ever trained on."""
    found: dict[str, str] = {}
    number = 0
    while len(found) < count and number < _TRIES * count:
        text, answer = question(module, difficulty, "test", number)
        found.setdefault(text, answer)
        number += 1
    return tuple(found.items())


def training_question(module: str, difficulty: str, tested: int, *seed: object) -> Question:
    """Return a question as :func:`question` does, but none of the ``tested`` questions of the test set."""
    held = _texts(module, difficulty, tested)
    for attempt in range(_TRIES):
        text, answer = question(module, difficulty, "train", *seed, attempt)
        if text not in held:
            return text, answer
    raise StudyError(
        f"{_TRIES} {difficulty} questions of {module} were all in the test set of {tested:,}: there are too few of"
        " them. Test on fewer (tested)."
    )


@cache
def _texts(module: str, difficulty: str, tested: int) -> frozenset[str]:
    return frozenset(text for text, _ in test_set(module, difficulty, tested))


def encoded(questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """Return questions [N, S] and answers [N, T] as character numbers (int64)."""
    return tuple(_table([asked[part] for asked in questions]) for part in (0, 1))  # type: ignore[return-value]


def decoded(row: Tensor) -> str:
    """Return the text of a row, up to its end."""
    return "".join(CHARACTERS[i] for i in row.tolist() if i != END)


def _table(texts: Sequence[str]) -> Tensor:
    width = max(map(len, texts)) + 1
    return torch.tensor([[*map(CHARACTERS.index, text), *[END] * (width - len(text))] for text in texts])


def check() -> None:
    """Make sure that questions can be made.

    Raises:
        StudyError: the package is not installed.
    """
    _makers()


@cache
def _makers() -> dict[tuple[str, str], Callable[[], Any]]:
    """Return what makes a problem of each module and difficulty."""
    try:
        with _old_sympy():
            modules = importlib.import_module("mathematics_dataset.modules.modules")
    except ModuleNotFoundError as error:
        raise StudyError(
            f"The mathematics study needs the package mathematics-dataset ({error.name} is missing). Install it:"
            " python -m pip install 'sublens[mathematics]'"
        ) from error
    importlib.import_module("mathematics_dataset.sample.polynomials").np = _OldNumpy("numpy")  # type: ignore[attr-defined]
    composition: Any = importlib.import_module("mathematics_dataset.util.composition")
    composition._ALLOWED_SYMBOLS = _Sorted(composition._ALLOWED_SYMBOLS)
    found = {}
    for number, difficulty in enumerate(DIFFICULTIES):
        made = modules.train(_third(number))
        for name, (area, module) in MODULES.items():
            found[name, difficulty] = made[area][module]
    return found


def _third(number: int) -> Callable[[tuple[float, float]], tuple[float, float]]:
    """Return what takes the ``number``-th third of a range of entropies, as the package's own generator does."""

    def cut(whole: tuple[float, float]) -> tuple[float, float]:
        low, high = whole
        return low + number * (high - low) / 3, low + (number + 1) * (high - low) / 3

    return cut


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators that the package draws from, and put their states back."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


@contextlib.contextmanager
def _old_sympy() -> Iterator[None]:
    """Let ``base_solution_linear`` be imported from where SymPy had it before 1.6."""
    package: Any = importlib.import_module("sympy.solvers.diophantine")
    name = "base_solution_linear"
    moved = not hasattr(package, name)
    if moved:
        setattr(package, name, getattr(importlib.import_module("sympy.solvers.diophantine.diophantine"), name))
    try:
        yield
    finally:
        if moved:
            delattr(package, name)


class _OldArray(np.ndarray):
    """An array with ``itemset``, which NumPy 2 has no longer."""

    def itemset(self, index: Any, value: Any) -> None:
        self[index] = value


class _OldNumpy(ModuleType):
    """NumPy as the package's polynomials use it: with ``np.object``, and arrays with ``itemset``."""

    object = object

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> np.ndarray:
        return np.zeros(*args, **kwargs).view(_OldArray)

    @staticmethod
    def empty(*args: Any, **kwargs: Any) -> np.ndarray:
        return np.empty(*args, **kwargs).view(_OldArray)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


class _Sorted(set[str]):
    """A set whose order is that of its texts: that of Python's own differs from process to process."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(set(super().__iter__())))

    def difference(self, *others: Any) -> "_Sorted":
        return _Sorted(super().difference(*others))
