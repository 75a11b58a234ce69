"""Writing a step's keys and values into the cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def write_kv(
    cache: Float[Array, "L P 2 K Z H"],
    layer: Int32[Array, ""],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    pages: Int32[Array, " T"],
    offsets: Int32[Array, " T"],
) -> Float[Array, "L P 2 K Z H"]:
    """The cache with row t's key and value at (pages[t], offsets[t]) of a layer; rows whose page is P are dropped.

    In place if the cache is donated, or the carry of a scan. No two rows may name the same place.
    """
    both = jnp.stack([k, v], axis=1).astype(cache.dtype)  # [T, 2, K, H]
    layer = jnp.asarray(layer, jnp.int32)
    updated: jax.Array = cache.at[layer, pages, :, :, offsets].set(both, mode="drop", unique_indices=False)
    return updated
