"""A table of networks that must work unmodified, each with its inputs and where the batch is in its outputs."""

import gzip
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

T, D, H = 5, 8, 12  # positions, features in, features within; no batch has these sizes

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Ctrl-C does what it does in a terminal, also where the tests are started in the background, with it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """A network and how to call it.

    Attributes:
        network: makes the network.
        inputs: its arguments for B examples.
        part: those of the examples a to b - 1 of them.
        axes: the dimension of the batch in each tensor of the output.
        batch_dim, where, biases: settings of the mask.
    """

    network: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    part: Callable[[Inputs, int, int], Inputs]
    axes: tuple[int, ...] = (0,)
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def made(self) -> nn.Module:
        """The network, the same one each time, with statistics in its norms, in training mode."""
        with torch.random.fork_rng():
            torch.manual_seed(4)
            network = self.network()
            for module in network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    assert module.running_mean is not None
                    assert module.running_var is not None
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2.0)
        return network.to(self.dtype).train()


def first(inputs: Inputs, a: int, b: int) -> Inputs:
    """Every tensor has the batch first."""
    return tuple(x[a:b] for x in inputs[0]), {k: v[a:b] for k, v in inputs[1].items()}


def second(inputs: Inputs, a: int, b: int) -> Inputs:
    """Every tensor has the batch second."""
    return tuple(x[:, a:b] for x in inputs[0]), {}


def one(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[int], Inputs]:
    return lambda batch: ((normal(batch, *shape).to(dtype),), {})


def padding(batch: int) -> Tensor:
    """True at positions that are padding; the first is none."""
    return torch.arange(T)[None] > (torch.arange(batch) * 7 % T)[:, None]


CAUSAL = torch.ones(T, T).triu(1).bool()


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, D)
        self.rnn = nn.LSTM(D, D, batch_first=True)
        self.head = nn.Linear(D, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


class TiedLinears(nn.Module):
    """Two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Unrolled(nn.Module):
    """A linear layer used at every step, as a recurrent network written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.turn = nn.Linear(D, H), nn.Linear(H, H, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.zeros(x.shape[0], H)
        for t in range(T):
            state = torch.tanh(self.read(x[:, t]) + self.turn(state))
        return state, self.turn(state).sum(1)


class Functional(nn.Module):
    """Weights of linear layers used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, H), nn.Linear(H, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.a.weight)
        x = torch.relu(x @ self.b.weight.T + self.b.bias)
        return self.c(x) * self.c.weight.norm()


class OverTheBatch(nn.Module):
    """Looks at all examples that it is given: at their mean, and with Python's ``if``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, H), nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x - x.mean(0) / 2)
        return self.b(torch.relu(hidden) if hidden.sum() > 0 else torch.tanh(hidden))


class Positions(nn.Module):
    """A linear layer of what does not depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place, self.mix = nn.Embedding(T, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x + self.place(self.table.weight))


class Complex(nn.Module):
    """Real and imaginary parts as two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.re, self.im = nn.Parameter(torch.randn(H, D)), nn.Parameter(torch.randn(H, D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(torch.complex(x, x.flip(-1)), torch.complex(self.re, self.im).conj())
        return z.imag, z.abs()


class Named(nn.Module):
    """Keyword arguments, a flag, a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, H), nn.Bilinear(H, D, 3)

    def forward(self, *, x: Tensor, scale: Tensor, loudly: bool = False) -> dict[str, Any]:
        hidden = torch.relu(self.a(x))
        out = self.b(hidden, x) * scale[:, None]
        return {"out": out, "nested": [hidden, (out.sum(1),)], "loudly": loudly}


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(D, H, 3, padding=1), nn.BatchNorm1d(H), nn.ReLU(), nn.Dropout(0.5), nn.Conv1d(H, 3, 3, groups=3)
    )


def conv2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, H, 3), nn.BatchNorm2d(H), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.5), nn.Flatten(),
        nn.Linear(H * 9, 3),
    )  # fmt: skip


def encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.3, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H, bias=False), nn.Tanh(), nn.Linear(H, 3))


def _state(batch: int, size: int) -> Tensor:
    return normal(2, batch, size, seed=1)  # two directions


CASES: dict[str, Case] = {
    "MLP": Case(mlp, one(D), first),
    "MLP with biases masked": Case(mlp, one(D), first, settings={"biases": True}),
    "MLP, one weight masked": Case(mlp, one(D), first, settings={"where": "2.weight"}),
    "MLP on sequences": Case(mlp, one(T, D), first),
    "MLP on sequences, batch second": Case(
        mlp, lambda b: ((normal(T, b, D),), {}), second, (1,), {"batch_dim": 1}
    ),
    "MLP with BatchNorm and dropout": Case(
        lambda: nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H), nn.ReLU(), nn.Dropout(0.5), nn.Linear(H, 3)),
        one(D),
        first,
    ),
    "wide MLP": Case(lambda: nn.Sequential(nn.Linear(130, 70), nn.ReLU(), nn.Linear(70, 33)), one(130), first),
    "MLP, bfloat16": Case(mlp, one(D, dtype=torch.bfloat16), first, dtype=torch.bfloat16),
    "MLP, float64": Case(mlp, one(D, dtype=torch.float64), first, dtype=torch.float64),
    "LSTM": Case(
        lambda: nn.LSTM(D, H, batch_first=True, bidirectional=True),
        lambda b: ((normal(b, T, D), (_state(b, H), _state(b, H))), {}),
        lambda i, a, b: ((i[0][0][a:b], tuple(s[:, a:b] for s in i[0][1])), {}),
        (0, 1, 1),
    ),
    "LSTM, sequence first": Case(
        lambda: nn.LSTM(D, H, 2, dropout=0.2), lambda b: ((normal(T, b, D),), {}), second, (1, 1, 1), {"batch_dim": 1}
    ),
    "LSTM with projection, float64": Case(
        lambda: nn.LSTM(D, H, proj_size=3, batch_first=True),
        one(T, D, dtype=torch.float64),
        first,
        (0, 1, 1),
        dtype=torch.float64,
    ),
    "GRU, sequence first": Case(
        lambda: nn.GRU(D, H), lambda b: ((normal(T, b, D),), {}), second, (1, 1), {"batch_dim": -2}
    ),
    "attention": Case(
        lambda: nn.MultiheadAttention(D, 2, dropout=0.1, batch_first=True),
        lambda b: ((normal(b, T, D),) * 3, {"key_padding_mask": padding(b)}),
        first,
        (0, 0),
    ),
    "attention, sequence first": Case(
        lambda: nn.MultiheadAttention(D, 2),
        lambda b: ((normal(T, b, D),) * 3, {"attn_mask": CAUSAL}),
        lambda i, a, b: (tuple(x[:, a:b] for x in i[0]), i[1]),
        (1, 0),
        {"batch_dim": 1},
    ),
    "encoder": Case(
        lambda: encoder(True),
        lambda b: ((normal(b, T, D),), {"mask": CAUSAL, "src_key_padding_mask": padding(b)}),
        lambda i, a, b: (
            (i[0][0][a:b],),
            {"mask": CAUSAL, "src_key_padding_mask": i[1]["src_key_padding_mask"][a:b]},
        ),
    ),
    "encoder, sequence first": Case(
        lambda: encoder(False),
        lambda b: ((normal(T, b, D),), {"mask": CAUSAL, "is_causal": True}),
        lambda i, a, b: ((i[0][0][:, a:b],), i[1]),
        (1,),
        {"batch_dim": 1},
    ),
    "Conv1d": Case(conv1d, one(D, T), first),
    "Conv2d": Case(conv2d, one(3, 9, 9), first),
    "Conv2d, bfloat16": Case(conv2d, one(3, 9, 9, dtype=torch.bfloat16), first, dtype=torch.bfloat16),
    "tied embedding": Case(
        Tied, lambda b: ((torch.arange(b * T).view(b, T) * 5 % 13,), {}), first, settings={"where": "*weight*"}
    ),
    "tied linears": Case(TiedLinears, one(D), first),
    "unrolled": Case(Unrolled, one(T, D), first, (0, 0)),
    "functional": Case(Functional, one(D), first),
    "over the batch": Case(OverTheBatch, one(D), first),
    "positions": Case(Positions, one(T, D), first),
    "complex": Case(Complex, one(D), first, (0, 0)),
    "weight norm": Case(
        lambda: nn.Sequential(weight_norm(nn.Linear(D, H), dim=None), nn.ReLU(), nn.Linear(H, 3)),
        one(D),
        first,
    ),
    "keywords": Case(
        Named, lambda b: ((), {"x": normal(b, D), "scale": normal(b, seed=1), "loudly": True}),
        lambda i, a, b: ((), {"x": i[1]["x"][a:b], "scale": i[1]["scale"][a:b], "loudly": True}),
        (0, 0, 0),
    ),
}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    """Each network of the table."""
    chosen: Case = request.param
    return chosen


# Image data sets, written in their real formats.


def _write_cifar(folder: Path, per_file: int = 20) -> dict[str, tuple[list[int], np.ndarray]]:
    """Write CIFAR-10 in its binary version; return each file's labels and images [N, 3, 32, 32]."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    written = {}
    for name in (*(f"data_batch_{part}.bin" for part in range(1, 6)), "test_batch.bin"):
        labels = [int(label) for label in random.permutation(per_file) % 10]
        pixels = random.integers(0, 256, (per_file, 3, 32, 32), dtype=np.uint8)
        records = [bytes([label]) + image.tobytes() for label, image in zip(labels, pixels, strict=True)]
        (folder / name).write_bytes(b"".join(records))
        written[name] = (labels, pixels)
    return written


def _idx(values: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


def _write_mnist(folder: Path, *, packed: bool = False, side: int = 28) -> dict[str, np.ndarray]:
    """Write MNIST's four files with 30 training and 20 test images; return their contents by name."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    written = {}
    for prefix, count in (("train", 30), ("t10k", 20)):
        written[f"{prefix}-images-idx3-ubyte"] = random.integers(0, 256, (count, side, side), dtype=np.uint8)
        written[f"{prefix}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for name, values in written.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(_idx(values)))
        else:
            (folder / name).write_bytes(_idx(values))
    return written


@pytest.fixture(scope="session")
def write_cifar() -> Callable[..., Any]:
    return _write_cifar


@pytest.fixture(scope="session")
def write_mnist() -> Callable[..., Any]:
    return _write_mnist


@pytest.fixture(scope="session")
def idx() -> Callable[[np.ndarray], bytes]:
    return _idx
