"""Where a parameter comes from: names of tensors in a checkpoint, and how their arrays are laid out anew."""

import dataclasses
import functools
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from ...errors import CheckpointError

# The sixteen values of 4-bit floats with 2 exponent bits and 1 mantissa bit (OCP Microscaling Formats 1.0, 5.3.3).
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
ALL = slice(None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One spelling of one parameter: templates of names, which may hold {layer} and {expert}, and a new layout.

    In this order: swap the last two axes (`transpose`), keep `rows` of `axis`, and, of (blocks, scales), unpack
    4-bit floats (`mxfp4`). The result is [out, in], [out], or those with a leading axis of experts.
    """

    names: tuple[str, ...]
    transpose: bool = False
    rows: slice = ALL
    axis: int = 0
    mxfp4: bool = False

    @property
    def per_expert(self) -> bool:
        """Each expert has tensors of its own."""
        return "{expert}" in self.names[0]

    def resolve(self, layer: int = 0, expert: int = 0) -> tuple[str, ...]:
        """The names of one layer's (one expert's) tensors."""
        return tuple(name.format(layer=layer, expert=expert) for name in self.names)

    def build(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The parameter of one layer (and expert) from the arrays of `names`; a view where possible."""
        arranged = [self._arrange(array) for array in arrays]
        return _unpack_mxfp4(*arranged) if self.mxfp4 else arranged[0]

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape that `build` gives for tensors of these shapes; raises CheckpointError if it cannot."""
        views = [np.broadcast_to(np.int8(0), shape) for shape in shapes]
        if any(view.ndim < max(self.axis + 1, 2 if self.transpose else 0) for view in views):
            raise CheckpointError(f"the tensors {', '.join(self.names)} have too few axes: {shapes}")
        arranged = [self._arrange(view).shape for view in views]
        if not self.mxfp4:
            return arranged[0]
        blocks, scales = arranged
        if len(blocks) != 4 or blocks[:-1] != scales or blocks[-1] != 16:
            raise CheckpointError(
                f"the tensors {' and '.join(self.names)} should be [experts, out, groups, 16] and "
                f"[experts, out, groups], but their shapes are {shapes[0]} and {shapes[1]}"
            )
        return (*blocks[:-2], blocks[-2] * 32)

    def _arrange(self, array: np.ndarray) -> np.ndarray:
        if self.transpose:
            array = np.swapaxes(array, -1, -2)
        return array[(ALL,) * self.axis + (self.rows,)]


@functools.cache
def _mxfp4_pairs() -> np.ndarray:
    """[2**16] uint32: for scale * 256 + byte, the byte's two values as bfloat16, low nibble first; scale 255 is NaN.

    Every product of a 4-bit float and a power of two down to 2**-127 is exact in bfloat16.
    """
    with np.errstate(over="ignore"):
        values = np.asarray(FP4_VALUES)[None, :] * np.exp2(np.arange(256.0) - 127)[:, None]
        values[255] = np.nan
        values = values.astype(ml_dtypes.bfloat16)
    byte = np.arange(256)
    pairs = np.stack([values[:, byte & 15], values[:, byte >> 4]], axis=-1)
    return np.ascontiguousarray(pairs).view(np.uint32).reshape(-1)


def _unpack_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[E, out, groups, 16] and [E, out, groups], uint8, to bfloat16 [E, out, groups * 32].

    One expert at a time, so that the index array stays small beside the result.
    """
    experts, out, groups, _ = blocks.shape
    packed = np.empty((experts, out, groups, 16), np.uint32)
    for expert in range(experts):
        index = scales[expert][..., None].astype(np.uint16) << 8 | blocks[expert]
        np.take(_mxfp4_pairs(), index, out=packed[expert], mode="clip")
    values: np.ndarray = packed.view(ml_dtypes.bfloat16)
    return values.reshape(experts, out, groups * 32)
