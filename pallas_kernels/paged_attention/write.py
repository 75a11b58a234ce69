"""Writing a step's keys and values into the cache."""

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
    """The cache with row t's key and value at (pages[t], offsets[t]) of one layer, rows of page P dropped.

    In place where the cache is donated or the carry of a loop. No two kept rows may name the same place.
    """
    both = jnp.stack([k, v], axis=1).astype(cache.dtype)  # [T, 2, K, H]
    place = cache.at[jnp.asarray(layer, jnp.int32), pages, :, :, offsets]
    return place.set(both, mode="drop", wrap_negative_indices=False)
