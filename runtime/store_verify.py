"""Every byte of a store compared with its manifest: all faults, not only the first."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..sharding.specs import Region
from .byte_bar import byte_bar
from .param_tree import flatten
from .store import Store, open_store
from .store_format import JOURNAL_FILE, LOCK_FILE, MANIFEST_FILE, PARAMS_FOLDER, array_key

_NUM_READERS = 4


def verify_store(place: Path | str, *, show_progress: bool) -> list[str]:
    """What is wrong with a store, a line each: chunks, digests of arrays and files, files that nothing lists."""
    try:
        store = open_store(place)
    except CheckpointError as error:
        return [str(error)]
    is_stopped = threading.Event()
    with (
        byte_bar("Verifying", store.num_bytes, show=show_progress) as advance,
        ThreadPoolExecutor(_NUM_READERS) as readers,
    ):

        def on_bytes(num_bytes: int) -> None:
            advance(num_bytes)
            if is_stopped.is_set():
                raise CancelledError

        faults = readers.map(lambda path: _array_faults(store, path, on_bytes), store.arrays)
        try:
            return [*(fault for found in faults for fault in found), *_tree_faults(store), *_extra_files(store)]
        except BaseException:
            is_stopped.set()
            raise


def _array_faults(store: Store, path: str, on_bytes: Callable[[int], None]) -> list[str]:
    """Every chunk of an array that cannot be read; where all can, whether they are those that were saved."""
    entry, digest, faults = store.arrays[path], hashlib.sha256(), []
    for region in entry.slabs():
        try:
            values = store.read(path, region)
        except CheckpointError:
            faults += _chunk_faults(store, path, region)
            continue
        digest.update(values.reshape(-1).view("u1").data)
        on_bytes(values.nbytes)
    if not faults and digest.hexdigest() != entry.sha256:
        faults.append(
            f"{store.url}: {path}: expected values of SHA-256 {entry.sha256}; got {digest.hexdigest()}. They are "
            "another model's, or were written again: fetch the store again."
        )
    return faults


def _chunk_faults(store: Store, path: str, region: Region) -> list[str]:
    """What is wrong with each chunk of a region."""
    faults = []
    for _, chunk in store.arrays[path].chunks():
        if all(part.start <= c.start < part.stop for part, c in zip(region, chunk, strict=True)):
            try:
                store.read(path, chunk)
            except CheckpointError as error:
                faults.append(str(error))
    return faults


def _tree_faults(store: Store) -> list[str]:
    """Arrays that Orbax, which knows nothing of the manifest, does not find as the manifest lists them."""
    import orbax.checkpoint as ocp  # here, because a start-up without it is seconds faster

    if store.root.folder is None:
        return []
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    try:
        leaves, _ = flatten(handler.metadata(store.root.folder / PARAMS_FOLDER).tree)
    except (ValueError, OSError) as error:
        return [f"{store.url}/{PARAMS_FOLDER}: Orbax cannot read its tree ({error}). Convert the model again."]
    finally:
        handler.close()
    found = {path: (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in leaves.items()}
    listed = {path: (entry.shape, entry.dtype) for path, entry in store.arrays.items()}
    return [
        f"{store.url}: {path}: the manifest has shape and dtype {listed.get(path)}; Orbax finds {found.get(path)}. "
        "Convert the model again."
        for path in sorted(listed.keys() | found.keys())
        if listed.get(path) != found.get(path)
    ]


def _extra_files(store: Store) -> list[str]:
    """Files that are no part of the store."""
    chunks = (array_key(path, file) for path, entry in store.arrays.items() for file, _ in entry.chunks())
    known = {*store.files, *chunks, MANIFEST_FILE, JOURNAL_FILE, LOCK_FILE}  # a killed or a waiting writer's last two
    return [
        f"{store.url}/{name}: expected only files that the manifest lists; it does not list this one. Remove it."
        for name in sorted((store.root.list() or known) - known)
    ]
