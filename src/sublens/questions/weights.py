"""Which weights each task keeps: shares of each layer, and pictures."""

import math
from collections.abc import Sequence

import torch

from sublens.answers import MOST_PICTURED, Answer, Bars, Figure, Picture, Series, percent
from sublens.mask import Mask
from sublens.questions.found import Found, listed, ordinal, spaced
from sublens.study import Asked

_LARGEST = 160  # rows and columns of a mask's picture
_MOST_PICTURES = 4


def ask_weights(asked: Asked, found: Found) -> Answer | None:
    """Which weights does each task keep?"""
    """Show which task's mask keeps which weight."""
    tasks = [task.name for task in asked.study.tasks][: 2 if len(asked.study.tasks) < 3 else MOST_PICTURED]
    masks = [asked.masks[name] for name in tasks]
    layers = [name for name in masks[0] if masks[0][name].ndim >= 2]
    figures: list[Figure] = []
    if len(tasks) == 2:
        figures.append(_proportions(tasks[0], tasks[1], masks[0], masks[1]))
    shown = [layers[round(index)] for index in spaced(len(layers), _MOST_PICTURES)]
    figures += [_picture(layer, tasks, masks) for layer in shown]
    if not figures:
        return None
    everywhere, anywhere = masks[0], masks[0]
    for mask in masks[1:]:
        everywhere, anywhere = everywhere & mask, anywhere | mask
    by_chance = math.fsum(
        size * math.prod(mask.kept_counts()[name] / size for mask in masks) for name, size in masks[0].sizes().items()
    ) / max(masks[0].size, 1)  # fmt: skip
    only = {name: (mask - _rest(masks, mask)).kept for name, mask in zip(tasks, masks, strict=True)}
    together = "both" if len(tasks) == 2 else f"all {len(tasks)}"
    parts = [f"{percent(value)} are kept by {name} alone" for name, value in only.items()]
    if len(tasks) > 1:
        parts.append(f"{percent(everywhere.kept)} by {together} (random masks {percent(by_chance)})")
    parts.append(f"{percent(1 - anywhere.kept)} by none")
    return Answer(
        title="Which weights does each task keep?",
        sentence=f"Of the masked weights, {listed(parts)}{_of_which(asked, tasks)}.",
        figures=figures,
        numbers={
            **{f"only_{name}": value for name, value in only.items()},
            "all": everywhere.kept,
            "all_by_chance": by_chance,
            "none": 1 - anywhere.kept,
        },
    )


def _of_which(asked: Asked, tasks: Sequence[str]) -> str:
    return f" of the first {len(tasks)} tasks" if len(tasks) < len(asked.study.tasks) else ""


def _rest(masks: Sequence[Mask], mask: Mask) -> Mask:
    others = [other for other in masks if other is not mask]
    rest = mask & ~mask
    for other in others:
        rest = rest | other
    return rest


def _proportions(first: str, second: str, mine: Mask, others: Mask) -> Bars:
    a, b, both = mine.kept_per_layer(), others.kept_per_layer(), (mine & others).kept_per_layer()
    layers = list(mine)
    return Bars(
        title="Share of each layer's weights. By chance: random masks of the same layer sizes.",
        label="share of the layer",
        groups=layers,
        series=[
            Series(
                name=f"{first} only",
                values=[a[name] - both[name] for name in layers],
                chance=[a[name] * (1 - b[name]) for name in layers],
            ),
            Series(
                name=f"{second} only",
                values=[b[name] - both[name] for name in layers],
                chance=[b[name] * (1 - a[name]) for name in layers],
            ),
            Series(
                name="both",
                values=[both[name] for name in layers],
                chance=[a[name] * b[name] for name in layers],
            ),
        ],
    )


def _picture(layer: str, tasks: Sequence[str], masks: Sequence[Mask]) -> Picture:
    code = torch.zeros(0)
    for bit, mask in enumerate(masks):
        kept = mask[layer].flatten(1).int() << bit
        code = kept if bit == 0 else code | kept
    tall, wide = code.shape
    rows, columns = (-(-length // _LARGEST) for length in (tall, wide))
    code = code[::rows, ::columns]
    sampled = [f"every {ordinal(step)} {what}" for step, what in ((rows, "row"), (columns, "column")) if step > 1]
    part = f" Shown: {' and '.join(sampled)}." if sampled else ""
    return Picture(
        title=f"{layer}: the colour says which masks keep a weight.{part}",
        row_label="outputs",
        column_label="inputs",
        masks=list(tasks),
        cells=["".join("0123456789abcdef"[digit] for digit in row) for row in code.tolist()],
    )
