"""Class removal (paper): which weights of a classifier does one class need?

A network learns to tell ten classes apart. A control mask is trained on all of them, and then one mask for each class
that is left out of its training. Its output layer is the control's, so that the class cannot be removed there.
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from sublens.analysis import measuring
from sublens.answers import Answer, Bars, Matrix, Series, Spread, percent
from sublens.errors import StudyError
from sublens.mask import Mask
from sublens.studies.image_files import Images, load_images
from sublens.studies.image_networks import ConvNet, ResNet
from sublens.studies.images import CONV_PAPER, CONV_QUICK, Confusion, confusion, image_task, layers_of
from sublens.studies.settings import chosen_preset, truth, whole
from sublens.study import Asked, Study, repeat_of

_CONTROL = "all"
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": CONV_PAPER,
    # Masks that are pressed less, or not as long, keep what a left-out class needs: only the penalty takes it away.
    "quick": {**CONV_QUICK, "mask_steps": 1_200, "alpha": 1e-3, "random_masks": 3},
}
_RESNET: dict[str, Any] = {
    "network_lr": 0.1,
    "network_optimizer": "sgd",
    "network_decay": 1e-4,
    "mask_lr": 3e-2,
    "alpha": 2e-5,
}
_RESNET_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        **_RESNET,
        "depth": 110,
        "batch_size": 256,
        "network_steps": 64_000,
        "network_milestones": (32_000, 48_000),
        "mask_steps": 30_000,
    },
    "quick": {
        **_RESNET,
        "depth": 20,
        "batch_size": 128,
        "network_steps": 400,
        "network_milestones": (200, 300),
        "mask_steps": 150,
        # 150 steps of the paper's size and alpha would close one gate in a hundred.
        "mask_lr": 0.1,
        "alpha": 1e-3,
        "evaluate_every": 200,
        "random_masks": 3,
    },
}


def study(preset: str = "quick", *, folder: str | None = None, dropout: bool = True, width: int | None = None) -> Study:
    """Return the study of a convolutional network.

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
    usual = chosen.pop("width")
    first = whole("width", usual if width is None else width, 1, 512)
    channels = [first * 2**layer for layer in range(4)]
    truth("dropout", dropout)
    images = load_images(folder)
    return _study(
        "class-removal",
        "Leave one class out: which weights of a convolutional network did it need?",
        images,
        preset=preset,
        network=lambda seed: ConvNet(images.shape, len(images.classes), channels, dropout=dropout),
        settings={"width": first, "dropout": dropout},
        **chosen,
    )


def resnet(preset: str = "quick", *, folder: str | None = None, depth: int | None = None) -> Study:
    """Return the study of a residual network.

    Args:
        preset: ``"quick"`` (a network of depth 20) or ``"paper"`` (ResNet-110 and the paper's steps and settings).
        folder: as for :func:`study`. The images of CIFAR-10 are shifted and mirrored by chance in training.
        depth: of the network, 6 n + 2.

    Raises:
        StudyError: no such preset, or an impossible setting.
        FileError: the folder does not hold images.
    """
    chosen = chosen_preset(_RESNET_PRESETS, preset)
    usual = chosen.pop("depth")
    layers = whole("depth", usual if depth is None else depth, 8, 1202)
    if layers % 6 != 2:
        raise StudyError(f"depth={layers} must be 6 n + 2, such as 20, 56 or 110.")
    images = load_images(folder)
    return _study(
        "class-removal-resnet",
        "Leave one class out: which weights of a residual network did it need?",
        images,
        preset=preset,
        network=lambda seed: ResNet(images.shape, len(images.classes), layers),
        settings={"depth": layers},
        **chosen,
    )


def _study(
    name: str, description: str, images: Images, *, batch_size: int, settings: dict[str, Any], **parts: Any
) -> Study:
    everything = range(len(images.classes))
    augment = name == "class-removal-resnet" and images.source == "cifar10"

    def task(called: str, left_out: int | None) -> Any:
        kept = [number for number in everything if number != left_out]
        return image_task(called, images, kept, batch_size, augment=augment, leaves_out=left_out is not None)

    return Study(
        name=name,
        description=description,
        tasks=[task(_without(called), number) for number, called in enumerate(images.classes)],
        control=task(_CONTROL, None),
        batch_size=batch_size,
        biases=True,
        from_control=("output",),
        repeated=(_CONTROL,),
        functions={},
        confusion=confusion(images),
        questions={
            "lost": lambda asked: lost(asked, images.classes),
            "confused": lambda asked: confused(asked, images.classes),
            "removed": lambda asked: removed(asked, images.classes),
        },
        settings={**settings, "images": images.described},
        **parts,
    )


def _without(class_name: str) -> str:
    return f"without-{class_name}"


def _confusions(asked: Asked, classes: Sequence[str]) -> dict[str, Confusion]:
    """Return the confusion under the control mask, and under the mask of each left-out class."""
    asks = asked.study.confusion
    assert asks is not None
    found = {}
    for name in (_CONTROL, *map(_without, classes)):
        with measuring(asked.network), asked.masks[name].applied(asked.network) as net:
            found[name] = asks(net)
    return found


def lost(asked: Asked, classes: Sequence[str]) -> Answer:
    """How much of a left-out class does the network still recognise?"""
    found = _confusions(asked, classes)
    own = {name: found[_without(name)][name][name] for name in classes}
    control = {name: found[_CONTROL][name][name] for name in classes}
    others = {name: [found[_without(out)][name][name] for out in classes if out != name] for name in classes}
    rest = mean(found[_without(out)][name][name] - control[name] for out in classes for name in classes if name != out)
    drop = mean(control[name] - own[name] for name in classes)
    return Answer(
        title="How much of a left-out class does the network still recognise?",
        sentence=(
            f"Under the mask that was trained without it, a class loses {percent(drop)} of its test images on average"
            f" against the control mask, and is still recognised in {percent(mean(own.values()))}; the classes that"
            f" stayed change by {100 * rest:+.1f} points."
        ),
        figures=[
            Bars(
                title=(
                    "Accuracy on the left-out class. Chance: its mean, lowest and highest accuracy under the masks that"
                    " leave another class out."
                ),
                label="test images recognised",
                groups=classes,
                series=[
                    Series(name="control mask", values=[control[name] for name in classes]),
                    Series(
                        name="mask trained without the class",
                        values=[own[name] for name in classes],
                        chance=[Spread(mean(others[name]), min(others[name]), max(others[name])) for name in classes],
                    ),
                ],
            )
        ],
        numbers={
            "accuracy_lost_on_left_out_class": drop,
            "accuracy_left_on_left_out_class": mean(own.values()),
            "accuracy_change_on_other_classes": rest,
            **{f"accuracy_lost_on_{name}": control[name] - own[name] for name in classes},
        },
    )


def confused(asked: Asked, classes: Sequence[str]) -> Answer:
    """How does leaving a class out change the confusion matrix?"""
    found = _confusions(asked, classes)
    control = found[_CONTROL]
    # Row and column of the left-out class in the difference of the two confusion matrices, and its diagonal.
    taken_for = [[found[_without(out)][out][name] - control[out][name] for name in classes] for out in classes]
    taken_from = [[found[_without(out)][name][out] - control[name][out] for name in classes] for out in classes]
    right = [[found[_without(out)][name][name] - control[name][name] for name in classes] for out in classes]
    wrongly = mean(row[at] for position, row in enumerate(taken_from) for at in range(len(row)) if at != position)
    targets = [
        (row[at], classes[position], classes[at])
        for position, row in enumerate(taken_for)
        for at in range(len(row))
        if at != position
    ]
    share, out, target = max(targets)
    return Answer(
        title="How does leaving a class out change the confusion matrix?",
        sentence=(
            f"The largest new confusion is {out}, left out, taken for {target} ({100 * share:+.1f} points of its"
            f" images); that images of the classes that stayed are taken for the left-out one changes by"
            f" {100 * wrongly:+.1f} points against the control mask."
        ),
        figures=[
            Matrix(
                title="Images of the left-out class: change of the share that is taken for each class",
                row_label="left-out class",
                column_label="answered",
                rows=classes,
                columns=classes,
                values=taken_for,
                diverging=True,
            ),
            Matrix(
                title="Images of each class: change of the share that is recognised",
                row_label="left-out class",
                column_label="class of the image",
                rows=classes,
                columns=classes,
                values=right,
                diverging=True,
            ),
        ],
        numbers={"taken_for_left_out_class": wrongly, "largest_new_confusion": share},
    )


def removed(asked: Asked, classes: Sequence[str]) -> Answer:
    """Which share of the control mask's weights does leaving a class out remove?"""
    control = asked.masks[_CONTROL]
    again = 1 - control.shared(asked.masks[repeat_of(_CONTROL)])
    whole_network = {name: 1 - control.shared(asked.masks[_without(name)]) for name in classes}
    layers = layers_of(control)
    per_layer = {name: _removed_per_layer(control, asked.masks[_without(name)], layers) for name in classes}
    repeat = _removed_per_layer(control, asked.masks[repeat_of(_CONTROL)], layers)
    average = mean(whole_network.values())
    return Answer(
        title="Which share of the control mask's weights does leaving a class out remove?",
        sentence=(
            f"Without a class, {percent(average)} of the weights that the control mask keeps are removed on average"
            f" (from {percent(min(whole_network.values()))} to {percent(max(whole_network.values()))}); a second"
            f" control mask with another seed lacks {percent(again)} of them."
        ),
        figures=[
            Bars(
                title="Weights of the control mask that are removed. Chance: those a second control mask lacks.",
                label="share of the control's weights",
                groups=classes,
                series=[
                    Series(
                        name="mask trained without the class",
                        values=list(whole_network.values()),
                        chance=[again] * len(classes),
                    )
                ],
            ),
            Matrix(
                title="The same for each layer; the last row is the second control mask",
                row_label="left-out class",
                column_label="layer",
                rows=[*classes, "none (second control)"],
                columns=list(layers),
                values=[*([per_layer[name][layer] for layer in layers] for name in classes), list(repeat.values())],
            ),
        ],
        numbers={
            "removed": average,
            "removed_by_second_control": again,
            **{f"removed_without_{name}": value for name, value in whole_network.items()},
        },
    )


def _removed_per_layer(control: Mask, other: Mask, layers: Mapping[str, Sequence[str]]) -> dict[str, float | None]:
    kept, both = control.kept_counts(), (control & other).kept_counts()
    shares: dict[str, float | None] = {}
    for layer, tensors in layers.items():
        count = sum(kept[name] for name in tensors)
        shares[layer] = 1 - sum(both[name] for name in tensors) / count if count else None
    return shares
