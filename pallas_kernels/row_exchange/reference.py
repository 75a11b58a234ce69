"""The definition of the exchange: everything goes everywhere, and each device takes what is for it."""

import jax

from .segments import segment_rows, starts_of


def exchange_rows(rows: jax.Array, sizes: jax.Array, *, num_received: int, capacity: int, axis: str) -> jax.Array:
    """See the contract."""
    del capacity
    num_devices, me = sizes.shape[0], jax.lax.axis_index(axis)
    all_rows = jax.lax.all_gather(rows, axis, tiled=True)
    starts = jax.vmap(starts_of)(sizes) + jax.numpy.arange(num_devices, dtype=sizes.dtype)[:, None] * rows.shape[0]
    return segment_rows(all_rows, starts[:, me], sizes[:, me], num_received)
