"""Matmul of 4- and 8-bit weights and bfloat16 activations for Hopper: TMA, weights decoded in registers, wgmma.

Schedule. Weights are M, since only wgmma's M operand may be registers; activations are N, 8 to 128 rows of them. A
block has two consumer warpgroups of 64 channels and one that copies. A stage is 128 bytes of a channel (256 inputs of
4 bits, 128 of 8): `ldmatrix` brings it into registers, and each of the 4 or 2 operands of 64 inputs that it becomes
(hopper_unpack) is decoded while wgmma multiplies the one before. Scales and zero points come by TMA too, 16 bytes of
each channel at once, so once in several stages (a panel); each split of K begins a panel, and may end within one. Where
their rows do not begin at multiples of 16 bytes, every second, fourth or eighth does, and is copied apart (`folds`).
Activations are read from L2 again by each block, N / 16 of the bytes of 4-bit weights with 64 channels: two blocks of a
cluster, which fill every pair of SMs, multicast them where they are many. Where N is wide they come in pieces of 64
inputs, each a slot of its own, so that shared memory holds enough of them; in rings of 2, 4 or 8 slots, places are
cheap to find.
With few rows reading weights bounds it, at 36 KB per SM and microsecond: 41 values of 4 bits a cycle, for two of which
a warp has 4.8 instructions, half of them decoding, of 128 that an SM issues. Waits are for others to fill: two blocks
of an SM, four warps on each of its schedulers. With many rows wgmma bounds it (64 x 128 x 64 takes 256 cycles, its
decoding 70 of another warpgroup's), or L2. Where there are too few tiles to fill the chip, or they spread unevenly
over it (`turns`), K is split, and XLA adds the float32 parts in whatever reads them.

Operands. In registers: operand i + 1 is decoded into registers of its own while wgmma i is in flight, and issued after
`wgmma_wait(0)`, so no register that wgmma reads is written before it ends. `wgmma_wait(1)` behind the next wgmma would
be as right, but ptxas takes both for one stage of its pipeline, in which nothing may define an operand, and serializes
(C7513). A stage's first operand has no wgmma before it, or that of the stage before (`ahead`, with its words
carried round the loop). In shared memory: a weight slot is released once its words are in registers, behind the first
wgmma, in whose time the fence between proxies is free; an activation slot after the `wgmma_wait(0)` behind the last
wgmma that reads it; a panel of scales with the last stage that it serves. Staged output is rewritten once its TMA
store has read it. Interpret mode has no operands in registers: there they go through shared memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Int32

from ..hopper_operands import ROWS, through_memory, words_of
from ..mosaic import swizzled
from .contract import QuantizedWeight, Storage, WeightFormat
from .hopper_tiles import (
    GroupTiles,
    Parts,
    Ring,
    Tile,
    Tiles,
    along_columns,
    free_barrier,
    full_barrier,
    launch,
    shared_by,
)
from .hopper_unpack import (
    COLUMNS,
    decoder,
    in_order_of_pairs,
    missing_power,
    offsets_of,
    operand,
    scales_of,
)

_PANELS = 2  # of scales in shared memory
_LEAST_COPY = 16  # bytes of a row that TMA copies, and what rows must begin at multiples of
_MOST_FOLDS = 8  # of which each begins at 128 bytes of shared memory


@dataclasses.dataclass(frozen=True)
class Groups:
    """How groups of inputs lie in stages, for a format that has them."""

    of_stage: int
    of_panel: int
    kind: str  # dtype of the scales
    has_zeros: bool

    @classmethod
    def of(cls, format: WeightFormat) -> "Groups | None":
        """Those of a format; None where all inputs of a channel share a scale."""
        if format.group is None:
            return None
        inputs = decoder(format.storage).inputs
        smallest = 1 if format.zeros else format.scales_dtype.itemsize
        of_stage = inputs // format.group
        return cls(of_stage, math.lcm(_LEAST_COPY // smallest, of_stage), format.scale, format.zeros)

    @property
    def stages(self) -> int:
        """Of a panel."""
        return self.of_panel // self.of_stage

    def panels(self, steps: int) -> int:
        """Of so many stages, the last be it short."""
        return -(-steps // self.stages)


class Work(NamedTuple):
    """Tiles of N that have weights each: those of group g are rows g * out_dim and so on."""

    out_dim: int  # M
    groups: Int32[Array, " tiles"]  # of each tile of N
    num_tiles: Int32[Array, " 1"]  # that are in use


def inputs_of_panel(format: WeightFormat) -> int:
    """Inputs that the scales of one copy are for."""
    return decoder(format.storage).inputs * _stages_of_panel(format)


def stages_of_split(format: WeightFormat) -> int:
    """That a split of K should have at least: a panel's, but two are enough."""
    return min(_stages_of_panel(format), 2)


def _stages_of_panel(format: WeightFormat) -> int:
    groups = Groups.of(format)
    return groups.stages if groups else 1


def product(
    weight: QuantizedWeight,
    x: BFloat16[Array, "N K"],
    *,
    tile: Tile,
    out_dtype: DTypeLike,
    work: Work | None = None,
    interpret: Any = None,
) -> jax.Array:
    """[splits, N, M] of out_dtype: parts to add, float32 if several; scales of whole channels are left to the caller
    then.

    The tile divides N, M and, but for its splits, K: the last of these may be short. With `work` each tile of N has its
    own M rows of the weights.
    """
    format, (num_rows, in_dim) = weight.format, x.shape
    # Splits are alike: where the last is short, TMA fills up weights and activations with zeros.
    in_dim += -in_dim % (tile.k * tile.splits)
    tiles = Tiles(tile, work.out_dim if work else weight.values.shape[0], num_rows, in_dim)
    groups = Groups.of(format)
    operands = {"weights": weight.values, "x": in_order_of_pairs(x, decoder(format.storage).pairs)}
    if groups is not None:
        scales = weight.scales
        bits = lax.bitcast_convert_type(scales, jnp.uint8) if scales.itemsize == 1 else scales
        operands["scales"] = _folded(bits, groups)
        if weight.zeros is not None:
            operands["zeros"] = _folded(weight.zeros, groups)
    if tile.splits == 1 and (channel := channel_scales(weight)) is not None:
        operands["channel"] = channel
    if work is not None:
        operands |= {"group_of_tile": work.groups, "num_tiles": work.num_tiles}
    parts = Parts(tiles, out_dtype)
    body = functools.partial(
        _body,
        names=tuple(operands),
        tiles=tiles,
        parts=parts,
        groups=groups,
        storage=format.storage,
        is_interpreted=bool(interpret),
    )
    scratch = _scratch(tile, weight, groups, operands, is_interpreted=bool(interpret)) | {"staged": parts.staged}
    stored = launch(
        body, tiles, tuple(operands.values()), out=parts.out, scratch=scratch, name="matmul_a16_hopper",
        interpret=interpret,
    )  # fmt: skip
    return parts.by_rows(stored)


def folds(num_groups: int, itemsize: int, of_panel: int) -> int:
    """Channels in a row of scales or zero points [out / folds, folds * groups] of which TMA can copy panels: one at
    least, and rows that begin at multiples of 16 bytes."""
    found = 1
    while found * num_groups * itemsize % _LEAST_COPY or found * num_groups < of_panel:
        found *= 2
    return found


def unsupported(format: WeightFormat, in_dim: int) -> str | None:
    """Why the kernel cannot copy the scales or zero points of so many inputs."""
    groups = Groups.of(format)
    if groups is None or format.group is None:
        return None
    sizes = [1, format.scales_dtype.itemsize] if format.zeros else [format.scales_dtype.itemsize]
    num_groups = in_dim // format.group
    if max(folds(num_groups, size, groups.of_panel) for size in sizes) > _MOST_FOLDS:
        return f"a channel must have an even number of scales or zero points of a byte, not {num_groups}"
    return None


def _folded(numbers: jax.Array, groups: Groups) -> jax.Array:
    """A view, not a copy: to pad rows instead would read and write 4.7 % of the weight's bytes once more (4 bits,
    groups of 128, zero points and scales of 16 bits), in one or two kernels of XLA's."""
    num_channels, num_groups = numbers.shape
    return numbers.reshape(num_channels // folds(num_groups, numbers.itemsize, groups.of_panel), -1)


def channel_scales(weight: QuantizedWeight) -> jax.Array | None:
    """One float32 for each channel, where the format has them: of whole rows, or of the whole weight."""
    if weight.format.group is None:
        return weight.scales[:, 0].astype(jnp.float32)
    if weight.global_scale is not None:
        return jnp.broadcast_to(weight.global_scale, weight.scales.shape[:1])
    return None


def _scratch(
    tile: Tile, weight: QuantizedWeight, groups: Groups | None, operands: Mapping[str, jax.Array], *,
    is_interpreted: bool,
) -> dict[str, Any]:  # fmt: skip
    slots, piece = tile.num_n_slots, tile.k // tile.pieces
    weights = operands["weights"]
    scratch = {
        "weights_smem": swizzled((tile.stages, tile.block_m, 128), weights.dtype),
        "x_smem": swizzled((slots, tile.n, piece), jnp.bfloat16),
        "weights_barriers": (full_barrier(tile.stages, 1), free_barrier(tile, tile.stages)),
        "x_barriers": (full_barrier(slots, 1), free_barrier(tile, slots, is_shared=True)),
    }
    if groups is not None:
        names = ["scales", "zeros"] if groups.has_zeros else ["scales"]
        num_folds = {name: weight.scales.shape[0] // operands[name].shape[0] for name in names}
        scratch["groups_smem"] = {
            name: plgpu.SMEM((_PANELS, of_row, tile.block_m // of_row, groups.of_panel), operands[name].dtype)
            for name, of_row in num_folds.items()
        }
        scratch["groups_barriers"] = (full_barrier(_PANELS, sum(num_folds.values())), free_barrier(tile, _PANELS))
    if "channel" in operands:
        scratch["channel_smem"] = plgpu.SMEM((tile.block_m,), jnp.float32)
        scratch["channel_barriers"] = (full_barrier(1, 1), free_barrier(tile, 1))
    if is_interpreted:
        scratch["operand_smem"] = swizzled((tile.warpgroups, ROWS, COLUMNS), jnp.bfloat16)
    return scratch


@dataclasses.dataclass(frozen=True)
class _Rings:
    weights: Ring
    x: Ring
    groups: Ring | None
    channel: Ring | None


def _body(
    *refs: Any,  # operands by `names`, and the output
    names: tuple[str, ...],
    tiles: Tiles,
    parts: Parts,
    groups: Groups | None,
    storage: Storage,
    is_interpreted: bool,
    **scratch: Any,
) -> None:
    """One block: the last warpgroup copies, the others decode and multiply."""
    tile, out_gmem = tiles.tile, refs[-1]
    gmem = dict(zip(names, refs, strict=False))
    if "num_tiles" in gmem:
        group_of_tile, num_n = gmem["group_of_tile"], gmem["num_tiles"][0]
        tiles = GroupTiles(tile, tiles.m, tiles.n, tiles.k, tiles, group_of_tile, num_n)
    rings = _Rings(
        Ring(tile.stages, *scratch["weights_barriers"]),
        Ring(tile.num_n_slots, *scratch["x_barriers"]),
        Ring(_PANELS, *scratch["groups_barriers"]) if groups else None,
        Ring(1, *scratch["channel_barriers"]) if "channel" in gmem else None,
    )
    wg = lax.axis_index("wg")

    @pl.when(wg == tile.warpgroups)
    def _() -> None:
        tiles.each(functools.partial(_fill, gmem=gmem, scratch=scratch, rings=rings, tiles=tiles, groups=groups))
        stages = tiles.num_turns() * tiles.steps
        rings.weights.drain(stages)
        rings.x.drain(stages * tile.pieces)
        if rings.groups and groups:
            rings.groups.drain(tiles.num_turns() * groups.panels(tiles.steps))
        if rings.channel:
            rings.channel.drain(tiles.num_turns())

    @pl.when(wg < tile.warpgroups)
    def _() -> None:
        rows = pl.ds(wg * tile.m, tile.m)

        def multiply(turn: jax.Array, index: jax.Array) -> None:
            split, m, n = tiles.at(index)
            mine = {name: _of_warpgroup(ref, wg, tile) for name, ref in scratch.get("groups_smem", {}).items()}
            mine |= {"weights": scratch["weights_smem"].at[:, rows], "x": scratch["x_smem"]}
            if is_interpreted:
                mine["operand"] = scratch["operand_smem"].at[wg]
            sums = _sums(mine, rings, turn, tiles=tiles, groups=groups, storage=storage)
            if power := missing_power(storage, has_scales=groups is not None, has_zeros=_has_zeros(groups)):
                sums = sums * jnp.float32(2.0**power)
            if rings.channel:
                rings.channel.to_read(turn)
                sums = sums * along_columns(scratch["channel_smem"][rows], sums.shape)
                plgpu.commit_smem()  # what was read is read before TMA, another proxy, writes
                rings.channel.release(turn)
            parts.store(sums, scratch["staged"].at[wg], out_gmem, split, m + wg * tile.m, n)

        tiles.each(multiply)
        plgpu.wait_smem_to_gmem(0)


def _fill(
    turn: jax.Array,
    index: jax.Array,
    *,
    gmem: Mapping[str, Any],
    scratch: Mapping[str, Any],
    rings: _Rings,
    tiles: Tiles,
    groups: Groups | None,
) -> None:
    """Copy one tile's operands as slots become free."""
    tile, groups_ring = tiles.tile, rings.groups
    split, m, n = tiles.at(index)
    channels, piece = pl.ds(tiles.first_channel(m, n), tile.block_m), tile.k // tile.pieces

    @pl.loop(0, tiles.steps)
    def _(step: jax.Array) -> None:
        use, stage = turn * tiles.steps + step, split * tiles.steps + step
        if groups is not None and groups_ring is not None:

            @pl.when(lax.rem(step, groups.stages) == 0)
            def _() -> None:
                slot, full = groups_ring.to_fill(_panel_use(groups, tiles, turn, step))
                for name, smem in scratch["groups_smem"].items():
                    _, num_folds, num_rows, of_panel = smem.shape
                    rows = pl.ds(lax.div(tiles.first_channel(m, n), num_folds), num_rows)
                    for fold in range(num_folds):
                        first = fold * (gmem[name].shape[1] // num_folds) + stage * groups.of_stage
                        part = gmem[name].at[rows, pl.ds(first, of_panel)]
                        plgpu.copy_gmem_to_smem(part, smem.at[slot, fold], full)

        slot, full = rings.weights.to_fill(use)
        stored = gmem["weights"].at[channels, pl.ds(stage * 128, 128)]
        plgpu.copy_gmem_to_smem(stored, scratch["weights_smem"].at[slot], full)
        for part in range(tile.pieces):
            slot, full = rings.x.to_fill(use * tile.pieces + part)
            rows = gmem["x"].at[pl.ds(n, tile.n), pl.ds(stage * tile.k + part * piece, piece)]
            plgpu.copy_gmem_to_smem(rows, scratch["x_smem"].at[slot], full, collective_axes=shared_by(tile))

    if rings.channel is not None:
        full = rings.channel.to_fill(turn)[1]
        plgpu.copy_gmem_to_smem(gmem["channel"].at[channels], scratch["channel_smem"], full)


def _sums(
    smem: Mapping[str, Any],  # [slots, this warpgroup's rows, ...]
    rings: _Rings,
    turn: jax.Array,
    *,
    tiles: Tiles,
    groups: Groups | None,
    storage: Storage,
) -> jax.Array:
    """One tile's products [m, n] in float32."""
    tile, groups_ring, first_use = tiles.tile, rings.groups, turn * tiles.steps
    is_interpreted = "operand" in smem
    num_operands, of_piece = tile.k // COLUMNS, tile.k // tile.pieces // COLUMNS

    def take(step: jax.Array) -> jax.Array:
        """A stage's words, once they and its scales are there."""
        use = first_use + step
        if groups is not None and groups_ring is not None:
            panel = _panel_use(groups, tiles, turn, step)
            pl.when(lax.rem(step, groups.stages) == 0)(lambda: groups_ring.wait_full(panel))
        return words_of(smem["weights"].at[rings.weights.to_read(use)], is_interpreted)

    def decoder_of(step: jax.Array) -> Callable[[jax.Array, int], jax.Array]:
        """Makes operands of a stage's words."""
        scales = offsets = None
        if groups is not None and groups_ring is not None:
            slot = groups_ring.slot(_panel_use(groups, tiles, turn, step))
            scales, offsets = _of_groups(smem, slot, step, groups, storage)
        return functools.partial(
            operand, storage=storage, scales=scales, offsets=offsets, is_interpreted=is_interpreted
        )

    def multiply(step: jax.Array, words: jax.Array, values: jax.Array, decode: Any, then: Any, sums: Any) -> Any:
        """Add a stage's products, of which `values` are the first operand; what `then` gives during the last."""
        following = None
        for index in range(num_operands):
            part, of_part = divmod(index, of_piece)
            x_use = (first_use + step) * tile.pieces + part
            slot = rings.x.to_read(x_use) if of_part == 0 else rings.x.slot(x_use)
            columns = smem["x"].at[slot, :, pl.ds(COLUMNS * of_part, COLUMNS)].transpose((1, 0))
            plgpu.wgmma(sums, through_memory(values, smem.get("operand")), columns)
            if index == 0:
                plgpu.commit_smem()  # what was read is read before TMA, another proxy, writes
                rings.weights.release(first_use + step)
            if index + 1 < num_operands:
                values = decode(words, index + 1)
            else:
                following = then()
            plgpu.wgmma_wait(0)
            if of_part == of_piece - 1:
                rings.x.release(x_use)
        if groups is not None and groups_ring is not None:
            panel, is_last = _panel_use(groups, tiles, turn, step), lax.rem(step, groups.stages) == groups.stages - 1
            if tiles.steps % groups.stages:
                is_last |= step == tiles.steps - 1
            pl.when(is_last)(lambda: groups_ring.release(panel))
        return following

    def stage(step: jax.Array, sums: Any) -> None:
        words, decode = take(step), decoder_of(step)
        multiply(step, words, decode(words, 0), decode, lambda: None, sums)

    def first_operand(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        words = take(step)
        return words, decoder_of(step)(words, 0)

    def stage_ahead(step: jax.Array, begun: tuple[jax.Array, jax.Array], sums: Any) -> Any:
        """What the stage before has begun; begins the next."""
        return multiply(step, *begun, decoder_of(step), lambda: first_operand(step + 1), sums)

    def run(sums: Any) -> jax.Array:
        if tile.ahead:
            last = jnp.int32(tiles.steps - 1)
            loop = functools.partial(stage_ahead, sums=sums)
            words, values = lax.fori_loop(0, last, loop, first_operand(jnp.int32(0)))
            multiply(last, words, values, decoder_of(last), lambda: None, sums)
        else:
            pl.loop(0, tiles.steps)(functools.partial(stage, sums=sums))
        done: jax.Array = sums[...]
        return done

    whole: jax.Array = pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((tile.m, tile.n), jnp.float32))
    return whole


def _of_warpgroup(folded: Any, wg: jax.Array, tile: Tile) -> Any:
    """Its channels of a ref [panels, folds, channels / folds, groups]."""
    num_rows = tile.m // folded.shape[1]
    return folded.at[:, :, pl.ds(wg * num_rows, num_rows)]


def _panel_use(groups: Groups, tiles: Tiles, turn: jax.Array, step: jax.Array) -> jax.Array:
    """Of the ring of panels, in a turn's step."""
    return turn * groups.panels(tiles.steps) + lax.div(step, groups.stages)


def _of_groups(
    smem: Mapping[str, Any], slot: jax.Array, step: jax.Array, groups: Groups, storage: Storage
) -> tuple[jax.Array, jax.Array | None]:
    """A stage's scales, and offsets where there are zero points."""
    first = lax.rem(step, groups.stages) * groups.of_stage
    is_interpreted = "operand" in smem
    place: dict[str, Any] = {"first": first, "count": groups.of_stage, "storage": storage}
    place |= {"is_interpreted": is_interpreted}
    scales = scales_of(smem["scales"].at[slot], **place, kind=groups.kind)
    offsets = offsets_of(smem["zeros"].at[slot], **place) if groups.has_zeros else None
    return scales, offsets


def _has_zeros(groups: Groups | None) -> bool:
    return groups is not None and groups.has_zeros
