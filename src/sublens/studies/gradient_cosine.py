"""Gradient cosine (paper): do the weights that a mask keeps still learn in the same direction?

A mask is trained for all classes but the first. Then it is put on ever more layers, from the output down, and each time
the gradient of the loss on the weights that are kept is compared with the gradient of the unmasked network.
"""

from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from sublens.analysis import measuring
from sublens.answers import Answer, Lines, Series, Spread
from sublens.mask import Mask
from sublens.studies.image_files import Images, load_images
from sublens.studies.image_networks import ConvNet
from sublens.studies.images import CONV_PAPER, CONV_QUICK, image_task, layers_of, loss
from sublens.studies.settings import chosen_preset, truth, whole
from sublens.study import Asked, Study, seed_from

_CONTROL = "all"
_AT_A_TIME = 1000
_PRESETS: dict[str, dict[str, Any]] = {"paper": CONV_PAPER, "quick": CONV_QUICK}

Gradients = Mapping[str, Tensor]


def study(preset: str = "quick", *, folder: str | None = None, dropout: bool = True, width: int | None = None) -> Study:
    """Return the study.

    Args:
        preset: ``"quick"`` (minutes, a network half as wide) or ``"paper"`` (the paper's steps and settings).
        folder: of CIFAR-10 or MNIST, see :func:`sublens.studies.image_files.load_images`; without one, scikit-learn's
            handwritten digits.
        dropout: whether the network is trained with dropout.
        width: channels of the first convolution; each of the three others has twice those of the one before.

    Raises:
        StudyError: no such preset, or an impossible setting.
        FileError: the folder does not hold images.
    """
    chosen = chosen_preset(_PRESETS, preset)
    first, batch_size = chosen.pop("width"), chosen["batch_size"]
    first = whole("width", first if width is None else width, 1, 512)
    truth("dropout", dropout)
    images = load_images(folder)
    everything = range(len(images.classes))
    channels = [first * 2**layer for layer in range(4)]
    without = f"without-{images.classes[0]}"
    return Study(
        name="gradient-cosine",
        preset=preset,
        description="Put a mask on ever more layers: do the kept weights still learn in the same direction?",
        network=lambda seed: ConvNet(images.shape, len(images.classes), channels, dropout=dropout),
        tasks=[image_task(without, images, everything[1:], batch_size, leaves_out=True)],
        control=image_task(_CONTROL, images, everything, batch_size),
        biases=True,
        functions={},
        questions={"cosine": lambda asked: cosine(asked, without, images)},
        settings={"width": first, "dropout": dropout, "images": images.described},
        **chosen,
    )


def gradients(net: nn.Module, images: Images, rows: Tensor) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over the test images ``rows`` for every parameter (name -> its shape).

    The network's own ``.grad`` is left as it is.
    """
    parameters = {name: value for name, value in net.named_parameters() if value.requires_grad}
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    with torch.enable_grad():
        for part in rows.split(_AT_A_TIME):
            batch = (images.standard(images.test.pixels[part]), images.test.labels[part])
            found = torch.autograd.grad(loss(net, batch) * (len(part) / len(rows)), list(parameters.values()))
            for name, gradient in zip(parameters, found, strict=True):
                total[name] += gradient
    return total


def similarity(first: Gradients, second: Gradients, mask: Mask, names: list[str]) -> float | None:
    """Return the cosine between two gradients over the weights that ``mask`` keeps in the named parameters.

    ``None`` where one of them is 0 there.
    """
    a, b = (torch.cat([each[name][mask[name]] for name in names]).double() for each in (first, second))
    lengths = a.norm() * b.norm()
    return None if lengths == 0 else ((a @ b) / lengths).item()


def cosine(asked: Asked, task: str, images: Images) -> Answer:
    """Do the weights that a mask keeps still have the gradient of the unmasked network?"""
    mask = asked.masks[task]
    layers = layers_of(mask)
    top_down = list(reversed(layers))
    every = torch.arange(len(images.test.labels))
    left_out = images.test.of((0,))
    draws = [Mask.random_like(mask, seed_from(asked.seed, "cosine", draw)) for draw in range(asked.study.random_masks)]
    plain = {"all": gradients(asked.network, images, every), "left": gradients(asked.network, images, left_out)}

    def along(chosen: Mask, which: str, rows: Tensor) -> list[float | None]:
        """The cosine with none, one, two, ... layers masked from the top."""
        values: list[float | None] = []
        for count in range(len(top_down) + 1):
            masked = {name for layer in top_down[:count] for name in layers[layer]}
            # All of a layer that is not masked yet counts as kept.
            partial = chosen.only(masked) if masked else chosen | ~chosen
            with partial.applied(asked.network) as net:
                found = gradients(net, images, rows)
            values.append(similarity(plain[which], found, partial, list(chosen)))
        return values

    with measuring(asked.network):
        seen = along(mask, "all", every)
        control = along(asked.masks[_CONTROL], "all", every)
        of_left_out = along(mask, "left", left_out)
        random = [along(draw, "all", every) for draw in draws]
    chance: list[Spread | None] = []
    for values in zip(*random, strict=True):
        there = [value for value in values if value is not None]
        chance.append(Spread(mean(there), min(there), max(there)) if there else None)
    end, by_chance = seen[-1], chance[-1] if chance else None
    said = "cannot be said (a gradient is 0)" if end is None else f"is {end:.2f}"
    beside = f", under random masks that keep as many weights {by_chance.mean:.2f}" if by_chance else ""
    return Answer(
        title="Do the kept weights still learn in the same direction?",
        sentence=(
            f"With all {len(layers)} layers masked, the cosine between the gradients of the masked and the unmasked"
            f" network on the kept weights {said}{beside}."
        ),
        figures=[
            Lines(
                title=(
                    "Cosine between the masked and the unmasked network's gradients on the kept weights, over the test"
                    " images. Chance: mean, lowest and highest of random masks that keep as many weights in each layer."
                ),
                label="cosine",
                x_label="masked layers, from the output down",
                x=["none", *(f"{'+ ' * bool(index)}{layer}" for index, layer in enumerate(top_down))],
                series=[
                    Series(name=f"mask {task}, all classes", values=seen, chance=chance),
                    Series(name=f"mask {task}, class {images.classes[0]} only", values=of_left_out),
                    Series(name="control mask, all classes", values=control),
                ],
                unit="number",
            )
        ],
        numbers={
            "cosine": end,
            "cosine_control": control[-1],
            "cosine_left_out_class": of_left_out[-1],
            "cosine_random": by_chance.mean if by_chance else None,
        },
    )
