"""A store, written as a Hugging Face directory: `millrace export`.

Tensors have the names and layouts of the family's published checkpoints. They are read, laid out and written one after
the other, so that the host holds one of them at a time. All goes into a folder beside the destination, which gets its
name once it is whole: a reader never sees half.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np

from ..errors import CheckpointError
from ..models.decoder import AbstractDecoder
from ..models.families import config_from_hf
from ..models.families.export import ExportPart, ExportTensor, export_config, export_plan
from ..models.quantization import format_paths
from ..pallas_kernels.quantized_matmul import WeightFormat
from ..sharding.specs import ParamSpec, whole_region
from .byte_bar import byte_bar
from .checkpoint import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from .param_tree import flatten
from .quantizing import dequantize_into
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

    Quantized weights are dequantized, which is said on stderr.

    Raises:
      CheckpointError: the destination holds something or cannot be written, the disk is full, or the store is damaged
        or unlike its config.
    """
    model = config_from_hf(dict(store.config))
    specs, _ = flatten(AbstractDecoder(model, jnp.dtype(store.dtype)).specs)
    check_store(store, specs)
    weights = _Weights(store, format_paths(model))
    shards = _split(weights, export_plan(model, _plain_shapes(specs, weights.formats)), max_shard_bytes)
    total = sum(weights.num_bytes(tensor) for tensors in shards.values() for tensor in tensors)
    if weights.formats:
        formats = ", ".join(sorted({format.name for format in weights.formats.values()}))
        print(f"millrace: weights in {formats} are exported as the {store.dtype} that they stand for", file=sys.stderr)
    with (
        _new_folder(destination, total) as (partial, folder),
        byte_bar("Exporting weights", total, show=show_progress) as advance,
    ):
        _write_small_files(store, partial, shards, total)
        for name, tensors in shards.items():
            with (partial / name).open("xb") as file:
                _write_shard(weights, tensors, file, advance)
    return folder


def _plain_shapes(specs: Mapping[str, ParamSpec], formats: Mapping[str, WeightFormat]) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters by path, once all are plain."""
    shapes = {}
    for path, spec in specs.items():
        projection, _, leaf = path.rpartition("/")
        format = formats.get(projection)
        if format is None or leaf == "bias":
            shapes[path] = spec.shape
        elif leaf == "weight":
            *lead, stored = spec.shape
            shapes[path] = (*lead, stored * 2 if format.is_packed else stored)
    return shapes


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


def _write_small_files(store: Store, folder: Path, shards: dict[str, list[ExportTensor]], total: int) -> None:
    """The config, the index where there are several shards, and all that lies beside the store's weights."""
    names = [name for name in store.files if not name.startswith(f"{PARAMS_FOLDER}/")]
    files = {**store.root.read(names), CONFIG_FILE: to_json(export_config(store.config, store.dtype))}
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
        files[INDEX_FILE] = to_json({"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)


def _split(weights: "_Weights", tensors: Sequence[ExportTensor], max_bytes: int) -> dict[str, list[ExportTensor]]:
    """The tensors of each file, by its name."""
    shards: list[list[ExportTensor]] = []
    room = 0
    for tensor in tensors:
        num_bytes = weights.num_bytes(tensor)
        if not shards or num_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= num_bytes
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def _write_shard(
    weights: "_Weights", tensors: Sequence[ExportTensor], file: BinaryIO, on_bytes: Callable[[int], object]
) -> None:
    """One safetensors file (the format: `safetensors_file`). Its library would want all the tensors in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers wants to know who wrote it
    stop = 0
    for tensor in tensors:
        start, stop = stop, stop + weights.num_bytes(tensor)
        row = {"dtype": _DTYPE_NAMES[weights.dtype(tensor)], "shape": tensor.shape, "data_offsets": (start, stop)}
        header[tensor.name] = row
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-(8 + len(content)) % _DATA_ALIGNMENT)
    file.write(len(content).to_bytes(8, "little"))
    file.write(content)
    for tensor in tensors:
        values = weights.read(tensor)
        file.write(values.reshape(-1).view(np.uint8).data)
        on_bytes(values.nbytes)


@dataclasses.dataclass(frozen=True)
class _Weights:
    """A store's weights as the tensors of a checkpoint without quantization."""

    store: Store
    formats: Mapping[str, WeightFormat]  # by the path of a quantized projection

    def dtype(self, tensor: ExportTensor) -> np.dtype:
        """Of the tensor as it is exported."""
        path = tensor.parts[0].path
        is_quantized = path.rpartition("/")[0] in self.formats and path.endswith("/weight")
        return np.dtype(jnp.dtype(self.store.dtype)) if is_quantized else self.store.arrays[path].dtype

    def num_bytes(self, tensor: ExportTensor) -> int:
        """Of the tensor as it is exported."""
        return math.prod(tensor.shape) * self.dtype(tensor).itemsize

    def read(self, tensor: ExportTensor) -> np.ndarray:
        """The tensor, its parts read at once, each straight into its place."""
        values = np.empty(tensor.shape, self.dtype(tensor))
        pending = []
        for part in tensor.parts:
            place, format = part.place(values), self.formats.get(part.path.rpartition("/")[0])
            if format is not None and part.path.endswith("/weight"):
                self._dequantize(part, place, format)
                continue
            region = (*(slice(i, i + 1) for i in part.index), *whole_region(place.shape))
            pending.append(self.store.start_read(part.path, region, place[(None,) * len(part.index)]))
        for read in pending:
            read.result()
        return values

    def _dequantize(self, part: ExportPart, place: np.ndarray, format: WeightFormat) -> None:
        """Fill the place of a weight with what its arrays stand for."""
        prefix = part.path.removesuffix("weight")
        arrays = {}
        for name in ("weight", "scales", "zeros", "global_scale", "offsets"):
            entry = self.store.arrays.get(prefix + name)
            if entry is not None:
                region = (*(slice(i, i + 1) for i in part.index), *whole_region(entry.shape[len(part.index) :]))
                stored = self.store.read(prefix + name, region)
                arrays[name] = stored.reshape(stored.shape[len(part.index) :])
        dequantize_into(place, arrays, format)
