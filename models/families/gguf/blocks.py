"""GGUF's quantized types: blocks of values that lie together with their scales, and what they become here.

Layouts: ggml's ggml-common.h. A block holds neighbouring inputs of one output. A tensor [*lead, out, in] is read as an
array [*lead, out, blocks] of its type's dtype, so that the array says what it holds. What a value stands for:
(value - center) * scale + offset, scale and offset being those of its group.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ....pallas_kernels.quantized_matmul.contract import FORMATS, UINT4_OFFSET, WeightFormat

type Parts = tuple[np.ndarray, np.ndarray | None]  # scales and offsets, float32 [*lead, out, groups]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockType:
    """One type. `values` gives small whole numbers [*lead, out, in]; `parts` scales and offsets, exact in float32."""

    name: str  # as the gguf package has it
    num_inputs: int  # of a block
    dtype: np.dtype
    format: WeightFormat  # what it becomes, no value of it changed
    center: int = 0
    values: Callable[[np.ndarray], np.ndarray]
    parts: Callable[[np.ndarray], Parts]


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)


def _joined(values: np.ndarray) -> np.ndarray:
    """[*lead, out, blocks, ...] without the axes of blocks and below: [*lead, out, in]."""
    lead = values.shape[:-2]
    return values.reshape(*lead, -1)


def _halves(packed: np.ndarray) -> np.ndarray:
    """[..., n] bytes as [..., 2n]: the low nibbles of all of them, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _nibbles(blocks: np.ndarray) -> np.ndarray:
    return _joined(_halves(blocks["qs"]))


def _nibbles_and_bits(blocks: np.ndarray) -> np.ndarray:
    """Of 32 values the fifth bits lie in the order of the values."""
    high = np.unpackbits(blocks["qh"], axis=-1, bitorder="little")
    return _joined(_halves(blocks["qs"]) | high << 4)


def _scale(blocks: np.ndarray) -> Parts:
    return _wide(blocks["d"]), None


def _scale_and_least(blocks: np.ndarray) -> Parts:
    return _wide(blocks["d"]), _wide(blocks["m"])


def _k_parts(blocks: np.ndarray) -> Parts:
    """Of Q4_K and Q5_K: 6 bits each for the scales and the least values of eight groups, in 12 bytes."""
    packed = blocks["scales"].reshape(*blocks.shape, 3, 4)
    low, least, high = (packed[..., row, :] for row in range(3))
    scales = np.concatenate([low & 0x3F, high & 0x0F | low >> 2 & 0x30], axis=-1)
    offsets = np.concatenate([least & 0x3F, high >> 4 | least >> 2 & 0x30], axis=-1)
    wide, lowest = _wide(blocks["d"])[..., None], _wide(blocks["dmin"])[..., None]
    return _joined(wide * _wide(scales)), _joined(-lowest * _wide(offsets))


def _q4_k_values(blocks: np.ndarray) -> np.ndarray:
    """Every 32 bytes hold 64 values."""
    return _joined(_halves(blocks["qs"].reshape(*blocks.shape, 4, 32)).reshape(*blocks.shape, 256))


def _q5_k_values(blocks: np.ndarray) -> np.ndarray:
    """As Q4_K, with a fifth bit: bit g of byte i for value i of group g."""
    low = _halves(blocks["qs"].reshape(*blocks.shape, 4, 32)).reshape(*blocks.shape, 8, 32)
    high = blocks["qh"][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _joined((low | high << 4).reshape(*blocks.shape, 256))


def _q6_k_values(blocks: np.ndarray) -> np.ndarray:
    """Each half of the block: four bits of 128 values in 64 bytes, two more of each in 32."""
    low = _halves(blocks["ql"].reshape(*blocks.shape, 2, 64)).reshape(*blocks.shape, 2, 4, 32)
    high = blocks["qh"].reshape(*blocks.shape, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    return _joined((low | high << 4).reshape(*blocks.shape, 256))


def _q6_k_parts(blocks: np.ndarray) -> Parts:
    return _joined(_wide(blocks["d"])[..., None] * _wide(blocks["scales"])), None


def _powers(blocks: np.ndarray) -> Parts:
    """The exponents as they are: `packing` makes scales of them."""
    return blocks["e"], None


def _integers(storage: Any, group: int, name: str, scale: Any = "float16", *, offsets: bool = False) -> WeightFormat:
    return WeightFormat(name=name, storage=storage, group=group, scale=scale, offsets=offsets)


def _type(name: str, num_inputs: int, fields: list[Any], format: WeightFormat, **rest: Any) -> BlockType:
    dtype = np.dtype([(key, kind, *size) for key, kind, *size in fields])
    return BlockType(name=name, num_inputs=num_inputs, dtype=dtype, format=format, **rest)


def _types() -> dict[str, BlockType]:
    d, m, k = ("d", "<f2"), ("m", "<f2"), [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12)]
    bits, nibbles = ("qh", "u1", 4), ("qs", "u1", 16)
    small = {"values": _nibbles, "parts": _scale}
    found = (
        _type("Q4_0", 32, [d, nibbles], _integers("uint4", 32, "q4_0"), center=8, **small),
        _type("Q4_1", 32, [d, m, nibbles], _integers("uint4", 32, "q4_1", "float32", offsets=True),
              values=_nibbles, parts=_scale_and_least),
        _type("Q5_0", 32, [d, bits, nibbles], _integers("int8", 32, "q5_0"), center=16,
              values=_nibbles_and_bits, parts=_scale),
        _type("Q5_1", 32, [d, m, bits, nibbles], _integers("int8", 32, "q5_1", offsets=True),
              values=_nibbles_and_bits, parts=_scale_and_least),
        _type("Q8_0", 32, [d, ("qs", "i1", 32)], _integers("int8", 32, "q8_0"),
              values=lambda blocks: _joined(blocks["qs"]), parts=_scale),
        _type("Q4_K", 256, [*k, ("qs", "u1", 128)], _integers("uint4", 32, "q4_k", "float32", offsets=True),
              values=_q4_k_values, parts=_k_parts),
        _type("Q5_K", 256, [*k, ("qh", "u1", 32), ("qs", "u1", 128)],
              _integers("int8", 32, "q5_k", "float32", offsets=True), values=_q5_k_values, parts=_k_parts),
        _type("Q6_K", 256, [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), d],
              _integers("int8", 16, "q6_k", "float32"), center=32, values=_q6_k_values, parts=_q6_k_parts),
        _type("MXFP4", 32, [("e", "u1"), nibbles], FORMATS["mxfp4"], values=_nibbles, parts=_powers),
    )  # fmt: skip
    return {each.name: each for each in found}


BLOCK_TYPES: Mapping[str, BlockType] = types.MappingProxyType(_types())
_BY_DTYPE: Mapping[np.dtype, BlockType] = types.MappingProxyType({each.dtype: each for each in BLOCK_TYPES.values()})


def block_type(array: np.ndarray) -> BlockType | None:
    """The type of an array of blocks; None if it holds plain numbers."""
    return _BY_DTYPE.get(array.dtype)


def stored_values(type: BlockType, array: np.ndarray, format: WeightFormat) -> np.ndarray:
    """The values as `format` stores them, 4-bit ones still one a byte.

    A group whose scale is 0 gets the value that stands for 0, for a stored scale is never 0.
    """
    values = type.values(array).view(np.int8 if format.storage == "int8" else np.uint8)
    if format.storage == "float4_e2m1":
        return values
    if format.storage == "int8" and type.center:
        values = values - np.int8(type.center)
    scales, _ = type.parts(array)
    if not scales.all():
        values.reshape(*scales.shape, -1)[scales == 0] = UINT4_OFFSET if format.storage == "uint4" else 0
    return values


def stored_parts(type: BlockType, array: np.ndarray, format: WeightFormat) -> Parts:
    """Scales and offsets as `format` has them, whose groups may be smaller than the type's; not yet in its dtype."""
    scales, offsets = type.parts(array)
    if format.storage == "float4_e2m1":
        return scales, None
    if format.offsets:
        offsets = np.zeros_like(scales) if offsets is None else offsets
        if format.storage == "uint4" and type.center != UINT4_OFFSET:
            offsets = offsets + np.float32(UINT4_OFFSET - type.center) * scales
    scales = np.where(scales == 0, np.float32(1), scales)
    times = array.shape[-1] * type.num_inputs // (scales.shape[-1] * (format.group or 1))
    return _repeated(scales, times), None if offsets is None else _repeated(offsets, times)


def _repeated(array: np.ndarray, times: int) -> np.ndarray:
    return array if times == 1 else np.repeat(array, times, axis=-1)
