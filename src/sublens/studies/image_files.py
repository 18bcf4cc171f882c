"""Images to train on: scikit-learn's handwritten digits, or CIFAR-10 or MNIST from a folder. Nothing is downloaded.

Shapes: N images, C channels, H rows, W columns.
"""

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sublens.errors import FileError

_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_TRAIN = tuple(f"data_batch_{part}.bin" for part in range(1, 6))
_CIFAR_TEST = "test_batch.bin"
_CIFAR_SHAPE = (3, 32, 32)
_DIGITS = tuple(str(digit) for digit in range(10))
_DIGITS_TEST = 599  # a third
_MNIST = {
    "train images": "train-images-idx3-ubyte",
    "train labels": "train-labels-idx1-ubyte",
    "test images": "t10k-images-idx3-ubyte",
    "test labels": "t10k-labels-idx1-ubyte",
}
_UNSIGNED_BYTES = 0x08  # the type code of an idx file
_WANTED = "CIFAR-10 in its binary version (data_batch_1.bin, ...) or MNIST (train-images-idx3-ubyte, ..., also .gz)"


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """Labelled images, as they are stored.

    Attributes:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N], numbers of classes.
    """

    pixels: Tensor
    labels: Tensor

    def of(self, classes: tuple[int, ...]) -> Tensor:
        """Return the numbers (int64) of the images of some classes."""
        return torch.isin(self.labels, torch.tensor(classes)).nonzero().flatten()


@dataclass(frozen=True, eq=False, kw_only=True)
class Images:
    """A data set.

    Attributes:
        source: ``"digits"``, ``"cifar10"`` or ``"mnist"``.
        classes: name of each class; a name is good for a task's name too.
        train: what networks and masks are trained on.
        test: what they are measured on.
        order: int64 [C * H * W], where each pixel that a network sees is taken from; ``None`` leaves them in place.
    """

    source: str
    classes: tuple[str, ...]
    train: Part
    test: Part
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H and W."""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width

    @cached_property
    def _spread(self) -> tuple[Tensor, Tensor]:
        counts = torch.stack([plane.flatten().bincount(minlength=256) for plane in self.train.pixels.transpose(0, 1)])
        values = torch.arange(256, dtype=torch.float64)
        shares = counts.double() / counts.sum(1, keepdim=True)
        mean = (shares * values).sum(1)
        deviation = ((shares * values**2).sum(1) - mean**2).clamp_min(1e-12).sqrt()
        return mean.float().view(-1, 1, 1), deviation.float().view(-1, 1, 1)

    def standard(self, pixels: Tensor) -> Tensor:
        """Return pixels (uint8 [N, C, H, W]) as a network sees them.

        That is float32, less the mean of the channel over all training images, over its deviation, and in ``order``.
        """
        mean, deviation = self._spread
        seen = (pixels.float() - mean) / deviation
        return seen if self.order is None else seen.flatten(1)[:, self.order].view_as(seen)

    @cached_property
    def described(self) -> dict[str, object]:
        """JSON values that tell this data set from any other."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(part.pixels.contiguous().numpy().tobytes())
            digest.update(part.labels.numpy().tobytes())
        return {
            "source": self.source,
            "train": len(self.train.labels),
            "test": len(self.test.labels),
            "sha256": digest.hexdigest(),
        }


def load_images(folder: str | Path | None) -> Images:
    """Return the images of a folder, or scikit-learn's handwritten digits (8x8) if there is none.

    Args:
        folder: one that holds CIFAR-10 in its binary version or MNIST (or another set in MNIST's files, such as
            Fashion-MNIST), itself or in the subfolder that the archive or torchvision makes.

    Raises:
        FileError: it holds neither, files are missing, or a file is not what its name says.
    """
    return _digits() if folder is None else _from_folder(Path(folder).expanduser().resolve())


@cache
def _digits() -> Images:
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split

    found = load_digits()
    # The same split for every seed of a run: seeds vary the training, not the question.
    train, test = train_test_split(
        np.arange(len(found.target)), test_size=_DIGITS_TEST, random_state=0, stratify=found.target
    )
    pixels = torch.from_numpy(found.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(found.target).long()
    parts = [Part(pixels=pixels[rows], labels=labels[rows]) for rows in (train, test)]
    return Images(source="digits", classes=_DIGITS, train=parts[0], test=parts[1])


@cache
def _from_folder(folder: Path) -> Images:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise FileError(f"The folder of images {folder} {what}. Name one that holds {_WANTED}.")
    for place in (folder, folder / "cifar-10-batches-bin"):
        if any((place / name).exists() for name in (*_CIFAR_TRAIN, _CIFAR_TEST)):
            return _cifar10(place)
    for place in (folder, folder / "MNIST" / "raw", folder / "raw"):
        if any(_mnist_file(place, name) for name in _MNIST.values()):
            return _mnist(place)
    for place in (folder, folder / "cifar-10-batches-py"):
        if (place / "data_batch_1").exists():
            raise FileError(
                f"{place} holds the Python version of CIFAR-10. Its files are pickles, and opening a pickle can run any"
                " code that is in it, so sublens never does. Get the binary version (cifar-10-binary.tar.gz), unpack"
                " it, and name that folder."
            )
    packed = next(iter(sorted(folder.glob("*.tar.gz"))), None)
    hint = f" Unpack {packed.name} first." if packed else f" Name a folder that holds {_WANTED}."
    raise FileError(f"The folder {folder} holds no images that sublens knows.{hint}")


def _cifar10(folder: Path) -> Images:
    missing = [name for name in (*_CIFAR_TRAIN, _CIFAR_TEST) if not (folder / name).is_file()]
    if missing:
        raise FileError(f"The folder {folder} holds CIFAR-10 but lacks {', '.join(missing)}. Unpack the archive again.")
    blocks = [_cifar_block(folder / name) for name in _CIFAR_TRAIN]
    train = Part(
        pixels=torch.cat([block.pixels for block in blocks]), labels=torch.cat([block.labels for block in blocks])
    )
    return Images(source="cifar10", classes=_CIFAR_CLASSES, train=train, test=_cifar_block(folder / _CIFAR_TEST))


def _cifar_block(path: Path) -> Part:
    """Read records of one byte of label, then 1024 bytes each of red, green and blue, row by row."""
    size = 1 + math.prod(_CIFAR_SHAPE)
    content = _read(path)
    if not content or len(content) % size:
        raise FileError(
            f"{path} has {len(content):,} bytes, which is not a whole number of images of {size:,} bytes each: the file"
            " is truncated, or no part of the binary version of CIFAR-10. Unpack the archive again."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    _check_labels(path, labels)
    return Part(pixels=torch.from_numpy(records[:, 1:].reshape(-1, *_CIFAR_SHAPE).copy()), labels=labels)


def _mnist(folder: Path) -> Images:
    found = {what: _mnist_file(folder, name) for what, name in _MNIST.items()}
    files = {what: path for what, path in found.items() if path is not None}
    missing = [name for what, name in _MNIST.items() if what not in files]
    if missing:
        raise FileError(
            f"The folder {folder} holds MNIST but lacks {', '.join(missing)} (also with .gz). Put the missing files"
            " there."
        )
    arrays = {what: _idx(path, 3 if "images" in what else 1) for what, path in files.items()}
    parts = {}
    for name in ("train", "test"):
        pixels, labels = torch.from_numpy(arrays[f"{name} images"]), torch.from_numpy(arrays[f"{name} labels"]).long()
        if len(pixels) != len(labels) or not len(labels):
            raise FileError(
                f"In {folder} there are {len(pixels):,} {name} images and {len(labels):,} labels. These files do not"
                " belong together."
            )
        _check_labels(files[f"{name} labels"], labels)
        parts[name] = Part(pixels=pixels.unsqueeze(1), labels=labels)
    if parts["train"].pixels.shape[1:] != parts["test"].pixels.shape[1:]:
        raise FileError(f"In {folder} the test images are of another size than the training images.")
    return Images(source="mnist", classes=_DIGITS, train=parts["train"], test=parts["test"])


def _mnist_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _idx(path: Path, dimensions: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read an idx file: two zero bytes, a type, the number of dimensions, their sizes (big-endian), then the values."""
    content = _read(path)
    if content[:4] != bytes((0, 0, _UNSIGNED_BYTES, dimensions)):
        raise FileError(
            f"{path} is not an idx file of bytes in {dimensions} dimension{'s' * (dimensions > 1)}: it begins with"
            f" {content[:4].hex(' ') or 'nothing'}. Get the file again."
        )
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise FileError(f"{path} ends within its header: it is truncated. Get the file again.")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, 4))
    if len(content) - header != math.prod(shape):
        raise FileError(
            f"{path} should hold {' x '.join(f'{size:,}' for size in shape)} bytes after its header and holds"
            f" {len(content) - header:,}: it is truncated or damaged. Get the file again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _check_labels(path: Path, labels: Tensor) -> None:
    if int(labels.max()) > 9:
        raise FileError(f"{path} has the label {int(labels.max())}, where classes are numbered 0 to 9. Get it again.")


def _read(path: Path) -> bytes:
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise FileError(f"{path} cannot be unpacked: {error}. Get the file again.") from error
    except OSError as error:
        raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error
