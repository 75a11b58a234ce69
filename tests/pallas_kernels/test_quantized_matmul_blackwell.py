"""Blackwell's matmuls: the tcgen05 kernel in GPU interpret mode with race detection, block-scaled products by XLA."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.pallas_kernels.quantized_matmul import FORMATS, MatmulProblem, QuantizedWeight, blackwell, matmul
from millrace.pallas_kernels.quantized_matmul import block_scaled as scaled
from millrace.pallas_kernels.quantized_matmul.formats import dequantize, quantize, quantize_rows
from millrace.pallas_kernels.quantized_matmul.row_tiles import Sizes

GB300 = "NVIDIA GB300"


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.bfloat16)


def multiply(num_rows: int, shape: tuple[int, int], tile_rows: int, stages: int) -> tuple[np.ndarray, np.ndarray]:
    """What the fp8 kernel gives, on two persistent blocks, and what it should."""
    x, weight = draw(num_rows, shape[1]), quantize(draw(*shape), FORMATS["fp8"])
    output = blackwell.matmul(
        x, weight, platform="gpu", device_kind=GB300, out_dtype=jnp.float32,
        sizes=Sizes(rows=tile_rows, channels=128, stages=stages, panel=2, blocks=2),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )  # fmt: skip
    values, scales = quantize_rows(x, "float8_e4m3fn")
    return np.float32(output), np.float32(values) * np.float32(scales) @ np.float32(dequantize(weight)).T


@pytest.mark.kernels
def test_fp8_products_are_scaled_by_row_and_channel() -> None:
    output, expected = multiply(19, (384, 384), tile_rows=16, stages=2)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.kernels
@pytest.mark.parametrize("num_rows", [1, 16, 65, 200])
@pytest.mark.parametrize("tile_rows", blackwell.ROW_TILES)
def test_every_tile_of_rows_serves_any_number_of_rows(tile_rows: int, num_rows: int) -> None:
    output, expected = multiply(num_rows, (512, 384), tile_rows=tile_rows, stages=3)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("name", "bound"), [("mxfp8", 1e-6), ("mxfp4", 1e-6), ("nvfp4", 1.5e-3)])
def test_terms_in_the_weights_format_add_up_to_the_activations(name: str, bound: float) -> None:
    rows, weight = draw(5, 256).at[1].multiply(1e-6).at[2].set(0.0), quantize(draw(128, 256), FORMATS[name])
    run = jax.jit(lambda x, w: scaled.matmul(x, w, platform="gpu", out_dtype=jnp.float32))
    expected = np.float32(rows) @ np.float32(dequantize(weight)).T
    error = np.linalg.norm(run(rows, weight) - expected, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-30)
    assert error.max() < bound


def test_a_row_of_activations_does_not_depend_on_its_neighbours() -> None:
    rows = draw(4, 256)
    quiet = scaled.split(rows, FORMATS["nvfp4"], 1)
    loud = scaled.split(rows.at[1:].multiply(100), FORMATS["nvfp4"], 1)
    for one, other in zip(quiet, loud, strict=True):
        np.testing.assert_array_equal(np.float32(one[:, 0]), np.float32(other[:, 0]))


def trace(name: str, num_rows: int) -> Any:
    """A linear layer as a GB300 is given it."""
    out_dim, in_dim, format = 512, 1024, FORMATS[name]
    weight = jax.eval_shape(lambda: quantize(jnp.zeros((out_dim, in_dim)), format))
    kernels = KernelChoices("gpu", device_kind=GB300)
    step = jax.jit(lambda x, w: matmul(x, w, kernels=kernels))
    return step.trace(jax.ShapeDtypeStruct((num_rows, in_dim), jnp.bfloat16), weight)


def lower(name: str, num_rows: int) -> str:
    """The program, for a chip that is not here."""
    device = AbstractDevice(device_kind=GB300, num_cores=152, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        text: str = trace(name, num_rows).lower(lowering_platforms=("cuda",)).as_text()
    return text


def test_the_tuned_kernel_of_a_prefill_lowers_for_the_chip() -> None:
    assert "matmul_blackwell" in lower("fp8", 1024)


@pytest.mark.kernels
@pytest.mark.parametrize("num_rows", blackwell.ROW_TILES)
def test_every_tuned_kernel_lowers_for_the_chip(num_rows: int) -> None:
    assert "matmul_blackwell" in lower("fp8", num_rows)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "mxfp4"])
def test_block_scaled_weights_reach_the_chips_own_product(name: str) -> None:
    few, many = (trace(name, num_rows).lower(lowering_platforms=("cuda",)).as_text() for num_rows in (16, 1024))
    assert "block_scaled_dot" in few
    assert "block_scaled_dot" not in many  # dequantized, where arithmetic bounds it


PROBLEM: dict[str, Any] = {
    "platform": "gpu", "device_kind": GB300, "num_rows": 64, "in_dim": 1024, "out_dim": 256, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": None}, "not plain"),
        ({"format": FORMATS["int4"]}, "not int4"),
        ({"format": FORMATS["int4_a8"]}, "not int4_a8"),
        ({"dtype": "float32"}, "activations must be bfloat16, not float32"),
        ({"out_dim": 192}, "out must be a multiple of 128"),
        ({"in_dim": 192}, "in of 128"),
    ],
)
def test_what_the_kernel_cannot_serve_has_a_reason(change: dict[str, Any], reason: str) -> None:
    problem = {**PROBLEM, "format": FORMATS["fp8"]}
    assert blackwell.unsupported(MatmulProblem(**problem)) is None
    assert reason in (blackwell.unsupported(MatmulProblem(**problem | change)) or "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device_kind": "NVIDIA H200"}, "block-scaled products are Blackwell's, not of NVIDIA H200"),
        ({"format": None}, "not plain"),
        ({"format": FORMATS["int4"]}, "mxfp8, nvfp4 or mxfp4, not int4"),
        ({"format": FORMATS["mxfp4"], "num_rows": 129}, "more than 128 rows"),
        ({"dtype": "float32"}, "activations must be bfloat16"),
        ({"in_dim": 960}, "multiples of 128, not 960 and 256"),
        ({"num_rows": 171}, "more than 170 rows move more bytes than a dequantized weight does, got 171"),
    ],
)
def test_what_block_scaled_products_cannot_serve_has_a_reason(change: dict[str, Any], reason: str) -> None:
    problem = {**PROBLEM, "format": FORMATS["nvfp4"]}
    assert scaled.unsupported(MatmulProblem(**problem)) is None
    assert reason in (scaled.unsupported(MatmulProblem(**problem | change)) or "")


def test_a_weight_with_a_global_scale_is_multiplied_by_it() -> None:
    weight = quantize(draw(128, 256), FORMATS["nvfp4"])
    doubled = QuantizedWeight(
        values=weight.values, scales=weight.scales, global_scale=2 * weight.global_scale, format=weight.format
    )
    run = jax.jit(lambda x, w: scaled.matmul(x, w, platform="gpu", out_dtype=jnp.float32))
    np.testing.assert_allclose(run(draw(2, 256), doubled), 2 * run(draw(2, 256), weight), rtol=1e-6)
