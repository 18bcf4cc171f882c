"""The same function twice (paper, section 3.2): does a network that adds two pairs of numbers reuse its weights?

Two pairs of numbers of two digits go in, both sums modulo 100 come out. A mask is trained for each pair, and a control
mask for both. The two tasks are the same function, so a network that reused its weights would have two like masks, at
least in the hidden layers: the first and the last layer have weights of their own for each pair.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from sublens.analysis import accuracies, overlap, shared_by_chance, total
from sublens.answers import Answer, Bars, Series, Spread, percent
from sublens.errors import StudyError
from sublens.mask import Mask
from sublens.studies.addition import INPUTS, OUTPUTS, PAIRS, task
from sublens.studies.networks import RepeatedLSTM, TurnsLSTM, feed_forward
from sublens.studies.settings import truth, whole
from sublens.study import Asked, Study, repeat_of

_BATCH = 128
_STEPS = 3  # for which an LSTM is shown each pair
MODES = ("together", "turns")
_PRESETS: dict[str, dict[str, Any]] = {
    # The paper's settings are the defaults of Study. It trains no mask twice; without that there is no verdict.
    "paper": {"train_samples": 1_000_000, "repeated": ("first",)},
    "quick": {
        "network_steps": 1_500,
        "network_lr": 2e-3,
        "mask_steps": 1_000,
        "mask_lr": 4e-2,
        "evaluate_every": 500,
        "repeated": ("first",),
        "train_samples": None,
    },
}
_WIDEST = 100_000
# A smaller network than the paper's, for an LSTM's step costs many times as much.
_QUICK_LSTM: dict[str, Any] = {
    "network_steps": 1_500,
    "network_lr": 5e-3,
    "mask_steps": 600,
    "mask_lr": 5e-2,
    "alpha": 4e-4,
    "evaluate_every": 300,
}


def study(preset: str = "quick", *, widths: Sequence[int] | None = None, copied: bool = False) -> Study:
    """Return the study of a feed-forward network, to which each pair is shown alone.

    Args:
        preset: ``"quick"`` (minutes) or ``"paper"`` (the paper's steps and settings).
        widths: widths of the hidden layers: 2000 four times, as in the paper, or 400-400-200 with ``"quick"``.
        copied: the paper's control of the method. When the network is trained, the second pair's weights in the first
            and last layer (and its output biases) are copied over the first's. Then nothing tells the pairs apart, and
            their masks must share what two masks of one task share.

    Raises:
        StudyError: no such preset, or an impossible width.
    """
    if widths is None:
        widths = (400, 400, 200) if preset == "quick" else (2000, 2000, 2000, 2000)
    truth("copied", copied)
    if not widths or any(not isinstance(width, int) or not 1 <= width <= _WIDEST for width in widths):
        raise StudyError(f"widths={widths!r} must be whole numbers from 1 to {_WIDEST:,}, such as 400,400,200.")
    return _study(
        preset,
        name="double-addition",
        description="Two additions modulo 100 in one feed-forward network",
        network=lambda seed: feed_forward(INPUTS, widths, OUTPUTS),
        alone=True,
        prepare=_copy_ends if copied else None,
        compared=[f"{2 * layer}.weight" for layer in range(1, len(widths))] or None,  # the hidden layers
        alpha=4e-4,
        settings={"widths": list(widths), "copied": copied},
    )


def recurrent(
    preset: str = "quick", *, mode: str = "together", width: int | None = None, layers: int | None = None
) -> Study:
    """Return the study of an LSTM.

    Args:
        preset: as for :func:`study`.
        mode: ``"together"``: both pairs are shown for six steps and answered at the last. ``"turns"``: one at a time,
            each for three steps in inputs of its own and answered at the last of them in outputs of its own.
        width: size of its state: 256, as in the paper, or 128 with ``"quick"``.
        layers: number of its layers: 2, as in the paper, or 1 with ``"quick"``.

    Raises:
        StudyError: no such preset or mode, or an impossible size.
    """
    if mode not in MODES:
        raise StudyError(f"mode={mode!r} must be {' or '.join(MODES)}.")
    usual_width, usual_layers = (128, 1) if preset == "quick" else (256, 2)
    width = usual_width if width is None else width
    layers = usual_layers if layers is None else layers
    whole("width", width, 1, _WIDEST)
    whole("layers", layers, 1, 100)
    turns = len(PAIRS)

    def network(seed: int) -> Any:
        if mode == "turns":
            return TurnsLSTM(INPUTS, width, layers, OUTPUTS, turns=turns, steps=_STEPS)
        return RepeatedLSTM(INPUTS, width, layers, OUTPUTS, steps=turns * _STEPS)

    early = [f"lstm.weight_{kind}_l{layer}" for layer in range((layers + 1) // 2) for kind in ("ih", "hh")]
    return _study(
        preset,
        name="double-addition-lstm",
        description="Two additions modulo 100 in one recurrent network (LSTM)",
        network=network,
        alone=False,
        settings={"mode": mode, "width": width, "layers": layers},
        first_half=early,
        compared=[name for layer in range(layers) for name in _shared(layer)],
        **(_QUICK_LSTM if preset == "quick" else {}),
    )


def _shared(layer: int) -> list[str]:
    """Return the weights of an LSTM's layer that no pair has for itself: all but those that read the input."""
    kinds = ("hh",) if layer == 0 else ("ih", "hh")
    return [f"lstm.weight_{kind}_l{layer}" for kind in kinds]


def _copy_ends(network: nn.Module) -> nn.Module:
    """Give the first pair the second pair's weights in the first and last layer, as the paper's control does."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    pair = INPUTS // 2
    layers[0].weight[:, :pair] = layers[0].weight[:, pair:]
    pair = OUTPUTS // 2
    for ends in (layers[-1].weight, layers[-1].bias):
        ends[:pair] = ends[pair:]
    return network


def _ends(mask: Mask) -> tuple[str, str]:
    """Return the names of the first layer and the last, those with weights of their own for each pair."""
    return mask.names[0], mask.names[-1]


def hidden_layers(asked: Asked) -> Answer:
    """How much do the two pairs' masks share between the first layer and the last, beside masks of the same pair?"""
    first, second = (asked.masks[pair] for pair in PAIRS)
    ends = _ends(first)
    hidden = [name for name in first.names if name not in ends]
    compared = {"the two pairs": (first, second)}
    repeats = {pair: asked.masks[repeat_of(pair)] for pair in PAIRS if repeat_of(pair) in asked.masks}
    compared |= {f"{pair} pair, two seeds": (asked.masks[pair], again) for pair, again in repeats.items()}
    rows = {name: [_iou(one, other, layers) for layers in (ends, hidden)] for name, (one, other) in compared.items()}
    (_, (seen, chance)), *others = rows.values()
    sentence = (
        f"In the hidden layers the masks of the two pairs, which are the same function, have an IoU of {seen:.3f};"
        f" random masks of the same sizes have {chance.mean:.3f}"
    )
    if others:
        sentence += f", and two masks of the same pair {others[0][1][0]:.3f}"
    bars = Bars(
        title="IoU of two masks, beside random masks that keep as many weights in each layer (mean and 95 % band)",
        label="IoU",
        unit="number",
        groups=["first and last layer", "hidden layers"],
        series=[
            Series(name=name, values=[seen for seen, _ in row], chance=[chance for _, chance in row])
            for name, row in rows.items()
        ],
    )
    numbers = {"iou": seen, "chance": chance.mean}
    numbers |= {f"iou_{pair}_repeated": row[1][0] for pair, row in zip(repeats, others, strict=True)}
    title = "Do the hidden layers use the same weights for the same function?"
    return Answer(title=title, sentence=f"{sentence}.", figures=[bars], numbers=numbers)


def _iou(one: Mask, other: Mask, layers: Sequence[str]) -> tuple[float, Spread]:
    """Return the IoU over some layers, and what chance gives."""
    sizes = [overlap(one, other)["per_layer"][name]["sizes"] for name in layers]
    kept = sum(size["first"] + size["second"] for size in sizes)
    if not kept:
        return 1.0, Spread(1.0, 1.0, 1.0)
    chance = total([shared_by_chance(size["total"], size["first"], size["second"]) for size in sizes])
    both = sum(size["both"] for size in sizes)
    return both / (kept - both), Spread(**chance.summary(lambda x: x / (kept - x)))


def inverse_masks(asked: Asked) -> Answer:
    """What do the weights that a pair's mask removes still know, alone and between the control's ends?"""
    control = asked.masks[asked.study.control.name]
    ends = _ends(control)
    kinds: dict[str, Any] = {
        "mask": lambda mask: mask,
        "mask, ends of both": lambda mask: mask.replace(control, ends),
        "inverse": lambda mask: ~mask,
        "inverse, ends of both": lambda mask: (~mask).replace(control, ends),
    }
    measured = {
        pair: {kind: accuracies(asked.network, asked.metrics, made(asked.masks[pair])) for kind, made in kinds.items()}
        for pair in PAIRS
    }
    other = dict(zip(PAIRS, reversed(PAIRS), strict=True))
    figures = [
        Bars(
            title=f'Right answers under the mask of the {pair} pair, with its own and with the "both" mask\'s first and'
            " last layer",
            label="right answers",
            groups=list(kinds),
            series=[Series(name=f"{of} pair", values=[found[of] for found in measured[pair].values()]) for of in PAIRS],
        )
        for pair in PAIRS
    ]
    told = []
    for pair in PAIRS:
        bare, joined = (measured[pair][kind] for kind in ("inverse", "inverse, ends of both"))
        told.append(
            f"What the {pair} pair's mask removes answers the {other[pair]} pair right in {percent(bare[other[pair]])}"
            f" and the {pair} in {percent(bare[pair])}; with the control mask's first and last layer"
            f" {percent(joined[other[pair]])} and {percent(joined[pair])}."
        )
    numbers = {
        f"{pair}: {kind}: {of}": value
        for pair, found in measured.items()
        for kind, accuracy in found.items()
        for of, value in accuracy.items()
    }
    return Answer(
        title="What do the inverse masks still know?", sentence=" ".join(told), figures=figures, numbers=numbers
    )


def _study(preset: str, *, alone: bool, settings: dict[str, Any], **parts: Any) -> Study:
    if preset not in _PRESETS:
        raise StudyError(f"No preset {preset!r}; the presets are {', '.join(_PRESETS)}.")
    chosen = dict(_PRESETS[preset])
    train = chosen.pop("train_samples")
    first, second, both = (
        task(name, asked, _BATCH, alone=alone, train_samples=train)
        for name, asked in ((PAIRS[0], [0]), (PAIRS[1], [1]), ("both", [0, 1]))
    )
    return Study(
        preset=preset,
        tasks=[first, second],
        control=both,
        functions=dict.fromkeys(PAIRS, "addition"),
        questions={"hidden-layers": hidden_layers, "inverse-masks": inverse_masks},
        batch_size=_BATCH,
        settings={**settings, "train_samples": train},
        **{**chosen, **parts},
    )
