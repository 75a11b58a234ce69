"""activation(gate) * up times a weight: Hopper's rows of float8 in GPU interpret mode, and what is left to others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from millrace.errors import KernelError
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.pallas_kernels.gated_activation import Activation, gated_activation
from millrace.pallas_kernels.gated_matmul import GatedMatmulProblem, gated_matmul, hopper
from millrace.pallas_kernels.quantized_matmul import FORMATS, matmul
from millrace.pallas_kernels.quantized_matmul.formats import quantize

H200 = "NVIDIA H200"
PROBLEM = GatedMatmulProblem(
    platform="gpu", device_kind=H200, activation="silu", format=FORMATS["fp8"], dtype="bfloat16", in_dim=28672,
    out_dim=8192,
)  # fmt: skip


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def rows_of(gate: jax.Array, up: jax.Array, activation: Activation, warpgroups: int) -> tuple[np.ndarray, np.ndarray]:
    values, scales = hopper.gated_rows(
        gate, up, activation=activation, warpgroups=warpgroups, interpret=plgpu.InterpretGPUParams(detect_races=True)
    )
    return np.float32(values), np.asarray(scales)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("width", "warpgroups"), [(1024, 1), (2048, 2), (6144, 3)])
def test_rows_are_those_of_the_product(width: int, warpgroups: int, activation: Activation) -> None:
    gate, up = draw(3, width), draw(3, width, seed=1)
    values, scales = rows_of(gate, up, activation, warpgroups)
    product = np.float32(gated_activation(gate, up, activation=activation, kernels=KernelChoices("gpu")))
    greatest = np.abs(product).max(axis=1, keepdims=True)
    np.testing.assert_allclose(scales, greatest / 448, rtol=1e-2)
    assert np.abs(values * scales - product).max() <= 0.05 * greatest.max()  # half a step of three bits
    assert np.abs(values).max(axis=1) == pytest.approx(448, rel=1e-2)


def test_a_row_of_zeros_has_scale_0_and_a_row_with_nan_a_nan_scale() -> None:
    gate, up = draw(3, 1024).at[1].set(0), draw(3, 1024, seed=1).at[2, 7].set(jnp.nan)
    values, scales = rows_of(gate, up, "silu", 1)
    assert scales[1] == 0
    assert not values[1].any()
    assert np.isnan(scales[2])
    assert np.isfinite(scales[0])


@pytest.mark.parametrize("width", [28672, 14336, 8192, 12288, 4096, 1024])
def test_widths_of_models_divide_into_warpgroups(width: int) -> None:
    count = hopper.num_warpgroups(width, H200)
    assert count is not None
    assert width % (1024 * count) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": None}, "not plain"),
        ({"format": FORMATS["int8"]}, "not int8"),
        ({"format": FORMATS["fp8_a16"]}, "not fp8_a16"),
        ({"format": FORMATS["fp8_block"]}, "not fp8_block"),
        ({"activation": "gelu"}, "error function"),
        ({"dtype": "float32"}, "must be bfloat16, not float32"),
        ({"in_dim": 11008}, "rows of 11008 columns"),
        ({"out_dim": 96}, "out must be a multiple of 64, not 96"),
    ],
)
def test_what_others_must_do_is_said(change: dict[str, object], reason: str) -> None:
    assert hopper.unsupported(PROBLEM) is None
    said = hopper.unsupported(dataclasses.replace(PROBLEM, **change))
    assert said is not None
    assert reason in said


@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_apart_it_is_the_activation_and_the_matmul(format: str | None) -> None:
    gate, up, plain = draw(4, 128), draw(4, 128, seed=1), draw(64, 128, seed=2)
    weight = plain if format is None else quantize(plain, FORMATS[format])
    kernels = KernelChoices("cpu")
    y = gated_matmul(gate, up, weight, activation="silu", kernels=kernels)
    inner = gated_activation(gate, up, activation="silu", kernels=kernels)
    np.testing.assert_array_equal(np.float32(y), np.float32(matmul(inner, weight, kernels=kernels)))
    assert ("gated_matmul", "apart") in kernels.made


@pytest.mark.parametrize("up", [draw(4, 64), draw(4, 128).astype(jnp.float32)])
def test_what_does_not_fit_is_said(up: jax.Array) -> None:
    with pytest.raises(KernelError, match="wants gate and up of its width and of one shape and dtype"):
        gated_matmul(draw(4, 128), up, draw(8, 128), activation="silu", kernels=KernelChoices("cpu"))
