"""Find subnetworks: learn a binary mask over a frozen network's weights, and say what the mask means.

``import sublens as sl`` loads nothing heavy: each public name is imported from its room when it is first used, so that
the command line can answer ``--help`` without loading torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from sublens.errors import (
    BatchError,
    CutGraphError,
    FileError,
    LostRankError,
    MismatchError,
    NonFiniteError,
    SelectionError,
    SettingError,
    StudyError,
    SublensError,
)

if TYPE_CHECKING:
    from sublens.diagnosis import Diagnosis, Finding, diagnose
    from sublens.fit import AlphaPath, Run, Settled, fit, fit_tasks
    from sublens.gates import (
        Bernoulli,
        ContinuousSparsification,
        Gate,
        GumbelSigmoid,
        HardConcrete,
        NOfM,
        Threshold,
        TopK,
    )
    from sublens.inspection import inspect
    from sublens.mask import Mask, fingerprint
    from sublens.masked_network import MaskedNetwork
    from sublens.objectives import agree, contrast, forget
    from sublens.reference_masks import attribution_mask, magnitude_mask, random_mask
    from sublens.selection import select
    from sublens.study import Study, Task
    from sublens.switchboard import Switchboard

__version__ = "0.1.0"

__all__ = [
    "AlphaPath",
    "BatchError",
    "Bernoulli",
    "ContinuousSparsification",
    "CutGraphError",
    "Diagnosis",
    "FileError",
    "Finding",
    "Gate",
    "GumbelSigmoid",
    "HardConcrete",
    "LostRankError",
    "Mask",
    "MaskedNetwork",
    "MismatchError",
    "NOfM",
    "NonFiniteError",
    "Run",
    "SelectionError",
    "SettingError",
    "Settled",
    "Study",
    "StudyError",
    "SublensError",
    "Switchboard",
    "Task",
    "Threshold",
    "TopK",
    "agree",
    "attribution_mask",
    "contrast",
    "diagnose",
    "fingerprint",
    "fit",
    "fit_tasks",
    "forget",
    "inspect",
    "magnitude_mask",
    "random_mask",
    "select",
]

_ROOM_OF = {
    "AlphaPath": "fit",
    "Bernoulli": "gates",
    "ContinuousSparsification": "gates",
    "Diagnosis": "diagnosis",
    "Finding": "diagnosis",
    "Gate": "gates",
    "GumbelSigmoid": "gates",
    "HardConcrete": "gates",
    "Mask": "mask",
    "MaskedNetwork": "masked_network",
    "NOfM": "gates",
    "Run": "fit",
    "Settled": "fit",
    "Study": "study",
    "Switchboard": "switchboard",
    "Task": "study",
    "Threshold": "gates",
    "TopK": "gates",
    "agree": "objectives",
    "attribution_mask": "reference_masks",
    "contrast": "objectives",
    "diagnose": "diagnosis",
    "fingerprint": "mask",
    "fit": "fit",
    "fit_tasks": "fit",
    "forget": "objectives",
    "inspect": "inspection",
    "magnitude_mask": "reference_masks",
    "random_mask": "reference_masks",
    "select": "selection",
}


def __getattr__(name: str) -> object:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'sublens' has no attribute '{name}'")
    value = getattr(import_module(f"sublens.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, in which ``sublens.fit`` is the function, also after something has imported the room of that name.

    Importing a submodule binds it in its package under its own name, which would put the room in the function's place.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _ROOM_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
