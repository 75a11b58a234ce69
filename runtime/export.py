"""A store, written as a Hugging Face directory: `millrace export`.

Tensors have the names and layouts of the family's published checkpoints. They are read, laid out and written one after
the other, so that the host holds one of them at a time. All goes into a folder beside the destination, which gets its
name once it is whole: a reader never sees half.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np

from ..errors import CheckpointError
from ..models.decoder import AbstractDecoder
from ..models.families import config_from_hf
from ..models.families.export import ExportTensor, export_config, export_plan
from .byte_bar import byte_bar
from .checkpoint import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from .param_tree import flatten
from .safetensors_file import DTYPES
from .store import Store
from .store_format import PARAMS_FOLDER, to_json
from .store_root import is_url, remedy
from .weights import check_store

MAX_SHARD_BYTES = 2_000_000_000  # of one file's tensors; a larger tensor has a file of its own
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DATA_ALIGNMENT = 64  # the format asks for 8; who maps the file into memory computes on it where it lies


def export(
    store: Store, destination: Path | str, *, max_shard_bytes: int = MAX_SHARD_BYTES, show_progress: bool = True
) -> Path:
    """The Hugging Face directory of a store, written to a new or empty folder; one that fails leaves nothing there.

    Raises:
      CheckpointError: the destination holds something or cannot be written, the disk is full, or the store is damaged
        or unlike its config.
    """
    model = config_from_hf(dict(store.config))
    specs, _ = flatten(AbstractDecoder(model, jnp.dtype(store.dtype)).specs)
    check_store(store, specs)
    shards = _split(store, export_plan(model, {path: spec.shape for path, spec in specs.items()}), max_shard_bytes)
    with (
        _new_folder(destination, store.num_bytes) as (partial, folder),
        byte_bar("Exporting weights", store.num_bytes, show=show_progress) as advance,
    ):
        _write_small_files(store, partial, shards)
        for name, tensors in shards.items():
            with (partial / name).open("xb") as file:
                _write_shard(store, tensors, file, advance)
    return folder


@contextlib.contextmanager
def _new_folder(destination: Path | str, num_bytes: int) -> Iterator[tuple[Path, Path]]:
    """A folder to fill and the destination, whose name it gets at the end; it must have room for `num_bytes`."""
    if is_url(destination):
        raise CheckpointError(f"{destination}: a checkpoint is exported to a folder; this is a URL. Name a folder.")
    folder = Path(destination).expanduser().resolve()
    try:
        if folder.exists() and (not folder.is_dir() or os.path.ismount(folder) or any(folder.iterdir())):
            raise CheckpointError(
                f"{folder}: a checkpoint is exported to a new or empty folder; this one holds something, or is no "
                "plain folder. Choose another destination."
            )
        parent = next(each for each in folder.parents if each.exists())
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=parent) as scratch:
            _check_room(parent, num_bytes)
            partial = Path(scratch) / folder.name
            partial.mkdir()
            yield partial, folder
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error}). {remedy(error)}") from error


def _check_room(parent: Path, num_bytes: int) -> None:
    """Raise OSError if the disk cannot hold the weights: better than after an hour."""
    free = shutil.disk_usage(parent).free
    if num_bytes > free:
        raise OSError(
            errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {num_bytes:,} bytes are to be written, {free:,} free"
        )


def _write_small_files(store: Store, folder: Path, shards: dict[str, list[ExportTensor]]) -> None:
    """The config, the index where there are several shards, and all that lies beside the store's weights."""
    names = [name for name in store.files if not name.startswith(f"{PARAMS_FOLDER}/")]
    files = {**store.root.read(names), CONFIG_FILE: to_json(export_config(store.config, store.dtype))}
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
        files[INDEX_FILE] = to_json({"metadata": {"total_size": store.num_bytes}, "weight_map": weight_map})
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)


def _split(store: Store, tensors: Sequence[ExportTensor], max_bytes: int) -> dict[str, list[ExportTensor]]:
    """The tensors of each file, by its name."""
    shards: list[list[ExportTensor]] = []
    room = 0
    for tensor in tensors:
        num_bytes = _num_bytes(store, tensor)
        if not shards or num_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= num_bytes
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def _write_shard(
    store: Store, tensors: Sequence[ExportTensor], file: BinaryIO, on_bytes: Callable[[int], object]
) -> None:
    """One safetensors file (the format: `safetensors_file`). Its library would want all the tensors in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers wants to know who wrote it
    stop = 0
    for tensor in tensors:
        start, stop = stop, stop + _num_bytes(store, tensor)
        row = {"dtype": _DTYPE_NAMES[_dtype(store, tensor)], "shape": tensor.shape, "data_offsets": (start, stop)}
        header[tensor.name] = row
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-(8 + len(content)) % _DATA_ALIGNMENT)
    file.write(len(content).to_bytes(8, "little"))
    file.write(content)
    for tensor in tensors:
        values = _read(store, tensor)
        file.write(values.reshape(-1).view(np.uint8).data)
        on_bytes(values.nbytes)


def _read(store: Store, tensor: ExportTensor) -> np.ndarray:
    """The tensor, its parts read at once, each straight into its place."""
    values = np.empty(tensor.shape, _dtype(store, tensor))
    pending = []
    for part in tensor.parts:
        place = part.place(values)
        region = (*(slice(i, i + 1) for i in part.index), *(slice(0, size) for size in place.shape))
        pending.append(store.start_read(part.path, region, place[(None,) * len(part.index)]))
    for read in pending:
        read.result()
    return values


def _dtype(store: Store, tensor: ExportTensor) -> np.dtype:
    return store.arrays[tensor.parts[0].path].dtype


def _num_bytes(store: Store, tensor: ExportTensor) -> int:
    return math.prod(tensor.shape) * _dtype(store, tensor).itemsize
