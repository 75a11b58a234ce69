"""Bytes in shared memory as operands in the registers that wgmma reads, for Hopper.

Values are never moved between threads. A word is 4 neighbouring bytes of a row. `ldmatrix` hands words to threads as
wgmma's 8-bit layout wants them (`words_of`), and that is where its 16-bit layout wants pairs. So pair i of every word,
its values i and i + 2, becomes an operand of its own, [64 rows, 64 inputs] from 32 words, by one conversion
(`both_pairs`); its columns are inputs in an order of their own, in which the other side is laid out beforehand
(`in_order_of_pairs`). Stored weights have decoders of their own (quantized_matmul/hopper_unpack).

A transposed operand is made likewise (`transposed_words_of`): the transposing `ldmatrix` moves units of 2 bytes, so a
word is two neighbouring columns of two neighbouring rows. Its pairs are neighbouring rows of one column: what is
contracted over is in order, while operand i has columns 2 m + i, which are rows of the product (`joined` orders them).

What cannot be said in jnp is inline Mosaic: loads and views of registers. Each has a twin in jnp for interpret mode,
which runs everything else as it is.
"""

import dataclasses
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
from jaxtyping import Array, Int32, Shaped

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


def in_order_of_pairs(x: Shaped[Array, "rows in"]) -> Shaped[Array, "rows in"]:
    """What each input has, in the order of the columns of `both_pairs`, one operand after the other."""
    return x.reshape(x.shape[0], -1, WORDS, 2, 2).transpose(0, 1, 4, 2, 3).reshape(x.shape)


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
    """How a word of an 8-bit dtype becomes its two pairs at once."""

    dtype: Any  # of the operands
    code: str  # PTX, of $2 to $0 and $1


_CONVERSIONS = {
    "float8_e4m3fn": _Conversion(
        jnp.float16,
        """
        .reg .b32 sorted;
        .reg .b16 even, odd;
        prmt.b32 sorted, $2, 0, 0x3120;
        mov.b32 {even, odd}, sorted;
        cvt.rn.f16x2.e4m3x2 $0, even;
        cvt.rn.f16x2.e4m3x2 $1, odd;
        """,
    ),
    # 0x4300 is 128 in bfloat16, whose last place is 1: a byte below 0x43 is 128 and more, and 256 and more where its
    # sign bit is set.
    "int8": _Conversion(
        jnp.bfloat16,
        """
        .reg .b32 bytes, low, high;
        prmt.b32 bytes, $2, 0x43, 0x4240;
        and.b32 low, bytes, 0xff7fff7f;
        and.b32 high, bytes, 0xff80ff80;
        sub.bf16x2 $0, low, high;
        prmt.b32 bytes, $2, 0x43, 0x4341;
        and.b32 low, bytes, 0xff7fff7f;
        and.b32 high, bytes, 0xff80ff80;
        sub.bf16x2 $1, low, high;
        """,
    ),
}


def converted_dtype(dtype: DTypeLike) -> Any:
    """What `both_pairs` makes of an 8-bit dtype."""
    return jnp.dtype(_CONVERSIONS[jnp.dtype(dtype).name].dtype)


def both_pairs(words: Int32[Array, "64 32"], dtype: DTypeLike, is_interpreted: bool) -> tuple[jax.Array, ...]:
    """Both operands [64, 64] of words of an 8-bit dtype."""
    conversion, shape = _CONVERSIONS[jnp.dtype(dtype).name], (ROWS, 2 * WORDS)
    if is_interpreted:
        values = lax.bitcast_convert_type(words, jnp.dtype(dtype)).astype(conversion.dtype)
        return tuple(values[..., pair::2].reshape(shape) for pair in (0, 1))
    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(conversion.dtype), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(WORD_LAYOUT,), return_type=(result, result))  # type: ignore[untyped-decorator]
    def convert(context: Any, array: Any) -> Any:
        layout, word = plgpu.Layout.WGMMA.to_mgpu(), ir.IntegerType.get_signless(32)
        element = ir.F16Type.get() if conversion.dtype == jnp.float16 else ir.BF16Type.get()
        pairs = [np.empty(layout.registers_shape(shape), object) for _ in (0, 1)]
        for i, register in enumerate(array.registers.flat):
            kind = llvm.StructType.get_literal([word, word])
            bits = mosaic.utils.bitcast(register, word)
            both = llvm.inline_asm(kind, [bits], f"{{{conversion.code}}}", "=r,=r,r")
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


def _i32(value: int) -> Any:
    return mosaic.c(value, ir.IntegerType.get_signless(32))


def _byte() -> Any:
    return ir.IntegerType.get_signless(8)
