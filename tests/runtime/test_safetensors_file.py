"""Headers that lie are refused when the file is opened; values that are not finite, when they are read."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from millrace.errors import CheckpointError
from millrace.runtime import safetensors_file
from millrace.runtime.safetensors_file import DTYPES, open_safetensors


def write(path, header, data=b"", header_bytes=None):
    """A file as the format lays it out, from a header that may be anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if header_bytes is None else header_bytes).to_bytes(8, "little") + text + data)
    return path


def entry(start, stop, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "BOOL"])
def test_every_dtype_reads_back_bit_for_bit(name, tmp_path):
    values = np.arange(1, 7).astype(DTYPES[name]).reshape(2, 3)
    path = write(tmp_path / "m", {"t": entry(0, values.nbytes, name, [2, 3])}, values.tobytes())
    read = open_safetensors(path).read("t")
    assert read.dtype == DTYPES[name] and read.shape == (2, 3) and read.tobytes() == values.tobytes()


def test_file_of_the_safetensors_package_reads_back(tmp_path):
    tensors = {"a": np.arange(3, dtype=np.int8), "b": np.ones((2, 2), ml_dtypes.bfloat16), "c": np.array(2, np.float32)}
    save_file(tensors, tmp_path / "m", metadata={"format": "np"})
    file = open_safetensors(tmp_path / "m")
    assert file.tensors.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(file.read(name), values)


def test_data_that_is_not_aligned_reads_back(tmp_path):
    header = {"odd": entry(0, 3), "t": entry(3, 11, "F32", [2])}
    path = write(tmp_path / "m", header, b"abc" + np.float32([1, 2]).tobytes())
    np.testing.assert_array_equal(open_safetensors(path).read("t"), np.float32([1, 2]))


def test_tensor_read_by_several_threads_equals_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_PARALLEL_BYTES", 100)
    monkeypatch.setattr(safetensors_file, "_READ_BYTES", 64)
    values = np.random.default_rng(0).normal(size=(37, 7)).astype(np.float32)
    save_file({"t": values}, tmp_path / "m")
    np.testing.assert_array_equal(open_safetensors(tmp_path / "m").read("t"), values)


def test_empty_tensor_and_empty_file_are_sound(tmp_path):
    assert open_safetensors(write(tmp_path / "m", {"t": entry(0, 0, "F32", [0, 4])})).read("t").shape == (0, 4)
    assert not open_safetensors(write(tmp_path / "n", {})).tensors


WRONG_HEADERS = {
    "not JSON": (b"{]", "does not parse"),
    "not UTF-8": (b'{"\xff": 1}', "does not parse"),
    "nested without end": (b"[" * 100_000, "does not parse"),
    "not an object": (b"[1]", "expected a JSON object"),
    "a key twice": (b'{"t": 1, "t": 2}', "'t' occurs twice"),
    "a key twice inside": (b'{"t": {"dtype": "U8", "dtype": "I8"}}', "'dtype' occurs twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, "object of strings"),
    "entry without offsets": ({"t": {"dtype": "U8", "shape": [4]}}, "expected dtype, shape and data_offsets"),
    "unknown dtype": ({"t": entry(0, 4, "F4")}, "dtypes read here are .* got 'F4'"),
    "dtype that is a list": ({"t": entry(0, 4, ["U8"])}, "dtypes read here are"),
    "negative dimension": ({"t": entry(0, 4, "U8", [-2, -2])}, "whole numbers"),
    "fractional dimension": ({"t": entry(0, 4, "U8", [4.0])}, "whole numbers"),
    "boolean dimension": ({"t": entry(0, 4, "U8", [True, 4])}, "whole numbers"),
    "huge dimension": ({"t": entry(0, 0, "U8", [0, 10**30])}, "whole numbers"),
    "three offsets": ({"t": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}}, "whole numbers"),
    "too many dimensions": ({"t": entry(0, 4, "U8", [1] * 40 + [4])}, "at most 8 dimensions"),
    "size unlike shape": ({"t": entry(0, 4, "F32", [2])}, r"takes 8 bytes; data_offsets \[0, 4\] hold 4"),
    "offsets backwards": ({"t": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}, "hold -4"),
    "overlap": ({"t": entry(0, 3), "u": entry(2, 4)}, "'u' should start at byte .* overlaps 't'"),
    "gap": ({"t": entry(0, 2), "u": entry(3, 4)}, "'u' should start at byte .* leaves a gap after 't'"),
    "gap at the start": ({"t": entry(1, 4)}, "leaves a gap after the header"),
    "outside the file": ({"t": entry(0, 5)}, "is truncated"),
    "bytes left over": ({"t": entry(0, 3)}, "longer than its tensors"),
}


@pytest.mark.parametrize("header, message", WRONG_HEADERS.values(), ids=WRONG_HEADERS)
def test_wrong_header_is_refused(header, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        open_safetensors(write(tmp_path / "m", header, b"\1\2\3\4"))


@pytest.mark.parametrize("content", [b"", b"\1\2\3", b"version https://git-lfs.github.com/spec/v1\n"])
def test_file_that_is_not_safetensors_is_refused(content, tmp_path):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        open_safetensors(tmp_path / "m")


@pytest.mark.parametrize("header_bytes", [100, 2**63, 100_000_001])
def test_absurd_header_length_is_refused(header_bytes, tmp_path):
    with pytest.raises(CheckpointError, match=f"announces a header of {header_bytes}"):
        open_safetensors(write(tmp_path / "m", {}, header_bytes=header_bytes))


@pytest.mark.parametrize("name", ["F16", "BF16", "F32", "F64", "F8_E5M2"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_is_refused_and_its_tensor_named(name, value, tmp_path):
    values = np.ones(9, DTYPES[name])
    values[7] = value
    file = open_safetensors(write(tmp_path / "m", {"w.q": entry(0, values.nbytes, name, [9])}, values.tobytes()))
    with pytest.raises(CheckpointError, match="'w.q' .* it holds NaN or infinity"):
        file.read("w.q")


@pytest.mark.parametrize("name, byte", [("F8_E4M3", 0x7F), ("F8_E4M3", 0xFF), ("F8_E8M0", 0xFF)])
def test_nan_of_eight_bits_is_refused(name, byte, tmp_path):
    file = open_safetensors(write(tmp_path / "m", {"t": entry(0, 2, name)}, bytes([1, byte])))
    with pytest.raises(CheckpointError, match="NaN"):
        file.read("t")


@pytest.mark.parametrize("name", ["F16", "BF16", "F32", "F8_E4M3", "F8_E5M2"])
def test_largest_finite_values_are_accepted(name, tmp_path):
    values = np.array([ml_dtypes.finfo(DTYPES[name]).max, ml_dtypes.finfo(DTYPES[name]).min], DTYPES[name])
    file = open_safetensors(write(tmp_path / "m", {"t": entry(0, values.nbytes, name, [2])}, values.tobytes()))
    assert file.read("t").tobytes() == values.tobytes()


def test_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    file = open_safetensors(write(tmp_path / "m", {"t": entry(0, 4)}, b"\1\2\3\4"))
    file.path.write_bytes(file.path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="became shorter"):
        file.read("t")
