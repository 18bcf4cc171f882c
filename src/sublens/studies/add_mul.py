"""Addition and multiplication in one network (paper, section 3.1): does each use weights of its own?

Two numbers of two digits and an operation go in, the result modulo 100 comes out. The network learns both operations; a
mask is trained for each, and a control mask for both.
"""

from collections.abc import Sequence
from typing import Any

from sublens.errors import StudyError
from sublens.studies.arithmetic import INPUTS, OPERATIONS, OUTPUTS, confusion, task
from sublens.studies.networks import RepeatedLSTM, feed_forward
from sublens.studies.settings import whole
from sublens.study import Study

_BATCH = 128
_PRESETS: dict[str, dict[str, Any]] = {
    # The paper's settings are the defaults of Study. It trains no mask twice; without that there is no verdict.
    "paper": {"train_samples": 1_000_000, "validation_samples": 10_000, "repeated": ("add",)},
    # Twice the learning rates: 3,000 steps take the masks about as far as 10,000 of the paper's.
    "quick": {
        "network_steps": 5_000,
        "network_lr": 2e-3,
        "mask_steps": 3_000,
        "mask_lr": 2e-2,
        "evaluate_every": 500,
        "repeated": ("add",),
    },
}
# An LSTM's step costs four times as much, but its masks settle sooner: fewer steps, larger ones, the paper's penalty.
_QUICK_LSTM: dict[str, Any] = {
    "network_steps": 4_500,
    "network_lr": 3e-3,
    "mask_steps": 1_600,
    "mask_lr": 3e-2,
    "alpha": 1e-4,
    "evaluate_every": 200,
}
_WIDEST = 100_000


def study(preset: str = "quick", *, widths: Sequence[int] = (400, 400, 200)) -> Study:
    """Return the study of a feed-forward network.

    Args:
        preset: ``"quick"`` (minutes) or ``"paper"`` (the paper's steps and settings).
        widths: widths of the hidden layers. The paper's are 400-400-200, and four layers of 800, 2000 or 4000.

    Raises:
        StudyError: no such preset, or an impossible width.
    """
    if not widths or any(not isinstance(width, int) or not 1 <= width <= _WIDEST for width in widths):
        raise StudyError(f"widths={widths!r} must be whole numbers from 1 to {_WIDEST:,}, such as 400,400,200.")
    return _study(
        preset,
        name="add-mul",
        description="Addition and multiplication modulo 100 in one feed-forward network",
        network=lambda seed: feed_forward(INPUTS, widths, OUTPUTS),
        settings={"widths": list(widths)},
    )


def recurrent(preset: str = "quick", *, width: int = 256, layers: int = 2) -> Study:
    """Return the study of an LSTM that is shown the problem for three steps and answers at the last.

    Args:
        preset: as for :func:`study`.
        width: size of its state.
        layers: number of its layers.

    Raises:
        StudyError: no such preset, or an impossible size.
    """
    whole("width", width, 1, _WIDEST)
    whole("layers", layers, 1, 100)
    early = [f"lstm.weight_{kind}_l{layer}" for layer in range((layers + 1) // 2) for kind in ("ih", "hh")]
    return _study(
        preset,
        name="add-mul-lstm",
        description="Addition and multiplication modulo 100 in one recurrent network (LSTM)",
        network=lambda seed: RepeatedLSTM(INPUTS, width, layers, OUTPUTS, steps=3),
        settings={"width": width, "layers": layers},
        first_half=early,
        **(_QUICK_LSTM if preset == "quick" else {}),
    )


def _study(preset: str, settings: dict[str, Any], **parts: Any) -> Study:
    if preset not in _PRESETS:
        raise StudyError(f"No preset {preset!r}; the presets are {', '.join(_PRESETS)}.")
    chosen = dict(_PRESETS[preset])
    sets = {name: chosen.pop(name, None) for name in ("train_samples", "validation_samples")}
    return Study(
        preset=preset,
        tasks=[task(operation, [operation], _BATCH, **sets) for operation in OPERATIONS],
        control=task("all", OPERATIONS, _BATCH, **sets),
        batch_size=_BATCH,
        confusion=confusion(),
        settings={**settings, **sets},
        **{**chosen, **parts},
    )
