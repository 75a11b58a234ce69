"""A checkpoint or store, written as a store: `millrace convert`, and what the first use of a checkpoint does.

Several arrays are on their way at once, each part by part: read, laid out and converted by the code that loads them,
hashed and written. What they hold together is bounded, so the host needs little more than the largest tensor.
"""

import contextlib
import hashlib
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ..errors import CheckpointError
from ..models.config import ModelConfig
from ..models.decoder import AbstractDecoder
from ..models.families import config_from_hf, tensor_plan
from ..models.families.plan import LeafPlan
from ..sharding.specs import ParamSpec
from .byte_bar import byte_bar
from .checkpoint import CONFIG_FILE, GENERATION_FILE, Checkpoint, locate
from .param_tree import flatten
from .store import Store, open_store
from .store_format import MANIFEST_FILE, PARAMS_FOLDER, to_json
from .store_journal import Origin
from .store_root import is_disk_full
from .store_writer import StoreWriter, open_writer
from .weights import Leaf, check_store, checkpoint_leaves, store_leaves
from .weights import convert as to_dtype

_NUM_WORKERS = 4
_BUDGET_BYTES = 384 << 20  # of parts on their way; a larger one goes alone


class _Budget:
    """A bound on the bytes that threads hold together."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._held = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Wait until there is room; what is larger than the budget waits until nothing else is held."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + num_bytes <= self._num_bytes)
            self._held += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= num_bytes
                self._changed.notify_all()


def convert(
    source: Checkpoint | Store, place: Path | str, *, dtype: np.dtype | None = None, show_progress: bool = True
) -> Store:
    """The store of `source` at a path or URL, in `dtype` or the model's own; an interrupted conversion goes on.

    A place that holds this conversion already is left as it is, which is said on stderr.

    Raises:
      CheckpointError: the source is damaged or unlike its config, the place holds something else, the disk is full.
    """
    model = config_from_hf(dict(source.config))
    own_dtype = source.dtype if isinstance(source, Store) else model.dtype
    return write_store(source, model, dtype or np.dtype(jnp.dtype(own_dtype)), place, show_progress=show_progress)


def write_store(
    source: Checkpoint | Store, model: ModelConfig, dtype: np.dtype, place: Path | str, *, show_progress: bool
) -> Store:
    """`convert`, for who knows the model's config and the dtype."""
    specs, _ = flatten(AbstractDecoder(model, jnp.dtype(dtype)).specs)
    leaves = list(_leaves(source, model, specs))
    origin = Origin({**source_name(source), "fingerprint": fingerprint(source)}, str(dtype))
    with open_writer(place, origin, specs) as writer:
        if writer is None:
            print(f"millrace: {place} holds this conversion already: nothing to do", file=sys.stderr)
        else:
            wanted = set(writer.unfinished)
            unfinished = [(leaf, num_read) for leaf, num_read in leaves if leaf.path in wanted]
            _check_room(writer, sum(leaf.spec.num_bytes for leaf, _ in unfinished))
            _write_all(writer, unfinished, sum(spec.num_bytes for spec in specs.values()), show_progress)
            writer.finish(_files(source))
    return open_store(place)


def source_name(source: Checkpoint | Store) -> dict[str, str | None]:
    """What the manifest calls a source: a folder's name, or a repository of the hub and its commit; never a path."""
    if isinstance(source, Store):
        return {"name": source.url.rsplit("/", 1)[-1], "revision": None}
    snapshots = source.path.parent
    repository = snapshots.parent.name
    if snapshots.name == "snapshots" and repository.startswith("models--"):
        return {"name": repository.removeprefix("models--").replace("--", "/"), "revision": source.path.name}
    return {"name": source.path.name, "revision": None}


def fingerprint(source: Checkpoint | Store) -> str:
    """A digest that changes when the source does: of a store's manifest; of a checkpoint's files, but for content."""
    if isinstance(source, Store):
        return hashlib.sha256(source.root.read([MANIFEST_FILE])[MANIFEST_FILE] or b"").hexdigest()
    files = {shard.path for shard in source.shards.values()} | set(source.tokenizer_files.values())
    files |= {locate(source.path, name) for name in _configs(source)}
    stats = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return hashlib.sha256(to_json({"files": stats})).hexdigest()


def _configs(source: Checkpoint) -> list[str]:
    return [name for name in (CONFIG_FILE, GENERATION_FILE) if os.path.lexists(source.path / name)]


def _files(source: Checkpoint | Store) -> dict[str, bytes]:
    """What lies beside the weights, by name."""
    if isinstance(source, Store):
        names = [name for name in source.files if not name.startswith(f"{PARAMS_FOLDER}/")]
        return {name: content for name, content in source.root.read(names).items() if content is not None}
    files = {name: locate(source.path, name) for name in _configs(source)} | dict(source.tokenizer_files)
    return {name: file.read_bytes() for name, file in files.items()}


def _leaves(
    source: Checkpoint | Store, model: ModelConfig, specs: Mapping[str, ParamSpec]
) -> Iterator[tuple[Leaf, list[int]]]:
    """Each leaf, with the bytes that are read for each of its parts."""
    if isinstance(source, Store):
        check_store(source, specs)
        for leaf in store_leaves(source, specs, whole=False):
            yield leaf, [source.arrays[leaf.path].num_bytes // len(leaf.parts)] * len(leaf.parts)
        return
    plan: Mapping[str, LeafPlan] = tensor_plan(model, source.tensor_names)
    for leaf in checkpoint_leaves(source, plan, specs):
        tensors = [piece.names for piece in plan[leaf.path].pieces]
        yield leaf, [sum(math.prod(source.shape(n)) * source.dtype(n).itemsize for n in names) for names in tensors]


def _check_room(writer: StoreWriter, num_bytes: int) -> None:
    """Raise CheckpointError if the disk cannot hold what is still to be written."""
    folder = writer.root.folder
    if folder is None:
        return
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise CheckpointError(
            f"{folder}: {num_bytes:,} bytes are still to be written; the disk has {free:,} free. Make room and run it "
            "again: it resumes."
        )


def _write_all(writer: StoreWriter, leaves: list[tuple[Leaf, list[int]]], total: int, show_progress: bool) -> None:
    """Every part of the leaves, several leaves at once; a bar on stderr counts bytes."""
    budget, is_stopped = _Budget(_BUDGET_BYTES), threading.Event()
    done_bytes = total - sum(leaf.spec.num_bytes for leaf, _ in leaves)
    with (
        byte_bar("Converting weights", total, show=show_progress, done=done_bytes) as advance,
        ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="millrace-convert") as workers,
    ):
        pending = [
            workers.submit(_write_leaf, writer, leaf, num_read, budget, is_stopped, advance)
            for leaf, num_read in leaves
        ]
        try:
            for done in as_completed(pending):
                done.result()
        except BaseException as error:
            is_stopped.set()
            workers.shutdown(wait=False, cancel_futures=True)
            if is_disk_full(error.__cause__):
                raise CheckpointError(f"{error} The arrays take {total:,} bytes in all.") from error.__cause__
            raise


def _write_leaf(
    writer: StoreWriter,
    leaf: Leaf,
    num_read: list[int],
    budget: _Budget,
    is_stopped: threading.Event,
    on_bytes: Callable[[int], None],
) -> None:
    """One array, part by part."""
    for part, read_bytes in zip(leaf.parts, num_read, strict=True):
        if is_stopped.is_set():
            return
        shape = leaf.spec.shape[len(part.index) :]
        part_bytes = math.prod(shape) * leaf.spec.dtype.itemsize
        with budget.hold(read_bytes + part_bytes):
            values = part.read([tuple(slice(0, size) for size in shape)])[0]
            writer.write_part(leaf.path, part.index, to_dtype(values, leaf.spec.dtype, leaf.path))
        on_bytes(part_bytes)
