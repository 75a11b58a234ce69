"""The reduction of a decode step's split slots on Hopper.

Schedule: a CTA of one warpgroup for each slot and KV head; slots of one item, or none, cost an exit. It walks over the
slot's items and joins their softmaxes as the running one does, [64, G] tiles of the head in registers, read straight
from global memory in the order that the decode kernel wrote them (whole lines), several items at once, for it is the
latency of a few CTAs' loads that bounds it; no shared memory but the transposed output. Its bytes are 8 H G per item
and KV head, a few per cent of the pages' own.

No wgmma runs here, so no operand can be overwritten under one.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ..mosaic import BY_COLUMN, swizzled
from .hopper_tiles import LOG2_E, MASKED, Put, along_rows, full, line_bytes, output_tiles, stage_output
from .hopper_work import Place, Split, item_of

_READ_REGISTERS = 64  # of a thread, for items that are read at once


def reduce_items(
    parts: tuple[jax.Array, jax.Array], kv_lens: jax.Array, place: Place, split: Split, sinks: jax.Array | None,
    dtype: DTypeLike, put: Put,
) -> jax.Array:  # fmt: skip
    """[B, K, G, H] of the slots that have several items, from what `decode` left of each; the rest is not written.

    `put` says what the sums' tiles are.
    """
    sums, peaks = parts
    _, num_kv_heads, head_dim, num_groups = sums.shape
    num_slots = kv_lens.shape[0]
    arguments = [sums, peaks, kv_lens]
    arguments += [] if sinks is None else [(sinks.astype(jnp.float32) * LOG2_E).reshape(num_kv_heads, -1)]
    kernel = plgpu.kernel(
        functools.partial(_body, place, split, sinks is not None, put),
        out_type=jax.ShapeDtypeStruct((num_slots, num_kv_heads, num_groups, head_dim), dtype),
        grid=(num_slots, num_kv_heads),
        grid_names=("slot", "head"),
        scratch_types=[swizzled((num_groups, head_dim), dtype, line_bytes(head_dim * jnp.dtype(dtype).itemsize))],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode_reduce_hopper",
    )
    output: jax.Array = kernel(*arguments)
    return output


def _body(place: Place, split: Split, has_sinks: bool, put: Put, sums: Any, peaks: Any, *refs: Any) -> None:
    kv_lens, sinks, output, staged = refs if has_sinks else (refs[0], None, *refs[1:])
    slot, head = lax.axis_index("slot"), lax.axis_index("head")
    num_items = item_of(kv_lens[slot], jnp.int32(0), place, split)[2]
    first = slot * split.most
    num_groups, head_dim = staged.shape
    tiles = output_tiles(head_dim)
    together = max(1, min(8, _READ_REGISTERS * 128 // (head_dim * num_groups)))

    def read(item: jax.Array) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        """An item's maxima, totals and tiles; past the slot's last item they count for nothing."""
        nothing = jnp.where(item < first + num_items, 0.0, MASKED)
        item = jnp.minimum(item, first + num_items - 1)
        peak = plgpu.load(peaks.at[item, head, 0], layout=BY_COLUMN, optimized=False)
        total = plgpu.load(peaks.at[item, head, 1], layout=BY_COLUMN, optimized=False)
        sources = (sums.at[item, head, pl.ds(start, 64)] for start in tiles)
        parts = [plgpu.load(source, layout=plgpu.Layout.WGMMA, optimized=False) for source in sources]
        return peak + nothing, total, parts

    def add_items(i: jax.Array, carry: Any) -> Any:
        for item_peak, item_total, parts in [read(first + i * together + j) for j in range(together)]:
            peak, total, mixed = carry
            new_peak = jnp.maximum(peak, item_peak)
            decay, item_decay = jnp.exp2(peak - new_peak), jnp.exp2(item_peak - new_peak)
            mixed = [
                old * along_rows(decay, old.shape) + part * along_rows(item_decay, part.shape)
                for old, part in zip(mixed, parts, strict=True)
            ]
            carry = new_peak, total * decay + item_total * item_decay, mixed
        return carry

    @pl.when(num_items > 1)
    def _() -> None:
        zeros = [full((64, num_groups), 0.0, plgpu.Layout.WGMMA) for _ in tiles]
        carry = (full((num_groups,), MASKED, BY_COLUMN), full((num_groups,), 0.0, BY_COLUMN), zeros)
        peak, total, mixed = lax.fori_loop(0, lax.div(num_items + together - 1, together), add_items, carry)
        stage_output(peak, total, mixed, None if sinks is None else sinks.at[head], put, staged)
        plgpu.copy_smem_to_gmem(staged, output.at[slot, head])
        plgpu.wait_smem_to_gmem(0)
