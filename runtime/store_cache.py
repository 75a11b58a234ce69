"""Stores of checkpoints that were opened before: converted on first use, then loaded from here.

A folder each, named by the checkpoint and a digest of all that its store depends on, so that a checkpoint that
changes gets another. Processes that want the same one at once wait for the first.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, ConfigError
from ..models.config import ModelConfig
from ..models.families.quantization import KEY
from ..pallas_kernels.quantized_matmul import WeightFormat
from .checkpoint import Checkpoint
from .config import DEFAULT_STORE_CACHE_DIR, stores_folder
from .convert import fingerprint, source_name, write_store
from .folders import unwritable
from .json_files import read_object
from .spelling import nearest
from .store import Store, open_store
from .store_format import FORMAT_VERSION, MANIFEST_FILE, to_json
from .store_journal import exclusively
from .store_root import open_root

_KEY_LEN = 12


@dataclasses.dataclass(frozen=True)
class CachedStore:
    """A folder of the cache; `source` and `dtype` are None where it was interrupted or is damaged."""

    path: Path
    source: str | None
    dtype: str | None
    num_bytes: int
    age_s: float

    @property
    def name(self) -> str:
        """What `millrace cache` calls it."""
        return self.path.name


def cached_store(
    source: Checkpoint | Store,
    model: ModelConfig,
    dtype: np.dtype,
    cache_dir: Path,
    quantization: WeightFormat | None = None,
    *,
    show_progress: bool,
) -> Store:
    """The store of a checkpoint in `dtype`, converted below `cache_dir` if it is not there; says so on stderr.

    `model` is what its config.json says; `quantization` what its weights, or those of a plain store, are made.

    Raises:
      CheckpointError: the checkpoint cannot be converted, or the cache not written or not trusted; names the options.
    """
    place = cache_dir / _folder_name(source, dtype, quantization)
    try:
        if os.path.lexists(place / MANIFEST_FILE):
            return open_store(place)
        print(
            f"millrace: converting {source.path} into a store, once, in {place} (--no-store loads it directly)",
            file=sys.stderr,
        )
        return write_store(source, model, dtype, place, quantization, show_progress=show_progress)
    except CheckpointError as error:
        if str(place) not in str(error):
            raise  # it is the checkpoint that is wrong
        raise CheckpointError(
            f"{error} This is the cache of converted checkpoints: --store_cache_dir=DIR puts it elsewhere, --no-store "
            f"loads the checkpoint directly, and millrace cache remove {place.name} begins again."
        ) from error


def can_keep(source: Checkpoint | Store, dtype: np.dtype, quantization: WeightFormat | None) -> bool:
    """Whether a checkpoint's store is in the default cache, or can be written there; says on stderr why not."""
    try:
        place = stores_folder(None) / _folder_name(source, dtype, quantization)
        reason = None if os.path.lexists(place / MANIFEST_FILE) else unwritable(place)
    except ConfigError as error:  # there is no home folder
        reason = str(error)
    if reason is not None:
        print(
            f"millrace: {source.path} is loaded directly, which takes longer: its store cannot be written into "
            f"{DEFAULT_STORE_CACHE_DIR} ({reason}); --store_cache_dir=DIR puts it elsewhere",
            file=sys.stderr,
        )
    return reason is None


def _folder_name(source: Checkpoint | Store, dtype: np.dtype, quantization: WeightFormat | None) -> str:
    """The source's name for people, and a digest of all that its store depends on."""
    name = str(source_name(source)["name"]).replace("/", "--")
    parts = {"path": str(source.path), "files": fingerprint(source), "dtype": str(dtype), "version": FORMAT_VERSION}
    declared = source.config.get(KEY) if quantization is None else dataclasses.asdict(quantization)
    if declared is not None:
        parts["quantization"] = declared
    digest = hashlib.sha256(to_json(parts)).hexdigest()
    return f"{name}{'' if quantization is None else f'-{quantization.name}'}-{digest[:_KEY_LEN]}"


def list_cached(cache_dir: Path) -> list[CachedStore]:
    """Every folder of the cache, by name."""
    folders = sorted(folder for folder in cache_dir.iterdir() if folder.is_dir()) if cache_dir.is_dir() else []
    return [_cached(folder) for folder in folders]


def _cached(folder: Path) -> CachedStore:
    manifest_file = folder / MANIFEST_FILE
    manifest, source = _manifest(manifest_file)
    revision = f" at {source['revision']}" if source.get("revision") else ""
    sizes, written_s = [], folder.stat().st_mtime
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a writer's temporary one
            sizes.append(file.stat().st_size if file.is_file() else 0)
            written_s = max(written_s, file.stat().st_mtime if file == manifest_file else 0)
    name = f"{source.get('name')}{revision}" if manifest else None
    return CachedStore(folder, name, manifest.get("dtype"), sum(sizes), max(0.0, time.time() - written_s))


def _manifest(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest and its source; nothing where it is absent or damaged, for such a store must still be removable."""
    try:
        manifest = read_object(file)
        return manifest, dict(manifest.get("source") or {})
    except (CheckpointError, TypeError, ValueError):
        return {}, {}


def find_cached(cache_dir: Path, names: Sequence[str]) -> list[CachedStore]:
    """The folders of these names.

    Raises:
      ConfigError: there is none of a name.
    """
    found = {store.name: store for store in list_cached(cache_dir)}
    for name in names:
        if name not in found:
            raise ConfigError(f"expected the name of a store in {cache_dir}; got {name!r}: {nearest(name, found)}")
    return [found[name] for name in names]


def remove_cached(store: CachedStore) -> None:
    """Remove a folder of the cache, after whoever converts into it."""
    with exclusively(open_root(store.path)):
        shutil.rmtree(store.path)
