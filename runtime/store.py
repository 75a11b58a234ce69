"""Millrace's own checkpoint: TensorStore arrays in the parameter tree's layout, and a manifest that vouches for them.

`store_format` says what is in it, `store_writer` writes it, `store_verify` reads every byte. Opening a store checks
the SHA-256 of all but the chunks; reading checks the CRC32C of each chunk that it touches.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tensorstore

from ..errors import CheckpointError
from ..models.families.quantization import KEY as QUANTIZATION_KEY
from ..sharding.specs import Region
from .checkpoint import CONFIG_FILE, GENERATION_FILE, TOKENIZER_FILES, ModelFiles, read_model_files
from .chunk_files import ChunkFiles
from .json_files import parse_object
from .safetensors_file import aligned_empty
from .store_array import open_array, region_shape, unreadable
from .store_format import (
    FORMAT_NAME,
    FORMAT_VERSION,
    JOURNAL_FILE,
    MANIFEST_FILE,
    ArrayEntry,
    FileEntry,
    array_key,
    file_entry,
    parse_array_entry,
    parse_file_entry,
    to_json,
)
from .store_root import STALL_S, StoreRoot, is_url, open_root

__all__ = ["ArrayEntry", "FileEntry", "PendingRead", "Store", "is_store", "open_store"]

MIRROR_DIR = Path("~/.cache/millrace/files")  # tokenizers want paths: the small files of stores elsewhere
_MIRRORED = (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES)


@dataclasses.dataclass(frozen=True)
class PendingRead:
    """A region on its way into its buffer."""

    _root: StoreRoot
    _path: str
    _region: Region
    _futures: Sequence[Any]  # of TensorStore or of ChunkFiles

    def result(self) -> None:
        """Wait until the buffer is filled, or nothing writes to it any more.

        Raises:
          CheckpointError: names the array, the region and the cause: damage, a missing chunk, permissions ...
        """
        errors = [error for future in self._futures if (error := self._wait(future)) is not None]
        if errors:
            raise unreadable(self._root, self._path, self._region, errors[0]) from errors[0]

    def _wait(self, future: Any) -> ValueError | OSError | None:
        try:
            future.result(timeout=None if self._root.folder is not None else STALL_S)
        except TimeoutError:
            return OSError(f"nothing came for {STALL_S:.0f} s")
        except (ValueError, OSError) as error:
            return error
        return None


@dataclasses.dataclass(frozen=True)
class Store(ModelFiles):
    """A store whose manifest, files and array metadata agree; the weights are still where they lie.

    `path` is the local folder of config.json and the tokenizer: the store itself, or a mirror of these.
    """

    root: StoreRoot
    arrays: Mapping[str, ArrayEntry]  # by parameter path
    files: Mapping[str, FileEntry]  # all but the chunks, by path below the store
    source: Mapping[str, Any]  # name, revision and fingerprint of what was converted
    dtype: str
    quantization: Mapping[str, Any] | None
    direct_io: bool = False  # past the page cache
    _opened: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where the store lies, as errors show it."""
        return self.root.url

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(entry.num_bytes for entry in self.arrays.values())

    def with_direct_io(self) -> Self:
        """The same store, read past the page cache."""
        return dataclasses.replace(self, direct_io=True, _opened={})

    def is_cached(self) -> bool:
        """Whether the page cache holds the arrays, as far as a look at each array's first and last chunk tells."""
        if self.root.folder is None or not hasattr(os, "RWF_NOWAIT"):
            return True
        ends = ((list(entry.chunks())[index][0], path) for path, entry in self.arrays.items() for index in (0, -1))
        return all(_in_page_cache(self.root.folder / array_key(path, file)) for file, path in ends)

    def read(self, path: str, region: Region) -> np.ndarray:
        """A region of one array, in a fresh buffer; reading different regions at once is fine.

        Raises:
          CheckpointError: see PendingRead.result.
        """
        entry = self.arrays[path]
        shape = region_shape(region)
        out = aligned_empty(math.prod(shape) * entry.dtype.itemsize).view(entry.dtype).reshape(shape)
        self.start_read(path, region, out).result()
        return out

    def start_read(self, path: str, region: Region, out: np.ndarray) -> PendingRead:
        """Begin to read a region straight into `out`, which has its shape and the stored dtype; several at once.

        Raises:
          CheckpointError: the array cannot be opened.
        """
        entry = self.arrays[path]
        assert out.dtype == entry.dtype, f"{path} is {entry.dtype}, the buffer {out.dtype}"
        if self.root.folder is not None:
            folder = self.root.folder / array_key(path, "")
            futures: Sequence[Any] = self._chunk_files.start_read(folder, entry, region, out)
        else:
            futures = [tensorstore.array(out).write(self._array(path)[region])]
        return PendingRead(self.root, path, region, futures)

    @functools.cached_property
    def _chunk_files(self) -> ChunkFiles:
        return ChunkFiles(direct=self.direct_io)

    def _array(self, path: str) -> Any:
        """The array, opened once; two threads that open it at the same time open equal ones."""
        if path not in self._opened:
            self._opened[path] = open_array(self.root, path, self.arrays[path])
        return self._opened[path]


def _in_page_cache(file: Path) -> bool:
    """Whether a file's middle can be read without the disk; True where the file system cannot say."""
    try:
        fd = os.open(file, os.O_RDONLY)
    except OSError:
        return True  # reading will say what is wrong
    try:
        os.preadv(fd, [bytearray(1)], os.fstat(fd).st_size // 2, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        os.close(fd)
    return True


def is_store(place: Path | str) -> bool:
    """Whether this claims to be a store, finished or not; `open_store` says whether it is a sound one."""
    return is_url(place) or any(os.path.lexists(Path(place) / name) for name in (MANIFEST_FILE, JOURNAL_FILE))


def open_store(place: Path | str, *, direct_io: bool = False, mirror_dir: Path = MIRROR_DIR) -> Store:
    """Opens the store at a path or URL and checks all that can be checked without reading the weights.

    The small files of a store that is not a local folder are copied below `mirror_dir`, by content.

    Raises:
      CheckpointError: what is wrong, where, and what would mend it.
    """
    root = open_root(place)
    manifest = _read_manifest(root)
    where = f"{root.url}/{MANIFEST_FILE}"
    files = {name: parse_file_entry(where, name, row) for name, row in _table(manifest, "files", where).items()}
    contents = _read_files(root, files)
    arrays = {}
    for path, row in _table(manifest, "arrays", where).items():
        name = array_key(path, "zarr.json")
        if name not in files:
            raise CheckpointError(f"{where}: should list {name}; it does not. Convert the model again.")
        arrays[path] = parse_array_entry(root.url, path, row, parse_object(contents[name], f"{root.url}/{name}"))
    if not arrays:
        raise CheckpointError(f"{where}: expected arrays; it lists none. Save the store again.")
    if CONFIG_FILE not in files:
        raise CheckpointError(f"{where}: should list {CONFIG_FILE}; it does not. Convert the model again.")
    source, quantization = manifest.get("source"), manifest.get("quantization")
    is_known = manifest.get("dtype") in {str(entry.dtype) for entry in arrays.values()}
    declared = parse_object(contents[CONFIG_FILE], f"{root.url}/{CONFIG_FILE}").get(QUANTIZATION_KEY)
    if not isinstance(source, dict) or not is_known or quantization != declared:
        raise CheckpointError(
            f"{where}: expected source, the arrays' dtype and the quantization of {CONFIG_FILE}, {declared!r:.80}; got "
            f"{source!r:.80}, {manifest.get('dtype')!r:.80} and {quantization!r:.80}. Convert the model again with "
            "this version."
        )
    model = read_model_files(root.folder or _mirror(contents, mirror_dir.expanduser()))
    return Store(
        model.path,
        model.config,
        model.generation_config,
        {name: file for name, file in model.tokenizer_files.items() if name in files},
        root=root,
        arrays=arrays,
        files=files,
        source=source,
        dtype=manifest["dtype"],
        quantization=quantization,
        direct_io=direct_io,
    )


def _read_manifest(root: StoreRoot) -> dict[str, Any]:
    """The manifest of a store of this format."""
    content = root.read([MANIFEST_FILE])[MANIFEST_FILE]
    if content is None:
        if root.read([JOURNAL_FILE])[JOURNAL_FILE] is not None:
            raise CheckpointError(
                f"{root.url}: an interrupted conversion, or one that still runs: run millrace convert again, it "
                "resumes."
            )
        raise CheckpointError(f"{root.url}: expected a store; there is no {MANIFEST_FILE}. Check the address.")
    where = f"{root.url}/{MANIFEST_FILE}"
    manifest = parse_object(content, where)
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMAT_NAME, FORMAT_VERSION):
        is_newer = found[0] == FORMAT_NAME and isinstance(found[1], int) and found[1] > FORMAT_VERSION
        mend = "A newer Millrace wrote it: update this one" if is_newer else "Convert the model again"
        raise CheckpointError(
            f"{where}: expected format {FORMAT_NAME} version {FORMAT_VERSION}; got {found[0]!r:.80} version "
            f"{found[1]!r:.80}. {mend}."
        )
    return manifest


def _table(manifest: Mapping[str, Any], key: str, where: str) -> dict[str, Mapping[str, Any]]:
    """One of the manifest's objects of objects."""
    table = manifest.get(key)
    if not isinstance(table, dict) or not all(isinstance(value, dict) for value in table.values()):
        raise CheckpointError(f"{where}: {key} should be an object of objects; got {table!r:.80}.")
    return table


def _read_files(root: StoreRoot, files: Mapping[str, FileEntry]) -> dict[str, bytes]:
    """Every file that is not a chunk, found to be the one that was saved."""
    contents: dict[str, bytes] = {}
    for name, content in root.read(files).items():
        expected = files[name]
        if content is None:
            raise CheckpointError(f"{root.url}/{name}: expected a file; there is none. Fetch the store again.")
        if file_entry(content) != expected:
            raise CheckpointError(
                f"{root.url}/{name}: expected {expected.num_bytes} bytes of SHA-256 {expected.sha256}; got "
                f"{len(content)} of {file_entry(content).sha256}. It was damaged, or replaced by another model's, "
                "after the store was saved: fetch the store again."
            )
        contents[name] = content
    return contents


def _mirror(contents: Mapping[str, bytes], mirror_dir: Path) -> Path:
    """A local folder, named by its content, of the files that want a path."""
    wanted = {name: contents[name] for name in _MIRRORED if name in contents}
    folder = mirror_dir / file_entry(to_json({name: file_entry(wanted[name]).sha256 for name in wanted})).sha256[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in wanted.items():
            file = folder / name
            if not file.is_file() or file.read_bytes() != content:
                partial = file.with_name(f".{name}.{os.getpid()}")
                partial.write_bytes(content)
                os.replace(partial, file)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error}). Mend its permissions or make room.") from error
    return folder
