"""Formats of quantized weights: exact where they can be, within a stated bound of random weights where not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from millrace.errors import KernelError
from millrace.pallas_kernels.quantized_matmul import FORMATS, WeightFormat
from millrace.pallas_kernels.quantized_matmul.formats import (
    dequantize,
    global_scale,
    pack_nibbles,
    quantize,
    quantize_part,
    quantize_rows,
    unpack_nibbles,
)

WITH_ZEROS = dataclasses.replace(FORMATS["int4"], name="int4 with zeros", zeros=True, scale="float16")
ALL = {**FORMATS, WITH_ZEROS.name: WITH_ZEROS}
# Root mean square of what rounding takes from normal weights, relative to them.
BOUNDS = {
    "int8": 0.01, "int8_a16": 0.01, "fp8": 0.03, "fp8_a16": 0.03, "fp8_block": 0.03, "mxfp8": 0.03,
    "int4": 0.1, "int4_a8": 0.1, "int4 with zeros": 0.1, "nvfp4": 0.09, "mxfp4": 0.12,
}  # fmt: skip


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) / 50


def grid(format: WeightFormat) -> list[float]:
    """The values that a format has at scale 1."""
    if format.storage == "int8":
        return [float(value) for value in range(-127, 128)]
    if format.storage == "uint4":
        return [float(value) for value in range(-7, 8)]
    if format.storage == "float4_e2m1":
        return [sign * value for sign in (1, -1) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
    every = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    return [float(value) for value in every[np.isfinite(every)]]


@pytest.mark.parametrize("name", ALL)
def test_random_weights_come_back_within_the_bound(name: str) -> None:
    weight, format = draw(256, 512), ALL[name]
    quantized = quantize(weight, format)
    assert quantized.shape == weight.shape
    assert quantized.values.shape == format.values_shape(256, 512)
    assert quantized.scales.shape == format.scales_shape(256, 512)
    error = np.linalg.norm(np.asarray(dequantize(quantized)) - weight) / np.linalg.norm(weight)
    assert error < BOUNDS[name]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "nvfp4"])
def test_what_lies_on_a_formats_grid_comes_back_exactly(name: str) -> None:
    format = FORMATS[name]
    values = grid(format)
    group = format.group or 64
    largest = max(map(abs, values))
    random = np.random.default_rng(0)
    weight = random.choice(values, (format.block_rows, 4 * group)).astype(np.float32)
    weight[:, ::group] = largest  # so that the scale of each group is found again
    scales = np.repeat([0.25, 1.0, 2.0, 8.0] if format.group else [0.5] * 4, group)
    weight = weight * scales.astype(np.float32)
    np.testing.assert_array_equal(dequantize(quantize(weight, format)), weight)


def test_nvfp4_groups_on_its_grid_come_back_exactly() -> None:
    weight = np.random.default_rng(0).choice(grid(FORMATS["nvfp4"]), (4, 64)).astype(np.float32)
    weight[:, ::16] = 6.0
    weight[0, :16] *= 448.0  # the largest group has the largest scale: the others are at 1 / 448 of it
    np.testing.assert_array_equal(dequantize(quantize(weight, FORMATS["nvfp4"])), weight)


@pytest.mark.parametrize("name", ALL)
def test_a_host_makes_the_numbers_of_a_device(name: str) -> None:
    weight, format = draw(128, 256), ALL[name]
    device = quantize(jnp.asarray(weight), format)
    host = quantize_part(weight, format, global_scale(weight, format) if format.global_scale else None)
    for ours, theirs in zip(host, (device.values, device.scales, device.zeros), strict=True):
        if ours is not None:
            assert np.asarray(theirs).tobytes() == ours.tobytes()


@pytest.mark.parametrize("name", ALL)
def test_rows_of_zeros_stay_zero_and_no_scale_is_zero(name: str) -> None:
    weight = draw(128, 256)
    weight[:] = 0
    quantized = quantize(weight, ALL[name])
    np.testing.assert_array_equal(dequantize(quantized), weight)
    scales = np.asarray(quantized.scales, np.float32)
    assert np.all(np.isfinite(scales)) and np.all(scales > 0)


@pytest.mark.parametrize("name", ALL)
def test_blocks_of_rows_may_be_quantized_apart(name: str) -> None:
    weight, format = draw(256, 256), ALL[name]
    top = global_scale(weight, format) if format.global_scale else None
    whole = quantize_part(weight, format, top)
    halves = [quantize_part(part, format, top) for part in np.split(weight, 2)]
    for index, array in enumerate(whole):
        if array is not None:
            joined = np.concatenate([half[index] for half in halves])
            assert joined.tobytes() == array.tobytes()


@given(
    hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3).map(lambda s: (*s[:-1], 2 * s[-1])), elements=st.integers(0, 15))
)
def test_nibbles_are_unpacked_as_they_were_packed(values: np.ndarray) -> None:
    packed = pack_nibbles(values)
    assert packed.shape == (*values.shape[:-1], values.shape[-1] // 2)
    np.testing.assert_array_equal(unpack_nibbles(packed), values)
    np.testing.assert_array_equal(packed & 15, values[..., ::2])  # the even input is the low nibble


@pytest.mark.parametrize("dtype, bound", [("int8", 0.01), ("float8_e4m3fn", 0.04)])
@pytest.mark.parametrize("group", [None, 16])
def test_activations_come_back_within_the_bound(dtype: str, bound: float, group: int | None) -> None:
    x = jnp.asarray(draw(2, 3, 64))
    values, scales = quantize_rows(x, dtype, group)  # type: ignore[arg-type]
    assert (values.shape, values.dtype, scales.shape) == (x.shape, dtype, (2, 3, 64 // (group or 64)))
    wide = values.astype(jnp.float32).reshape(*scales.shape, -1) * scales[..., None]
    assert jnp.linalg.norm(wide.reshape(x.shape) - x) < bound * jnp.linalg.norm(x)


def test_activations_of_zeros_stay_and_nan_is_not_hidden() -> None:
    x = jnp.zeros((2, 8)).at[1, 3].set(jnp.nan)
    values, scales = quantize_rows(x, "int8")
    assert not np.any(values[0]) and scales[0, 0] == 0
    assert np.isnan(scales[1, 0])


@pytest.mark.parametrize(
    "name, shape, reason",
    [
        ("int4", (8, 96), "its 96 inputs do not divide into groups of 64"),
        ("fp8_block", (64, 128), "its 64 outputs do not divide into blocks of 128"),
        ("nvfp4", (8, 24), "its 24 inputs do not divide into groups of 16"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_with_the_reason(name: str, shape: tuple[int, int], reason: str) -> None:
    with pytest.raises(KernelError, match=reason):
        quantize(jnp.zeros(shape), FORMATS[name])


def test_a_quantized_weight_goes_through_jit_with_its_format() -> None:
    weight = quantize(draw(16, 64), FORMATS["int4"])
    again = jax.jit(lambda weight: weight)(weight)
    assert again.format is weight.format and again.shape == (16, 64)
