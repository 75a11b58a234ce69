"""The exchange as one all-to-all of equal parts, each as large as the most that a device may send to another.

Nothing is ever dropped; what it costs is X * capacity rows on the way, however few there are.
"""

import jax
import jax.numpy as jnp

from .segments import segment_rows, starts_of


def exchange_rows(rows: jax.Array, sizes: jax.Array, *, num_received: int, capacity: int, axis: str) -> jax.Array:
    """See the contract."""
    num_devices, me = sizes.shape[0], jax.lax.axis_index(axis)
    index = starts_of(sizes[me])[:, None] + jnp.arange(capacity, dtype=sizes.dtype)
    sent = jnp.take(rows, index, axis=0, mode="clip")  # rows past a part's size are never read
    received = jax.lax.all_to_all(sent, axis, split_axis=0, concat_axis=0, tiled=True)
    starts = jnp.arange(num_devices, dtype=sizes.dtype) * capacity
    return segment_rows(received.reshape(-1, rows.shape[1]), starts, sizes[:, me], num_received)
