"""What every Mosaic GPU kernel here needs: tiles of shared memory, layouts of vectors, stores."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

LINE_BYTES = 128  # of the widest swizzle
# Rows of shared memory that are tiled together. TMA copies whole such tiles of an array: from a row within one it takes
# that row's place in each, and zeros past its end, and nothing says so.
TILED_ROWS = 8
BY_COLUMN, BY_ROW = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)  # one number for each column, or row


def swizzled(shape: Sequence[int], dtype: DTypeLike, line_bytes: int = LINE_BYTES) -> Any:
    """A tile of shared memory [..., rows, columns] as TMA fills it and tensor cores read it."""
    line = line_bytes // jnp.dtype(dtype).itemsize
    # mypy takes transforms for abstract classes.
    transforms = (plgpu.TilingTransform((TILED_ROWS, line)), plgpu.SwizzleTransform(line_bytes))  # type: ignore[abstract]
    return plgpu.SMEM(tuple(shape), jnp.dtype(dtype), transforms=transforms)


def store(target: Any, value: jax.Array) -> None:
    """Store registers, be it in less than whole lines or with bank conflicts."""
    if hasattr(plgpu, "store"):
        plgpu.store(target, value, optimized=False)
    else:  # jax 0.11, whose plain stores may be such
        target[...] = value
