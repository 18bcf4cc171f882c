"""Mask stability (paper): how much of a mask is the task's, and how much is chance of its training?

For each of some random pairs of classes two masks are trained, with another order of the data and another noise. How
much the two overlap says how far a mask may be read as *the* weights of its task.
"""

from itertools import combinations
from statistics import mean, stdev
from typing import Any

import torch

from sublens.analysis import overlap
from sublens.answers import Answer, Bars, Series, Spread
from sublens.studies.image_files import load_images
from sublens.studies.image_networks import ConvNet
from sublens.studies.images import CONV_PAPER, CONV_QUICK, image_task
from sublens.studies.settings import chosen_preset, whole
from sublens.study import Asked, Study, repeat_of, seed_from

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**CONV_PAPER, "pairs": 10},
    "quick": {**CONV_QUICK, "pairs": 3, "random_masks": 3},
}


def study(
    preset: str = "quick", *, folder: str | None = None, pairs: int | None = None, width: int | None = None
) -> Study:
    """Return the study. Its network is trained without dropout, as in the paper.

    Args:
        preset: ``"quick"`` (minutes, three pairs, a network half as wide) or ``"paper"`` (its steps and settings).
        folder: of CIFAR-10 or MNIST, see :func:`sublens.studies.image_files.load_images`; without one, scikit-learn's
            handwritten digits.
        pairs: how many pairs of classes, drawn by chance, the same for every seed of a run.
        width: channels of the first convolution; each of the three others has twice those of the one before.

    Raises:
        StudyError: no such preset, or an impossible setting.
        FileError: the folder does not hold images.
    """
    chosen = chosen_preset(_PRESETS, preset)
    first, count, batch_size = chosen.pop("width"), chosen.pop("pairs"), chosen["batch_size"]
    first = whole("width", first if width is None else width, 1, 512)
    images = load_images(folder)
    possible = list(combinations(range(len(images.classes)), 2))
    count = whole("pairs", count if pairs is None else pairs, 1, len(possible))
    order = torch.randperm(len(possible), generator=torch.Generator().manual_seed(seed_from("mask-stability")))
    channels = [first * 2**layer for layer in range(4)]
    tasks = [
        image_task("-".join(images.classes[number] for number in possible[at]), images, possible[at], batch_size)
        for at in order[:count].tolist()
    ]
    names = [task.name for task in tasks]
    return Study(
        name="mask-stability",
        preset=preset,
        description="Train two masks for one pair of classes: how much do they overlap?",
        network=lambda seed: ConvNet(images.shape, len(images.classes), channels, dropout=False),
        tasks=tasks,
        control=image_task("all", images, range(len(images.classes)), batch_size),
        biases=True,
        repeated=names,
        questions={"stability": lambda asked: stability(asked, names)},
        settings={"width": first, "pairs": names, "images": images.described},
        **chosen,
    )


def stability(asked: Asked, names: list[str]) -> Answer:
    """How much do two masks of the same pair of classes overlap?"""
    found = [overlap(asked.masks[name], asked.masks[repeat_of(name)]) for name in names]
    same = [each["iou"] for each in found]
    chance = [Spread(**each["chance"]["iou"]) for each in found]
    others = {
        name: [asked.masks[name].iou(asked.masks[repeat_of(other)]) for other in names if other != name]
        for name in names
    }
    across = [value for values in others.values() for value in values]
    spread = f" (standard deviation {stdev(same):.3f})" if len(same) > 1 else ""
    beside = f", two masks of different pairs {mean(across):.3f}" if across else ""
    return Answer(
        title="How much do two masks of the same pair of classes overlap?",
        sentence=(
            f"Two masks of the same pair, trained on another order of the data with another noise, have an IoU of"
            f" {mean(same):.3f} on average over {len(names)} pairs{spread}{beside}, and random masks of the same layer"
            f" sizes {mean(level.mean for level in chance):.3f}."
        ),
        figures=[
            Bars(
                title=(
                    "IoU of two masks. Chance: random masks that keep as many weights in each layer, with their central"
                    " 95 %. Different pairs: mean, lowest and highest."
                ),
                label="IoU",
                groups=names,
                series=[
                    Series(name="the same pair twice", values=same, chance=chance),
                    *(
                        [
                            Series(
                                name="different pairs",
                                values=[Spread(mean(values), min(values), max(values)) for values in others.values()],
                            )
                        ]
                        if across
                        else []
                    ),
                ],
                unit="number",
            )
        ],
        numbers={
            "iou_same_pair": mean(same),
            "iou_same_pair_sd": stdev(same) if len(same) > 1 else None,
            "iou_different_pairs": mean(across) if across else None,
            "iou_random": mean(level.mean for level in chance),
        },
    )
