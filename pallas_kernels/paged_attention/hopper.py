"""Paged attention on Hopper: which kernel computes which rows of a step.

A step of one query per slot is the decode kernel's, and the reduction's where slots are split. In a mixed step the
slots of one query still are, and the prefill kernel has all other rows; an update in place, of a row for each slot,
joins them.
The write of new keys and values stays XLA's scatter: in place, a few kilobytes per token and layer, against pages of
megabytes that attention reads; a kernel of its own would save no launch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ..tuning import generation, tuned
from .contract import KvCache, PagedAttentionProblem, PagedAttentionSpec, PagedBatch
from .hopper_decode import Decode, decode
from .hopper_prefill import prefill
from .hopper_prefill_work import ROWS_EACH, Prefill
from .hopper_reduce import reduce_items
from .hopper_work import BLOCK_KEYS, Keys, Place, Split, Tiles, Units, choose_split, item_of, make_tiles

HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_GROUPS = 64  # query heads of one KV head: wgmma's N in a decode step, and rows of one tile in prefill
MIN_SCALED_PAGE = 32  # a copy of scales brings at least 128 bytes
SHARED_BYTES = 232448  # of one CTA, and with 1 KB for each CTA of one SM


def unsupported(problem: PagedAttentionProblem) -> str | None:
    """Why no tile of these kernels fits a problem, whatever the chip."""
    size, dtype, cache_dtype = problem.page_size, problem.dtype, problem.cache_dtype
    if problem.head_dim not in HEAD_DIMS:
        return f"head dimensions are {', '.join(map(str, HEAD_DIMS))}, not {problem.head_dim}"
    if dtype not in ("bfloat16", "float16"):
        return f"queries must be bfloat16 or float16, not {dtype}"
    if cache_dtype not in (dtype, "float8_e4m3fn", "int8"):
        return f"the cache of {dtype} queries must be {dtype}, float8_e4m3fn or int8, not {cache_dtype}"
    if size % 8 or (BLOCK_KEYS % size and size % BLOCK_KEYS):
        return f"pages must have 8, 16, 32 or a multiple of {BLOCK_KEYS} tokens, not {size}"
    if cache_dtype == "int8" and size < MIN_SCALED_PAGE:
        return f"pages of an int8 cache must have at least {MIN_SCALED_PAGE} tokens, not {size}"
    if problem.num_heads // problem.num_kv_heads > MAX_GROUPS:
        return f"at most {MAX_GROUPS} heads may share a KV head, not {problem.num_heads // problem.num_kv_heads}"
    return None


def paged_attention(
    q: Float[Array, "T N H"],
    cache: KvCache[Array],
    layer: Int32[Array, ""],
    batch: PagedBatch,
    *,
    spec: PagedAttentionSpec,
    sinks: Float[Array, " N"] | None,
    device_kind: str,
    change: Mapping[str, int] | None = None,
) -> Float[Array, "T N H"]:
    """See the contract; `change` overrides tuned sizes."""
    step = _Step(q, cache, layer.reshape(1), batch, spec, sinks, device_kind, change or {})
    if spec.one_query_per_slot:
        return step.decode(batch.kv_lens, jnp.arange(q.shape[0], dtype=jnp.int32)).reshape(q.shape)
    query_lens = jnp.diff(batch.cu_query_lens)
    is_single, starts = query_lens == 1, batch.cu_query_lens[:-1]
    singles = step.decode(jnp.where(is_single, batch.kv_lens, 0), jnp.where(is_single, starts, 0))
    output = step.prefill(jnp.where(is_single, 0, query_lens))
    # In place, and dropped where a slot has a chunk: its row would be one behind the last.
    rows = jnp.where(is_single, starts, q.shape[0] + jnp.arange(starts.shape[0]))
    output = output.at[rows].set(singles, mode="drop", unique_indices=True)
    return output.reshape(q.shape)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One call's arrays and what its kernels are compiled for."""

    q: jax.Array
    cache: KvCache[jax.Array]
    layer: jax.Array  # [1]
    batch: PagedBatch
    spec: PagedAttentionSpec
    sinks: jax.Array | None
    device_kind: str
    change: Mapping[str, int]

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.cache.values.shape[3]

    @property
    def place(self) -> Place:
        """How keys lie in pages."""
        return Place(Units(self.cache.values.shape[4]), self.spec.window)

    @property
    def has_tensor_memory(self) -> bool:
        """Whether the chip is a Blackwell."""
        return generation(self.device_kind) == "blackwell"

    def sizes(self, kernel: str) -> dict[str, int]:
        """The tuned sizes of a kernel; all 16-bit caches share theirs."""
        cache_dtype = self.cache.values.dtype
        kind = "16bit" if cache_dtype.itemsize == 2 else cache_dtype.name
        tuned_sizes = tuned("paged_attention", self.device_kind, f"{kernel}_{kind}_{self.q.shape[2]}")
        return {**tuned("paged_attention", self.device_kind, "split"), **tuned_sizes, **self.change}

    def decode(self, kv_lens: jax.Array, rows: jax.Array) -> jax.Array:
        """[B, K, G, H] of slots whose one query is row rows[b]; zeros where kv_lens [B] is 0."""
        num_rows, num_heads, head_dim = self.q.shape
        num_slots, num_groups, sinks = kv_lens.shape[0], num_heads // self.num_kv_heads, self.sinks
        q = self.q.reshape(num_rows, self.num_kv_heads, num_groups, head_dim)
        padding = -num_groups % (32 if self.has_tensor_memory else 8)
        if padding:
            q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))
            if sinks is not None:
                sinks = jnp.pad(sinks.reshape(self.num_kv_heads, num_groups), ((0, 0), (0, padding)))
        sizes = self.sizes("decode")
        max_keys = self.batch.page_tables.shape[1] * self.place.units.page_size
        split = choose_split(num_slots, self.num_kv_heads, max_keys, sizes)
        case = self._decode_case(sizes, num_groups + padding, split)
        keys = Keys(self.cache, self.layer, self.batch.page_tables, kv_lens)
        output, parts = decode(q, keys, rows, sinks, case)
        if split.most > 1:
            num_items = item_of(kv_lens, 0, self.place, split)[2]
            reduced = reduce_items(parts, kv_lens, self.place, split, sinks, q.dtype, case.put)
            output = jnp.where((num_items > 1)[:, None, None, None], reduced, output)
        return output[:, :, :num_groups]

    def prefill(self, query_lens: jax.Array) -> jax.Array:
        """[T, K, G, H]: rows of slots with query_lens [B] > 0, zeros behind the last slot, and elsewhere anything."""
        num_rows, num_heads, head_dim = self.q.shape
        case = self._prefill_case(self.sizes("prefill"), num_heads // self.num_kv_heads)
        tiles = make_tiles(self.batch, query_lens, num_rows, case.tile_queries, Place(case.units, case.window))
        keys = Keys(self.cache, self.layer, self.batch.page_tables, self.batch.kv_lens)
        q = self.q.reshape(num_rows, self.num_kv_heads, case.num_groups, head_dim)
        if not case.is_tiled:
            return prefill(q, keys, tiles, self.sinks, case)
        return self._rows_of(prefill(_tiled(q, tiles, case), keys, tiles, self.sinks, case), tiles, case)

    def _rows_of(self, tiled: jax.Array, tiles: Tiles, case: Prefill) -> jax.Array:
        """[T, K, G, H] of tiles [C, K, rows, H]."""
        used = tiled[:, :, : case.tile_queries * case.num_groups]
        used = used.reshape(*used.shape[:2], case.tile_queries, case.num_groups, used.shape[-1])
        cu, row = self.batch.cu_query_lens, jnp.arange(self.q.shape[0])
        slot = jnp.searchsorted(cu, row, side="right", method="compare_all") - 1
        tile, offset = jnp.divmod(row - cu[slot], case.tile_queries)
        return used.at[tiles.first_tile[slot] + tile, :, offset].get(mode="clip")

    def _decode_case(self, sizes: Mapping[str, int], num_groups: int, split: Split) -> Decode:
        is_interpreted = not sizes.get("weights_in_registers", 1)
        case = Decode(**self._case(sizes), head_dim=self.q.shape[2], split=split, is_interpreted=is_interpreted)
        while case.shared_bytes(num_groups) + 1024 > SHARED_BYTES:  # many heads of 256
            case = dataclasses.replace(case, stages=case.stages - 1)
        resident = SHARED_BYTES // (case.shared_bytes(num_groups) + 1024)
        return dataclasses.replace(case, num_ctas=sizes["sms"] * min(sizes["ctas_per_sm"], resident))

    def _prefill_case(self, sizes: Mapping[str, int], num_groups: int) -> Prefill:
        units = Units(self.place.units.page_size, sizes.get("block_keys", BLOCK_KEYS))
        return Prefill(
            **{**self._case(sizes), "units": units},
            num_groups=num_groups,
            consumers=sizes["consumers"],
            raw_stages=sizes.get("raw_stages", 1),
            weights_in_registers=bool(sizes.get("weights_in_registers", 1)) and not self.has_tensor_memory,
            # A stage is held while another is awaited.
            is_overlapped=bool(sizes.get("overlapped", 0)) and sizes["stages"] > 1,
        )

    def _case(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """What both kernels are compiled for."""
        return {
            "units": self.place.units,
            "dtype": self.q.dtype,
            "cache_dtype": self.cache.values.dtype,
            "scale": self.spec.scale,
            "window": self.spec.window,
            "soft_cap": self.spec.soft_cap,
            "has_sinks": self.sinks is not None,
            "stages": sizes["stages"],
            "num_ctas": sizes["sms"],
            "has_tensor_memory": self.has_tensor_memory,
        }


def _tiled(q: jax.Array, tiles: Tiles, case: Prefill) -> jax.Array:
    """Tiles [C, K, rows, H] of q [T, K, G, H]."""
    rows = tiles.rows[:, 1, None] + jnp.arange(case.tile_queries)
    tiled = jnp.moveaxis(q.at[rows].get(mode="clip"), 1, 2)  # [C, K, queries, G, H]
    tiled = tiled.reshape(*tiled.shape[:2], -1, tiled.shape[-1])
    rest = case.consumers * ROWS_EACH - tiled.shape[2]
    return jnp.pad(tiled, ((0, 0), (0, 0), (0, rest), (0, 0)))
