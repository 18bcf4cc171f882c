"""Files: what is written comes back, and what was not written by us, or was changed, is refused."""

import hashlib
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sublens.errors import FileError, MismatchError, SettingError
from sublens.storage import (
    atomic_write_bytes,
    atomic_write_text,
    files,
    hash_tensors,
    load_logits,
    load_tensors,
    load_weights,
    pack_bits,
    save_logits,
    save_tensors,
    unpack_bits,
    writing,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


def bits_of(tensor: Tensor) -> bytes:
    return tensor.detach().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def container(header: object, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def forged(entry: object, tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file whose sublens entry claims anything."""
    text = entry if isinstance(entry, str) else json.dumps(entry, sort_keys=True, separators=(",", ":"))
    return safetensors.torch.save(tensors, {"sublens": text})


def signed(content: dict[str, Tensor], /, **entry: object) -> bytes:
    """A file with a valid checksum, as a malicious writer would make it."""
    whole: dict[str, object] = {"version": 1, "tensors": list(content), **entry}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    return forged(whole | {"checksum": hash_tensors(content, text)}, content)


# --- bits


@given(st.lists(st.booleans(), max_size=70))
def test_bits_lie_where_the_format_says(bits: list[bool]) -> None:
    packed = pack_bits(torch.tensor(bits, dtype=torch.bool))
    number = sum(bit << i for i, bit in enumerate(bits))
    assert packed.numpy().tobytes() == number.to_bytes((len(bits) + 7) // 8, "little")
    assert unpack_bits(packed, (len(bits),)).tolist() == bits


@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.integers(0, 2**32 - 1))
def test_packing_round_trip(shape: tuple[int, ...], seed: int) -> None:
    bits = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, shape).astype(bool).reshape(shape))
    assert torch.equal(unpack_bits(pack_bits(bits), shape), bits)
    # the layout in memory does not matter
    transposed = bits.permute(tuple(reversed(range(bits.dim()))))
    assert torch.equal(unpack_bits(pack_bits(transposed), tuple(transposed.shape)), transposed)


@pytest.mark.parametrize(
    ("packed", "shape", "message"),
    [
        (torch.tensor([1, 2]), (9,), "uint8"),
        (torch.zeros(1, 1, dtype=torch.uint8), (3,), "one row"),
        (torch.zeros(2, dtype=torch.uint8), (2, 4), "needs 1 bytes of packed bits, but there are 2"),
        (torch.zeros(1, dtype=torch.uint8), (3, 3), "needs 2 bytes"),
        (torch.zeros(0, dtype=torch.uint8), (), "needs 1 bytes"),
        (torch.tensor([0b1000], dtype=torch.uint8), (3,), "padding bits after the last of 3 elements are set"),
        (torch.tensor([0, 0x80], dtype=torch.uint8), (15,), "padding"),
    ],
)
def test_impossible_bits_are_refused(packed: Tensor, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(FileError, match=message):
        unpack_bits(packed, shape)


# --- hash


def test_hash_is_the_one_in_the_specification() -> None:
    tensors = {"b": torch.tensor([[1.0, -2.0]]), "a.ü": torch.tensor(True)}
    by_hand = b'["a.\\u00fc","bool",[]]\n\x01["b","float32",[1,2]]\n' + struct.pack("<ff", 1.0, -2.0)
    assert hash_tensors(tensors) == hashlib.sha256(by_hand).hexdigest()
    assert hash_tensors(tensors, "{}") == hashlib.sha256(b"{}\n" + by_hand).hexdigest()


def test_hash_sees_values_names_dtypes_and_shapes_but_not_layout() -> None:
    base = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    same = [{"w": base.t().contiguous().t()}, {"w": nn.Parameter(base)}]
    assert {hash_tensors(tensors) for tensors in same} == {hash_tensors({"w": base})}
    negative_zero = base.clone()
    negative_zero[0, 0] = -0.0
    others = [
        {"w": negative_zero},
        {"v": base},
        {"w": base.reshape(3, 2)},
        {"w": base.view(torch.int32)},
        {"w": base, "x": torch.zeros(0)},
        {"w": base[:1], "x": base[1:]},
        {},
    ]
    assert len({hash_tensors(tensors) for tensors in [{"w": base}, *others]}) == len(others) + 1


def test_hash_reads_lazy_views_by_value() -> None:
    number = torch.tensor([1 + 2j])
    assert hash_tensors({"w": number.conj()}) == hash_tensors({"w": number.conj().resolve_conj()})
    assert hash_tensors({"w": number.conj().imag}) == hash_tensors({"w": torch.tensor([-2.0])})


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.zeros(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_without_bytes_are_refused(tensor: Tensor, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"tensor 'w' .* has no plain bytes; make it a dense tensor"):
        hash_tensors({"w": tensor})
    with pytest.raises(SettingError, match="no plain bytes"):
        save_tensors(tmp_path / "f", {"w": tensor})
    assert not list(tmp_path.iterdir())


# --- round trip

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits in any dtype, NaNs with payload among them."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).view(dtype).reshape(shape)


@settings(deadline=None, max_examples=80)
@given(st.dictionaries(NAMES, tensors(), max_size=4), st.dictionaries(st.text(max_size=4), JSON, max_size=3))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Tensor], extra: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("files") / "file.safetensors"
    extra = {key: value for key, value in extra.items() if key not in ("version", "checksum", "tensors")}
    save_tensors(path, content, extra)
    found, metadata = load_tensors(path)
    assert metadata == extra
    assert list(found) == list(content)
    for name, tensor in content.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits_of(found[name]) == bits_of(tensor)
    first = path.read_bytes()
    save_tensors(path, content, extra)
    assert path.read_bytes() == first
    assert os.listdir(path.parent) == [path.name]


def test_tied_transposed_and_grown_tensors(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    content = {"a": weight, "b": weight, "c": weight.t(), "d": weight[1:], "e": torch.zeros(1).expand(5)}
    save_tensors(tmp_path / "f", content)
    found, _ = load_tensors(tmp_path / "f")
    assert all(torch.equal(found[name], content[name]) and not found[name].requires_grad for name in content)


def test_new_files_get_the_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save_tensors(tmp_path / "f", {"a": torch.zeros(1)})
        atomic_write_text(tmp_path / "g", "text")
    finally:
        os.umask(old)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in "fg"} == {0o640}


@pytest.mark.parametrize(
    ("content", "metadata", "message"),
    [
        ({"__metadata__": torch.zeros(1)}, {}, "reserves that name"),
        ({"\ud800": torch.zeros(1)}, {}, "cannot store these names or dtypes"),
        ({"a": torch.zeros(1)}, {"version": 3}, "must not contain version"),
        ({"a": torch.zeros(1)}, {"x": object()}, "metadata is not JSON"),
        ({"a": torch.zeros(1)}, {"x": float("nan")}, "metadata is not JSON"),
        ({"a": torch.zeros(1)}, {"x": "y" * 2**24}, "take more than 16777216 bytes"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    tmp_path: Path, content: dict[str, Tensor], metadata: dict[str, Any], message: str
) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(SettingError, match=message):
        save_tensors(tmp_path / "f", content, metadata)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


# --- hostile files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "f"
    save_tensors(path, {"w": torch.arange(3, dtype=torch.uint8), "v": torch.ones(2)}, {"kind": "mask", "network": "ab"})
    return path.read_bytes()


def refused(path: Path, data: bytes | None = None) -> str:
    """Reading the file must give one FileError of one line, whichever reader opens it."""
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(FileError) as caught:
        load_tensors(path)
    message = str(caught.value)
    assert len(message) < 600 and message.isprintable(), message
    return message


def test_every_truncation_is_refused(tmp_path: Path, good: bytes) -> None:
    for length in range(len(good)):
        refused(tmp_path / "f", good[:length])
    refused(tmp_path / "f", good + b"\0")
    refused(tmp_path / "f", good + good)


def test_every_flipped_bit_is_refused(tmp_path: Path, good: bytes) -> None:
    for position in range(len(good) * 8):
        damaged = bytearray(good)
        damaged[position // 8] ^= 1 << (position % 8)
        refused(tmp_path / "f", bytes(damaged))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_damage_gives_other_content(
    tmp_path_factory: pytest.TempPathFactory, good: bytes, data: st.DataObject
) -> None:
    """Whatever overwrites, inserts or deletes in a file: it is refused, or says the same."""
    path = tmp_path_factory.mktemp("fuzz") / "f"
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(damaged)))
        stop = data.draw(st.integers(start, min(start + 9, len(damaged))))
        damaged[start:stop] = data.draw(
            st.binary(max_size=9) | st.sampled_from([b" ", b"{", b'"', b"0", b'\\"', b"9" * 20])
        )
    path.write_bytes(good)
    before = load_tensors(path)
    path.write_bytes(damaged)
    try:
        after = load_tensors(path)
    except FileError:
        return
    assert after[1] == before[1]
    assert {name: bits_of(t) for name, t in after[0].items()} == {name: bits_of(t) for name, t in before[0].items()}


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200))
def test_noise_is_refused(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("noise")
    refused(path / "f", noise)
    refused(path / "f", container(noise))


U8 = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
TWO = {"a": torch.zeros(2, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has only 0 bytes"),
        (b"PK\x03\x04 a zip archive, or so it says", "is not a whole safetensors file"),
        (pickle.dumps({"w": [1, 2]}), "is not a whole safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "announces a header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 2**24 + 1) + b" " * (2**24 + 1), "at most 16777216 are read"),
        (container([]), "not a whole safetensors file"),
        (container(b"[" * 100_000), "not a whole safetensors file"),
        (container(b'{"a":' * 10_000), "not a whole safetensors file"),
        (container(b'{"a":' + b"9" * 10_000 + b"}"), "not a whole safetensors file"),
        (container(b"\xff\xfe"), "not a whole safetensors file"),
        (container({"a": U8}, b"ab"), "but not one of sublens"),
        (container({"a": U8 | {"shape": [2**62]}}, b"ab"), "not a whole safetensors file"),
        (container({"a": U8 | {"shape": [2**32, 2**32, 2**32]}}, b"ab"), "not a whole safetensors file"),
        (container({"a": U8 | {"shape": [-2]}}, b"ab"), "not a whole safetensors file"),
        (container({"a": {"dtype": "U8", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}), "not a whole"),
        (container({"a": U8 | {"data_offsets": [0, 2**62]}}, b"ab"), "not a whole safetensors file"),
        (container({"a": U8 | {"data_offsets": [1, 3]}}, b"abc"), "not a whole safetensors file"),
        (container({"a": U8, "b": U8}, b"ab"), "not a whole safetensors file"),
        (container({"a": U8 | {"dtype": "PICKLE"}}, b"ab"), "not a whole safetensors file"),
        (container({"a": U8 | {"dtype": "F8_E8M0"}}, b"ab"), "not a whole safetensors file"),
        (container({"a": U8, "A": U8}, b"ab").replace(b'"A"', b'"a"'), "a key occurs twice"),
        (container({"__metadata__": {"sublens": 3}, "a": U8}, b"ab"), "not a whole safetensors file"),
        (container({"__metadata__": {"format": "pt"}, "a": U8}, b"ab"), "but not one of sublens"),
        (forged("", TWO), "cannot be read"),
        (forged("[]", TWO), "is not a JSON object"),
        (forged("[" * 100_000, TWO), "cannot be read"),
        (forged('{"version":' + "9" * 10_000 + "}", TWO), "cannot be read"),
        (forged('{"version":NaN}', TWO), "NaN is not JSON"),
        (forged('{"version":1,"version":1}', TWO), "a key occurs twice"),
        (forged({}, TWO), "has format version None; this sublens reads version 1"),
        (forged({"version": 2}, TWO), "has format version 2; this sublens reads version 1"),
        (forged({"version": True}, TWO), "has format version True"),
        (forged({"version": 1}, TWO), "is damaged: its content does not have its checksum"),
        (forged({"version": 1, "checksum": "0" * 64, "tensors": ["a"]}, TWO), "is damaged"),
        (forged({"version": 1, "checksum": ["0"], "tensors": ["a"]}, TWO), "is damaged"),
        (forged('{"version":1,"x":' + "[" * 990 + "]" * 990 + "}", TWO), "cannot be read|is damaged"),
        (signed(TWO, tensors=["a", "a"]), "are not the names of its tensors"),
        (signed(TWO, tensors=["b"]), "are not the names of its tensors"),
        (signed(TWO, tensors=[]), "are not the names of its tensors"),
        (signed(TWO, tensors=[["a"]]), "is not a list of names"),
        (signed(TWO, tensors="a"), "is not a list of names"),
        (signed(TWO, tensors={"a": 1}), "is not a list of names"),
    ],
)  # fmt: skip
def test_hostile_files(tmp_path: Path, data: bytes, message: str) -> None:
    assert re.search(message, refused(tmp_path / "f", data))


def test_signed_is_what_sublens_accepts(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(signed(TWO, kind="x"))
    assert load_tensors(tmp_path / "f", "x")[1] == {"kind": "x"}
    # the same in another spelling: refused, since only canonical text is proof against every change
    text = json.dumps({"kind": "x", "tensors": ["a"], "version": 1}, separators=(",", ":"))
    entry = {"version": 1, "tensors": ["a"], "kind": "x", "checksum": hash_tensors(TWO, text)}
    (tmp_path / "f").write_bytes(forged(json.dumps(entry, sort_keys=True, separators=(",", ":")), TWO))
    assert load_tensors(tmp_path / "f", "x")[1] == {"kind": "x"}
    (tmp_path / "f").write_bytes(forged(json.dumps(entry), TWO))
    assert "is damaged" in refused(tmp_path / "f")


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "missing")
    assert "is a folder; pass the path of a file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in refused(tmp_path / "pipe")
    assert "is no regular file" in refused(Path("/dev/zero"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be opened" in refused(tmp_path / "loop")
    assert "cannot be opened" in refused(Path("a\0b"))
    assert "does not exist" in refused(tmp_path / "a\x1b[31m\nred")  # no control characters in messages


def test_kind_is_checked(tmp_path: Path, good: bytes) -> None:
    (tmp_path / "f").write_bytes(good)
    assert list(load_tensors(tmp_path / "f", "mask")[0]) == ["w", "v"]
    with pytest.raises(FileError, match="holds 'mask', not 'logits'; pass the file that holds 'logits'"):
        load_tensors(tmp_path / "f", "logits")


# --- logits


def test_logits_round_trip(tmp_path: Path) -> None:
    logits = {"b": nn.Parameter(torch.randn(2, 3)), "a": nn.Parameter(torch.tensor([float("inf"), -0.0]))}
    save_logits(tmp_path / "f", logits, "ab")
    found, network = load_logits(tmp_path / "f", "ab")
    assert network == "ab" and list(found) == ["b", "a"]
    assert all(bits_of(found[name]) == bits_of(logits[name]) for name in logits)
    with pytest.raises(MismatchError, match="holds logits of network ab, not of cd"):
        load_logits(tmp_path / "f", "cd")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (signed(TWO, kind="logits", network="ab"), "logits must be float32, but 'a' is torch.uint8"),
        (signed({"a": torch.zeros(1)}, kind="logits"), "does not say to which network"),
        (signed({"a": torch.zeros(1)}, kind="logits", network=["x"]), "does not say to which network"),
        (signed({"a": torch.zeros(1)}, kind="mask", network="ab"), "holds 'mask', not 'logits'"),
    ],
)
def test_hostile_logits(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(FileError, match=message):
        load_logits(tmp_path / "f")


# --- weights from elsewhere


class Bomb:
    """Leaves a mark if it is ever unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_weights_from_torch(tmp_path: Path, suffix: str, legacy: bool) -> None:
    state = nn.LSTM(2, 3).state_dict()
    torch.save(state, tmp_path / f"w.{suffix}", _use_new_zipfile_serialization=not legacy)
    found = load_weights(tmp_path / f"w.{suffix}")
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_weights_from_safetensors(tmp_path: Path) -> None:
    state = nn.LSTM(2, 3).state_dict()
    safetensors.torch.save_file(state, tmp_path / "theirs.safetensors")
    save_tensors(tmp_path / "ours.safetensors", state, {"kind": "network"})
    for name in ("theirs", "ours"):
        found = load_weights(tmp_path / f"{name}.safetensors")
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    save_logits(tmp_path / "logits.safetensors", state, "ab")
    with pytest.raises(FileError, match="holds 'logits', not the weights of a network"):
        load_weights(tmp_path / "logits.safetensors")


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_runs(tmp_path: Path, legacy: bool) -> None:
    torch.save({"w": Bomb(tmp_path / "mark")}, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(FileError, match=r"read without running code .*; write one with torch.save\(network.state_dict"):
        load_weights(tmp_path / "w.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(FileError):
        load_weights(tmp_path / "plain.pt")
    assert not (tmp_path / "mark").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()  # the bomb is a real one


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(1, 1), "read without running code"),
        ({"epoch": 3, "state_dict": {}}, r"holds keys \['epoch', 'state_dict'\], not a plain state_dict"),
        ({3: torch.zeros(1)}, r"holds keys \[3\]"),
        ([torch.zeros(1)], "holds a list, not a plain state_dict"),
        (torch.zeros(1), "holds a Tensor"),
    ],
)
def test_other_torch_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(FileError, match=message):
        load_weights(tmp_path / "w.pt")


def test_damaged_torch_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": torch.zeros(20)}, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError):
            load_weights(path)
    with pytest.raises(FileError, match="does not exist"):
        load_weights(tmp_path / "missing.pt")
    with pytest.raises(FileError, match=r"read from .safetensors, .pt or .pth files, not from '.bin'"):
        load_weights(tmp_path / "w.bin")


# --- writing


def write_tensors(path: Path) -> None:
    save_tensors(path, {"a": torch.zeros(2)})


def write_bytes(path: Path) -> None:
    atomic_write_bytes(path, b"new")


def test_text_and_bytes(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "f", "ünï\n")
    assert (tmp_path / "f").read_bytes() == "ünï\n".encode()
    atomic_write_bytes(tmp_path / "f", b"\0\r\n")
    assert (tmp_path / "f").read_bytes() == b"\0\r\n"
    atomic_write_text(tmp_path / ("n" * 250), "long names leave room for the temporary one")
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("write", [write_tensors, write_bytes])
@pytest.mark.parametrize("function", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"]
)
def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], None],
    function: str,
    failure: BaseException,
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(writing.os, function, fail)
    with pytest.raises(FileError if isinstance(failure, OSError) else KeyboardInterrupt) as caught:
        write(path)
    if isinstance(failure, OSError):
        assert "cannot be written: [Errno 28] No space left on device; nothing there was changed" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_full_disk_inside_safetensors_is_a_file_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(files.safetensors.torch, "save_file", fail)
    with pytest.raises(FileError, match="cannot be written: Error while serializing"):
        write_tensors(tmp_path / "f")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("write", [write_tensors, write_bytes])
def test_impossible_places_are_refused(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with pytest.raises(FileError, match="its folder does not exist; make the folder first"):
        write(tmp_path / "no" / "f")
    with pytest.raises(FileError, match="it is a folder"):
        write(tmp_path)
    with pytest.raises(FileError, match="cannot be written"):
        write(tmp_path / ("n" * 300))
    assert not os.listdir(tmp_path)


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    """Killed at many moments, the file is always one of those that were being written."""
    script = textwrap.dedent("""
        import os, signal, sys, time
        import torch
        from sublens.storage import load_tensors, save_tensors

        path = sys.argv[1]
        save_tensors(path, {"w": torch.zeros(50_000)}, {"step": 0})
        steps = []
        for moment in range(12):
            child = os.fork()
            while child == 0:
                step = load_tensors(path)[1]["step"] + 1
                save_tensors(path, {"w": torch.full((50_000,), float(step))}, {"step": step})
            time.sleep(0.03 + moment * 0.0007)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            tensors, metadata = load_tensors(path)
            assert bool((tensors["w"] == metadata["step"]).all())
            steps.append(metadata["step"])
        print(steps[-1] - steps[0])
    """)
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "f")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0  # something was being written
