"""The words of the paged attention contract: the cache, what a step brings, and what is compiled in (the specs)."""

import dataclasses
from typing import Literal, NamedTuple

from jaxtyping import Array, Int32

from ..dispatch import Platform

CacheDType = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"]


class KvCache[T](NamedTuple):
    """Keys (0) and values (1) of all layers' tokens, or in T's place what describes each array: a spec, axes.

    int8 has a float32 scale for each token and head, max|x| / 127 over the head dimension, and stands for
    value * scale. float8_e4m3fn is a saturating cast (finite numbers stay finite), the others a plain one: no scales.
    uint8 holds the bits of float8_e4m3fn, for compilers that would widen all of a float8 array to write one row of it.
    """

    values: T  # [L, P, 2, K, Z, H]
    scales: T | None  # [L, P, 2, K, Z] float32 beside int8, else None


class PagedBatch(NamedTuple):
    """Who owns which query and which page in one step. What a page table holds past its slot's keys is never used."""

    page_tables: Int32[Array, "B pages_per_slot"]
    cu_query_lens: Int32[Array, "B+1"]  # slot b's queries are rows cu_query_lens[b] to cu_query_lens[b + 1]
    kv_lens: Int32[Array, " B"]  # keys of each slot, those of this step included


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedAttentionSpec:
    """What one attention layer asks for.

    `one_query_per_slot`: T == B and row b is the only query of slot b, or nobody's if kv_lens[b] is 0;
    cu_query_lens is not read then.
    """

    scale: float  # multiplies q·k
    window: int | None = None  # keys a query sees, itself included
    soft_cap: float | None = None  # scores become cap * tanh(scores / cap)
    one_query_per_slot: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedAttentionProblem:
    """What an implementation may be unable to serve."""

    platform: Platform
    device_kind: str = ""  # what jax calls the devices
    spec: PagedAttentionSpec
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str  # of the queries
    cache_dtype: str  # of the cache's values as they are stored
    has_sinks: bool
