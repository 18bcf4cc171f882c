"""Images: the files of CIFAR-10 and MNIST written byte by byte, the digits, and the networks."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sublens.errors import FileError
from sublens.studies.image_files import load_images
from sublens.studies.image_networks import ConvNet, ResNet

Writer = Callable[..., Any]


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar_is_read_as_it_was_written(write_cifar: Writer, tmp_path: Path, inside: str) -> None:
    written = write_cifar(tmp_path / inside)
    images = load_images(tmp_path)
    assert (images.source, images.shape) == ("cifar10", (3, 32, 32))
    assert images.classes == tuple(
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    )
    train = [written[f"data_batch_{part}.bin"] for part in range(1, 6)]
    assert images.train.labels.tolist() == [label for labels, _ in train for label in labels]
    assert np.array_equal(images.train.pixels.numpy(), np.concatenate([pixels for _, pixels in train]))
    assert images.test.labels.tolist() == written["test_batch.bin"][0]
    assert np.array_equal(images.test.pixels.numpy(), written["test_batch.bin"][1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inside", ["", "MNIST/raw"])
def test_mnist_is_read_as_it_was_written(write_mnist: Writer, tmp_path: Path, packed: bool, inside: str) -> None:
    written = write_mnist(tmp_path / inside, packed=packed)
    images = load_images(str(tmp_path))
    assert (images.source, images.shape, len(images.classes)) == ("mnist", (1, 28, 28), 10)
    for part, prefix in ((images.train, "train"), (images.test, "t10k")):
        assert np.array_equal(part.pixels[:, 0].numpy(), written[f"{prefix}-images-idx3-ubyte"])
        assert np.array_equal(part.labels.numpy(), written[f"{prefix}-labels-idx1-ubyte"])


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Mine:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return open, (str(tmp_path / "opened"), "w")  # type: ignore[return-value]

    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps(Mine()))
    with pytest.raises(FileError, match=r"Python version of CIFAR-10.*pickles.*cifar-10-binary\.tar\.gz"):
        load_images(tmp_path)
    assert not (tmp_path / "opened").exists()


def test_folders_without_images_say_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"does not exist\. Name one that holds CIFAR-10"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="is not a folder"):
        load_images(tmp_path / "file")
    with pytest.raises(FileError, match="holds no images that sublens knows"):
        load_images(tmp_path)
    (tmp_path / "cifar-10-binary.tar.gz").touch()
    with pytest.raises(FileError, match=r"Unpack cifar-10-binary\.tar\.gz first"):
        load_images(tmp_path)


def test_damaged_cifar_is_refused(write_cifar: Writer, tmp_path: Path) -> None:
    write_cifar(tmp_path / "missing")
    (tmp_path / "missing" / "data_batch_3.bin").unlink()
    (tmp_path / "missing" / "test_batch.bin").unlink()
    with pytest.raises(FileError, match=r"lacks data_batch_3\.bin, test_batch\.bin"):
        load_images(tmp_path / "missing")
    for name, content, message in (
        ("short", b"\0" * 3072, "3,072 bytes, which is not a whole number"),
        ("empty", b"", "0 bytes, which is not"),
        ("label", b"\x0a" + b"\0" * 3072, "has the label 10"),
    ):
        write_cifar(tmp_path / name)
        (tmp_path / name / "data_batch_2.bin").write_bytes(content)
        with pytest.raises(FileError, match=message):
            load_images(tmp_path / name)


def test_damaged_mnist_is_refused(write_mnist: Writer, idx: Callable[[np.ndarray], bytes], tmp_path: Path) -> None:
    whole = idx(np.zeros((30, 28, 28), np.uint8))
    labels = idx((np.arange(30) % 10).astype(np.uint8))
    for number, (name, content, message) in enumerate(
        (
            ("train-images-idx3-ubyte", whole[:-1], "should hold 30 x 28 x 28 bytes .* holds 23,519"),
            ("train-images-idx3-ubyte", whole + b"\0", "23,521"),
            ("train-images-idx3-ubyte", whole[:9], "truncated"),
            ("train-images-idx3-ubyte", labels, "not an idx file of bytes in 3 dimensions: it begins with 00 00 08 01"),
            ("train-images-idx3-ubyte", b"", "begins with nothing"),
            ("train-labels-idx1-ubyte", labels[:-1] + b"\x0b", "has the label 11"),
            ("train-labels-idx1-ubyte", idx(np.zeros(29, np.uint8)), "30 train images and 29 labels"),
            ("t10k-images-idx3-ubyte", idx(np.zeros((20, 27, 28), np.uint8)), "another size"),
        )
    ):
        folder = tmp_path / str(number)
        write_mnist(folder)
        (folder / name).write_bytes(content)
        with pytest.raises(FileError, match=message):
            load_images(folder)
    write_mnist(tmp_path / "gz", packed=True)
    packed = tmp_path / "gz" / "train-labels-idx1-ubyte.gz"
    for content in (packed.read_bytes()[:-9], b"not gzip at all"):
        packed.write_bytes(content)
        with pytest.raises(FileError, match="cannot be unpacked"):
            load_images(tmp_path / "gz")
    packed.unlink()
    with pytest.raises(FileError, match=r"lacks train-labels-idx1-ubyte \(also with \.gz\)"):
        load_images(tmp_path / "gz")


def test_the_digits_are_split_once_and_evenly() -> None:
    images = load_images(None)
    assert (images.source, images.shape) == ("digits", (1, 8, 8))
    assert (len(images.train.labels), len(images.test.labels)) == (1198, 599)
    assert images.train.pixels.max() == 16
    counts = images.test.labels.bincount()
    assert len(counts) == 10
    assert counts.min() >= 57
    both = torch.cat([images.train.pixels, images.test.pixels]).flatten(1)
    assert len(both.unique(dim=0)) == 1797  # no image is in both parts
    assert images.described["sha256"] == load_images(None).described["sha256"]


def test_pixels_are_standardised_by_the_training_images(write_cifar: Writer, tmp_path: Path) -> None:
    write_cifar(tmp_path)
    images = load_images(tmp_path)
    standard = images.standard(images.train.pixels)
    torch.testing.assert_close(standard.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    raw = images.train.pixels[:, 1].double()
    expected = (images.test.pixels[:, 1].double() - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(images.standard(images.test.pixels)[:, 1].double(), expected, atol=1e-5, rtol=0)
    assert images.described["sha256"] != load_images(None).described["sha256"]


def sizes(network: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in network.parameters()]


def test_the_conv_net_is_the_papers() -> None:
    network = ConvNet((3, 32, 32), 10, dropout=True)
    assert sizes(network)[::2] == [(32, 3, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3), (10, 256)]
    # 3*32*9 + 32, 32*64*9 + 64, 64*128*9 + 128, 128*256*9 + 256, 256*10 + 10
    assert sum(parameter.numel() for parameter in network.parameters()) == 896 + 18_496 + 73_856 + 295_168 + 2_570
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == [0.25, 0.5]
    assert not any(isinstance(module, nn.Dropout) for module in ConvNet((3, 32, 32), 10, dropout=False).modules())
    last: list[Tensor] = []
    for shape, pools, side in (((3, 32, 32), 3, 4), ((1, 28, 28), 3, 3), ((1, 8, 8), 1, 4)):
        network = ConvNet(shape, 10, dropout=True).eval()
        network.features.register_forward_hook(lambda *call: last.append(call[2]))
        x = torch.randn(2, *shape)
        out = network(x)
        assert sum(isinstance(module, nn.MaxPool2d) for module in network.modules()) == pools
        assert last[-1].shape == (2, 256, side, side)
        torch.testing.assert_close(out, network.output(last[-1].mean((2, 3))))


def test_resnet_110_has_its_size_and_shapes() -> None:
    network = ResNet((3, 32, 32), 10)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    wide = [module for module in convolutions if module.kernel_size == (3, 3)]
    assert len(wide) == 109  # and the linear layer makes 110
    assert [sum(module.out_channels == count for module in wide) for count in (16, 32, 64)] == [37, 36, 36]
    # 3x3 convolutions, two 1x1 ones, norms (two numbers a channel), linear layer
    by_hand = (
        (3 * 16 + 36 * 16 * 16 + 16 * 32 + 35 * 32 * 32 + 32 * 64 + 35 * 64 * 64) * 9
        + 16 * 32
        + 32 * 64
        + 2 * (37 * 16 + 37 * 32 + 37 * 64)
        + 64 * 10
        + 10
    )
    assert sum(parameter.numel() for parameter in network.parameters()) == by_hand == 1_730_714
    small_one = ResNet((3, 32, 32), 10, depth=8).eval()
    seen: list[tuple[int, ...]] = []
    for stage in small_one.stages:
        stage.register_forward_hook(lambda *call: seen.append(tuple(call[2].shape)))
    assert small_one(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert seen == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    with pytest.raises(ValueError, match="depth=9 must be 6 n"):
        ResNet((3, 32, 32), 10, depth=9)
