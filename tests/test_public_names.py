"""What ``import sublens`` gives, and what it does not load."""

import subprocess
import sys
from types import ModuleType

import pytest

import sublens

NAMES = {
    "AlphaPath", "BatchError", "Bernoulli", "ContinuousSparsification", "CutGraphError", "Diagnosis", "FileError",
    "Finding", "Gate",
    "GumbelSigmoid", "HardConcrete", "LostRankError", "Mask", "NOfM", "Threshold", "TopK",
    "MaskedNetwork", "MismatchError", "NonFiniteError", "Run", "SelectionError", "SettingError", "Settled", "Study",
    "StudyError", "SublensError", "Switchboard", "Task", "agree", "attribution_mask", "contrast", "diagnose",
    "fingerprint", "fit", "fit_tasks", "forget", "inspect", "magnitude_mask", "random_mask", "select",
}  # fmt: skip


def test_public_names_are_these_and_each_is_there():
    assert set(sublens.__all__) == NAMES
    assert len(sublens.__all__) == len(NAMES)
    for name in NAMES:
        assert not isinstance(getattr(sublens, name), ModuleType), name
        assert name in dir(sublens)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'sublens' has no attribute 'Maks'"):
        _ = sublens.Maks


def after(program: str) -> str:
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_import_loads_nothing_heavy():
    heavy = "[m for m in ('torch', 'numba', 'numpy', 'matplotlib') if m in sys.modules]"
    assert after(f"import sys, sublens; sublens.SublensError; print({heavy})") == "[]"


@pytest.mark.parametrize("first", ["import sublens.fit", "from sublens.fit import Run", "import sublens.inspection"])
def test_fit_is_the_function_whatever_was_imported_before(first):
    assert after(f"{first}\nimport sublens; print(sublens.fit.__name__, type(sublens.fit).__name__)") == "fit function"


@pytest.mark.parametrize("name", [name for name in sorted(NAMES) if name.endswith("Error")])
def test_errors_are_caught_as_one_and_as_builtins(name):
    error = getattr(sublens, name)
    assert issubclass(error, sublens.SublensError)
    assert name == "SublensError" or issubclass(error, (ValueError, RuntimeError, ArithmeticError))
