"""What published layouts do to quantized values, zero points and scales, undone: into the order of the contract.

A 4-bit weight holds two inputs in a byte, the even one in the low nibble; scales and zero points are [out, groups]
(pallas_kernels/quantized_matmul/contract). Whatever a layout says beside the numbers (the order of groups, zero
points of a symmetric weight) is checked where its scales are read.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import ml_dtypes
import numpy as np

from ....errors import CheckpointError
from ..source import ALL, Shape

WORDS = ("int32", "uint32")
FLOATS = ("float16", "bfloat16", "float32")
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)  # the nibble of a 32-bit word that holds each of eight neighbours


class Companion(Protocol):
    """A tensor beside the scales, which must say what is computed anyway."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Names of the dtypes that it may have."""

    def check(self, array: np.ndarray, scales: Shape) -> None:
        """Raises CheckpointError if it asks for something else, or is not of a weight with scales [out, groups]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedInputs:
    """Neighbouring inputs in 32-bit words, the first in the lowest bits: [out, words], or [words, out].

    4-bit values stay as they are; 8-bit ones, which stand for v - 128, become int8.
    """

    bits: Literal[4, 8]
    words_first: bool = False

    @property
    def dtypes(self) -> tuple[tuple[str, ...], ...]:
        """One tensor of words."""
        return (WORDS,)

    def build(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[out, in / 2] uint8, or [out, in] int8."""
        words = arrays[0].T if self.words_first else arrays[0]
        stored = np.ascontiguousarray(words).view(np.uint8)
        return stored if self.bits == 4 else (stored ^ np.uint8(128)).view(np.int8)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """See build."""
        rows, words = _two_axes(shapes[0])[:: -1 if self.words_first else 1]
        return rows, words * 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedOutputs:
    """4-bit values of eight neighbouring outputs in 32-bit words, at the nibbles `order`: [in, out / 8].

    What comes out is as stored: a number from 0 to 15.
    """

    order: tuple[int, ...] = IN_ORDER

    @property
    def dtypes(self) -> tuple[tuple[str, ...], ...]:
        """One tensor of words."""
        return (WORDS,)

    def build(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[out, in / 2] uint8."""
        num_in, words = arrays[0].shape
        values = np.empty((words * 8, num_in // 2), np.uint8)
        for output, nibble in enumerate(self.order):
            one = _nibble(arrays[0], nibble)
            values[output::8] = (one[0::2] | one[1::2] << 4).T
        return values

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """See build."""
        num_in, words = _two_axes(shapes[0])
        if num_in % 2:
            raise CheckpointError(f"an even number of inputs was expected, but the shape is {list(shapes[0])}")
        return words * 8, num_in // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroPoints:
    """4-bit zero points of eight neighbouring outputs in 32-bit words: [groups, out / 8], or [out / 8, groups].

    `stored_less` is what the layout takes off before it stores them.
    """

    order: tuple[int, ...] = IN_ORDER
    words_first: bool = False
    stored_less: int = 0

    @property
    def dtypes(self) -> tuple[tuple[str, ...], ...]:
        """One tensor of words."""
        return (WORDS,)

    def build(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[out, groups] uint8, from 0 to 15."""
        words = arrays[0] if self.words_first else arrays[0].T
        zeros = np.empty((words.shape[0] * 8, words.shape[1]), np.uint8)
        for output, nibble in enumerate(self.order):
            zeros[output::8] = _nibble(words, nibble)
        zeros += np.uint8(self.stored_less)
        if self.stored_less and zeros.max(initial=0) > 15:
            raise CheckpointError(
                "a stored zero point of 15 stands for 16 or for 0, as it was written by this tool or that: expected "
                "0 to 14. Take a checkpoint with 'checkpoint_format': 'gptq_v2', or a symmetric one"
            )
        return zeros

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """See build."""
        words, groups = _two_axes(shapes[0])[:: 1 if self.words_first else -1]
        return words * 8, groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scales:
    """Scales of rows, groups or blocks in `dtype`: [out, groups], that `groups_first`, or [out]."""

    dtype: str
    groups_first: bool = False
    companions: tuple[Companion, ...] = ()

    @property
    def dtypes(self) -> tuple[tuple[str, ...], ...]:
        """Of the scales and their companions."""
        return (FLOATS, *(companion.dtypes for companion in self.companions))

    def build(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[out, groups]."""
        scales = arrays[0].reshape(self._two_axes(arrays[0].shape))
        by_row = scales.T if self.groups_first else scales
        for companion, array in zip(self.companions, arrays[1:], strict=True):
            companion.check(array, by_row.shape)
        return checked_scales(by_row, self.dtype)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """See build."""
        shape = self._two_axes(shapes[0])
        return shape[::-1] if self.groups_first else shape

    def _two_axes(self, shape: Shape) -> Shape:
        return _two_axes((*shape, 1) if len(shape) == 1 else shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowScales:
    """A scale for each of some `rows` of a weight, [all rows] or [all rows, 1], or one for all of the weight."""

    num_rows: int
    rows: slice = ALL

    @property
    def dtypes(self) -> tuple[tuple[str, ...], ...]:
        """A float."""
        return (FLOATS,)

    def build(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[num_rows, 1] float32."""
        scales = arrays[0].reshape(-1, 1)
        return checked_scales(np.repeat(scales, self.num_rows, 0) if scales.size == 1 else scales[self.rows], "float32")

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """See build."""
        count = math.prod(shapes[0])
        if count not in (1, *shapes[0][:1]):
            raise CheckpointError(
                f"one number for each row, or one in all, was expected, but the shape is {list(shapes[0])}"
            )
        return (self.num_rows if count == 1 else len(range(count)[self.rows])), 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divisor:
    """A number that a whole weight is to be divided by, as the scale that it is to be multiplied by."""

    @property
    def dtypes(self) -> tuple[tuple[str, ...], ...]:
        """A float."""
        return (FLOATS,)

    def build(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[] float32."""
        divisor = checked_scales(arrays[0].reshape(()), "float32")
        return checked_scales(np.asarray(np.float32(1) / divisor), "float32")

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """See build."""
        _one_number(shapes[0])
        return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Powers:
    """Powers of two by their exponent, one for each group: [..., out, groups] (OCP Microscaling Formats, E8M0)."""

    @property
    def dtypes(self) -> tuple[tuple[str, ...], ...]:
        """Bytes, under either name."""
        return (("uint8", "float8_e8m0fnu"),)

    def build(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The same bytes."""
        exponents = arrays[0].view(np.uint8)
        if exponents.max(initial=0) == 255:
            raise CheckpointError("finite scales were expected, but it holds NaN (an exponent of 255)")
        return exponents.view(ml_dtypes.float8_e8m0fnu)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """See build."""
        return shapes[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """4-bit floats in groups of 32 inputs, two in a byte, low nibble first: [experts, out, groups, 16]."""

    @property
    def dtypes(self) -> tuple[tuple[str, ...], ...]:
        """Bytes."""
        return (("uint8",),)

    def build(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[experts, out, in / 2] uint8."""
        return arrays[0].reshape(self.shape([arrays[0].shape]))

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """See build."""
        if len(shapes[0]) != 4 or shapes[0][-1] != 16:
            raise CheckpointError(f"[experts, out, groups, 16] was expected, but the shape is {list(shapes[0])}")
        return (*shapes[0][:2], shapes[0][2] * 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiddleZeros:
    """Zero points of a symmetric weight: all in the middle, or one below it, as versions of a layout have it."""

    bits: Literal[4, 8]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Words."""
        return WORDS

    def check(self, array: np.ndarray, scales: Shape) -> None:
        """Raises CheckpointError for any other zero point."""
        _check_shape(array, (scales[1], scales[0] * self.bits // 32))
        first = int(np.ascontiguousarray(array).view(np.uint8).flat[0])
        found, middle = first & (1 << self.bits) - 1, 1 << self.bits - 1
        word = np.uint32(found * (0xFFFF_FFFF // ((1 << self.bits) - 1)))
        if found not in (middle, middle - 1) or (array.view(np.uint32) != word).any():
            raise CheckpointError(
                f"config.json says 'sym': true, so all zero points should be {middle} (or {middle - 1}, stored less "
                "one), but they are not: one of the two files is of another checkpoint"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupOrder:
    """The group of each input: its place divided by the group's size, or 0 where all inputs are one group."""

    group: int | None

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Whole numbers."""
        return ("int32", "int64")

    def check(self, array: np.ndarray, scales: Shape) -> None:
        """Raises CheckpointError for any other order."""
        _check_shape(array, (scales[1] * (self.group or max(array.size, 1)),))
        if (array != np.arange(array.size) // (self.group or array.size)).any():
            raise CheckpointError(
                "inputs were expected in the order of their groups, but they are reordered by activations "
                "('desc_act': true), which is not implemented. Take a checkpoint with 'desc_act': false"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoBias:
    """A bias that a tool wrote although the model has none."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Floats."""
        return FLOATS

    def check(self, array: np.ndarray, scales: Shape) -> None:
        """Raises CheckpointError unless all of it is zero."""
        _check_shape(array, scales[:1])
        if array.any():
            raise CheckpointError("a bias of zeros was expected, for config.json asks for none here, but it has values")


def checked_scales(scales: np.ndarray, dtype: str) -> np.ndarray:
    """The scales in `dtype`, contiguous; raises CheckpointError if one is zero, NaN or infinite there."""
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(scales.astype(np.dtype(getattr(ml_dtypes, dtype, dtype))))
    wide = converted.astype(np.float32)
    if not np.isfinite(wide).all() or not wide.all():
        was = "" if converted.dtype == scales.dtype else f", once they are {dtype}"
        raise CheckpointError(
            f"scales should be finite and not zero, but there is a zero, NaN or infinity{was}. The checkpoint is "
            "damaged: fetch it again, or quantize the model anew"
        )
    return converted.reshape(scales.shape)


def _nibble(words: np.ndarray, nibble: int) -> np.ndarray:
    return (words.view(np.uint32) >> np.uint32(4 * nibble) & np.uint32(15)).astype(np.uint8)


def _two_axes(shape: Shape) -> Shape:
    if len(shape) != 2:
        raise CheckpointError(f"two axes were expected, but the shape is {list(shape)}")
    return shape


def _check_shape(array: np.ndarray, shape: Shape) -> None:
    if array.shape != shape:
        raise CheckpointError(f"{list(shape)} was expected beside these scales, but the shape is {list(array.shape)}")


def _one_number(shape: Shape) -> None:
    if any(size != 1 for size in shape):
        raise CheckpointError(f"one number for the whole weight was expected, but the shape is {list(shape)}")
