"""GGUF files as checkpoints: the configs and tokenizer files that they stand for are made of their metadata.

A model split over several files (gguf-split's NAME-00001-of-0000N.gguf) is opened by its first.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..models.config import ModelConfig
from ..models.families import config_from_hf
from ..models.families.gguf import Architecture, Metadata, architecture_of, gguf_plan, section_of
from ..models.families.plan import LeafPlan
from ..models.families.quantization import KEY
from .checkpoint import CONFIG_FILE, GENERATION_FILE, Checkpoint
from .gguf_file import GgufFile, open_gguf_file
from .gguf_tokenizer import generation_config, tokenizer_files
from .store_format import to_json
from .tokenizer import Tokenizer, tokenizer_of

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>(?i:\.gguf))")


@dataclasses.dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF that was found sound; `path` is the file, or the first of them."""

    architecture: Architecture
    generated: Mapping[str, bytes]  # tokenizer files by name

    def plan(self, model: ModelConfig) -> Mapping[str, LeafPlan]:
        """See Checkpoint."""
        return gguf_plan(self.architecture, model, self.tensor_names)

    def small_files(self) -> dict[str, bytes]:
        """See Checkpoint."""
        configs = {CONFIG_FILE: to_json(self.config), GENERATION_FILE: to_json(self.generation_config)}
        return {**configs, **self.generated}

    def source_files(self) -> set[Path]:
        """See Checkpoint."""
        return {shard.path for shard in self.shards.values()}

    def load_tokenizer(self) -> Tokenizer | None:
        """See ModelFiles."""
        return tokenizer_of(self.generated, str(self.path))


def open_gguf(path: Path) -> GgufCheckpoint:
    """Opens a GGUF and checks its header, its metadata and its tokenizer.

    Raises:
      CheckpointError: what is wrong, where, and what would mend it.
      UnsupportedModelError: its architecture, or something in its metadata, is not implemented.
    """
    path = path.resolve()
    files = _open_parts(path)
    metadata = files[0].metadata
    shards = {name: file for file in files for name in file.tensors}
    if len(shards) != sum(len(file.tensors) for file in files):
        raise CheckpointError(f"{path}: each tensor should be in one part; one is in two. Fetch the parts again.")
    architecture = architecture_of(metadata, str(path))
    shapes = {name: file.tensors[name].shape for name, file in shards.items()}
    types = {name: type for file in files for name, type in file.types.items()}
    found = Metadata(metadata, shapes, lambda name: shards[name].read(name), str(path))
    config: dict[str, Any] = {"dtype": _dtype(types, shapes), **architecture.config(found)}
    found.reader.finish()
    model = config_from_hf(config)
    section = section_of(model, architecture.sources(model), types)
    return GgufCheckpoint(
        path=path,
        config=config if section is None else {**config, KEY: section},
        generation_config=generation_config(metadata, str(path)),
        tokenizer_files={},
        shards=shards,
        architecture=architecture,
        generated=tokenizer_files(metadata, str(path)),
    )


def _open_parts(path: Path) -> list[GgufFile]:
    """The file, and those that it was split with."""
    first = open_gguf_file(path)
    count, number = (first.metadata.get(f"split.{key}", default) for key, default in (("count", 1), ("no", 0)))
    if count == 1:
        return [first]
    name = _PART.fullmatch(path.name)
    if name is None or (number, int(name["number"]), int(name["count"])) != (0, 1, count):
        raise CheckpointError(
            f"{path}: part {number!r} of {count!r} (from 0 on) of a model in several files: name the first of them, "
            "whose name should end in -00001-of-0000N.gguf, N being their number."
        )
    parts = range(2, int(name["count"]) + 1)
    rest = (path.with_name(f"{name['stem']}-{part:05}-of-{name['count']}{name['suffix']}") for part in parts)
    files = [first, *map(open_gguf_file, rest)]
    if [file.metadata.get("split.no") for file in files] != list(range(len(files))):
        raise CheckpointError(f"{path}: its parts should be numbered from 0 to {count - 1}: fetch all of them again.")
    return files


def _dtype(types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Of embeddings, norms and activations: float32 where most weights are so, else bfloat16, for its range."""
    sizes = Counter[str]()
    for name, type in types.items():
        sizes[type] += math.prod(shapes[name])
    return "float32" if max(sizes, key=sizes.__getitem__, default="F32") == "F32" else "bfloat16"
