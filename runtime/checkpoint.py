"""Hugging Face directories: everything in them that can be wrong is looked for before any weight is placed.

Read are config.json, generation_config.json, model.safetensors or the shards of model.safetensors.index.json,
and the tokenizer's files. Python files are never read, let alone run, whatever `auto_map` says; pickle files
(*.bin, *.pt) are never opened.

Links: a file may be a link to a file inside the same directory, or into the `blobs` folder of the Hugging Face
cache that holds the directory. A link to anywhere else is refused: a checkpoint from somebody else should not
choose which of this machine's files are read.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..models.config import ModelConfig
from ..models.families import tensor_plan
from ..models.families.plan import LeafPlan
from .json_files import read_object
from .safetensors_file import TensorFile, open_safetensors
from .tokenizer import Tokenizer, load_tokenizer

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """What a directory says about its model, besides the weights. Without generation_config.json that is empty."""

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer_files: Mapping[str, Path]  # those of TOKENIZER_FILES that exist, by name

    def load_tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None where there is none.

        Raises:
          CheckpointError: it cannot be read.
        """
        return load_tokenizer(self.path)


@dataclasses.dataclass(frozen=True)
class Checkpoint(ModelFiles):
    """A Hugging Face directory that was found sound; the weights are still on disk. A GGUF: `gguf_checkpoint`."""

    shards: Mapping[str, TensorFile]  # by tensor name

    @property
    def tensor_names(self) -> frozenset[str]:
        """Every tensor that can be read."""
        return frozenset(self.shards)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from its file's header."""
        return self.shards[name].tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The tensor's dtype, from its file's header."""
        return self.shards[name].tensors[name].dtype

    def num_bytes(self, name: str) -> int:
        """Bytes of the tensor on disk."""
        return self.shards[name].tensors[name].num_bytes

    def plan(self, model: ModelConfig) -> Mapping[str, LeafPlan]:
        """How each parameter is built from the tensors.

        Raises:
          CheckpointError: tensors are missing or left over.
        """
        return tensor_plan(model, self.tensor_names, self.config)

    def small_files(self) -> dict[str, bytes]:
        """What a store keeps beside the weights, by name: configs and tokenizer files."""
        return {name: file.read_bytes() for name, file in (self._configs() | dict(self.tokenizer_files)).items()}

    def source_files(self) -> set[Path]:
        """Every file that it is read from."""
        weights = {shard.path for shard in self.shards.values()}
        return weights | set(self.tokenizer_files.values()) | set(self._configs().values())

    def _configs(self) -> dict[str, Path]:
        names = (CONFIG_FILE, GENERATION_FILE)
        return {name: locate(self.path, name) for name in names if os.path.lexists(self.path / name)}

    def read(self, name: str) -> np.ndarray:
        """The tensor in a fresh buffer.

        Raises:
          CheckpointError: the file changed since it was opened, or the tensor holds NaN or infinity.
        """
        return self.shards[name].read(name)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a Hugging Face directory and checks its configs, its index and every header.

    Raises:
      CheckpointError: what is wrong, where, and what would mend it.
    """
    files = read_model_files(Path(path))
    root = files.path
    if os.path.lexists(root / WEIGHTS_FILE):
        file = open_safetensors(locate(root, WEIGHTS_FILE))
        shards = dict.fromkeys(file.tensors, file)
    elif os.path.lexists(root / INDEX_FILE):
        shards = _open_shards(root)
    else:
        raise CheckpointError(_no_weights(root))
    if not shards:
        raise CheckpointError(f"{root}: expected weights; its safetensors files hold no tensor. Fetch it again.")
    return Checkpoint(files.path, files.config, files.generation_config, files.tokenizer_files, shards)


def read_model_files(path: Path) -> ModelFiles:
    """The configs and tokenizer files of a directory.

    Raises:
      CheckpointError: no such directory, or config.json is absent, or one of the configs is malformed.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a model's directory; there is none. Check the path.")
    root = path.resolve()
    if not os.path.lexists(root / CONFIG_FILE):
        raise CheckpointError(
            f"{root}: expected a config.json; there is none. Name the directory that holds config.json and the weights."
        )
    has_generation = os.path.lexists(root / GENERATION_FILE)
    return ModelFiles(
        path=root,
        config=read_object(locate(root, CONFIG_FILE)),
        generation_config=read_object(locate(root, GENERATION_FILE)) if has_generation else {},
        tokenizer_files={name: locate(root, name) for name in TOKENIZER_FILES if os.path.lexists(root / name)},
    )


def locate(root: Path, name: str) -> Path:
    """The file `name` of the resolved directory `root`, links followed as the module's docstring allows.

    Raises:
      CheckpointError: the name or a link leaves the directory, or there is no such file.
    """
    _check_name(root, name)
    link = root / name
    target = Path(os.path.realpath(link))
    if not (target.is_relative_to(root) or any(target.is_relative_to(blobs) for blobs in _cache_blobs(root))):
        raise CheckpointError(
            f"{link}: a link may lead to a file of its own directory or of its Hugging Face cache; it leads to "
            f"{target}. Put the file itself there, or name the directory that it lies in."
        )
    if not os.path.isfile(target):  # unlike Path.is_file, False for a name that no file can have
        raise CheckpointError(f"{link}: expected a file; there is none. Fetch the checkpoint again, whole.")
    return target


def _check_name(root: Path, name: str) -> None:
    """Raise CheckpointError if a file name from a checkpoint could lead out of its directory."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{root}: expected a file name inside the directory; got {name!r}. Do not load it.")


def _cache_blobs(root: Path) -> tuple[Path, ...]:
    """The `blobs` folder of models--org--name/{blobs,snapshots/revision}, if `root` is such a snapshot."""
    return tuple(folder.parent / "blobs" for folder in root.parents[:2] if folder.name == "snapshots")


def read_weight_map(root: Path) -> dict[str, str]:
    """The shard of each tensor, by name, as the index of a resolved directory has it.

    Raises:
      CheckpointError: the index is malformed, or names a file outside the directory or one that is not safetensors.
    """
    index_path = locate(root, INDEX_FILE)
    weight_map = read_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index_path}: expected weight_map, an object of file names; got {weight_map!r:.80}.")
    if wrong := sorted({file for file in weight_map.values() if not file.endswith(".safetensors")}):
        raise CheckpointError(f"{index_path}: shards should be .safetensors files; got {wrong[0]!r}. No other is read.")
    for name in set(weight_map.values()):
        _check_name(root, name)
    return weight_map


def _open_shards(root: Path) -> dict[str, TensorFile]:
    """The file of each tensor that the index names; index and headers must agree."""
    weight_map = read_weight_map(root)
    files = {name: open_safetensors(locate(root, name)) for name in sorted(set(weight_map.values()))}
    owner: dict[str, str] = {}
    for file_name, file in files.items():
        for name in file.tensors:
            if name in owner:
                raise CheckpointError(
                    f"{root}: each tensor should be in one shard; {name!r} is in {owner[name]} and in {file_name}. "
                    "Shards of two checkpoints are mixed: fetch them again."
                )
            owner[name] = file_name
    for name, file_name in weight_map.items():
        if owner.get(name) != file_name:
            raise CheckpointError(
                f"{root / INDEX_FILE}: {name!r} should be in {file_name}; it is {_whereabouts(owner.get(name))}. "
                "Index and shards are of different checkpoints: fetch them again."
            )
    # A tensor that the index leaves out stays out: the index is the table of contents.
    return {name: files[file_name] for name, file_name in weight_map.items()}


def _whereabouts(file_name: str | None) -> str:
    """For an error message."""
    return "in no shard" if file_name is None else f"in {file_name}"


def _no_weights(root: Path) -> str:
    """Why a directory without safetensors weights cannot be loaded."""
    names = sorted(entry.name for entry in root.iterdir())
    if pickles := [name for name in names if name.endswith(_PICKLE_SUFFIXES)]:
        return (
            f"{root}: expected {WEIGHTS_FILE} or {INDEX_FILE}; the weights are in pickle files "
            f"({', '.join(pickles[:3])}), which can run code and are never opened. Save the model with "
            "safe_serialization=True, or fetch a revision that has safetensors."
        )
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return f"{root}: expected {WEIGHTS_FILE} or {INDEX_FILE}; found {', '.join(ggufs[:3])}. Name that file itself."
    found = [name for name in names if name.endswith((".safetensors", ".npz", ".h5", ".msgpack"))]
    return (
        f"{root}: expected {WEIGHTS_FILE} or {INDEX_FILE}; found {', '.join(found[:3]) or 'no weights'}. "
        "Name a directory as transformers' save_pretrained writes it."
    )
