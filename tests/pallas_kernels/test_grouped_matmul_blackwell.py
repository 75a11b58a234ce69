"""The Blackwell kernel of the grouped matmul, in GPU interpret mode with race detection, and lowered for the chip."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.pallas_kernels.grouped_matmul import GroupedMatmulProblem, blackwell, grouped_matmul
from millrace.pallas_kernels.quantized_matmul import FORMATS, QuantizedWeight
from millrace.pallas_kernels.quantized_matmul.blackwell import ROW_TILES
from millrace.pallas_kernels.quantized_matmul.formats import dequantize, quantize, quantize_rows
from millrace.pallas_kernels.quantized_matmul.row_tiles import Sizes

pytestmark = pytest.mark.usefixtures("tma_of_tiled_rows")

B200 = "NVIDIA B200"
UNEVEN = (26, (0, 17, 0, 3, 2, 0))  # rows, then the size of each group
GROUPINGS = {"uneven": UNEVEN, "one": (200, (0, 200)), "large": (230, (70, 1, 129)), "none": (6, (0, 0, 0))}


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.bfloat16)


def multiply(
    grouping: tuple[int, tuple[int, ...]], shape: tuple[int, int], tile_rows: int, *, is_fp8: bool = False
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
        poisoned = quantized.scales.at[empty].set(jnp.nan)
        stored = QuantizedWeight(values=quantized.values, scales=poisoned, format=quantized.format)
    expected = np.zeros((num_rows, shape[0]), np.float32)
    group = np.repeat(np.arange(len(group_sizes)), group_sizes)
    expected[:num_used] = np.einsum("mi,moi->mo", wide_x[:num_used], wide[group])
    output = blackwell.grouped_matmul(
        x.at[num_used:].set(jnp.nan), stored, jnp.asarray(group_sizes, jnp.int32), platform="gpu", device_kind=B200,
        out_dtype=jnp.float32, sizes=Sizes(rows=tile_rows, channels=128, stages=2, panel=2, blocks=2),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )  # fmt: skip
    return np.float32(output), expected


def test_rows_of_uneven_groups_meet_their_weights() -> None:
    output, expected = multiply(UNEVEN, (128, 256), 16, is_fp8=True)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-3)


def test_rows_of_no_group_leave_the_next_items_sums_alone() -> None:
    """Items without steps come between those of a panel, and share an accumulator with the next."""
    x, weight = draw(40, 128), draw(1, 256, 128)
    output = blackwell.grouped_matmul(
        x, weight, jnp.asarray([8], jnp.int32), platform="gpu", device_kind=B200, out_dtype=jnp.float32,
        sizes=Sizes(rows=32, channels=128, stages=2, panel=1, blocks=1),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )  # fmt: skip
    expected = np.zeros((40, 256), np.float32)
    expected[:8] = np.float32(x)[:8] @ np.float32(weight)[0].T
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.kernels
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("tile_rows", ROW_TILES)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_every_tile_of_rows_serves_every_grouping(grouping: str, tile_rows: int, is_fp8: bool) -> None:
    output, expected = multiply(GROUPINGS[grouping], (256, 384), tile_rows, is_fp8=is_fp8)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("tile_rows", ROW_TILES)
def test_every_tuned_kernel_lowers_for_the_chip(dtype: str, tile_rows: int) -> None:
    groups, out_dim, in_dim = 8, 512, 1024
    weight: Any = jax.ShapeDtypeStruct((groups, out_dim, in_dim), dtype)
    if dtype != "bfloat16":
        scales = jax.ShapeDtypeStruct((groups, out_dim, 1), jnp.float32)
        weight = QuantizedWeight(values=weight, scales=scales, format=FORMATS["fp8"])
    x = jax.ShapeDtypeStruct((groups * tile_rows // 2, in_dim), jnp.bfloat16)
    kernels = KernelChoices("gpu", device_kind=B200)
    device = AbstractDevice(device_kind=B200, num_cores=148, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        step = jax.jit(lambda *arguments: grouped_matmul(*arguments, kernels=kernels))
        traced = step.trace(x, weight, jax.ShapeDtypeStruct((groups,), jnp.int32))
        assert "matmul_blackwell" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": FORMATS["int8"]}, "not int8"),
        ({"dtype": "float32"}, "activations must be bfloat16, not float32"),
        ({"out_dim": 192}, "out must be a multiple of 128"),
    ],
)
def test_what_it_cannot_serve_has_a_reason(change: dict[str, Any], reason: str) -> None:
    problem: dict[str, Any] = {
        "platform": "gpu", "device_kind": B200, "format": None, "num_groups": 8, "num_rows": 64, "in_dim": 128,
        "out_dim": 128, "dtype": "bfloat16",
    }  # fmt: skip
    assert blackwell.unsupported(GroupedMatmulProblem(**problem)) is None
    assert reason in (blackwell.unsupported(GroupedMatmulProblem(**problem | change)) or "")
