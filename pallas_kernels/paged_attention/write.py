"""Writing a step's keys and values into the cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .contract import KvCache

_INT8_MAX, _FLOAT8_MAX = 127, 448


def write_kv(
    cache: KvCache[Array],
    layer: Int32[Array, ""],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    pages: Int32[Array, " T"],
    offsets: Int32[Array, " T"],
) -> KvCache[Array]:
    """The cache with row t's key and value at (pages[t], offsets[t]) of one layer, rows of page P dropped.

    In place where the cache is donated or the carry of a loop. No two kept rows may name the same place.
    """
    both = jnp.stack([k, v], axis=1)  # [T, 2, K, H]
    if len(pages) == 1:  # XLA makes a scatter of one row an update of a slice, for which it copies the cache on a CPU
        both, offsets = jnp.repeat(both, 2, axis=0), jnp.repeat(offsets, 2)
        pages = jnp.append(pages, jnp.int32(cache.values.shape[1]))  # the second is dropped
    if cache.scales is None:
        return KvCache(_put(cache.values, layer, pages, offsets, _cast(both, cache.values.dtype)), None)
    values, scales = _quantize(both)
    return KvCache(_put(cache.values, layer, pages, offsets, values), _put(cache.scales, layer, pages, offsets, scales))


def _put(array: jax.Array, layer: jax.Array, pages: jax.Array, offsets: jax.Array, rows: jax.Array) -> jax.Array:
    """`rows` [T, 2, K, ...] at their places of one layer of an array [L, P, 2, K, Z, ...]."""
    place = array.at[jnp.asarray(layer, jnp.int32), pages, :, :, offsets]
    return place.set(rows, mode="drop", wrap_negative_indices=False)


def _cast(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` rounded to the cache's dtype; float8 has no infinity, so what is too large becomes its largest number."""
    if dtype not in (jnp.float8_e4m3fn, jnp.uint8):
        return x.astype(dtype)
    rounded = jnp.clip(x, -_FLOAT8_MAX, _FLOAT8_MAX).astype(jnp.float8_e4m3fn)
    return rounded if dtype == jnp.float8_e4m3fn else jax.lax.bitcast_convert_type(rounded, jnp.uint8)


def _quantize(x: Float[Array, "*rows H"]) -> tuple[jax.Array, jax.Array]:
    """int8 values and a float32 scale for each row, 0 for a row of zeros."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / _INT8_MAX
    divisors = jnp.where(scales == 0, 1, scales)
    return jnp.round(x / divisors[..., None]).astype(jnp.int8), scales
