"""What a store looks like on disk: names, the manifest's rows, chunks, and the metadata that zarr and Orbax read.

    manifest.json     written last; source, dtype, quantization; `files` and `arrays` below, with their SHA-256
    config.json       the model's config in Hugging Face's form, read by the same family readers
    generation_config.json, tokenizer.json ...   as in a Hugging Face directory, if the model has them
    params/_METADATA  the tree, as Orbax writes it
    params/*/         a zarr3 array: zarr.json, and c/I/J/... for each chunk: its bytes, little-endian, and their CRC32C

Stacked arrays have a chunk per layer; axes that a mesh may shard are split, so that a shard reads only its own bytes.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..sharding.specs import Region
from .safetensors_file import DTYPES

MANIFEST_FILE = "manifest.json"
JOURNAL_FILE = "conversion.json"  # there until the manifest is
LOCK_FILE = ".lock"
PARAMS_FOLDER = "params"
TREE_FILE = f"{PARAMS_FOLDER}/_METADATA"
FORMAT_NAME = "millrace-store"
FORMAT_VERSION = 2
PLAIN = "plain"  # the layout [out, in]
MAX_PIECES = 8  # of one axis: what a tensor axis may ask for, in chunks as large as can be
_DTYPES = {str(dtype): dtype for dtype in DTYPES.values()}


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file that is not a chunk."""

    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ArrayEntry:
    """One array, as the manifest and its zarr metadata agree on it; one file holds `chunk_shape` of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]
    sha256: str  # of the plain bytes in C order
    layout: str = PLAIN

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk's values; its file holds four more, the CRC32C."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    def chunks(self) -> Iterator[tuple[str, Region]]:
        """Every chunk's file, by path below the array's folder, and what it holds."""
        cells = (range(-(-size // step)) for size, step in zip(self.shape, self.chunk_shape, strict=True))
        for cell in itertools.product(*cells):
            spans = zip(cell, self.chunk_shape, self.shape, strict=True)
            region = tuple(slice(i * step, min((i + 1) * step, size)) for i, step, size in spans)
            yield "/".join(("c", *map(str, cell))), region

    def slabs(self) -> Iterator[Region]:
        """Regions that follow each other in C order and hold whole chunks, none larger than it must be."""
        lead = next((axis for axis, step in enumerate(self.chunk_shape) if step > 1), len(self.shape) - 1)
        lead = max(lead, 0)
        steps = (*self.chunk_shape[: lead + 1], *self.shape[lead + 1 :])
        yield from (region for _, region in dataclasses.replace(self, chunk_shape=steps).chunks())


def array_folder(path: str) -> str:
    """The folder below params/ of the array at a parameter path, as Orbax names it."""
    return path.replace("/", ".")


def array_key(path: str, file: str) -> str:
    """A file of an array, by path below the store."""
    return f"{PARAMS_FOLDER}/{array_folder(path)}/{file}"


def zarr_metadata(shape: tuple[int, ...], dtype: np.dtype, chunk_shape: tuple[int, ...]) -> dict[str, Any]:
    """The array's zarr.json (zarr specification, version 3)."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": str(dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "fill_value": False if dtype == np.bool_ else 0,
    }


def tree_metadata(arrays: Mapping[str, ArrayEntry]) -> dict[str, Any]:
    """What Orbax keeps in _METADATA: the tree that the arrays are leaves of. It holds no times and no paths."""

    def leaf(path: str, entry: ArrayEntry) -> dict[str, Any]:
        keys = [{"key": key, "key_type": 2} for key in path.split("/")]  # 2: the key of a dict
        value = {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(entry.shape)}
        return {"key_metadata": keys, "value_metadata": value}

    return {
        "tree_metadata": {str(tuple(path.split("/"))): leaf(path, entry) for path, entry in arrays.items()},
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def to_json(value: Mapping[str, Any]) -> bytes:
    """Sorted, so that equal values make equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def file_entry(content: bytes) -> FileEntry:
    """The row of a file with this content."""
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def array_row(entry: ArrayEntry) -> dict[str, Any]:
    """The manifest's row of an array."""
    return {"shape": list(entry.shape), "dtype": str(entry.dtype), "layout": entry.layout, "sha256": entry.sha256}


def parse_file_entry(where: str, name: str, row: Mapping[str, Any]) -> FileEntry:
    """A row of the manifest's files, checked; `where` begins the error."""
    num_bytes, sha256 = row.get("num_bytes"), row.get("sha256")
    is_plain = bool(name) and not name.startswith("/") and ".." not in name.split("/") and "\0" not in name
    if not is_plain or type(num_bytes) is not int or not isinstance(sha256, str):
        raise CheckpointError(
            f"{where}: expected num_bytes and sha256 of a file inside; got {name!r:.80}: {row!r:.80}."
        )
    return FileEntry(num_bytes, sha256)


def parse_array_entry(where: str, path: str, row: Mapping[str, Any], zarr: Mapping[str, Any]) -> ArrayEntry:
    """A row of the manifest's arrays, compared with the array's own metadata; `where` begins the error."""
    listed, found = (row.get("shape"), row.get("dtype")), (zarr.get("shape"), zarr.get("data_type"))
    if listed != found:
        raise CheckpointError(
            f"{where}: {path} should have the shape and dtype that {MANIFEST_FILE} lists, {listed}; its own metadata "
            f"say {found}. The manifest is of another model: convert it again."
        )
    if isinstance(row.get("layout"), dict):
        raise CheckpointError(
            f"{where}: {path} is packed for the kernel {row['layout'].get('packed_for')!r:.80}; this version reads "
            f"{PLAIN} arrays only. Convert the model again."
        )
    if row.get("layout") != PLAIN or not isinstance(row.get("sha256"), str):
        raise CheckpointError(f"{where}: expected layout and sha256 of {path}; got {row!r:.120}. Convert it again.")
    try:
        chunk_shape = tuple(zarr["chunk_grid"]["configuration"]["chunk_shape"])
        shape, dtype = tuple(zarr["shape"]), _DTYPES[zarr["data_type"]]
        is_ours = zarr == zarr_metadata(shape, dtype, chunk_shape)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: {path}/zarr.json does not describe a zarr3 array ({error!r}).") from error
    if not is_ours or len(chunk_shape) != len(shape) or not all(chunk_shape):
        raise CheckpointError(f"{where}: {path}/zarr.json has codecs or chunks unlike a store's: {zarr!r:.200}.")
    return ArrayEntry(shape, dtype, chunk_shape, row["sha256"])
