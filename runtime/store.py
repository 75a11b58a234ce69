"""Millrace's own checkpoint: TensorStore arrays in the parameter tree's layout, and a manifest that vouches for them.

    manifest.json     format version; shape and dtype of every array; size and SHA-256 of every file of params/
    config.json       the model's config in Hugging Face's form, read by the same family readers
    generation_config.json, tokenizer.json ...   as in a Hugging Face directory, if the model has them
    params/           zarr3 arrays, one folder per array, zstd-compressed; Orbax reads them too

A file is hashed when something in it is first read, so that damage is noticed and yet nobody reads more than its
own part. `store_writer` writes this format.
"""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from ..errors import CheckpointError
from .checkpoint import ModelFiles, read_model_files
from .json_files import parse_object, read_object
from .safetensors_file import check_finite

MANIFEST_FILE = "manifest.json"
PARAMS_FOLDER = "params"
FORMAT_NAME = "millrace-store"
FORMAT_VERSION = 1
_ARRAY_FILE = "zarr.json"

type Region = tuple[slice, ...]  # one slice per dimension, with start and stop


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file of params/."""

    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ArrayEntry:
    """One array, as the manifest and its zarr metadata agree on it; one file holds `chunk_shape` of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Store(ModelFiles):
    """A store whose manifest, file sizes and array metadata agree; the weights are still on disk."""

    arrays: Mapping[str, ArrayEntry]  # by parameter path
    files: Mapping[str, FileEntry]  # by path below params/
    _hashed: set[str] = dataclasses.field(default_factory=set)

    def read(self, path: str, region: Region) -> np.ndarray:
        """A region of one array, in a fresh buffer; reading different regions at once is fine.

        Raises:
          CheckpointError: a file is not the one that was saved, or holds NaN or infinity.
        """
        entry, folder = self.arrays[path], array_folder(path)
        for file in _chunk_files(entry, region):
            self._check_hash(f"{folder}/{file}")
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{self.path / PARAMS_FOLDER / folder}/"}}
        try:
            array = tensorstore.open(spec, open=True).result()
            values = np.asarray(array[region].read(order="C").result())
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {path} cannot be read ({error}). Fetch the store again.") from error
        if values.dtype != entry.dtype:
            raise CheckpointError(f"{self.path}: {path} should be {entry.dtype}; it reads as {values.dtype}.")
        check_finite(values, f"{self.path}: {path}")
        return values

    def _check_hash(self, name: str) -> None:
        """Compares a file of params/ with the manifest, the first time that it is needed."""
        if name in self._hashed:
            return
        file = self.path / PARAMS_FOLDER / name
        expected = self.files.get(name)
        if expected is None:
            raise CheckpointError(
                f"{self.path / MANIFEST_FILE}: should list {name}; it does not. Save the store again."
            )
        try:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error}). Fetch the store again.") from error
        if digest != expected.sha256:
            raise CheckpointError(
                f"{file}: expected SHA-256 {expected.sha256}; got {digest}. It was damaged or replaced after it was "
                "saved: fetch the store again."
            )
        self._hashed.add(name)


def is_store(path: Path | str) -> bool:
    """Whether a directory claims to be a store; `open_store` says whether it is a sound one."""
    return os.path.lexists(Path(path) / MANIFEST_FILE)


def open_store(path: Path | str) -> Store:
    """Opens a store and checks all that can be checked without reading the weights.

    Raises:
      CheckpointError: what is wrong, where, and what would mend it.
    """
    model = read_model_files(Path(path))
    manifest_path = model.path / MANIFEST_FILE
    manifest = read_object(manifest_path)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT_NAME, FORMAT_VERSION):
        raise CheckpointError(
            f"{manifest_path}: expected format {FORMAT_NAME} version {FORMAT_VERSION}; got "
            f"{manifest.get('format')!r:.80} version {manifest.get('version')!r:.80}. Convert the model again."
        )
    files = {name: _file_entry(manifest_path, name, value) for name, value in _table(manifest, "files", model.path)}
    for name, entry in files.items():
        file = model.path / PARAMS_FOLDER / name
        found = os.path.getsize(file) if os.path.isfile(file) else None
        if found != entry.num_bytes:
            came = "there is none" if found is None else f"it has {found}"
            raise CheckpointError(f"{file}: expected a file of {entry.num_bytes} bytes; {came}. Fetch the store again.")
    store = Store(model.path, model.config, model.generation_config, model.tokenizer_files, {}, files)
    arrays = {name: _array_entry(store, name, value) for name, value in _table(manifest, "arrays", model.path)}
    if not arrays:
        raise CheckpointError(f"{manifest_path}: expected arrays; it lists none. Save the store again.")
    return dataclasses.replace(store, arrays=arrays)


def array_folder(path: str) -> str:
    """The folder below params/ of the array at a parameter path, as Orbax names it."""
    return path.replace("/", ".")


def _table(manifest: Mapping[str, Any], key: str, root: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows of one of the manifest's objects of objects."""
    table = manifest.get(key)
    if not isinstance(table, dict) or not all(isinstance(value, dict) for value in table.values()):
        raise CheckpointError(f"{root / MANIFEST_FILE}: {key} should be an object of objects; got {table!r:.80}.")
    return list(table.items())


def _file_entry(manifest_path: Path, name: str, value: Mapping[str, Any]) -> FileEntry:
    num_bytes, sha256 = value.get("num_bytes"), value.get("sha256")
    if name.startswith("/") or ".." in name.split("/") or type(num_bytes) is not int or not isinstance(sha256, str):
        raise CheckpointError(
            f"{manifest_path}: expected num_bytes and sha256 of a file below params/; got {name!r:.80}: {value!r:.80}."
        )
    return FileEntry(num_bytes, sha256)


def _array_entry(store: Store, path: str, value: Mapping[str, Any]) -> ArrayEntry:
    """One row of the manifest's arrays, compared with the array's own metadata."""
    name = f"{array_folder(path)}/{_ARRAY_FILE}"
    store._check_hash(name)
    zarr = parse_object((store.path / PARAMS_FOLDER / name).read_bytes(), f"{store.path}: {name}")
    listed, found = (value.get("shape"), value.get("dtype")), (zarr.get("shape"), zarr.get("data_type"))
    if listed != found:
        raise CheckpointError(
            f"{store.path}: {path} should have the shape and dtype that {MANIFEST_FILE} lists, {listed}; its own "
            f"metadata say {found}. Save the store again."
        )
    try:
        chunk_shape = tuple(zarr["chunk_grid"]["configuration"]["chunk_shape"])
        entry = ArrayEntry(tuple(zarr["shape"]), np.dtype(zarr["data_type"]), chunk_shape)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{store.path}: {name} does not describe a zarr3 array ({error!r}).") from error
    if len(entry.chunk_shape) != len(entry.shape) or not all(entry.chunk_shape):
        raise CheckpointError(f"{store.path}: {name} has chunks of {entry.chunk_shape} in an array of {entry.shape}.")
    return entry


def _chunk_files(entry: ArrayEntry, region: Region) -> list[str]:
    """The files of an array, by path below its folder, that hold a region."""
    cells = [
        range(part.start // size, -(-part.stop // size)) for part, size in zip(region, entry.chunk_shape, strict=True)
    ]
    return ["/".join(("c", *map(str, cell))) for cell in itertools.product(*cells)]
