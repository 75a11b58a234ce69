"""Stored weights as bfloat16 in the registers that wgmma reads, for Hopper.

Values are never moved between threads. A word is 4 neighbouring bytes of a row of weights: 8 values of 4 bits or 4 of
8. `ldmatrix` hands words to threads as wgmma's 8-bit layout wants them, and that is where its 16-bit layout wants
pairs. So pair i of every word, its values i and i + pairs, becomes an operand of its own, [64 rows, 64 inputs] from 32
words, by shifts, masks and one or two multiplications; its columns are inputs in an order of their own, in which
activations are laid out beforehand (`in_order_of_pairs`). One `lop3` masks and places two values at once.

What cannot be said in jnp is inline Mosaic: views of registers (`words_of`, `pairs_of`) and scales spread over columns
(`_spread`). Each has a twin in jnp for interpret mode, which runs everything else as it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mosaic
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector
from jaxtyping import Array, BFloat16, Int32, Shaped

from .contract import Storage

ROWS = 64  # of an operand
WORDS = 32  # of a row of a stage: the widest swizzle
_WORD_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How one storage's words become pairs of bfloat16."""

    pairs: int  # in a word
    minuend: Callable[[Any, int], Any]  # words, pair -> what stands for a pair's values, as bits
    subtrahend: Callable[[Any, int], Any] | None = None  # likewise, to subtract
    power: int = 0  # of two, that the difference still lacks
    offset: int = 0  # of every value
    offset_bits: int = 0  # that make a zero point of 0..15 an offset

    @property
    def inputs(self) -> int:
        """Of a stage."""
        return WORDS * self.pairs * 2


def _shifted(words: Any, right: int) -> Any:
    """Words shifted right, or left where negative."""
    if right == 0:
        return words
    return lax.shift_right_logical(words, jnp.int32(right)) if right > 0 else lax.shift_left(words, jnp.int32(-right))


def _masked(words: Any, mask: int, also: int = 0) -> Any:
    masked = lax.bitwise_and(words, _constant(mask))
    return lax.bitwise_or(masked, _constant(also)) if also else masked


def _constant(bits: int) -> Any:
    """An int32 of these bits in both halves."""
    return jnp.int32(int(np.array(bits << 16 | bits, np.uint32).view(np.int32)))


def _float(words: Any, *, sign_at: int, at: int, to: int, size: int) -> Any:
    """Small floats as bfloat16 bits: a sign at bit `sign_at`, `size` bits that begin at bit `at` and go to bit `to`."""
    mask = ((1 << size) - 1) << to
    return lax.bitwise_or(_masked(_shifted(words, sign_at - 15), 0x8000), _masked(_shifted(words, at - to), mask))


# 0x4300 is 128 in bfloat16, whose last place is 1: 7 low bits count upwards from there.
_DECODERS: dict[Storage, Decoder] = {
    "uint4": Decoder(4, lambda w, i: _masked(_shifted(w, 4 * i), 0xF, 0x4300), offset=136, offset_bits=0x4300),
    # The sign bit of an int8 is the lowest of the exponent, which turns 128 into 256.
    "int8": Decoder(
        2,
        lambda w, i: _masked(_shifted(w, 8 * i), 0x7F, 0x4300),
        lambda w, i: _masked(_shifted(w, 8 * i), 0x80, 0x4300),
    ),
    "float8_e4m3fn": Decoder(2, lambda w, i: _float(w, sign_at=8 * i + 7, at=8 * i, to=4, size=7), power=120),
    "float4_e2m1": Decoder(4, lambda w, i: _float(w, sign_at=4 * i + 3, at=4 * i, to=6, size=3), power=126),
}


def decoder(storage: Storage) -> Decoder:
    """Of a storage."""
    return _DECODERS[storage]


def in_order_of_pairs(x: Shaped[Array, "rows in"], pairs: int) -> Shaped[Array, "rows in"]:
    """Activations with each stage's inputs in the order of the operands' columns."""
    rows = x.shape[0]
    return x.reshape(rows, -1, WORDS, 2, pairs).transpose(0, 1, 4, 2, 3).reshape(x.shape)


def operand(
    words: Int32[Array, "64 32"], pair: int, storage: Storage, scales: Any, offsets: Any, *, is_interpreted: bool
) -> BFloat16[Array, "64 64"]:
    """Pair `pair` of all words: (value - offset) * scale, rounded to bfloat16; None: no scale, the usual offset."""
    chosen = _DECODERS[storage]
    values = pairs_of(chosen.minuend(words, pair), chosen.power, is_interpreted)
    if chosen.subtrahend is not None:
        values = values - pairs_of(chosen.subtrahend(words, pair), 0, is_interpreted)
    if offsets is not None:
        values = values - offsets
    elif chosen.offset:
        values = values - jnp.bfloat16(chosen.offset)
    return values if scales is None else values * scales


def words_of(stored: Any, is_interpreted: bool) -> Int32[Array, "64 32"]:
    """A ref [64, 128 bytes] in shared memory as words."""
    packed = stored[...]
    if is_interpreted:
        return lax.bitcast_convert_type(packed.reshape(ROWS, WORDS, 4), jnp.int32)
    eight_bit = plgpu.Layout.WGMMA_8BIT
    result = plgpu.ShapeDtypeStruct((ROWS, WORDS), jnp.dtype(jnp.int32), layout=_WORD_LAYOUT)

    @plgpu.inline_mgpu(arg_types=(eight_bit,), return_type=result)  # type: ignore[untyped-decorator]
    def view(context: Any, array: Any) -> Any:
        kind = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        return _viewed(array, kind, _WORD_LAYOUT.to_mgpu(), (ROWS, WORDS), is_signed=True)

    return cast(jax.Array, view(plgpu.layout_cast(packed, eight_bit)))


def pairs_of(bits: Int32[Array, "64 32"], power: int, is_interpreted: bool) -> BFloat16[Array, "64 64"]:
    """The halves of words as bfloat16, times 2**power."""
    if is_interpreted:
        return _pairs_without_subnormals(bits, power)
    result = plgpu.ShapeDtypeStruct((ROWS, 2 * WORDS), jnp.dtype(jnp.bfloat16), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(_WORD_LAYOUT,), return_type=result)  # type: ignore[untyped-decorator]
    def view(context: Any, array: Any) -> Any:
        kind = ir.VectorType.get((2,), ir.BF16Type.get())
        return _viewed(array, kind, plgpu.Layout.WGMMA.to_mgpu(), (ROWS, 2 * WORDS), is_signed=None)

    pairs = cast(jax.Array, view(bits))
    return pairs * jnp.bfloat16(2.0**power) if power else pairs


def _viewed(array: Any, kind: Any, layout: Any, shape: tuple[int, int], *, is_signed: bool | None) -> Any:
    """The same registers, each of another kind, as an array of another layout."""
    registers = np.empty(layout.registers_shape(shape), object)
    assert registers.size == array.registers.size, "a view keeps the registers"
    for i, register in enumerate(array.registers.flat):
        registers.flat[i] = mosaic.utils.bitcast(register, kind)
    return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)


def _pairs_without_subnormals(bits: jax.Array, power: int) -> jax.Array:
    """The twin of `pairs_of`: XLA on a CPU flushes the subnormals that small floats are before their power of two."""
    halves = lax.bitcast_convert_type(bits, jnp.uint16).reshape(ROWS, 2 * WORDS).astype(jnp.int32)
    exponent, fraction = (halves >> 7) & 0xFF, halves & 0x7F
    significand = jnp.where(exponent > 0, 128 + fraction, fraction).astype(jnp.float32)
    size = significand * jnp.exp2((jnp.maximum(exponent, 1) - 134 + power).astype(jnp.float32))
    return jnp.where(halves >> 15 == 1, -size, size).astype(jnp.bfloat16)


def scales_of(ref: Any, first: Any, count: int, *, kind: str, is_interpreted: bool) -> BFloat16[Array, "64 64"]:
    """Groups first..first + count of a ref [64, groups], spread over an operand's columns.

    `kind` is the dtype that the ref's bits stand for: 8-bit floats come as uint8.
    """
    if is_interpreted:
        groups = ref[:, pl.ds(first, count)]
        if groups.dtype == jnp.uint8:
            groups = lax.bitcast_convert_type(groups, jnp.dtype(kind))
        return jnp.repeat(groups.astype(jnp.float32).astype(jnp.bfloat16), 2 * WORDS // count, axis=1)
    scales = _spread(ref, first, count, kind)
    return scales * jnp.bfloat16(2.0**120) if kind == "float8_e4m3fn" else scales


def offsets_of(ref: Any, first: Any, count: int, storage: Storage, *, is_interpreted: bool) -> BFloat16[Array, "64 64"]:
    """Zero points, uint8 in a ref [64, groups], as what `operand` subtracts."""
    if is_interpreted:
        offsets = (ref[:, pl.ds(first, count)].astype(jnp.int32) + 128).astype(jnp.bfloat16)
        return jnp.repeat(offsets, 2 * WORDS // count, axis=1)
    return _spread(ref, first, count, "zeros", _DECODERS[storage].offset_bits)


def _spread(ref: Any, first: Any, count: int, kind: str, also: int = 0) -> jax.Array:
    """One number of a row for all columns of its group, twice in a register, as bits of bfloat16."""
    assert count <= 16, "at most two groups in 8 columns"
    layout = plgpu.Layout.WGMMA.to_mgpu()
    result = plgpu.ShapeDtypeStruct((ROWS, 2 * WORDS), jnp.dtype(jnp.bfloat16), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=result)  # type: ignore[untyped-decorator]
    def load(context: Any, source: Any, start: Any) -> Any:
        start = start.registers.item()
        row, quarter = _row_and_quarter()
        registers = np.empty(layout.registers_shape((ROWS, 2 * WORDS)), object)
        loaded: dict[tuple[int, int], Any] = {}
        for at in np.ndindex(registers.shape):
            tile, half = at[1], at[4]  # 8 columns; 8 rows of 16
            key = half, tile * 8 * count // (2 * WORDS)
            if key not in loaded:
                group = _plus(start, key[1])
                if count == 16:  # two groups in a tile; a thread's two columns are of one
                    group = arith.addi(group, arith.shrui(quarter, _i32(1)))
                number = memref.load(source, [_index(_plus(row, 8 * half)), _index(group)])
                loaded[key] = _doubled(number, kind, also)
            registers[at] = loaded[key]
        return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return cast(jax.Array, load(ref, first))


def _row_and_quarter() -> tuple[Any, Any]:
    """This thread's first row of 64, and which quarter of a tile's 8 columns it has, in wgmma's layout."""
    thread = arith.andi(mosaic.utils.thread_idx(), _i32(127))
    warp, lane = arith.shrui(thread, _i32(5)), arith.andi(thread, _i32(31))
    return arith.addi(arith.shli(warp, _i32(4)), arith.shrui(lane, _i32(2))), arith.andi(lane, _i32(3))


def _doubled(number: Any, kind: str, also: int) -> Any:
    """Two bfloat16 in a register, both with the bits of one number; e4m3 still lacks 2**120."""
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    if kind in ("bfloat16", "float16", "float32"):
        if kind == "float16":
            number = arith.extf(ir.F32Type.get(), number)
        if kind != "bfloat16":
            number = arith.truncf(ir.BF16Type.get(), number)
        return vector.broadcast(pair, number)
    bits = arith.extui(ir.IntegerType.get_signless(32), number)
    if kind == "float8_e8m0fnu":
        bits = arith.shli(bits, _i32(7))
    elif kind == "float8_e4m3fn":
        bits = arith.shli(arith.andi(bits, _i32(0x7F)), _i32(4))
    bits = arith.ori(arith.ori(bits, arith.shli(bits, _i32(16))), _i32(also << 16 | also))
    return mosaic.utils.bitcast(vector.broadcast(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), bits), pair)


def _i32(value: int) -> Any:
    return mosaic.c(value, ir.IntegerType.get_signless(32))


def _plus(value: Any, constant: int) -> Any:
    return arith.addi(value, _i32(constant)) if constant else value


def _index(value: Any) -> Any:
    return arith.index_cast(ir.IndexType.get(), value)
