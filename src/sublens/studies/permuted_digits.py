"""Permuted digits (paper): is what was learned reused, where the network may choose?

A network learns to read digits, then again under one permutation of the pixels after the other. Weights and masks train
together. The weights that an earlier mask keeps are frozen and at hand; all others are drawn anew each time, and so is
the whole first layer, since a permutation changes what its weights mean. Beyond the first layer the function stays the
same: a network that reuses would use the frozen weights.

Frozen weights are trained ones, all others are as they were drawn, so some of them would be used whatever is learned.
How many is seen by the last task, which asks the same images another function: how bright they are.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from torch import nn

from sublens.analysis import Distribution, accuracies, shared_by_chance, total
from sublens.answers import Answer, Lines, Series, Spread, percent
from sublens.errors import StudyError
from sublens.inspection import used_before
from sublens.studies.image_files import Images, load_images
from sublens.studies.images import image_task, layers_of
from sublens.studies.networks import feed_forward
from sublens.studies.settings import chosen_preset, truth, whole
from sublens.study import Asked, Study, Together, seed_from

BRIGHTNESS = "brightness"  # name of the task of another function
_FIRST = "1"  # the first linear layer, after the one that flattens the image
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"widths": (800, 800, 64), "permutations": 11, "mask_steps": 30_000},
    "quick": {
        "widths": (200, 200, 64),
        "permutations": 6,
        "mask_steps": 400,
        "mask_lr": 3e-2,
        "evaluate_every": 200,
        "random_masks": 3,
    },
}


def study(
    preset: str = "quick",
    *,
    folder: str | None = None,
    permutations: int | None = None,
    widths: Sequence[int] | None = None,
    used_logit: float = 2.0,
    new_logit: float = 2.0,
    other: bool = True,
) -> Study:
    """Return the study.

    Args:
        preset: ``"quick"`` (minutes) or ``"paper"`` (the paper's network, steps and settings).
        folder: of MNIST (or CIFAR-10), see :func:`sublens.studies.image_files.load_images`; without one, scikit-learn's
            handwritten digits.
        permutations: how many, the one that leaves the pixels in their places included.
        widths: of the hidden layers.
        used_logit: where the logits of weights start that an earlier mask keeps.
        new_logit: where the others start: 2, 0 or -1 in the paper. The lower, the more reuse is preferred.
        other: whether a last task asks another function of the images, which the paper does not: how bright they are.

    Raises:
        StudyError: no such preset, or an impossible setting.
        FileError: the folder does not hold images.
    """
    chosen = chosen_preset(_PRESETS, preset)
    usual_widths, usual_count = chosen.pop("widths"), chosen.pop("permutations")
    hidden = usual_widths if widths is None else tuple(widths)
    if not hidden:
        raise StudyError("widths is empty: give the width of at least one hidden layer, such as 200,200,64.")
    for width in hidden:
        whole("widths", width, 1, 100_000)
    count = whole("permutations", usual_count if permutations is None else permutations, 2, 1000)
    images = load_images(folder)
    inputs = images.train.pixels[0].numel()
    everything = range(len(images.classes))
    tasks = []
    for number in range(count):
        # The same permutations for every seed of a run.
        generator = torch.Generator().manual_seed(seed_from("permuted-digits", number))
        order = None if number == 0 else torch.randperm(inputs, generator=generator)
        name = f"permutation-{number}" if number else "original"
        tasks.append(image_task(name, replace(images, order=order), everything, 128))
    if truth("other", other):
        generator = torch.Generator().manual_seed(seed_from("permuted-digits", count))
        order = torch.randperm(inputs, generator=generator)
        tasks.append(image_task(BRIGHTNESS, replace(by_brightness(images), order=order), everything, 128))
    return Study(
        name="permuted-digits",
        preset=preset,
        description="Learn the same digits under one permutation of their pixels after the other: is anything reused?",
        network=lambda seed: nn.Sequential(nn.Flatten(), *feed_forward(inputs, hidden, len(images.classes))),
        control=tasks[0],
        tasks=tasks[1:],
        together=Together(used=used_logit, new=new_logit, fresh=(_FIRST,)),
        batch_size=128,
        network_steps=0,
        network_lr=1e-2,
        alpha=1.28e-3,
        samples=8,
        biases=True,
        functions={task.name: BRIGHTNESS if task.name == BRIGHTNESS else "digits" for task in tasks},
        questions={"reuse": reuse, "accuracy": accuracy},
        settings={"widths": list(hidden), "permutations": count, "other": other, "images": images.described},
        **{"mask_lr": 1e-2, **chosen},
    )


def by_brightness(images: Images) -> Images:
    """The same images, to be told apart by their mean brightness: as many classes of equal size as there were.

    The bounds between classes are those of the training images.
    """
    count = len(images.classes)
    train, test = (part.pixels.flatten(1).double().mean(1) for part in (images.train, images.test))
    bounds = train.quantile(torch.arange(1, count, dtype=train.dtype) / count)
    return replace(
        images,
        classes=tuple(str(number) for number in range(count)),
        train=replace(images.train, labels=torch.bucketize(train, bounds)),
        test=replace(images.test, labels=torch.bucketize(test, bounds)),
    )


def reuse(asked: Asked) -> Answer:
    """Which share of each mask is reused from earlier permutations?"""
    names = [task.name for task in asked.study.tasks]
    layers = {layer: tensors for layer, tensors in layers_of(asked.masks[names[0]]).items() if layer != _FIRST}
    groups = {**layers, "all but the first": [name for tensors in layers.values() for name in tensors]}
    seen: dict[str, list[float | None]] = {group: [] for group in groups}
    chance: dict[str, list[Spread | None]] = {group: [] for group in groups}
    for name in names:
        mask, used = asked.masks[name], used_before(asked.masks, name)
        kept, size = mask.kept_counts(), mask.sizes()
        reused = {layer: int((mask[layer] & used[layer]).sum()) for layer in mask}
        for group, tensors in groups.items():
            count = sum(kept[tensor] for tensor in tensors)
            seen[group].append(sum(reused[tensor] for tensor in tensors) / count if count else None)
            drawn = total([shared_by_chance(size[tensor], int(used[tensor].sum()), kept[tensor]) for tensor in tensors])
            chance[group].append(_share(drawn, count) if count else None)
    permuted = [i for i, name in enumerate(names) if name != BRIGHTNESS]
    ends = {group: (values[permuted[-1]], chance[group][permuted[-1]]) for group, values in seen.items()}
    whole_network, by_chance = ends["all but the first"]
    every_size = asked.masks[names[0]].sizes()
    left = used_before(asked.masks, BRIGHTNESS if len(permuted) < len(names) else "")
    taken = sum(int(left[t].sum()) for t in groups["all but the first"]) / sum(
        every_size[t] for t in groups["all but the first"]
    )
    said = "cannot be said, since the mask keeps nothing" if whole_network is None else f"is {percent(whole_network)}"
    beside = f", where a random mask of its size would hit {percent(by_chance.mean)}" if by_chance else ""
    of_another, compared = None, ""
    if len(permuted) < len(names):
        of_another, chance_of_another = seen["all but the first"][-1], chance["all but the first"][-1]
        if of_another is None or chance_of_another is None:
            compared = " The mask of another function, how bright an image is, keeps nothing to compare that with."
        else:
            compared = (
                f" Of the mask that asks the images another function, how bright they are, it is {percent(of_another)}"
                f" (random masks {percent(chance_of_another.mean)})"
            ) + (
                ": of what a permutation uses again, that much beyond chance would be used whatever is asked."
                if of_another > chance_of_another.high
                else ", no more than by chance: what is used again is used for the function."
            )
    return Answer(
        title="Which share of each mask is reused from earlier permutations?",
        sentence=(
            f"Beyond the first layer, the share of the last permutation's mask that earlier ones already used {said}"
            f"{beside}; by then {percent(taken)} of these weights are used by some permutation.{compared}"
        ),
        figures=[
            Lines(
                title=(
                    "Share of a mask that earlier permutations already used. Chance: random masks of the same layer"
                    " sizes, with their central 95 %."
                ),
                label="share of the mask",
                x_label="task",
                x=names,
                series=[
                    Series(
                        name=group if group not in layers else f"layer {group}",
                        values=seen[group],
                        chance=chance[group],
                    )
                    for group in groups
                ],
            )
        ],
        numbers={
            "reused": whole_network,
            "reused_by_chance": by_chance.mean if by_chance else None,
            "used_in_the_end": taken,
            "reused_by_another_function": of_another,
            **{f"reused_in_layer_{layer}": ends[layer][0] for layer in layers},
        },
    )


def _share(drawn: Distribution, count: int) -> Spread:
    return Spread(**drawn.summary(lambda shared: shared / count))


def _of_another(asked: Asked) -> float | None:
    """Accuracy of the task of another function, if the study has it."""
    task = asked.study.tasks[-1]
    if task.name != BRIGHTNESS:
        return None
    return accuracies(asked.networks[task.name], {task.name: task.measure}, asked.masks[task.name])[task.name]


def accuracy(asked: Asked) -> Answer:
    """Does every permutation still work, with the mask and the network that its training left?"""
    every = (asked.study.control, *asked.study.tasks)
    last = every[-1].name
    tasks = [task for task in every if task.name != BRIGHTNESS]
    own, final = [], []
    for task in tasks:
        metric = {task.name: task.measure}
        own.append(accuracies(asked.networks[task.name], metric, asked.masks[task.name])[task.name])
        # The weights of the end, seen through this task's mask, and with this task's first layer.
        network = asked.networks[task.name]
        later = dict(asked.networks[last].named_parameters())
        with torch.no_grad():
            own_first = {name: value for name, value in network.state_dict().items() if name.startswith(f"{_FIRST}.")}
            state = {**later, **own_first}
        together = asked.study.network(0)
        together.load_state_dict(state)
        final.append(accuracies(together, metric, asked.masks[task.name].bind(together))[task.name])
    return Answer(
        title="Does every permutation still work in the end?",
        sentence=(
            f"Right after its training a permutation has an accuracy of {percent(mean(own))} on average (lowest"
            f" {percent(min(own))}), and {percent(mean(final))} (lowest {percent(min(final))}) with the weights of the"
            " end and its own first layer: what is frozen is not forgotten."
            if mean(final) == mean(own)
            else f"Right after its training a permutation has an accuracy of {percent(mean(own))} on average, but"
            f" {percent(mean(final))} with the weights of the end and its own first layer."
        ),
        figures=[
            Lines(
                title="Accuracy of each permutation under its own mask",
                label="test images recognised",
                x_label="permutation",
                x=[task.name for task in tasks],
                series=[
                    Series(name="right after its training", values=own),
                    Series(name="with the weights of the end", values=final),
                ],
            )
        ],
        numbers={
            "accuracy": mean(own),
            "lowest_accuracy": min(own),
            "accuracy_in_the_end": mean(final),
            "accuracy_of_another_function": _of_another(asked),
        },
    )
