"""GGUF's tensors as parameters: blocks taken apart, rows of heads back in their order, norms without Gemma's one."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import ml_dtypes
import numpy as np

from ....errors import CheckpointError
from ....pallas_kernels.quantized_matmul.contract import WeightFormat
from ....pallas_kernels.quantized_matmul.formats import pack_nibbles
from ..published.packing import FLOATS
from ..source import Shape
from .blocks import BLOCK_TYPES, block_type, stored_parts, stored_values

type Leaf = Literal["weight", "scales", "offsets"]

_BLOCKS = tuple(each.dtype.name for each in BLOCK_TYPES.values())
_SLAB_VALUES = 1 << 20  # dequantized in one go: the temporaries are several times that


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """A parameter that is not quantized here, of a tensor of any type.

    `head_dim` is that of rows whose rotated pairs lie side by side, as llama.cpp wants them for Llama; `less_one` takes
    off what it adds to Gemma's norms.
    """

    head_dim: int | None = None
    less_one: bool = False

    @property
    def dtypes(self) -> tuple[tuple[str, ...], ...]:
        """Floats, and all that are made of them."""
        return ((*FLOATS, *_BLOCKS),)

    def build(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[*lead, out, in], or [out]."""
        array = _ordered(_dequantized(arrays[0]), self.head_dim)
        return array.astype(np.float32) - np.float32(1) if self.less_one else array

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """See build."""
        _check_heads(shapes[0], self.head_dim)
        return shapes[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """One parameter of a quantized weight, from a tensor of blocks."""

    leaf: Leaf
    format: WeightFormat
    head_dim: int | None = None

    @property
    def dtypes(self) -> tuple[tuple[str, ...], ...]:
        """Blocks of any type: what they become is the format's to say."""
        return (_BLOCKS,)

    def build(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[*lead, out, stored_in] or [*lead, out, groups].

        Raises:
          CheckpointError: a scale or an offset is NaN or infinite.
        """
        array, found = arrays[0], block_type(arrays[0])
        assert found is not None  # the format was chosen by the tensor's type
        if self.leaf == "weight":
            values = stored_values(found, array, self.format)
            return _ordered(pack_nibbles(values) if self.format.is_packed else values, self.head_dim)
        scales, offsets = stored_parts(found, array, self.format)
        part = scales if self.leaf == "scales" else offsets
        assert part is not None  # only a format with offsets has such a leaf
        return _ordered(_checked(part, self.format), self.head_dim)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """See build; `shapes` count inputs, not blocks."""
        _check_heads(shapes[0], self.head_dim)
        *lead, out_dim, in_dim = shapes[0]
        of = self.format.values_shape if self.leaf == "weight" else self.format.scales_shape
        return (*lead, *of(out_dim, in_dim))


def _dequantized(array: np.ndarray) -> np.ndarray:
    """Blocks in float32 by the gguf package, some rows at a time; plain numbers as they are."""
    found = block_type(array)
    if found is None:
        return array
    from gguf import GGMLQuantizationType, quants

    rows = array.reshape(-1, array.shape[-1])
    whole = np.empty((rows.shape[0], rows.shape[1] * found.num_inputs), np.float32)
    step = max(1, _SLAB_VALUES // whole.shape[1])
    for start in range(0, len(rows), step):
        slab = np.ascontiguousarray(rows[start : start + step]).view(np.uint8)
        whole[start : start + step] = quants.dequantize(slab, GGMLQuantizationType[found.name])
    if not np.isfinite(whole).all():
        raise CheckpointError("finite weights were expected, but a scale of its blocks is NaN or infinite")
    return whole.reshape(*array.shape[:-1], -1)


def _checked(part: np.ndarray, format: WeightFormat) -> np.ndarray:
    """Scales or offsets in the format's dtype, all finite."""
    if format.scale == "float8_e8m0fnu":
        if part.max(initial=0) == 255:
            raise CheckpointError("finite scales were expected, but one is NaN (an exponent of 255)")
        return np.ascontiguousarray(part).view(ml_dtypes.float8_e8m0fnu)
    if not np.isfinite(part).all():
        raise CheckpointError("finite scales were expected, but one of a block is NaN or infinite. It is damaged")
    return part.astype(format.scales_dtype)


def _ordered(array: np.ndarray, head_dim: int | None) -> np.ndarray:
    """Rows i, i + half of a head again where llama.cpp put them side by side."""
    if head_dim is None:
        return array
    pairs = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _check_heads(shape: Shape, head_dim: int | None) -> None:
    if head_dim is not None and shape[0] % head_dim:
        raise CheckpointError(f"rows for whole heads of {head_dim} were expected, but the shape is {list(shape)}")
