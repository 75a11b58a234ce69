"""Scales and zero points of stored weights, spread over the columns of operands in registers (hopper_operands).

`_spread` is inline Mosaic, with a twin in jnp for interpret mode.
"""

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
from jaxtyping import Array, BFloat16

from ..hopper_operands import ROWS, WORDS, decoder
from .contract import Storage


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
    return _spread(ref, first, count, "zeros", decoder(storage).offset_bits)


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
