"""Writes stores (see `store`) with Orbax. Apart from reading, so that a start-up never imports Orbax.

Stacked arrays above CHUNK_BYTES get at least one file per layer, so that layers and shards can be read apart. What
Orbax adds beside `_METADATA` holds times and paths; it is dropped, so that equal weights make equal bytes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import orbax.checkpoint as ocp

from ..errors import CheckpointError
from .checkpoint import CONFIG_FILE
from .param_tree import flatten
from .store import FORMAT_NAME, FORMAT_VERSION, MANIFEST_FILE, PARAMS_FOLDER, array_folder

CHUNK_BYTES = 64 << 20
_DROPPED = ("_CHECKPOINT_METADATA", "_sharding", "array_metadatas", "commit_success.txt")


def save_store(
    path: Path | str, params: Mapping[str, Any], hf_config: Mapping[str, Any], files: Mapping[str, Path | bytes]
) -> None:
    """Writes a store to a new or empty directory, from one process; it appears there whole or not at all.

    `params` is a nested dict of arrays, `hf_config` becomes config.json, and `files` are copied beside it by name
    (generation_config.json, tokenizer.json ...).

    Raises:
      CheckpointError: the directory holds something, a name cannot be used, or there is nothing to save.
    """
    path = Path(os.path.abspath(path))
    leaves, _ = flatten(params)
    if len(leaves) != len(jax.tree.leaves(params)):
        raise CheckpointError(f"{path}: two params have one path. Keys of params should be without slashes.")
    _check_names(path, list(leaves), list(files))
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _save_arrays(partial / PARAMS_FOLDER, params)
        _write_json(partial / CONFIG_FILE, hf_config)
        for name, content in files.items():
            (partial / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        _write_json(partial / MANIFEST_FILE, _manifest(partial / PARAMS_FOLDER, leaves))
        os.replace(partial, path)  # works on an empty directory
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_names(path: Path, array_paths: list[str], file_names: list[str]) -> None:
    """Everything that would make a store which cannot be read back."""
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path}: a store is saved to a new or empty directory; this one holds something.")
    folders = [array_folder(name) for name in array_paths]
    if not folders or len(set(folders)) < len(folders) or any("." in name for name in array_paths):
        raise CheckpointError(
            f"{path}: params should be nested dicts of arrays with keys without dots; got {folders[:5]}."
        )
    reserved = (CONFIG_FILE, MANIFEST_FILE, PARAMS_FOLDER)
    if wrong := [name for name in file_names if not name or name in reserved or PurePosixPath(name).name != name]:
        raise CheckpointError(f"{path}: files are plain names other than {', '.join(reserved)}; got {wrong}.")


def _save_arrays(folder: Path, params: Mapping[str, Any]) -> None:
    def save_args(leaf: Any) -> ocp.SaveArgs:
        if leaf.nbytes <= CHUNK_BYTES:
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if leaf.ndim > 2 else ())

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(params, save_args=jax.tree.map(save_args, params)))
    for name in _DROPPED:
        extra = folder / name
        shutil.rmtree(extra) if extra.is_dir() else extra.unlink(missing_ok=True)


def _manifest(folder: Path, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """See `store`; sorted, so that equal stores have equal manifests."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "arrays": {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in leaves.items()},
        "files": {
            file.relative_to(folder).as_posix(): {"num_bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in files
        },
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
