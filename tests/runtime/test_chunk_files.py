"""Chunks read past TensorStore: bit for bit what it wrote, whatever is asked for and wherever it goes."""

import contextlib
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.runtime import chunk_files
from millrace.runtime.chunk_files import ChunkFiles, read_chunk
from millrace.runtime.store_format import ArrayEntry, zarr_metadata

WAYS = pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])


def write(folder: Path, values: np.ndarray, chunk_shape: tuple[int, ...]) -> ArrayEntry:
    """The array as TensorStore writes it."""
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": zarr_metadata(values.shape, values.dtype, chunk_shape),
        "store_data_equal_to_fill_value": True,
    }
    tensorstore.open(spec, create=True, delete_existing=True).result().write(values).result()
    return ArrayEntry(values.shape, values.dtype, chunk_shape, "")


def read(folder: Path, entry: ArrayEntry, region: tuple[slice, ...], out: np.ndarray, direct: bool) -> None:
    with no_direct_io_is_a_skip():
        for future in ChunkFiles(direct=direct).start_read(folder, entry, region, out):
            future.result()


@contextlib.contextmanager
def no_direct_io_is_a_skip() -> Any:
    """Some file systems (tmpfs) have none, and say so."""
    try:
        yield
    except ValueError as error:
        if "weights_io=cached" in str(error):
            pytest.skip("this file system has no direct I/O")
        raise


@st.composite
def reads(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[slice, ...]]:
    """A shape, chunks that need not divide it, and a region."""
    rank = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, 9)) for _ in range(rank))
    chunks = tuple(draw(st.integers(1, size)) for size in shape)
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    stops = [draw(st.integers(start + 1, size)) for start, size in zip(starts, shape, strict=True)]
    return shape, chunks, tuple(map(slice, starts, stops))


@WAYS
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(case=reads(), dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16, np.int8]))
def test_any_region_is_what_tensorstore_wrote(direct: bool, case: Any, dtype: Any, tmp_path: Path) -> None:
    shape, chunks, region = case
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    entry = write(tmp_path, values, chunks)
    out = np.zeros([part.stop - part.start for part in region], dtype)
    read(tmp_path, entry, region, out, direct)
    assert out.tobytes() == np.ascontiguousarray(values[region]).tobytes()


@WAYS
@pytest.mark.parametrize("num_bytes", [4096, 4092, 3 * 4096 + 8, 5000])
@pytest.mark.parametrize("offset", [0, 64])
def test_a_chunk_of_any_size_arrives_whole_in_any_buffer(
    direct: bool, num_bytes: int, offset: int, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).integers(0, 256, num_bytes).astype(np.uint8)
    write(tmp_path, values, (num_bytes,))
    buffer = chunk_files.aligned_empty(num_bytes + 2 * offset, 4096)
    buffer[:] = 7
    with no_direct_io_is_a_skip():
        read_chunk(tmp_path / "c" / "0", buffer[offset : offset + num_bytes], direct=direct)
    np.testing.assert_array_equal(buffer[offset : offset + num_bytes], values)
    assert (buffer[:offset] == 7).all() and (buffer[offset + num_bytes :] == 7).all()


@WAYS
def test_shards_of_a_column_land_in_the_middle_of_a_larger_buffer(direct: bool, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)
    entry = write(tmp_path, values, (1, 4, 2))
    buffer = np.zeros((4, 12), np.float32)
    read(tmp_path, entry, (slice(1, 2), slice(0, 4), slice(2, 6)), buffer[None, :, 3:7], direct)
    np.testing.assert_array_equal(buffer[:, 3:7], values[1, :, 2:6])
    assert not buffer[:, :3].any() and not buffer[:, 7:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:5] + bytes([content[5] ^ 1]) + content[6:], "CRC32C is 0x"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "should be 0x"),
        (lambda content: content[:-1], "it has 35 bytes, and should have 36"),
        (lambda content: content + b"x", "it has 37 bytes"),
        (None, "is missing"),
    ],
)
def test_a_chunk_that_is_not_what_was_written_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, np.arange(8, dtype=np.float32), (8,))
    file = tmp_path / "c" / "0"
    content = file.read_bytes()
    file.unlink()
    if change is not None:
        file.write_bytes(change(content))
    with pytest.raises(ValueError, match=message):
        read_chunk(file, np.empty(32, np.uint8), direct=False)


def test_a_read_that_the_system_cuts_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(1000, dtype=np.int32)
    write(tmp_path, values, (1000,))
    preadv = os.preadv

    def short(fd: int, buffers: list[np.ndarray], offset: int) -> int:
        return preadv(fd, [buffers[0][:900]], offset)

    monkeypatch.setattr(os, "preadv", short)
    out = np.empty(4000, np.uint8)
    read_chunk(tmp_path / "c" / "0", out, direct=False)
    np.testing.assert_array_equal(out.view(np.int32), values)
