"""Index arithmetic of rows that lie in segments of any length."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

_NOWHERE = np.int32(2**31 - 1)


def segment_rows(
    rows: Float[Array, "M D"], starts: Int32[Array, " S"], sizes: Int32[Array, " S"], num_rows: int
) -> Float[Array, "N D"]:
    """The segments rows[start : start + size] laid end to end, zeros behind them; N = num_rows."""
    ends = jnp.cumsum(sizes)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    segment = jnp.minimum(jnp.searchsorted(ends, row, side="right"), sizes.shape[0] - 1)
    index = (starts - ends + sizes)[segment] + row
    picked: jax.Array = jnp.take(rows, jnp.where(row < ends[-1], index, _NOWHERE), axis=0, mode="fill", fill_value=0)
    return picked


def starts_of(sizes: Int32[Array, "*S"]) -> Int32[Array, "*S"]:
    """Where segments begin that lie end to end, in C order."""
    flat = sizes.reshape(-1)
    return (jnp.cumsum(flat) - flat).reshape(sizes.shape)
