"""Stored weights as bfloat16 in the registers that wgmma reads, for Hopper.

Values are never moved between threads. A word is 4 neighbouring bytes of a row of weights: 8 values of 4 bits or 4 of
8, which lies in threads as wgmma's 8-bit layout wants it (hopper_operands), and that is where its 16-bit layout wants
pairs. So pair i of 4 words, their values i and i + pairs, is 8 columns of an operand [64 rows, 64 inputs], by a shift,
a mask and one multiplication and addition; within 4 words columns are inputs in an order of their own, in which
activations are laid out beforehand (`in_order_of_pairs`). An operand's inputs are neighbours, and so few groups' own.

Instructions bound what decodes. Values of 4 bits stay where they are in the low byte of a half word, where bfloat16
counts in units of 2**-133: one shift and 4 masks for 8 values, and for two of them one `fma.bf16x2` with the scale,
2**96 of that power in it, and -8 scales (an exact bfloat16, so that nothing is rounded but the result). What is then
missing of the power comes into the float32 sums (`missing_power`).

What cannot be said in jnp is inline Mosaic: views of registers (`_pairs_in_order`) and scales spread over
columns (`_spread`). Each has a twin in jnp for interpret mode, which runs everything else as it is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mosaic
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector
from jaxtyping import Array, BFloat16, Int32, Shaped

from ..hopper_operands import ROWS, WORD_LAYOUT, WORDS
from .contract import UINT4_OFFSET, Storage

COLUMNS = 64  # of an operand
_WORDS_OF_TILE = 4  # in 8 columns, one in each quarter of them
_MOST_POWER = 127  # of two in bfloat16
_FOLDED_POWER = 96  # into a scale: scales up to 2**31 stay finite, products of those down to 2**-89 normal


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How one storage's words become pairs of bfloat16."""

    pairs: int  # in a word
    bits: Callable[[Any, int], Any]  # words, pair -> words whose halves are its values, but for a power of two
    subtrahend: Callable[[Any, int], Any] | None = None  # likewise, to subtract
    power: int = 0  # of two, that the bits lack
    odd_power: int = 0  # of two, that those of odd pairs have of it
    offset: int = 0  # of every value

    @property
    def inputs(self) -> int:
        """Of a stage."""
        return WORDS * self.pairs * 2

    def power_in_operand(self, *, has_scales: bool, has_zeros: bool) -> int:
        """What an operand makes up for of `power`, be it with its scales."""
        return min(self.power, _FOLDED_POWER if has_scales and not has_zeros else _MOST_POWER)


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


_DECODERS: dict[Storage, Decoder] = {
    # The low byte of a bfloat16 counts in units of 2**-133, through the subnormal numbers and the first normal ones.
    "uint4": Decoder(
        4, lambda w, i: _masked(_shifted(w, i // 2 * 8), 0xF << i % 2 * 4), power=133, odd_power=4, offset=UINT4_OFFSET
    ),
    # 0x4300 is 128 in bfloat16, whose last place is 1: 7 low bits count upwards from there. The sign bit of an int8 is
    # the lowest of the exponent, which turns 128 into 256.
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
    """What each input has, in the order of the operands' columns."""
    return x.reshape(x.shape[0], -1, _WORDS_OF_TILE, 2, pairs).transpose(0, 1, 4, 2, 3).reshape(x.shape)


def missing_power(storage: Storage, *, has_scales: bool, has_zeros: bool) -> int:
    """Of two, that products of operands lack."""
    chosen = _DECODERS[storage]
    return chosen.power - chosen.power_in_operand(has_scales=has_scales, has_zeros=has_zeros)


def operand(
    words: Int32[Array, "64 32"], index: int, storage: Storage, scales: Any, offsets: Any, *, is_interpreted: bool
) -> BFloat16[Array, "64 64"]:
    """A stage's inputs from 64 * index: (value - offset) * scale / 2**missing_power, rounded to bfloat16.

    Of the stage [64, inputs] are `scales_of` and `offsets_of`; None: no scale, the usual offset.
    """
    chosen = _DECODERS[storage]
    mine = _slice(words, index, WORDS // chosen.pairs)
    scales, offsets = (None if each is None else _slice(each, index, COLUMNS) for each in (scales, offsets))
    power = chosen.power_in_operand(has_scales=scales is not None, has_zeros=offsets is not None)
    is_folded = scales is not None and offsets is None and chosen.subtrahend is None
    if offsets is None and chosen.offset:
        offset = jnp.bfloat16(-chosen.offset * 2.0 ** (power - chosen.power))
        offsets = scales * offset if is_folded else jnp.full((ROWS, COLUMNS), offset)
    powers = [power - chosen.odd_power * (pair % 2) for pair in range(chosen.pairs)]
    factor = scales if is_folded else None

    def values(bits: Callable[[Any, int], Any]) -> jax.Array:
        words_of_pairs = [bits(mine, pair) for pair in range(chosen.pairs)]
        return _pairs_in_order(words_of_pairs, powers, factor, offsets, is_interpreted=is_interpreted)

    whole = values(chosen.bits)
    if chosen.subtrahend is not None:
        whole = whole - values(chosen.subtrahend)
    return whole if scales is None or is_folded else whole * scales


def _slice(numbers: jax.Array, index: int, size: int) -> jax.Array:
    return lax.slice(numbers, (0, index * size), (ROWS, (index + 1) * size))


def _pairs_in_order(
    pairs: Sequence[Int32[Array, "64 words"]],
    powers: Sequence[int],
    factor: BFloat16[Array, "64 64"] | None,
    addend: BFloat16[Array, "64 64"] | None,
    *,
    is_interpreted: bool,
) -> BFloat16[Array, "64 64"]:
    """The halves of the words of each pair as bfloat16, times 2**power of that pair and the factor, plus the addend.

    It is rounded once, but for the factor's product with the power, which is exact.
    """
    if is_interpreted:
        return _pairs_without_subnormals(pairs, powers, factor, addend)
    given = [each for each in (factor, addend) if each is not None]
    layouts = [WORD_LAYOUT] * len(pairs) + [plgpu.Layout.WGMMA] * len(given)
    result = plgpu.ShapeDtypeStruct((ROWS, COLUMNS), jnp.dtype(jnp.bfloat16), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=tuple(layouts), return_type=result)  # type: ignore[untyped-decorator]
    def arrange(context: Any, *arrays: Any) -> Any:
        words, columns = arrays[: len(pairs)], [array.registers for array in arrays[len(pairs) :]]
        factors, addends = columns.pop(0) if factor is not None else None, columns.pop() if columns else None
        layout = plgpu.Layout.WGMMA.to_mgpu()
        registers = np.empty(layout.registers_shape((ROWS, COLUMNS)), object)
        kind = ir.VectorType.get((2,), ir.BF16Type.get())
        for at in np.ndindex(registers.shape):
            tile, pair = divmod(at[1], len(pairs))
            value = mosaic.utils.bitcast(words[pair].registers[(at[0], tile, *at[2:])], kind)
            by = _splat(2.0 ** powers[pair], kind) if powers[pair] else None
            if factors is not None:
                by = factors[at] if by is None else arith.mulf(factors[at], by)
            registers[at] = _multiplied_and_added(value, by, None if addends is None else addends[at])
        return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return cast(jax.Array, arrange(*pairs, *given))


def _multiplied_and_added(value: Any, factor: Any, addend: Any) -> Any:
    """value * factor + addend in one instruction, or what of it there is."""
    if factor is not None and addend is not None:
        kind, word = value.type, ir.IntegerType.get_signless(32)
        given = [mosaic.utils.bitcast(each, word) for each in (value, factor, addend)]
        # What LLVM makes of arith's or math's goes through float32.
        sum_ = llvm.inline_asm(word, given, "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r")
        return mosaic.utils.bitcast(sum_, kind)
    if factor is not None:
        return arith.mulf(value, factor)
    return value if addend is None else arith.addf(value, addend)


def _splat(number: float, kind: Any) -> Any:
    return vector.broadcast(kind, mosaic.c(number, ir.BF16Type.get()))


def _pairs_without_subnormals(
    pairs: Sequence[jax.Array], powers: Sequence[int], factor: jax.Array | None, addend: jax.Array | None
) -> jax.Array:
    """The twin of `_pairs_in_order`: XLA on a CPU flushes subnormal numbers, and so the bits have their power first."""
    values = [_floats(words, power) for words, power in zip(pairs, powers, strict=True)]
    tiles = jnp.stack([each.reshape(ROWS, -1, 2 * _WORDS_OF_TILE) for each in values], axis=2)
    whole = tiles.reshape(ROWS, COLUMNS)
    if factor is not None:
        whole = whole * factor.astype(jnp.float32)
    if addend is not None:
        whole = whole + addend.astype(jnp.float32)
    return whole.astype(jnp.bfloat16)


def _floats(bits: Int32[Array, "64 words"], power: int) -> jax.Array:
    """The bfloat16 halves of words, times 2**power."""
    halves = lax.bitcast_convert_type(bits, jnp.uint16).astype(jnp.int32)
    exponent, fraction = (halves >> 7) & 0xFF, halves & 0x7F
    significand = jnp.where(exponent > 0, 128 + fraction, fraction).astype(jnp.float32)
    size = significand * jnp.exp2((jnp.maximum(exponent, 1) - 134 + power).astype(jnp.float32))
    return jnp.where(halves >> 15 == 1, -size, size)


def scales_of(
    ref: Any, first: Any, count: int, storage: Storage, *, kind: str, is_interpreted: bool
) -> BFloat16[Array, "64 inputs"]:
    """Groups first..first + count of a ref [folds, 64 // folds, groups], those of a stage, spread over its operands'
    columns; row r lies at [r % folds, r // folds].

    `kind` is the dtype that the ref's bits stand for: 8-bit floats come as uint8.
    """
    if is_interpreted:
        groups = _unfolded(ref[:, :, pl.ds(first, count)])
        if groups.dtype == jnp.uint8:
            groups = lax.bitcast_convert_type(groups, jnp.dtype(kind))
        return _spread_in_jnp(groups.astype(jnp.float32).astype(jnp.bfloat16), storage)
    scales = _spread(ref, first, count, storage, kind)
    return scales * jnp.bfloat16(2.0**120) if kind == "float8_e4m3fn" else scales


def offsets_of(
    ref: Any, first: Any, count: int, storage: Storage, *, is_interpreted: bool
) -> BFloat16[Array, "64 inputs"]:
    """Zero points, uint8 in a ref as that of `scales_of`, as what `operand` adds."""
    if is_interpreted:
        lacking = missing_power(storage, has_scales=True, has_zeros=True)
        zeros = _unfolded(ref[:, :, pl.ds(first, count)]).astype(jnp.float32) * -(2.0**-lacking)
        return _spread_in_jnp(zeros.astype(jnp.bfloat16), storage)
    return _spread(ref, first, count, storage, "zeros") * jnp.bfloat16(-(2.0**_MOST_POWER))


def _unfolded(groups: jax.Array) -> jax.Array:
    return groups.swapaxes(0, 1).reshape(ROWS, -1)


def _spread_in_jnp(groups: jax.Array, storage: Storage) -> jax.Array:
    chosen = _DECODERS[storage]
    return in_order_of_pairs(jnp.repeat(groups, chosen.inputs // groups.shape[1], axis=1), chosen.pairs)


def _spread(ref: Any, first: Any, count: int, storage: Storage, kind: str) -> jax.Array:
    """One number of a row for all columns of its group, twice in a register, as bits of bfloat16."""
    chosen = _DECODERS[storage]
    layout, shape = plgpu.Layout.WGMMA.to_mgpu(), (ROWS, chosen.inputs)
    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.bfloat16), layout=plgpu.Layout.WGMMA)
    group, of_tile = chosen.inputs // count, 2 * _WORDS_OF_TILE * chosen.pairs  # inputs
    folds = ref.shape[0]  # a power of two
    assert 2 * group >= of_tile, "at most two groups in 4 words"

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=result)  # type: ignore[untyped-decorator]
    def load(context: Any, source: Any, start: Any) -> Any:
        start = start.registers.item()
        row, quarter = _row_and_quarter()
        registers = np.empty(layout.registers_shape(shape), object)
        loaded: dict[tuple[int, int], Any] = {}
        for at in np.ndindex(registers.shape):
            tile, half = at[1] // chosen.pairs, at[4]  # of 4 words; 8 rows of 16
            key = half, tile * of_tile // group
            if key not in loaded:
                place = _plus(start, key[1])
                if group < of_tile:  # of 4 words two are of one group, and a thread has one
                    place = arith.addi(place, arith.shrui(quarter, _i32(1)))
                mine = _plus(row, 8 * half)
                fold, within = arith.andi(mine, _i32(folds - 1)), arith.shrui(mine, _i32(folds.bit_length() - 1))
                number = memref.load(source, [_index(fold), _index(within), _index(place)])
                loaded[key] = _doubled(number, kind)
            registers[at] = loaded[key]
        return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return cast(jax.Array, load(ref, first))


def _row_and_quarter() -> tuple[Any, Any]:
    """This thread's first row of 64, and which quarter of a tile's 8 columns it has, in wgmma's layout."""
    thread = arith.andi(mosaic.utils.thread_idx(), _i32(127))
    warp, lane = arith.shrui(thread, _i32(5)), arith.andi(thread, _i32(31))
    return arith.addi(arith.shli(warp, _i32(4)), arith.shrui(lane, _i32(2))), arith.andi(lane, _i32(3))


def _doubled(number: Any, kind: str) -> Any:
    """Two bfloat16 in a register, both with the bits of one number; e4m3 still lacks 2**120, zero points 2**133."""
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
    bits = arith.ori(bits, arith.shli(bits, _i32(16)))
    return mosaic.utils.bitcast(vector.broadcast(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), bits), pair)


def _i32(value: int) -> Any:
    return mosaic.c(value, ir.IntegerType.get_signless(32))


def _plus(value: Any, constant: int) -> Any:
    return arith.addi(value, _i32(constant)) if constant else value


def _index(value: Any) -> Any:
    return arith.index_cast(ir.IndexType.get(), value)
