"""The two vocabularies of sharding: mesh axes (devices) and logical axes (what a dimension of an array means)."""

from typing import Literal, get_args

# Slowest first: the devices of a tensor group lie next to each other, where links are fastest.
MeshAxis = Literal["data", "expert", "tensor"]
MESH_AXES: tuple[MeshAxis, ...] = get_args(MeshAxis)

LogicalAxis = Literal[
    "shard",  # R: data shards; leads every array of a step, of the cache and of the slot state
    "layers",  # L
    "vocab",  # V
    "embed",  # D
    "heads",  # N, or N*H flattened
    "kv_heads",  # K, or K*H flattened, of a weight
    "cache_heads",  # K as the cache holds it: at least one per tensor shard
    "head_dim",  # H
    "mlp",  # F
    "experts",  # E, or the places for them
    "slots",  # B or S
    "tokens",  # T
    "pages",  # P
    "page",  # Z, and the key/value pair
]
Axes = tuple[LogicalAxis | None, ...]
