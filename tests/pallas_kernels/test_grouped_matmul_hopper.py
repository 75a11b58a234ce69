"""The Hopper kernel of the grouped matmul, in GPU interpret mode with race detection, and lowered for the chip."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.pallas_kernels.grouped_matmul import GroupedMatmulProblem, grouped_matmul, hopper, hopper_a16
from millrace.pallas_kernels.mosaic import TILED_ROWS
from millrace.pallas_kernels.quantized_matmul import FORMATS, QuantizedWeight, WeightFormat
from millrace.pallas_kernels.quantized_matmul.formats import dequantize, quantize, quantize_rows
from millrace.pallas_kernels.quantized_matmul.row_tiles import Sizes, mean_tile_rows, work_list

pytestmark = pytest.mark.usefixtures("tma_of_tiled_rows")

H200 = "NVIDIA H200"
# Rows, then the size of each group: empty groups at both ends, several tiles of a group, rows beyond the sum.
UNEVEN = (40, (0, 17, 0, 3, 9, 0))
GROUPINGS = {
    "uneven": UNEVEN,
    "singles": (4, (1, 0, 1, 0, 0, 1, 1, 0)),
    "one": (200, (0, 200)),
    "large": (230, (70, 1, 129)),
    "none": (6, (0, 0, 0)),
}


def sizes(rows: int, *, channels: int = 64, stages: int = 3, blocks: int = 3) -> Sizes:
    return Sizes(rows=rows, channels=channels, stages=stages, panel=2, blocks=blocks)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.bfloat16)


def multiply(
    grouping: tuple[int, tuple[int, ...]],
    shape: tuple[int, int],
    tiles: Sizes,
    *,
    is_fp8: bool = False,
    out_dtype: str = "float32",
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel gives and what it should; NaN wherever nothing may be read, or what is read may not be stored."""
    (num_rows, group_sizes), num_used = grouping, sum(grouping[1])
    x, weight = draw(num_rows, shape[1]), draw(len(group_sizes), *shape)
    empty = np.flatnonzero(np.array(group_sizes) == 0)
    wide_x, wide = np.float32(x), np.float32(weight)
    stored: jax.Array | QuantizedWeight = weight.at[empty].set(jnp.nan)
    if is_fp8:
        quantized = quantize(weight, FORMATS["fp8"])
        values, scales = quantize_rows(x, "float8_e4m3fn")
        wide_x, wide = np.float32(values) * np.float32(scales), np.float32(dequantize(quantized))
        stored = QuantizedWeight(
            values=quantized.values.at[empty].set(jnp.nan),
            scales=quantized.scales.at[empty].set(jnp.nan),
            format=quantized.format,
        )
    expected = np.zeros((num_rows, shape[0]), np.float32)
    group = np.repeat(np.arange(len(group_sizes)), group_sizes)
    expected[:num_used] = np.einsum("mi,moi->mo", wide_x[:num_used], wide[group])
    output = hopper.grouped_matmul(
        x.at[num_used:].set(jnp.nan), stored, jnp.asarray(group_sizes, jnp.int32), platform="gpu", device_kind=H200,
        out_dtype=out_dtype, sizes=tiles, interpret=plgpu.InterpretGPUParams(detect_races=True),
    )  # fmt: skip
    assert output.dtype == out_dtype
    return np.float32(output), expected


@pytest.mark.kernels
def test_rows_of_uneven_groups_meet_their_weights() -> None:
    output, expected = multiply(UNEVEN, (128, 128), sizes(16), out_dtype="bfloat16")
    np.testing.assert_allclose(output, expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())


@pytest.mark.kernels
def test_outputs_that_are_no_multiple_of_a_tile_are_cut_off() -> None:
    output, expected = multiply((20, (3, 0, 14)), (192, 128), sizes(8))
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-4)


def test_fp8_products_are_scaled_by_row_and_channel() -> None:
    output, expected = multiply((20, (3, 0, 14)), (192, 128), sizes(8), is_fp8=True)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.kernels
def test_a_tile_larger_than_its_staging_leaves_in_pieces() -> None:
    output, expected = multiply((150, (0, 150)), (128, 64), sizes(128, channels=128, stages=2, blocks=1))
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-4)


def multiply_a16(grouping: tuple[int, tuple[int, ...]], in_dim: int, format: WeightFormat) -> None:
    """Weights of a format and bfloat16 rows, on clusters of two blocks."""
    (num_rows, group_sizes), num_used, out_dim = grouping, sum(grouping[1]), 256
    x, weight = draw(num_rows, in_dim), quantize(np.float32(draw(len(group_sizes), out_dim, in_dim)), format)
    tile = hopper_a16.tile_for(format, num_rows, len(group_sizes), out_dim, H200)
    output = hopper_a16.grouped_matmul(
        x.at[num_used:].set(jnp.nan), jax.tree.map(jnp.asarray, weight), jnp.asarray(group_sizes, jnp.int32),
        tile=dataclasses.replace(tile, blocks=4, cluster=2), out_dtype=jnp.float32,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )  # fmt: skip
    expected = np.zeros((num_rows, out_dim), np.float32)
    group = np.repeat(np.arange(len(group_sizes)), group_sizes)
    expected[:num_used] = np.einsum("mi,moi->mo", np.float32(x)[:num_used], np.float32(dequantize(weight))[group])
    np.testing.assert_allclose(output, expected, rtol=1e-2, atol=5e-3 * np.abs(expected).max())


def test_four_bit_experts_are_decoded_in_the_kernel() -> None:
    multiply_a16((12, (0, 9, 2)), 256, FORMATS["mxfp4"])  # half a panel of scales


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4", "mxfp8", "fp8_a16", "int8_a16"])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_every_format_serves_every_grouping(grouping: str, name: str) -> None:
    multiply_a16(GROUPINGS[grouping], 768, FORMATS[name])


@pytest.mark.kernels
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("rows", hopper.ROW_TILES)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_every_tile_of_rows_serves_every_grouping(grouping: str, rows: int, is_fp8: bool) -> None:
    output, expected = multiply(GROUPINGS[grouping], (192, 384), sizes(rows), is_fp8=is_fp8)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=2e-4)


WORK_LIST = jax.jit(work_list, static_argnums=(1, 2))


@settings(max_examples=25)
@given(st.lists(st.integers(0, 40), min_size=6, max_size=6), st.sampled_from([8, 16, 64]))
def test_the_work_list_gives_every_row_to_a_whole_tile_of_its_group(group_sizes: list[int], tile_rows: int) -> None:
    num_rows = 240
    tiles, num_tiles = WORK_LIST(np.array(group_sizes, np.int32), num_rows, tile_rows)
    assert num_tiles[0] <= tiles.shape[1]
    group, start, first, end = np.asarray(tiles)[:, : int(num_tiles[0])]
    assert not np.any(start % TILED_ROWS)  # TMA begins at no other
    assert np.all((start <= first) & (first < end) & (end <= start + tile_rows))
    rows = np.concatenate([np.arange(*own) for own in zip(first, end, strict=True)])
    np.testing.assert_array_equal(rows, np.arange(num_rows))
    expected = np.repeat(np.arange(7), [*group_sizes, num_rows - sum(group_sizes)])
    np.testing.assert_array_equal(np.repeat(group, end - first), expected)


def test_the_most_tiles_that_groups_can_have_fit_the_work_list() -> None:
    group_sizes = np.array([7, 10, 6, 10, 6, 10, 6, 10], np.int32)  # those of 10 begin at the last row of a tile of 8
    tiles, num_tiles = WORK_LIST(group_sizes, 67, 8)
    assert num_tiles[0] == 17 <= tiles.shape[1]


@pytest.mark.parametrize(("num_rows", "tile_rows"), [(8, 8), (9, 16), (64, 16), (128, 32), (4096, 128)])
def test_a_tile_has_room_for_the_mean_rows_of_a_group_wherever_they_begin(num_rows: int, tile_rows: int) -> None:
    assert mean_tile_rows(num_rows, 8, hopper.ROW_TILES, most_before=TILED_ROWS - 1) == tile_rows


def test_gradients_are_those_of_the_definition() -> None:
    x, weight, group_sizes = draw(5, 64), draw(2, 64, 64), jnp.array([2, 3], jnp.int32)

    def total(implementation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
        kernels = KernelChoices("gpu", {"grouped_matmul": implementation}, device_kind=H200)
        return grouped_matmul(x, weight, group_sizes, kernels=kernels).astype(jnp.float32).sum()

    traced = jax.make_jaxpr(jax.grad(functools.partial(total, "hopper"), (0, 1)))(x, weight)
    assert [out.aval.shape for out in traced.jaxpr.outvars] == [x.shape, weight.shape]


def lower(dtype: str, rows: int) -> None:
    """Lowers the tuned kernel for an H200 that is not here."""
    groups, out_dim, in_dim = 8, 512, 1024
    weight: Any = jax.ShapeDtypeStruct((groups, out_dim, in_dim), dtype)
    if dtype != "bfloat16":
        scales = jax.ShapeDtypeStruct((groups, out_dim, 1), jnp.float32)
        weight = QuantizedWeight(values=weight, scales=scales, format=FORMATS["fp8"])
    arguments = (
        jax.ShapeDtypeStruct((groups * min(rows // 2, rows - 7), in_dim), jnp.bfloat16),
        weight,
        jax.ShapeDtypeStruct((groups,), jnp.int32),
    )
    kernels = KernelChoices("gpu", {"grouped_matmul": "hopper"}, device_kind=H200)
    device = AbstractDevice(device_kind=H200, num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        step = jax.jit(lambda *arguments: grouped_matmul(*arguments, kernels=kernels))
        lowered = step.trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "grouped_matmul_hopper" in lowered.as_text()


def test_the_tuned_kernel_of_a_prefill_lowers_for_the_chip() -> None:
    lower("float8_e4m3fn", 128)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("rows", hopper.ROW_TILES)
def test_every_tuned_kernel_lowers_for_the_chip(dtype: str, rows: int) -> None:
    lower(dtype, rows)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "activations must be bfloat16, not float32"),
        ({"format": FORMATS["fp8_block"]}, "fp8_block quantizes them"),
        ({"format": FORMATS["int8"]}, "int8 quantizes them"),
        ({"format": FORMATS["mxfp4"], "in_dim": 2880}, "a channel must have a multiple of 128 bytes, not 1440"),
        ({"out_dim": 96}, "out must be a multiple of 64"),
        ({"in_dim": 192}, "in of 128, not 128 and 192"),
    ],
)
def test_what_it_cannot_serve_has_a_reason(change: dict[str, Any], reason: str) -> None:
    problem: dict[str, Any] = {
        "platform": "gpu", "device_kind": H200, "format": FORMATS["fp8"], "num_groups": 8, "num_rows": 64,
        "in_dim": 128, "out_dim": 128, "dtype": "bfloat16",
    }  # fmt: skip
    assert hopper.unsupported(GroupedMatmulProblem(**problem)) is None
    assert reason in (hopper.unsupported(GroupedMatmulProblem(**problem | change)) or "")
