"""8- and 4-bit values as operands in the registers that wgmma reads, for Hopper.

Values are never moved between threads. A word is 4 neighbouring bytes of a row: 8 values of 4 bits or 4 of 8.
`ldmatrix` hands words to threads as wgmma's 8-bit layout wants them, and that is where its 16-bit layout wants pairs.
So pair i of every word, its values i and i + pairs, becomes an operand of its own, [64 rows, 64 inputs] from 32 words,
by shifts, masks and one or two multiplications, or by one conversion; its columns are inputs in an order of their own,
in which the other side is laid out beforehand (`in_order_of_pairs`). One `lop3` masks and places two values at once.

A transposed operand is made likewise (`transposed_words_of`): the transposing `ldmatrix` moves units of 2 bytes, so a
word is two neighbouring columns of two neighbouring rows. Its pairs are neighbouring rows of one column: what is
contracted over is in order, while operand i has columns 2 m + i, which are rows of the product (`joined` orders them).

What cannot be said in jnp is inline Mosaic: loads and views of registers. Each has a twin in jnp for interpret mode,
which runs everything else as it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mosaic
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector
from jaxtyping import Array, BFloat16, Int32, Shaped

from .mosaic import TILED_ROWS

ROWS = 64  # of an operand
WORDS = 32  # of a row of a stage: the widest swizzle
BYTES = 4 * WORDS
WORD_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)

# Of 128 rows a warp has 32, of which a thread has 2 neighbours, and those 16 behind.
_JOINED_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((128, 8), (32, 8), (16, 8), (2, 2), (2, 1))), warp_dims=(-10,), lane_dims=(-6, -5), vector_dim=-2
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
_DECODERS: dict[str, Decoder] = {
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


def decoder(storage: str) -> Decoder:
    """Of a storage."""
    return _DECODERS[storage]


def in_order_of_pairs(x: Shaped[Array, "rows in"], pairs: int) -> Shaped[Array, "rows in"]:
    """Activations with each stage's inputs in the order of the operands' columns."""
    rows = x.shape[0]
    return x.reshape(rows, -1, WORDS, 2, pairs).transpose(0, 1, 4, 2, 3).reshape(x.shape)


def in_order_of_neighbours(x: Shaped[Array, "rows in"]) -> Shaped[Array, "rows in"]:
    """The same for operands of neighbouring bytes."""
    rows = x.shape[0]
    return x.reshape(rows, -1, WORDS, 2, 2).transpose(0, 1, 3, 2, 4).reshape(x.shape)


def operand(
    words: Int32[Array, "64 32"], pair: int, storage: str, scales: Any, offsets: Any, *, is_interpreted: bool
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
    result = plgpu.ShapeDtypeStruct((ROWS, WORDS), jnp.dtype(jnp.int32), layout=WORD_LAYOUT)

    @plgpu.inline_mgpu(arg_types=(eight_bit,), return_type=result)  # type: ignore[untyped-decorator]
    def view(context: Any, array: Any) -> Any:
        kind = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        return _viewed(array, kind, WORD_LAYOUT.to_mgpu(), (ROWS, WORDS), is_signed=True)

    return cast(jax.Array, view(plgpu.layout_cast(packed, eight_bit)))


def pairs_of(bits: Int32[Array, "64 32"], power: int, is_interpreted: bool) -> BFloat16[Array, "64 64"]:
    """The halves of words as bfloat16, times 2**power."""
    if is_interpreted:
        return _pairs_without_subnormals(bits, power)
    result = plgpu.ShapeDtypeStruct((ROWS, 2 * WORDS), jnp.dtype(jnp.bfloat16), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(WORD_LAYOUT,), return_type=result)  # type: ignore[untyped-decorator]
    def view(context: Any, array: Any) -> Any:
        kind = ir.VectorType.get((2,), ir.BF16Type.get())
        return _viewed(array, kind, plgpu.Layout.WGMMA.to_mgpu(), (ROWS, 2 * WORDS), is_signed=None)

    pairs = cast(jax.Array, view(bits))
    return pairs * jnp.bfloat16(2.0**power) if power else pairs


def transposed_words_of(stored: Any, is_interpreted: bool) -> Int32[Array, "64 32"]:
    """A ref [64, 128 bytes] as the words of its transpose: word [m, c] is columns 2 m, 2 m + 1 of rows 2 c, 2 c + 1."""
    if is_interpreted:
        units = stored[...].reshape(ROWS // 2, 2, BYTES // 2, 2).transpose(2, 0, 1, 3)
        return lax.bitcast_convert_type(units.reshape(ROWS, WORDS, 4), jnp.int32)
    # mypy takes transforms for abstract classes.
    transforms = (plgpu.TilingTransform((TILED_ROWS, BYTES)), plgpu.SwizzleTransform(BYTES))  # type: ignore[abstract]
    result = plgpu.ShapeDtypeStruct((ROWS, WORDS), jnp.dtype(jnp.int32), layout=WORD_LAYOUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms),), return_type=result)  # type: ignore[untyped-decorator]
    def load(context: Any, source: Any) -> Any:
        layout = WORD_LAYOUT.to_mgpu()
        registers = np.empty(layout.registers_shape((ROWS, WORDS)), object)
        tile_bytes = ir.MemRefType(source.type).get_strides_and_offset()[0][0]
        first = _ldmatrix_address(source, tile_bytes)
        for tile in range(0, ROWS // TILED_ROWS, 2):
            four = _ldmatrix_transposed(mosaic.utils.getelementptr(first, [tile * tile_bytes], _byte()))
            for i, word in enumerate(four):
                registers[0, tile + i // 2, 0, 0, i % 2] = word
        return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return cast(jax.Array, load(stored))


def _ldmatrix_address(source: Any, tile_bytes: int) -> Any:
    """Where this thread's row of the first four matrices is: those of 8 rows and 16 columns, those of the 16 columns
    behind, and both for the 8 rows below.

    A warp has the 32 columns that become its 16 rows of words. The swizzle exchanges 16 bytes by the row's number.
    """
    lane, warp = arith.andi(mosaic.utils.thread_idx(), _i32(31)), arith.andi(mosaic.utils.thread_idx(), _i32(96))
    row, columns, below = arith.andi(lane, _i32(7)), arith.andi(lane, _i32(8)), arith.shrui(lane, _i32(4))
    column = arith.xori(arith.ori(warp, arith.shli(columns, _i32(1))), arith.shli(row, _i32(4)))
    offset = arith.addi(arith.muli(below, _i32(tile_bytes)), arith.addi(arith.muli(row, _i32(BYTES)), column))
    return mosaic.utils.getelementptr(mosaic.utils.memref_ptr(source), [offset], _byte())


def _ldmatrix_transposed(address: Any) -> list[Any]:
    """A register of each of four matrices of 8 x 8 units of 2 bytes, transposed."""
    shape = ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>")
    four = nvvm.ldmatrix(address, layout=nvvm.MMALayout.col, num=4, shape=shape, elt_type=nvvm.LdStMatrixEltType.B16)
    word = ir.IntegerType.get_signless(32)
    kind = ir.VectorType.get((1,), word)
    return [mosaic.utils.bitcast(llvm.extractvalue(word, four, [i]), kind) for i in range(4)]


@dataclasses.dataclass(frozen=True)
class _Conversion:
    """How a word of an 8-bit dtype becomes its two pairs at once, in fewer instructions than a Decoder's.

    PTX, of $2 to $0 and $1: bytes 0 and 2, and 1 and 3, of `apart`, 0 and 1, and 2 and 3, of `neighbours`. $3 is 0x43.
    """

    dtype: Any  # of the operands
    apart: str
    neighbours: str


_FROM_FLOAT8 = """
    .reg .b32 sorted;
    .reg .b16 first, second;
    {sort}
    mov.b32 {{first, second}}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, first;
    cvt.rn.f16x2.e4m3x2 $1, second;
"""
# As above: a byte below 0x43 is 128 and more in bfloat16, and 256 and more where its sign bit is set. One of prmt's two
# constants must be a register, which ptxas fills each time anew if it knows the number.
_FROM_INT8 = """
    .reg .b32 bytes, low, high;
    prmt.b32 bytes, $2, $3, {first};
    and.b32 low, bytes, 0xff7fff7f;
    and.b32 high, bytes, 0xff80ff80;
    sub.bf16x2 $0, low, high;
    prmt.b32 bytes, $2, $3, {second};
    and.b32 low, bytes, 0xff7fff7f;
    and.b32 high, bytes, 0xff80ff80;
    sub.bf16x2 $1, low, high;
"""
_CONVERSIONS = {
    "float8_e4m3fn": _Conversion(
        jnp.float16,
        apart=_FROM_FLOAT8.format(sort="prmt.b32 sorted, $2, 0, 0x3120;"),
        neighbours=_FROM_FLOAT8.format(sort="mov.b32 sorted, $2;"),
    ),
    "int8": _Conversion(
        jnp.bfloat16,
        apart=_FROM_INT8.format(first="0x4240", second="0x4341"),
        neighbours=_FROM_INT8.format(first="0x4140", second="0x4342"),
    ),
}


def converted_dtype(dtype: DTypeLike) -> Any:
    """What `both_pairs` makes of an 8-bit dtype."""
    return jnp.dtype(_CONVERSIONS[jnp.dtype(dtype).name].dtype)


def both_pairs(
    words: Int32[Array, "64 32"], dtype: DTypeLike, is_interpreted: bool, *, are_neighbours: bool = False
) -> tuple[jax.Array, ...]:
    """Both operands [64, 64] of words of an 8-bit dtype, of pairs as in `operand` or of neighbouring bytes."""
    conversion, shape = _CONVERSIONS[jnp.dtype(dtype).name], (ROWS, 2 * WORDS)
    code = conversion.neighbours if are_neighbours else conversion.apart
    if is_interpreted:
        values = lax.bitcast_convert_type(words, jnp.dtype(dtype)).astype(conversion.dtype)
        order = (slice(0, 2), slice(2, 4)) if are_neighbours else (slice(0, None, 2), slice(1, None, 2))
        return tuple(values[..., pair].reshape(shape) for pair in order)
    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(conversion.dtype), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(WORD_LAYOUT,), return_type=(result, result))  # type: ignore[untyped-decorator]
    def convert(context: Any, array: Any) -> Any:
        layout, word = plgpu.Layout.WGMMA.to_mgpu(), ir.IntegerType.get_signless(32)
        element = ir.F16Type.get() if conversion.dtype == jnp.float16 else ir.BF16Type.get()
        pairs = [np.empty(layout.registers_shape(shape), object) for _ in (0, 1)]
        opaque = arith.addi(nvvm.read_ptx_sreg_nctaid_z(), _i32(0x42))
        for i, register in enumerate(array.registers.flat):
            kind = llvm.StructType.get_literal([word, word])
            bits = mosaic.utils.bitcast(register, word)
            both = llvm.inline_asm(kind, [bits, opaque], f"{{{code}}}", "=r,=r,r,r")
            for which, pair in enumerate(pairs):
                half = llvm.extractvalue(word, both, [which])
                pair.flat[i] = mosaic.utils.bitcast(half, ir.VectorType.get((2,), element))
        return tuple(mosaic.FragmentedArray(_registers=pair, _layout=layout, _is_signed=None) for pair in pairs)

    return cast(tuple[jax.Array, ...], convert(words))


def through_memory(values: jax.Array, smem: Any) -> Any:
    """An operand as it is, or in interpret mode, which gives a place for it, from there."""
    if smem is None:
        return values
    smem[...] = values
    plgpu.commit_smem()
    return smem


def joined(even: Shaped[Array, "64 N"], odd: Shaped[Array, "64 N"], is_interpreted: bool) -> Shaped[Array, "128 N"]:
    """Rows 2 m and 2 m + 1 of products with transposed operands, in the layout in which they are neighbours."""
    shape = (2 * ROWS, even.shape[1])
    if is_interpreted:
        return jnp.stack([even, odd], axis=1).reshape(shape)
    result = plgpu.ShapeDtypeStruct(shape, even.dtype, layout=_JOINED_LAYOUT)
    wgmma = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(arg_types=(wgmma, wgmma), return_type=result)  # type: ignore[untyped-decorator]
    def join(context: Any, *parts: Any) -> Any:
        layout = _JOINED_LAYOUT.to_mgpu()
        registers = np.empty(layout.registers_shape(shape), object)
        kind = ir.VectorType.get((2,), parts[0].mlir_dtype)
        for at in np.ndindex(registers.shape):
            tile, half, column = at[1], at[4], at[9]
            numbers = [vector.extract(part.registers[0, tile, 0, 0, half].item(), [], [column]) for part in parts]
            registers[at] = vector.from_elements(kind, numbers)
        return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return cast(jax.Array, join(even, odd))


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


def _i32(value: int) -> Any:
    return mosaic.c(value, ir.IntegerType.get_signless(32))


def _byte() -> Any:
    return ir.IntegerType.get_signless(8)
