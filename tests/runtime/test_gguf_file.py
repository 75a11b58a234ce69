"""GGUF headers: whatever is wrong with a file is one CheckpointError, before anything is loaded."""

import functools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.errors import CheckpointError, MillraceError
from millrace.runtime.gguf_checkpoint import open_gguf
from millrace.runtime.gguf_file import GgufFile, open_gguf_file
from millrace.runtime.model_source import open_model

U32, U64, STRING, ARRAY, FLOAT = 4, 10, 8, 9, 6


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(
    name: str = "a", shape: Sequence[int] = (4,), kind: int = 0, offset: int = 0, rank: int | None = None
) -> bytes:
    dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return (
        text(name) + struct.pack("<I", len(shape) if rank is None else rank) + dims + struct.pack("<IQ", kind, offset)
    )


def build(
    keys: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data: bytes = b"", *, magic: bytes = b"GGUF",
    version: int = 3, num_keys: int | None = None, num_tensors: int | None = None,
) -> bytes:  # fmt: skip
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data


@pytest.fixture
def load(tmp_path: Path) -> Callable[[bytes], GgufFile]:
    def load(content: bytes) -> GgufFile:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return open_gguf_file(path)

    return load


def test_metadata_and_tensors_are_read(load: Callable[[bytes], GgufFile]) -> None:
    words = struct.pack("<IQ", STRING, 2) + text("in") + text("naïve")
    keys = [
        key("general.alignment", U32, struct.pack("<I", 64)),
        key("eps", FLOAT, struct.pack("<f", 1e-6)),
        key("words", ARRAY, words),
        key("numbers", ARRAY, struct.pack("<IQ3H", 2, 3, 1, 2, 3)),
        key("flag", 7, b"\1"),
    ]
    header = build(keys, [tensor("a", (2, 3)), tensor("b", (1, 64), kind=8, offset=64)])
    header += b"\0" * (-len(header) % 64)
    values = np.arange(6, dtype=np.float32)
    file = load(header + values.tobytes() + b"\0" * 40 + bytes(range(68)))
    assert file.metadata["words"] == ["in", "naïve"] and file.metadata["numbers"] == [1, 2, 3]
    assert file.metadata["eps"] == 1e-6 and file.metadata["flag"] is True
    assert file.types == {"a": "F32", "b": "Q8_0"}
    np.testing.assert_array_equal(file.read("a"), values.reshape(2, 3))
    assert file.read("b").shape == (1, 2) and file.tensors["b"].shape == (1, 64)
    assert file.read("b").tobytes() == bytes(range(68))


HUGE = 2**62
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "begins with b''"),
    "another format": (b"PK\x03\x04" + b"\0" * 64, "expected a GGUF file"),
    "version 1": (build(version=1), "of version 2 or 3; it has version 1"),
    "big-endian": (build(version=3 << 24), "it is big-endian"),
    "no counts": (b"GGUF\3\0\0\0", "the number of tensors takes 8 bytes"),
    "absurd tensors": (build(num_tensors=HUGE), f"announces {HUGE} tensors"),
    "absurd keys": (build(num_keys=HUGE), f"and {HUGE} keys"),
    "absurd key": (build([struct.pack("<Q", HUGE) + b"\0" * 8]), f"takes {HUGE} bytes"),
    "empty key": (build([key("", U32, b"\0" * 4)]), "should have 1 to 65536 characters"),
    "key twice": (build([key("k", U32, b"\0" * 4)] * 2), "'k' occurs twice"),
    "key no text": (build([struct.pack("<Q", 4) + b"\xff\xfe\0\0" + b"\0" * 8]), "should be UTF-8"),
    "absurd string": (build([key("k", STRING, struct.pack("<Q", HUGE))]), f"takes {HUGE} bytes"),
    "unknown kind": (build([key("k", 13, b"\0" * 8)]), "type of 'k' should be 0 to 12"),
    "absurd array": (build([key("k", ARRAY, struct.pack("<IQ", U64, HUGE))]), "the array 'k' takes"),
    "absurd strings": (build([key("k", ARRAY, struct.pack("<IQ", STRING, HUGE))]), f"announces {HUGE} strings"),
    "nested arrays": (build([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + b"\0" * 16)]), "should hold strings or"),
    "alignment": (build([key("general.alignment", U32, struct.pack("<I", 48))]), "a power of two from 8"),
    "alignment 0": (build([key("general.alignment", U32, struct.pack("<I", 0))]), "a power of two from 8"),
    "rank 0": (build(tensors=[tensor(shape=(), offset=0) + b"\0" * 8]), "1 to 4 dimensions; it has 0"),
    "absurd rank": (build(tensors=[tensor(rank=2**31)]), "1 to 4 dimensions"),
    "size 0": (build(tensors=[tensor(shape=(4, 0))]), "dimensions above 0"),
    "overflow": (build(tensors=[tensor(shape=(2**40, 2**40))]), "dimensions above 0 and"),
    "unknown type": (build(tensors=[tensor(kind=77)]), "has the unknown type 77; types read are F32, F16, BF16, Q4_0"),
    "other type": (build(tensors=[tensor(shape=(256,), kind=10)]), "'a' is Q2_K; types read are .* such as Q4_K_M"),
    "part of a block": (build(tensors=[tensor(shape=(40,), kind=8)]), "rows of Q8_0 are multiples of 32; got 40"),
    "unaligned": (build(tensors=[tensor(offset=8)], data=b"\0" * 64), "its offset should be a multiple of 32"),
    "absurd offset": (build(tensors=[tensor(offset=HUGE)], data=b"\0" * 64), "its offset should be a multiple"),
    "past the end": (build(tensors=[tensor(offset=1 << 40)], data=b"\0" * 64), "has 128 and is truncated"),
    "truncated": (build(tensors=[tensor()], data=b"\0" * 15), "and is truncated"),
    "overlap": (build(tensors=[tensor("a"), tensor("b")], data=b"\0" * 64), "inside 'a'|inside 'b'"),
    "tensor twice": (build(tensors=[tensor("a"), tensor("a", offset=32)], data=b"\0" * 64), "one is named twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_right_is_refused(load: Callable[[bytes], GgufFile], name: str) -> None:
    content, message = BAD[name]
    with pytest.raises(CheckpointError, match=message):
        load(content)


@functools.cache
def whole_file() -> bytes:
    """Of a model that opens."""
    path = Path(gguf_files.__file__).parent / "gguf" / "q8_0.gguf"
    return path.read_bytes()


HEADER_BYTES = 12_000  # metadata and tensors of it, and some of the data


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_found_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(whole_file())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, HEADER_BYTES))
        content[position : position + 8] = data.draw(st.binary(min_size=8, max_size=8))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    try:
        open_model(str(path), None)
    except MillraceError as error:
        assert str(error)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.5, 0.999])
def test_a_truncated_model_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole_file()[: int(len(whole_file()) * share)])
    with pytest.raises(CheckpointError, match="truncated|takes|begins|announces"):
        open_model(str(path), None)


def made(tmp_path: Path, **extra: Any) -> Path:
    config = gguf_files.model_config("llama")
    return gguf_files.write_gguf(tmp_path / "model.gguf", "llama", config, gguf_files.random_tensors(config), **extra)


def test_an_architecture_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(build([key("general.architecture", STRING, text("rwkv7"))]))
    with pytest.raises(CheckpointError, match="'general.architecture' should be one of llama, .* but it is 'rwkv7'"):
        open_gguf(path)


def test_parts_are_opened_by_the_first(tmp_path: Path) -> None:
    whole = made(tmp_path)
    first = made(tmp_path / ".", **{"split.count": 2, "split.no": 0}).rename(tmp_path / "m-00001-of-00002.gguf")
    made(tmp_path, **{"split.count": 2, "split.no": 1}).rename(tmp_path / "m-00002-of-00002.gguf")
    assert not whole.exists()
    with pytest.raises(CheckpointError, match="each tensor should be in one part"):
        open_gguf(first)
    with pytest.raises(CheckpointError, match="name the first of them"):
        open_gguf(tmp_path / "m-00002-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002.gguf: cannot be read"):
        open_gguf(first)


def test_a_model_in_two_parts_is_one_model(tmp_path: Path) -> None:
    config = gguf_files.model_config("llama")
    tensors = gguf_files.random_tensors(config)
    split = {"split.count": 2}
    for number in range(2):
        part = {name: array for i, (name, array) in enumerate(tensors.items()) if i % 2 == number}
        path = tmp_path / f"m-0000{number + 1}-of-00002.gguf"
        gguf_files.write_gguf(path, "llama", config, part, **split, **{"split.no": number})
    source = open_gguf(tmp_path / "m-00001-of-00002.gguf")
    assert len(source.tensor_names) == len(tensors)
    assert {file.name for file in source.source_files()} == {"m-00001-of-00002.gguf", "m-00002-of-00002.gguf"}


def test_a_folder_of_ggufs_says_which_to_name(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="found model.gguf. Name that file itself"):
        open_model(str(tmp_path), None)
