"""The built-in studies, and how a study is found: by its name, or in a Python file of the user's own.

Listing them imports neither torch nor the studies themselves.
"""

import difflib
import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, cast

from sublens.errors import StudyError, SublensError
from sublens.study import Study

# name -> (module, function, description)
_BUILT_IN: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "add-mul": (
            "sublens.studies.add_mul",
            "study",
            "Addition and multiplication modulo 100 in one feed-forward network: do they use different weights?",
        ),
        "add-mul-lstm": (
            "sublens.studies.add_mul",
            "recurrent",
            "The same in a recurrent network (LSTM) that is shown the problem for three steps.",
        ),
        "double-addition": (
            "sublens.studies.double_addition",
            "study",
            "Two additions side by side in one feed-forward network: does the same function use the same weights?",
        ),
        "double-addition-lstm": (
            "sublens.studies.double_addition",
            "recurrent",
            "The same in a recurrent network (LSTM) that is shown the two together, or in turns.",
        ),
        "scan": (
            "sublens.studies.scan",
            "study",
            "Commands and actions (SCAN) in LSTMs: does a mask trained without some combinations still know them?",
        ),
        "scan-transformer": ("sublens.studies.scan", "transformer", "The same in a Transformer."),
        "mathematics": (
            "sublens.studies.mathematics",
            "study",
            "School mathematics in a Transformer: does the mask of the easy questions answer the hard ones?",
        ),
        "class-removal": (
            "sublens.studies.class_removal",
            "study",
            "Leave one class of images out: which weights of a convolutional network did it need?",
        ),
        "class-removal-resnet": (
            "sublens.studies.class_removal",
            "resnet",
            "The same in a residual network (ResNet-110).",
        ),
        "mask-stability": (
            "sublens.studies.mask_stability",
            "study",
            "Train two masks for the same pair of classes: how much do they overlap?",
        ),
        "gradient-cosine": (
            "sublens.studies.gradient_cosine",
            "study",
            "Put a mask on ever more layers: do the kept weights still learn in the same direction?",
        ),
        "permuted-digits": (
            "sublens.studies.permuted_digits",
            "study",
            "Learn the same digits under one permutation of their pixels after the other: is anything reused?",
        ),
        "probe": (
            "sublens.studies.probe",
            "study",
            "Number and tense in a pretrained sentence encoder: which weights make them readable? (sublens[probe])",
        ),
    }
)

# The fields of a Study that a command may change. batch_size is not among them: the tasks' batches would not follow it.
_FIELDS = (
    "network_steps", "network_lr", "network_clip", "mask_lr", "mask_clip", "penalty", "keep", "biases", "groups",
    "evaluate_every", "random_masks",
)  # fmt: skip


def names() -> list[str]:
    """Return the names of the built-in studies."""
    return list(_BUILT_IN)


def descriptions() -> dict[str, str]:
    """Return one line on each built-in study."""
    return {name: description for name, (_, _, description) in _BUILT_IN.items()}


def load(name_or_path: str | Path, *, preset: str | None = None, **settings: Any) -> Study:
    """Return a built-in study, or the one that a Python file defines by its function ``study()``.

    Args:
        name_or_path: a name out of :func:`names`, or the path of a Python file. The file is executed.
        preset: handed to the study's function; ``None`` leaves the function its own default.
        settings: handed to the study's function, for example ``widths=(800, 800, 800, 800)``.

    Raises:
        StudyError: no such study or file (near misses are named); the file does not run (its line is named) or defines
            no ``study()``; the study has no such preset or setting.
    """
    return _load(name_or_path, settings if preset is None else {**settings, "preset": preset}, ())


def _load(name_or_path: str | Path, settings: Mapping[str, Any], also: Sequence[str]) -> Study:
    """See :func:`load`. ``also`` are the settings that can be changed besides the study's own."""
    text = str(name_or_path)
    if text in _BUILT_IN:
        module, function, _ = _BUILT_IN[text]
        return _build(getattr(importlib.import_module(module), function), text, settings, also)
    path = Path(name_or_path)
    if not path.is_file():
        near = difflib.get_close_matches(text, _BUILT_IN, n=3, cutoff=0.4)
        if path.suffix == ".py" and path.parent.is_dir():
            near += difflib.get_close_matches(path.name, [p.name for p in sorted(path.parent.glob("*.py"))], n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise StudyError(
            f"No study {text!r}: it is neither a built-in study ({', '.join(_BUILT_IN)}) nor a Python file.{hint}"
        )
    try:
        source = path.read_bytes()
    except OSError as error:
        raise StudyError(f"Cannot read the study {path}: {error.strerror}.") from error
    study = _build(_function_of(path, source), str(path), settings, also, path)
    # A run of another version of the file, or with another value of a parameter, is another run, whether or not the
    # file thinks of writing it down.
    asked = {key: _plain(value) for key, value in settings.items() if value is not None and key != "preset"}
    return replace(study, settings={**asked, **study.settings, "file_sha256": hashlib.sha256(source).hexdigest()})


def _plain(value: Any) -> Any:
    """A setting's value as JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def configured(name_or_path: str | Path, settings: Mapping[str, Any]) -> Study:
    """Return a study with settings put in: numbers of :class:`sublens.Study`, and those of the study's own function.

    Args:
        name_or_path: as for :func:`load`.
        settings: name -> value. ``keep``, ``mask_lr``, ``penalty`` and their like go by their names in
            :class:`sublens.Study`; all others (``preset``, ``widths``, ``folder``, ...) go to the study's function.

    Raises:
        StudyError: as for :func:`load`, or an impossible value.
    """
    fields = {name: value for name, value in settings.items() if name in _FIELDS}
    own = {name: value for name, value in settings.items() if name not in fields}
    return replace(_load(name_or_path, own, _FIELDS), **fields)


def _function_of(path: Path, source: bytes) -> Callable[..., Study]:
    """Execute the file and return its ``study``."""
    path = path.resolve()
    if path.suffix != ".py":
        raise StudyError(f"The study {path} is not a Python file: its name must end in .py.")
    name = f"sublens_study_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickling inside the file look their module up
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as for any script: modules beside the file can be imported
    try:
        # The very bytes that are hashed, and no cached bytecode beside the file.
        exec(compile(source, path, "exec"), vars(module))
    except SublensError:
        raise
    except Exception as error:
        raise _failed(path, error) from error
    function = getattr(module, "study", None)
    if not callable(function):
        near = difflib.get_close_matches("study", [key for key in vars(module) if not key.startswith("_")], n=1)
        hint = f" (it defines {near[0]!r})" if near else ""
        raise StudyError(f"{path.name} defines no function study(){hint}. Add one that returns a sublens.Study.")
    return cast(Callable[..., Study], function)


def _build(
    function: Callable[..., Study],
    label: str,
    settings: Mapping[str, Any],
    also: Sequence[str],
    path: Path | None = None,
) -> Study:
    """Call a study's function with what was asked, after a look at what it accepts."""
    wanted = {key: value for key, value in settings.items() if value is not None}
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in wanted:
            if key == "mask_steps" and key not in parameters:
                raise StudyError("mask_steps is set by --steps (steps of each mask).")
            if key not in parameters:
                near = difflib.get_close_matches(key, [*parameters, *also], n=1)
                has = f" Its settings: {', '.join(parameters)}." if parameters else " It takes no settings."
                has += f" Of every study: {', '.join(also)}." if also else ""
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise StudyError(f"The study {label} has no setting {key!r}.{hint}{has}")
    try:
        study = function(**wanted)
    except SublensError:
        raise
    except Exception as error:
        if path is None:
            raise
        raise _failed(path.resolve(), error) from error
    if not isinstance(study, Study):
        raise StudyError(f"study() of {label} returned a {type(study).__name__}; it must return a sublens.Study.")
    return study


def _failed(path: Path, error: Exception) -> StudyError:
    """Say in one line where in the user's file its own error came from."""
    line: int | None = None
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line = error.lineno
    else:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = lines[-1] if lines else None
    where = f"{path.name}, line {line}" if line else path.name
    what = error.msg if isinstance(error, SyntaxError) else str(error)
    return StudyError(f"The study {where}: {type(error).__name__}: {what}")
