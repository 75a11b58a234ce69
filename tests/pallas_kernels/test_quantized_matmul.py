"""The contract of the matmul with weights, held by every implementation of its table."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace.errors import KernelError
from millrace.pallas_kernels.dispatch import KernelChoices, anywhere
from millrace.pallas_kernels.quantized_matmul import FORMATS, TABLE, QuantizedWeight, WeightFormat
from millrace.pallas_kernels.quantized_matmul import matmul as quantized_matmul
from millrace.pallas_kernels.quantized_matmul.formats import dequantize, quantize, unpack_nibbles

IN, OUT = 48, 24
XLA, REFERENCE, NATIVE = (KernelChoices("cpu", {"quantized_matmul": name}) for name in ("xla", "reference", "cpu"))


# Kernels that are made for a GPU have tests of their own; so have the instruction sets of those for a CPU.
ANYWHERE = [entry.name for entry in TABLE if entry.unsupported is anywhere]


@pytest.fixture(params=[*ANYWHERE, "cpu"])
def kernels(request: pytest.FixtureRequest) -> KernelChoices:
    return NATIVE if request.param == "cpu" else KernelChoices("cpu", {"quantized_matmul": request.param})


def matmul(x: jax.Array, weight: Any, *, kernels: KernelChoices, **options: Any) -> jax.Array:
    """The operation; a test of what the native kernels refuse is skipped for their reason."""
    try:
        return quantized_matmul(x, weight, kernels=kernels, **options)
    except KernelError as error:
        if kernels is NATIVE and str(error).startswith("no implementation of quantized_matmul serves"):
            pytest.skip(str(error).partition("; ")[0].partition("cpu: ")[2])
        raise


def draw(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


def quantized(weight: jax.Array, format: WeightFormat) -> QuantizedWeight:
    """Rounded by numpy, which is faster here than jax op by op, to the same numbers."""
    made: QuantizedWeight = jax.tree.map(jnp.asarray, quantize(np.asarray(weight, np.float32), format))
    return made


def product(x: jax.Array, weight: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


@pytest.mark.parametrize("rows", [(), (1,), (5,), (1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_leading_axes_follow_the_definition(kernels: KernelChoices, rows: tuple[int, ...], dtype: str) -> None:
    x, weight = draw(*rows, IN, dtype=dtype), draw(OUT, IN, dtype=dtype)
    y = matmul(x, weight, kernels=kernels)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(np.asarray(y, np.float64), product(x, weight), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_bfloat16_is_accumulated_and_returned_in_float32(kernels: KernelChoices, num_rows: int) -> None:
    x, weight = draw(num_rows, 4096, dtype="bfloat16"), draw(OUT, 4096, dtype="bfloat16")
    y = matmul(x, weight, kernels=kernels, out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, product(x, weight), rtol=1e-4, atol=1e-3)


def test_float32_is_never_rounded_to_tf32(kernels: KernelChoices) -> None:
    lowered = jax.jit(lambda x, w: matmul(x, w, kernels=kernels)).lower(draw(4, IN), draw(OUT, IN))
    assert "HIGHEST" in lowered.as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_gradients_follow_the_definition(kernels: KernelChoices, dtype: str, num_rows: int) -> None:
    x, weight, push = draw(num_rows, IN, dtype=dtype), draw(OUT, IN, dtype=dtype), draw(num_rows, OUT, dtype=dtype)
    _, pull = jax.vjp(lambda x, w: matmul(x, w, kernels=kernels), x, weight)
    x_grad, weight_grad = pull(push)
    assert (x_grad.dtype, weight_grad.dtype) == (x.dtype, weight.dtype)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.float64(x_grad), product(push, weight.T), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.float64(weight_grad), product(push.T, x.T), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_weights_are_scaled_by_output_channel(kernels: KernelChoices, dtype: str, num_rows: int) -> None:
    values = jnp.asarray(np.random.default_rng(3).integers(-127, 128, (OUT, IN)), jnp.int8)
    scales = jnp.linspace(0.001, 0.02, OUT)[:, None]
    weight = QuantizedWeight(values=values, scales=scales, format=FORMATS["int8_a16"])
    assert weight.shape == (OUT, IN)
    x = draw(num_rows, IN, dtype=dtype)
    y = jax.jit(lambda x, w: matmul(x, w, kernels=kernels, out_dtype=jnp.float32))(x, weight)
    dense = np.float64(values) * np.float64(weight.scales)
    np.testing.assert_allclose(y, np.float64(x) @ dense.T, rtol=1e-4, atol=1e-4)


# Of the product, relative to that of the plain weight in float32: the format's own rounding, nothing else. int8 and
# fp8 round activations as well.
BOUNDS = {
    "int8": 0.012, "int8_a16": 0.01, "fp8": 0.04, "fp8_a16": 0.03, "fp8_block": 0.04, "mxfp8": 0.03, "int4": 0.1,
    "int4_a8": 0.1, "nvfp4": 0.09, "mxfp4": 0.12,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_weights_give_the_product_within_the_formats_bound(kernels: KernelChoices, name: str) -> None:
    x, weight = draw(5, 512), draw(256, 512)
    y = jax.jit(lambda x, w: matmul(x, w, kernels=kernels))(x, quantized(weight, FORMATS[name]))
    exact = product(x, weight)
    assert np.linalg.norm(np.float64(y) - exact) < BOUNDS[name] * np.linalg.norm(exact)


@pytest.mark.parametrize("name", FORMATS)
def test_one_row_in_bfloat16_follows_the_reference(name: str) -> None:
    x, weight = draw(1, 256, dtype="bfloat16"), quantized(draw(128, 256), FORMATS[name])
    found, exact = (
        jax.jit(lambda x, w, kernels=kernels: matmul(x, w, kernels=kernels))(x, weight) for kernels in (XLA, REFERENCE)
    )
    assert found.dtype == exact.dtype == jnp.bfloat16
    assert np.linalg.norm(np.float64(found) - np.float64(exact)) < 1e-2 * np.linalg.norm(np.float64(exact))


def test_zero_points_are_subtracted(kernels: KernelChoices) -> None:
    format = dataclasses.replace(FORMATS["int4"], group=32, zeros=True)
    x, weight = draw(3, 64), quantized(draw(16, 64) + 2, format)
    np.testing.assert_allclose(
        np.float64(matmul(x, weight, kernels=kernels)), product(x, dequantize(weight)), rtol=1e-4, atol=1e-4
    )


# As GGUF files have them: in groups, and, which no file has, one for each channel.
WITH_OFFSETS = [
    WeightFormat(name="offsets", storage="uint4", group=32, offsets=True),
    WeightFormat(name="offsets", storage="int8", group=16, scale="float16", offsets=True),
    WeightFormat(name="offsets", storage="int8", offsets=True),
]


def with_offsets(format: WeightFormat, *lead: int) -> QuantizedWeight:
    """A random weight [*lead, 16, 64] of a format that nothing is rounded to."""
    random = np.random.default_rng(7)
    shape = (*lead, *format.scales_shape(16, 64))
    bits = random.integers(0, 256, (*lead, *format.values_shape(16, 64)), np.uint8)
    scales, offsets = (jnp.asarray(random.normal(size=shape) / 8, format.scales_dtype) for _ in range(2))
    return QuantizedWeight(
        values=jnp.asarray(bits.view(format.values_dtype)), scales=scales, offsets=offsets, format=format
    )


@pytest.mark.parametrize("format", WITH_OFFSETS, ids=lambda format: f"{format.storage}-{format.group}")
def test_offsets_are_added_after_the_scales(kernels: KernelChoices, format: WeightFormat) -> None:
    x, weight = draw(3, 64), with_offsets(format)
    codes = unpack_nibbles(np.asarray(weight.values)) - 8.0 if format.is_packed else np.asarray(weight.values)
    scales, offsets = (np.repeat(np.float64(each), 64 // each.shape[1], 1) for each in (weight.scales, weight.offsets))
    np.testing.assert_allclose(dequantize(weight), codes * scales + offsets, rtol=1e-5, atol=1e-5)
    y = jax.jit(lambda x, w: matmul(x, w, kernels=kernels))(x, weight)
    np.testing.assert_allclose(np.float64(y), np.float64(x) @ (codes * scales + offsets).T, rtol=1e-4, atol=1e-3)


def test_nothing_is_rounded_to_a_format_with_offsets() -> None:
    with pytest.raises(KernelError, match="offsets has offsets: such weights are read as they are"):
        quantize(draw(16, 64), WITH_OFFSETS[0])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_lowers_for_a_gpu(name: str) -> None:
    x, weight = draw(4, 128, dtype="bfloat16"), quantized(draw(128, 128), FORMATS[name])
    kernels = KernelChoices("gpu", {"quantized_matmul": "xla"})
    run = jax.jit(lambda x, w: matmul(x, w, kernels=kernels))
    run.trace(x, weight).lower(lowering_platforms=("cuda",))


def test_fp8_reaches_a_gpus_dot_in_8_bits() -> None:
    x, weight = draw(4, 128, dtype="bfloat16"), quantized(draw(128, 128), FORMATS["fp8"])
    kernels = KernelChoices("gpu", {"quantized_matmul": "xla"})
    run = jax.jit(lambda x, w: matmul(x, w, kernels=kernels))
    text = run.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert re.search(r"dot_general.*\(tensor<4x128xf8E4M3FN>, tensor<128x128xf8E4M3FN>\) -> tensor<4x128xf32>", text)


def test_every_implementation_lowers_for_a_gpu() -> None:
    for name in ANYWHERE:
        kernels = KernelChoices("gpu", {"quantized_matmul": name})
        run = jax.jit(lambda x, w, kernels=kernels: matmul(x, w, kernels=kernels))
        run.trace(draw(1, IN, dtype="bfloat16"), draw(OUT, IN, dtype="bfloat16")).lower(lowering_platforms=("cuda",))


def test_widths_that_disagree_raise(kernels: KernelChoices) -> None:
    with pytest.raises(KernelError, match=r"wants activations of width 48, got \(3, 40\)"):
        matmul(draw(3, 40), draw(OUT, IN), kernels=kernels)
