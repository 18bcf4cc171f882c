"""The studies on images: tasks, settings against the paper, and answers against masks whose answers are known."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sublens import studies
from sublens.answers import Answer, Bars, Lines, Matrix, Spread
from sublens.errors import FileError, StudyError
from sublens.inspection import inspect
from sublens.mask import Mask, fingerprint
from sublens.studies import class_removal, gradient_cosine, mask_stability, permuted_digits
from sublens.studies.image_files import Images, Part, load_images
from sublens.studies.image_networks import ConvNet, ResNet
from sublens.studies.images import _augmented, confusion, image_task, loss
from sublens.study import Asked, Study, Together, seed_from

NAMES = ("class-removal", "class-removal-resnet", "mask-stability", "gradient-cosine", "permuted-digits")


def settings_of(study: Study) -> tuple[Any, ...]:
    assert study.samples in (4, 8)
    assert (study.biases, study.penalty, study.mask_clip, study.network_clip) == (True, "logits", 1.0, 1.0)
    assert torch.logit(torch.tensor(study.keep)).item() == pytest.approx(2.0)
    return study.network_steps, study.network_lr, study.mask_steps, study.mask_lr, study.alpha, study.batch_size


def small(count: int = 40) -> Images:
    """Each image's only pixel value is its number, and its class the number's last digit."""
    numbers = torch.arange(count)
    part = Part(pixels=numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 5), labels=numbers % 10)
    return Images(source="digits", classes=tuple("0123456789"), train=part, test=part)


def test_a_task_draws_and_measures_its_own_classes_only() -> None:
    images = small()
    task = image_task("some", images, (2, 5), 64)
    inputs, labels = task.batches_for(3)(7)
    assert inputs.shape == (64, 1, 4, 5)
    assert set(labels.tolist()) == {2, 5}
    numbers = (inputs[:, 0, 0, 0] * images._spread[1].item() + images._spread[0].item()).round().long()
    assert torch.equal(numbers % 10, labels)
    assert torch.equal(inputs, task.batches_for(3)(7)[0])
    assert not torch.equal(labels, task.batches_for(3)(8)[1])
    assert not torch.equal(labels, task.batches_for(4)(7)[1])


class Answers(nn.Module):
    """Answers the class of each image of :func:`small`, plus ``shift``."""

    def __init__(self, images: Images, shift: int = 0) -> None:
        super().__init__()
        self.images, self.shift = images, shift

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.images._spread
        number = (x * deviation + mean)[:, 0, 0, 0].round().long()
        return 20.0 * nn.functional.one_hot((number + self.shift) % 10, 10)


def test_accuracy_and_confusion_are_counted_right() -> None:
    images = small()
    task = image_task("some", images, (2, 5), 8)
    assert task.metric(Answers(images)) == 1.0
    assert task.metric(Answers(images, 1)) == 0.0
    assert task.loss(Answers(images), task.batches_for(0)(0)).item() == pytest.approx(0, abs=1e-6)
    table = confusion(images)(Answers(images, 3))
    assert table["2"] == {str(name): float(name == 5) for name in range(10)}
    assert table["9"]["2"] == 1.0


def test_the_loss_is_cross_entropy_over_all_classes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(20, 10))
    inputs, labels = image_task("some", small(), (2, 5), 8).batches_for(0)(0)
    out = torch.log_softmax(net(inputs), 1)
    assert loss(net, (inputs, labels)).item() == pytest.approx(-sum(out[i, labels[i]].item() for i in range(8)) / 8)


def test_augmented_images_are_shifted_and_mirrored_whole() -> None:
    image = torch.arange(1.0, 81.0).view(1, 1, 8, 10).expand(300, 2, -1, -1)
    made = _augmented(image, torch.Generator().manual_seed(0))
    assert made.shape == image.shape
    padded = nn.functional.pad(image[0, 0], (4, 4, 4, 4))
    possible = {}
    for down in range(9):
        for right in range(9):
            window = padded[down : down + 8, right : right + 10]
            possible[tuple(window.flatten().tolist())] = (down, right, False)
            possible[tuple(window.flip(1).flatten().tolist())] = (down, right, True)
    seen = [possible[tuple(one[0].flatten().tolist())] for one in made]
    assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == set(range(9))
    assert {flipped for _, _, flipped in seen} == {False, True}
    assert torch.equal(made[:, 0], made[:, 1])  # all channels alike
    again = _augmented(image, torch.Generator().manual_seed(0))
    assert torch.equal(made, again)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory, write_cifar: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    write_cifar(folder)
    return folder


@pytest.mark.parametrize("name", ["class-removal", "mask-stability", "gradient-cosine"])
def test_the_paper_preset_of_the_convolutional_studies_is_the_papers(name: str, cifar: Path) -> None:
    study = studies.load(name, preset="paper", folder=str(cifar))
    assert settings_of(study) == (20_000, 1e-3, 20_000, 1e-3, 3e-4, 128)
    network = study.network(0)
    assert isinstance(network, ConvNet)
    assert [tuple(p.shape) for p in network.parameters()] == [
        tuple(p.shape) for p in ConvNet((3, 32, 32), 10, dropout=False).parameters()
    ]
    dropout = any(isinstance(module, nn.Dropout) for module in network.modules())
    assert dropout == (name != "mask-stability")
    images = study.settings["images"]
    assert (images["source"], images["train"], images["test"]) == ("cifar10", 100, 20)
    others = {"class-removal": 10, "mask-stability": 10, "gradient-cosine": 1}
    assert len(study.tasks) == others[name]


def test_class_removal_leaves_each_class_out_once(cifar: Path) -> None:
    study = studies.load("class-removal", folder=str(cifar), dropout=False)
    assert [task.name for task in study.tasks][:2] == ["without-airplane", "without-automobile"]
    for left_out, task in enumerate(study.tasks):
        assert set(task.batches_for(0)(0)[1].tolist()) == set(range(10)) - {left_out}
    assert set(study.control.batches_for(0)(0)[1].tolist()) == set(range(10))
    assert tuple(study.from_control) == ("output",)
    assert not any(isinstance(module, nn.Dropout) for module in study.network(0).modules())


def test_the_paper_preset_of_the_residual_study_is_the_papers(cifar: Path) -> None:
    study = studies.load("class-removal-resnet", preset="paper", folder=str(cifar))
    assert settings_of(study) == (64_000, 0.1, 30_000, 3e-2, 2e-5, 256)
    assert (study.network_optimizer, study.network_decay) == ("sgd", 1e-4)
    assert tuple(study.network_milestones) == (32_000, 48_000)
    network = study.network(0)
    assert isinstance(network, ResNet)
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_730_714
    inputs, _ = study.control.batches_for(0)(0)
    assert (inputs == 0).flatten(1).any(1).float().mean() > 0.9  # shifted images have edges of padding
    digits = studies.load("class-removal-resnet", preset="paper")
    assert digits.control.batches_for(0)(0)[0].shape == (256, 1, 8, 8)


def test_the_paper_preset_of_permuted_digits_is_the_papers(tmp_path: Path, write_mnist: Callable[..., Any]) -> None:
    write_mnist(tmp_path)
    study = studies.load("permuted-digits", preset="paper", folder=str(tmp_path), new_logit=-1, other=False)
    assert settings_of(study)[2:] == (30_000, 1e-2, 1.28e-3, 128)
    assert (study.network_lr, study.samples) == (1e-2, 8)
    assert study.together == Together(used=2.0, new=-1, fresh=("1",))
    shapes = [tuple(value.shape) for value in study.network(0).parameters() if value.dim() > 1]
    assert shapes == [(800, 784), (800, 800), (64, 800), (10, 64)]
    tasks = (study.control, *study.tasks)
    assert len(tasks) == 11
    plain = study.control.batches_for(3)(5)
    for number, task in enumerate(tasks[1:], 1):
        inputs, labels = task.batches_for(3)(5)
        assert torch.equal(labels, plain[1])
        assert inputs.shape == plain[0].shape == (128, 1, 28, 28)
        assert not torch.equal(inputs, plain[0])
        order = torch.randperm(784, generator=torch.Generator().manual_seed(seed_from("permuted-digits", number)))
        assert torch.equal(inputs.flatten(1), plain[0].flatten(1)[:, order])


def test_the_other_function_of_permuted_digits_is_how_bright_an_image_is() -> None:
    images = load_images(None)
    study = studies.load("permuted-digits")
    assert [task.name for task in study.tasks][-2:] == ["permutation-5", "brightness"]
    sorted_by = permuted_digits.by_brightness(images)
    for part, labelled in ((images.train, sorted_by.train), (images.test, sorted_by.test)):
        brightness = part.pixels.double().mean((1, 2, 3))
        order = brightness.argsort()
        # Brighter images have labels as high or higher, and no class is rare.
        assert bool((labelled.labels[order].diff() >= 0).all())
        assert int(labelled.labels.bincount(minlength=10).min()) > len(order) / 20
    # Batches are of the same images, with other labels, in another order of pixels.
    inputs, labels = study.tasks[-1].batches_for(3)(5)
    plain = study.control.batches_for(3)(5)
    assert torch.equal(inputs.flatten(1).sort().values, plain[0].flatten(1).sort().values)
    assert not torch.equal(inputs, plain[0])
    assert not torch.equal(labels, plain[1])


def test_mask_stability_draws_pairs_and_trains_two_masks_for_each() -> None:
    study = studies.load("mask-stability", pairs=45)
    pairs = [tuple(task.name.split("-")) for task in study.tasks]
    assert len(set(pairs)) == 45
    assert all(first != second for first, second in pairs)
    assert list(study.repeated) == [task.name for task in study.tasks]
    for task, pair in zip(study.tasks[:3], pairs, strict=False):
        assert {str(label) for label in task.batches_for(0)(0)[1].tolist()} == set(pair)
    assert [task.name for task in studies.load("mask-stability").tasks] == ["-".join(pair) for pair in pairs[:3]]


@pytest.mark.parametrize("name", NAMES)
def test_impossible_settings_and_folders_are_one_clear_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="No preset 'slow'; the presets are paper, quick"):
        studies.load(name, preset="slow")
    with pytest.raises(FileError, match="holds no images that sublens knows"):
        studies.load(name, folder=str(tmp_path))
    wrong: dict[str, list[dict[str, Any]]] = {
        "class-removal": [{"width": 0}, {"width": 1.5}, {"dropout": 1}],
        "class-removal-resnet": [{"depth": 9}, {"depth": 2}],
        "mask-stability": [{"pairs": 0}, {"pairs": 46}],
        "gradient-cosine": [{"width": True}, {"dropout": "no"}],
        "permuted-digits": [{"permutations": 1}, {"widths": ()}, {"widths": (0,)}, {"new_logit": 11}, {"other": 1}],
    }
    for settings in wrong[name]:
        (setting,) = settings
        with pytest.raises(StudyError, match=setting.removesuffix("_logit")):
            studies.load(name, **settings)


class Reader(nn.Module):
    """Reads the class off an image of ``small()``; its output layer, the identity, hands it on."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(10, 10, bias=False)
        with torch.no_grad():
            self.output.weight.copy_(torch.eye(10))

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = small()._spread
        number = (x * deviation + mean)[:, 0, 0, 0].round().long()
        answer: Tensor = self.output(nn.functional.one_hot(number % 10, 10).float())
        return answer


def asked_of(network: nn.Module, masks: dict[str, Mask], study: Study) -> Asked:
    return Asked(network=network, masks=masks, metrics={}, study=study, seed=0)


def without(network: nn.Module, *classes: int) -> Mask:
    kept = torch.eye(10, dtype=torch.bool)
    kept[list(classes)] = False
    return Mask({"output.weight": kept}, fingerprint(network))


def test_class_removal_counts_what_is_lost_confused_and_removed() -> None:
    network, images = Reader(), small()
    masks = {"all": without(network), "all-repeat": without(network, 1, 2)}
    masks |= {f"without-{number}": without(network, number) for number in range(10)}
    study = class_removal._study(
        "class-removal", "", images, batch_size=8, settings={}, network=lambda seed: Reader(), preset="quick"
    )
    asked = asked_of(network, masks, study)
    lost = class_removal.lost(asked, images.classes)
    # All outputs of a removed class are 0, and the first of equal outputs wins: class 0 is recognised all the same.
    assert lost.numbers is not None
    assert lost.numbers["accuracy_lost_on_left_out_class"] == pytest.approx(0.9)
    assert lost.numbers["accuracy_left_on_left_out_class"] == pytest.approx(0.1)
    assert lost.numbers["accuracy_change_on_other_classes"] == 0
    assert lost.numbers["accuracy_lost_on_3"] == 1
    bars = lost.figures[0]
    assert isinstance(bars, Bars)
    assert bars.series[0].values == (1.0,) * 10
    assert bars.series[1].values == (1.0, *(0.0,) * 9)
    assert bars.series[1].chance == (Spread(1.0, 1.0, 1.0),) * 10
    confused = class_removal.confused(asked, images.classes)
    taken_for, right = confused.figures
    assert isinstance(taken_for, Matrix)
    assert isinstance(right, Matrix)
    expected = torch.zeros(10, 10)
    expected[1:, 0] = 1
    expected -= torch.eye(10)
    expected[0] = 0
    assert torch.equal(torch.tensor(taken_for.values, dtype=torch.float32), expected)
    assert torch.equal(torch.tensor(right.values, dtype=torch.float32), -torch.eye(10) * (torch.arange(10) > 0))
    assert "taken for 0 (+100.0 points" in confused.sentence
    removed = class_removal.removed(asked, images.classes)
    assert removed.numbers is not None
    assert removed.numbers["removed"] == pytest.approx(0.1)
    assert removed.numbers["removed_by_second_control"] == pytest.approx(0.2)
    layers = removed.figures[1]
    assert isinstance(layers, Matrix)
    assert layers.columns == ("output",)
    assert [row[0] for row in layers.values] == pytest.approx([0.1] * 10 + [0.2])


def test_stability_compares_the_same_pair_and_different_ones() -> None:
    network = Reader()
    # 10 kept by both of the first, 8 and 9 of 10 by the second's two masks.
    masks = {"a": without(network), "a-repeat": without(network), "b": without(network, 0, 1)}
    masks["b-repeat"] = without(network, 1)
    study = studies.load("mask-stability", pairs=1)
    answer = mask_stability.stability(asked_of(network, masks, study), ["a", "b"])
    assert answer.numbers is not None
    assert answer.numbers["iou_same_pair"] == pytest.approx((1 + 8 / 9) / 2)
    assert answer.numbers["iou_different_pairs"] == pytest.approx((9 / 10 + 8 / 10) / 2)
    # Two random sets of 10 out of 100 share 1 on average, which is 1 of 19.
    bars = answer.figures[0]
    assert isinstance(bars, Bars)
    chance = bars.series[0].chance[0]
    assert isinstance(chance, Spread)
    assert chance.low <= 1 / 19 <= chance.high
    assert chance.mean == pytest.approx(0.0535, abs=0.003)
    alone = mask_stability.stability(asked_of(network, masks, study), ["a"])
    assert alone.numbers is not None
    assert (alone.numbers["iou_different_pairs"], alone.numbers["iou_same_pair_sd"]) == (None, None)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 10))


def test_gradients_are_those_of_the_mean_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = two_layers(), small()
    rows = torch.tensor([1, 4, 5, 11, 12, 30, 31])
    monkeypatch.setattr(gradient_cosine, "_AT_A_TIME", 3)
    with torch.no_grad():
        found = gradient_cosine.gradients(network, images, rows)
    loss(network, (images.standard(images.test.pixels[rows]), images.test.labels[rows])).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_the_cosine_is_over_kept_weights_of_the_named_parameters() -> None:
    mask = Mask({"w": torch.tensor([True, True, False]), "b": torch.tensor([True])}, "network")
    first = {"w": torch.tensor([3.0, 4.0, 100.0]), "b": torch.tensor([7.0])}
    second = {"w": torch.tensor([4.0, 3.0, -9.0]), "b": torch.tensor([0.0])}
    assert gradient_cosine.similarity(first, second, mask, ["w"]) == pytest.approx(24 / 25)
    assert gradient_cosine.similarity(first, second, mask, ["w", "b"]) == pytest.approx(24 / (74**0.5 * 5))
    assert gradient_cosine.similarity(first, second, mask, ["b"]) is None


def test_the_cosine_is_1_without_a_mask_and_falls_layer_by_layer() -> None:
    network, images = two_layers(), small()
    full = Mask.full(network, biases=True)
    half = Mask.random_like(Mask({name: torch.rand(full[name].shape) < 0.5 for name in full}, full.network), seed=3)
    study = Study(
        name="cosine",
        network=lambda seed: two_layers(),
        tasks=[image_task("some", images, range(1, 10), 8)],
        control=image_task("all", images, range(10), 8),
        batch_size=8,
        biases=True,
        random_masks=2,
    )

    def lines(masks: dict[str, Mask]) -> tuple[Lines, Answer]:
        answer = gradient_cosine.cosine(asked_of(network, masks, study), "some", images)
        (figure,) = answer.figures
        assert isinstance(figure, Lines)
        return figure, answer

    figure, _ = lines({"all": full, "some": full})
    assert figure.x == ("none", "3", "+ 1")
    for series in figure.series:
        assert series.values == pytest.approx([1, 1, 1])
    figure, answer = lines({"all": full, "some": half})
    values = figure.series[0].values
    assert values[0] == pytest.approx(1)
    # By hand: everything masked, both gradients on the kept weights alone.
    batch = images.standard(images.test.pixels), images.test.labels
    plain = torch.autograd.grad(loss(network, batch), list(network.parameters()))
    pruned = half.apply(network)
    masked = torch.autograd.grad(loss(pruned, batch), list(pruned.parameters()))
    a, b = (torch.cat([g[half[name]] for name, g in zip(half, each, strict=True)]) for each in (plain, masked))
    assert values[2] == pytest.approx(torch.cosine_similarity(a, b, 0).item(), abs=1e-5)
    assert answer.numbers is not None
    assert answer.numbers["cosine"] == values[2]
    assert isinstance(figure.series[0].chance[2], Spread)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_reuse_is_the_share_of_a_mask_that_earlier_ones_keep() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 5, bias=False))

    def mask(*kept: int) -> Mask:
        last = torch.zeros(10, dtype=torch.bool)
        last[list(kept)] = True
        layers = {"1.weight": torch.ones(2, 2).bool(), "1.bias": torch.ones(2).bool(), "3.weight": last.view(5, 2)}
        return Mask(layers, "network")

    masks = {"original": mask(0, 1, 2), "permutation-1": mask(2, 3), "permutation-2": mask(0, 3, 4, 5)}
    study = dataclasses.replace(
        studies.load("permuted-digits", permutations=3, other=False), network=lambda seed: network
    )
    answer = permuted_digits.reuse(asked_of(network, masks, study))
    (lines,) = answer.figures
    assert isinstance(lines, Lines)
    assert lines.x == ("permutation-1", "permutation-2")
    layer, whole = lines.series
    assert layer.values == whole.values == (1 / 2, 2 / 4)  # {2} of {0, 1, 2}; {0, 3} of {0, 1, 2, 3}
    chance = [spread for spread in layer.chance if isinstance(spread, Spread)]
    assert [spread.mean for spread in chance] == pytest.approx([0.3, 0.4])  # 3 and 4 of 10 are used
    assert answer.numbers is not None
    assert answer.numbers["used_in_the_end"] == pytest.approx(0.6)
    empty = permuted_digits.reuse(asked_of(network, {**masks, "permutation-2": mask()}, study))
    assert empty.numbers is not None
    assert empty.numbers["reused"] is None
    assert empty.numbers["reused_by_another_function"] is None
    # A task of another function is compared with the last permutation, and is none of them.
    study = dataclasses.replace(studies.load("permuted-digits", permutations=3), network=lambda seed: network)
    masks["brightness"] = mask(1, 7, 8, 9)
    compared = permuted_digits.reuse(asked_of(network, masks, study))
    assert compared.numbers == {**answer.numbers, "reused_by_another_function": 1 / 4}
    assert "it is 25.0\xa0% (random masks 60.0\xa0%), no more than by chance" in compared.sentence
    like_it = permuted_digits.reuse(asked_of(network, {**masks, "brightness": mask(0, 1, 2, 3, 4, 5)}, study))
    assert "it is 100.0\xa0% (random masks 60.0\xa0%): of what a permutation uses again, that much" in like_it.sentence
    nothing = permuted_digits.reuse(asked_of(network, {**masks, "brightness": mask()}, study))
    assert "keeps nothing to compare" in nothing.sentence


QUICK: dict[str, dict[str, Any]] = {
    "class-removal": {"width": 1},
    "class-removal-resnet": {"depth": 8},
    "mask-stability": {"width": 1, "pairs": 2},
    "gradient-cosine": {"width": 2},
    "permuted-digits": {"permutations": 3, "widths": (12, 8)},
}


@pytest.mark.parametrize("name", NAMES)
def test_each_study_runs_to_its_answers(name: str, tmp_path: Path, write_mnist: Callable[..., Any]) -> None:
    write_mnist(tmp_path / "images", side=8)
    study = studies.load(name, folder=str(tmp_path / "images"), **QUICK[name])
    study = dataclasses.replace(study, network_steps=min(study.network_steps, 2), mask_steps=2, random_masks=1)
    result = inspect(study, out=tmp_path / "run", progress=False, report=False)
    answers = {key: Answer.from_json(value) for key, value in result["answers"].items()}
    assert list(answers) == list(study.questions)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    if name == "permuted-digits":
        assert answers["accuracy"].numbers is not None
        assert answers["accuracy"].numbers["accuracy"] == answers["accuracy"].numbers["accuracy_in_the_end"]
