"""Writes stores (see `store_format`), array by array and part by part; the manifest comes last.

Apart from reading, so that what only reads never asks how arrays are sharded. No array is copied as a whole: chunks
go from the caller's values to TensorStore, a bounded number of bytes at a time.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import shutil
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..errors import CheckpointError
from ..models.families.quantization import KEY as QUANTIZATION_KEY
from ..models.quantization import is_beside_values
from ..sharding.rules import RULES
from ..sharding.specs import ParamSpec, Region, SpecTree
from .checkpoint import CONFIG_FILE
from .param_tree import flatten
from .safetensors_file import check_finite
from .store_array import open_array, read_sha256
from .store_format import (
    FORMAT_NAME,
    FORMAT_VERSION,
    JOURNAL_FILE,
    LOCK_FILE,
    MANIFEST_FILE,
    MAX_PIECES,
    PARAMS_FOLDER,
    TREE_FILE,
    ArrayEntry,
    array_key,
    array_row,
    file_entry,
    to_json,
    tree_metadata,
    zarr_metadata,
)
from .store_journal import Journal, Origin, exclusively, is_finished, is_lock, open_journal
from .store_root import StoreRoot, open_root, remedy
from .weights import alias

MIN_CHUNK_BYTES = 1 << 20  # smaller pieces of an axis stay together
_IN_FLIGHT_BYTES = 32 << 20  # of one array, on their way to the disk


def chunk_shape(spec: ParamSpec, min_bytes: int = MIN_CHUNK_BYTES) -> tuple[int, ...]:
    """One layer, and of each axis that a mesh may shard a piece: whole experts, or up to an eighth of the rest."""
    chunk = [1 if axis == "layers" else size for axis, size in zip(spec.axes, spec.stored_shape, strict=True)]
    for i, (axis, size) in enumerate(zip(spec.axes, spec.stored_shape, strict=True)):
        if axis not in RULES:
            continue
        num_bytes = math.prod(chunk) * spec.dtype.itemsize
        counts = range(size, 1, -1) if axis == "experts" else (MAX_PIECES >> shift for shift in range(4))
        pieces = (count for count in counts if size % count == 0 and num_bytes >= count * min_bytes)
        chunk[i] //= next(pieces, 1)
    return tuple(chunk)


class _ArrayWriter:
    """One array on its way: its parts in C order."""

    def __init__(self, root: StoreRoot, path: str, entry: ArrayEntry) -> None:
        self._what = f"{root.url}: {path}"
        self._entry = entry
        self._digest = hashlib.sha256()
        self._num_written = 0
        self._group: tuple[tuple[int, ...], np.ndarray] | None = None  # parts smaller than a chunk, until it is full
        self._array = open_array(root, path, entry)

    def write(self, index: tuple[int, ...], values: np.ndarray) -> str | None:
        """Write what lies at `index` of the leading axes; after the last part the array's SHA-256."""
        assert values.dtype == self._entry.dtype and values.shape == self._entry.shape[len(index) :], self._what
        values = np.asarray(values, order="C")
        check_finite(values, self._what)
        for start, whole in self._whole_chunks(index, values):
            self.write_region(start, whole)
        self._digest.update(values.reshape(-1).view(np.uint8).data)
        self._num_written += values.size
        return self._digest.hexdigest() if self._num_written == math.prod(self._entry.shape) else None

    def _whole_chunks(self, index: tuple[int, ...], values: np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """The values with their place, once they fill chunks."""
        chunk, shape = self._entry.chunk_shape, self._entry.shape
        extents = tuple(min(step, size) for step, size in zip(chunk[: len(index)], shape, strict=False))
        start = tuple(i // step * step for i, step in zip(index, extents, strict=True))
        tail = (0,) * (len(shape) - len(index))
        if math.prod(extents) == 1:
            yield (*index, *tail), values.reshape((1,) * len(index) + values.shape)
            return
        if self._group is None:
            sizes = (min(step, size - i) for step, size, i in zip(extents, shape, start, strict=False))
            self._group = start, np.empty((*sizes, *values.shape), values.dtype)
        assert self._group[0] == start, f"{self._what}: parts come in order"
        buffer = self._group[1]
        buffer[tuple(i - first for i, first in zip(index, start, strict=True))] = values
        last = tuple(first + size - 1 for first, size in zip(start, buffer.shape, strict=False))
        if index == last:
            self._group = None
            yield (*start, *tail), buffer

    def write_region(self, start: tuple[int, ...], values: np.ndarray) -> None:
        """Write values of full rank chunk by chunk; returns once they are stored.

        Raises:
          CheckpointError: they cannot be stored.
        """
        region = tuple(slice(first, first + size) for first, size in zip(start, values.shape, strict=True))
        pending: deque[Any] = deque()
        most = max(1, _IN_FLIGHT_BYTES // max(1, self._entry.chunk_bytes))
        try:
            for part in _chunks_within(self._entry, region):
                local = tuple(slice(p.start - r.start, p.stop - r.start) for p, r in zip(part, region, strict=True))
                pending.append(self._array[part].write(values[local], can_reference_source_data_indefinitely=True))
                if len(pending) > most:
                    pending.popleft().result()
            while pending:
                pending.popleft().result()
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self._what} cannot be written ({error}). {remedy(error)}") from error


def _chunks_within(entry: ArrayEntry, region: Region) -> Iterator[Region]:
    """A region cut where chunks end."""
    spans = []
    for part, step in zip(region, entry.chunk_shape, strict=True):
        cuts = [part.start, *range((part.start // step + 1) * step, part.stop, step), part.stop]
        spans.append([slice(*pair) for pair in itertools.pairwise(cuts)])
    return itertools.product(*spans)


class StoreWriter:
    """A store that is being filled; arrays may be written by several threads, each array by one."""

    def __init__(
        self,
        root: StoreRoot,
        origin: Origin,
        specs: Mapping[str, ParamSpec],
        journal: Journal | None,
        min_chunk_bytes: int,
    ) -> None:
        self._root = root
        self._origin = origin
        self._finished = {} if journal is None else journal.finished
        self._journal = journal
        self._writers: dict[str, _ArrayWriter] = {}
        self._entries = {
            path: ArrayEntry(spec.stored_shape, spec.dtype, chunk_shape(spec, min_chunk_bytes), "")
            for path, spec in specs.items()
        }

    @property
    def root(self) -> StoreRoot:
        """Where the store is written."""
        return self._root

    @property
    def unfinished(self) -> list[str]:
        """The arrays that are still to be written, in order; an array that was begun is begun again."""
        return [path for path in self._entries if path not in self._finished]

    def write_part(self, path: str, index: tuple[int, ...], values: np.ndarray) -> None:
        """Write what lies at `index` of an array's leading axes; parts come in C order, the last finishes the array.

        Raises:
          CheckpointError: values are not finite, or cannot be stored; names the array.
        """
        if path not in self._writers:
            self._writers[path] = _ArrayWriter(self._root, path, self._entries[path])
        sha256 = self._writers[path].write(index, values)
        if sha256 is not None:
            del self._writers[path]
            self._note(path, sha256)

    def write_shards(self, path: str, array: jax.Array) -> None:
        """Write what this process' devices hold of an array, each shard once; `seal` finishes the array.

        Places beyond the number of experts hold experts once more: they are left out.

        Raises:
          CheckpointError: values are not finite, or cannot be stored; names the array.
        """
        writer = _ArrayWriter(self._root, path, self._entries[path])
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                start = tuple(part.indices(1 << 62)[0] for part in shard.index)
                room = (max(0, size - first) for first, size in zip(start, self._entries[path].shape, strict=True))
                values = np.asarray(shard.data)[tuple(map(slice, room))]
                if values.size:
                    check_finite(np.asarray(values, order="C"), f"{self._root.url}: {path}")
                    writer.write_region(start, values)

    def seal(self, path: str) -> None:
        """Finish an array of which all shards are written: its SHA-256 comes from what is stored."""
        sha256 = read_sha256(self._root, path, self._entries[path])
        self._note(path, sha256)

    def holds_claim(self) -> bool:
        """Whether what lies at the place is this writer's, and not another's who took over."""
        return self._journal is not None and self._journal.still_stands()

    def _note(self, path: str, sha256: str) -> None:
        assert self._journal is not None, "only the writer that claimed the place finishes arrays"
        self._journal.note(path, sha256)

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Write the files beside the arrays, and the manifest, which makes a store of all this."""
        assert not self.unfinished, self.unfinished
        arrays = {
            path: dataclasses.replace(entry, sha256=self._finished[path])
            for path, entry in sorted(self._entries.items())
        }
        written = {**files, TREE_FILE: to_json(tree_metadata(arrays))}
        for path, entry in arrays.items():
            metadata = zarr_metadata(entry.shape, entry.dtype, entry.chunk_shape)
            written[array_key(path, "zarr.json")] = to_json(metadata)
        for name, content in written.items():
            self._root.write(name, content)
        chunks = {array_key(path, file) for path, entry in arrays.items() for file, _ in entry.chunks()}
        _sweep(self._root, keep=chunks | written.keys())
        manifest = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "source": dict(self._origin.source),
            "dtype": self._origin.dtype,
            "quantization": self._origin.quantization,
            "arrays": {path: array_row(entry) for path, entry in arrays.items()},
            "files": {name: dataclasses.asdict(file_entry(content)) for name, content in written.items()},
        }
        self._root.write(MANIFEST_FILE, to_json(manifest))
        self._root.delete([JOURNAL_FILE])


@contextlib.contextmanager
def open_writer(
    place: Path | str, origin: Origin, specs: Mapping[str, ParamSpec], *, min_chunk_bytes: int = MIN_CHUNK_BYTES
) -> Iterator[StoreWriter | None]:
    """A writer that goes on where one of the same origin was interrupted; None where the store is finished.

    Raises:
      CheckpointError: the place holds something else, or another process writes there.
    """
    root = open_root(place)
    with exclusively(root):
        if is_finished(root, origin):
            _sweep(root)
            root.delete([JOURNAL_FILE])
            yield None
        else:
            yield StoreWriter(root, origin, specs, open_journal(root, origin), min_chunk_bytes)


def _sweep(root: StoreRoot, keep: Collection[str] | None = None) -> None:
    """Remove what a killed writer left: TensorStore's lock files, and files of params/ that no array has."""

    def is_left(name: str) -> bool:
        return is_lock(name) or (keep is not None and name.startswith(f"{PARAMS_FOLDER}/") and name not in keep)

    root.delete(filter(is_left, root.list() or ()))


def save_store(
    place: Path | str,
    params: Mapping[str, Any],
    specs: SpecTree,
    hf_config: Mapping[str, Any],
    files: Mapping[str, Path | bytes],
    *,
    name: str = "saved",
    min_chunk_bytes: int = MIN_CHUNK_BYTES,
) -> None:
    """Writes a store of a tree of arrays to a new or empty place; a save that fails leaves nothing there.

    `specs` are the params' own, `hf_config` becomes config.json, `files` are copied beside it by name
    (generation_config.json, tokenizer.json ...), and `name` says in the manifest what was saved. Every process calls
    it alike, and writes the shards that its devices hold.

    Raises:
      CheckpointError: the place holds something, a name cannot be used, or there is nothing to save.
    """
    leaves, flat_specs = _checked(str(place), params, specs)
    contents = _checked_files(str(place), hf_config, files)
    source = {"name": name, "revision": None, "fingerprint": None}
    origin = Origin(source, _main_dtype(flat_specs), hf_config.get(QUANTIZATION_KEY))
    is_first = jax.process_index() == 0
    claim = open_writer if is_first else _joined_writer
    with claim(place, origin, flat_specs, min_chunk_bytes=min_chunk_bytes) as writer:
        assert writer is not None  # without a fingerprint no store counts as finished
        try:
            _meet("claimed")
            _write_leaves(writer, leaves, is_first)
            if is_first:
                writer.finish(contents)
            _meet("finished")
        except BaseException:
            if is_first and writer.holds_claim():
                _discard(writer.root)
            raise


def _main_dtype(specs: Mapping[str, ParamSpec]) -> str:
    """That of most bytes, but for the integers and narrow floats of quantized weights."""
    num_bytes = Counter[str]()
    for path, spec in specs.items():
        if spec.dtype.itemsize > 1 and not is_beside_values(path):
            num_bytes[str(spec.dtype)] += spec.num_bytes
    return num_bytes.most_common(1)[0][0] if num_bytes else str(next(iter(specs.values())).dtype)


def _write_leaves(writer: StoreWriter, leaves: Mapping[str, Any], is_first: bool) -> None:
    """Arrays that the first process has whole, it writes alone; all processes write the others together."""
    sharded = [path for path, leaf in leaves.items() if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated]
    for path, leaf in leaves.items():
        if path in sharded:
            writer.write_shards(path, leaf)
        elif is_first:
            writer.write_part(path, (), np.asarray(alias(leaf) if isinstance(leaf, jax.Array) else leaf))
    _meet("written")
    for path in sharded if is_first else ():
        writer.seal(path)


@contextlib.contextmanager
def _joined_writer(
    place: Path | str, origin: Origin, specs: Mapping[str, ParamSpec], *, min_chunk_bytes: int
) -> Iterator[StoreWriter]:
    """For the processes that write shards of a store which the first one has claimed."""
    yield StoreWriter(open_root(place), origin, specs, None, min_chunk_bytes)


def _meet(what: str) -> None:
    """Wait for the other processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"millrace-save-{what}")


def _discard(root: StoreRoot) -> None:
    """Remove what a failed save wrote: the place held nothing before."""
    if root.folder is not None:
        shutil.rmtree(root.folder, ignore_errors=True)
    else:
        root.delete(root.list() or ())


def _checked(place: str, params: Mapping[str, Any], specs: SpecTree) -> tuple[dict[str, Any], dict[str, ParamSpec]]:
    """The arrays and their specs by path, found to be what a store can hold."""
    leaves, _ = flatten(params)
    if len(leaves) != len(jax.tree.leaves(params)):
        raise CheckpointError(f"{place}: two params have one path. Keys of params should be without slashes.")
    if not leaves or any("." in path for path in leaves):
        raise CheckpointError(
            f"{place}: params should be nested dicts of arrays with keys without dots; got {list(leaves)[:5]}."
        )
    flat, _ = flatten(specs)
    expected = {path: (spec.shape, spec.dtype) for path, spec in flat.items()}
    found = {path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    if found != expected:
        wrong = sorted(path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path))
        raise CheckpointError(
            f"{place}: {wrong[0]} should be {expected.get(wrong[0])}, as its spec says; got {found.get(wrong[0])}."
        )
    return leaves, flat


def _checked_files(place: str, hf_config: Mapping[str, Any], files: Mapping[str, Path | bytes]) -> dict[str, bytes]:
    """What lies beside the arrays, by name."""
    reserved = (CONFIG_FILE, MANIFEST_FILE, JOURNAL_FILE, LOCK_FILE, PARAMS_FOLDER)
    if wrong := [name for name in files if not name or name in reserved or PurePosixPath(name).name != name]:
        raise CheckpointError(f"{place}: files are plain names other than {', '.join(reserved)}; got {wrong}.")
    contents = {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in files.items()}
    return {CONFIG_FILE: to_json(hf_config), **contents}
