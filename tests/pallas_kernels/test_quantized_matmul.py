"""The contract of the matmul with weights, held by every implementation of its table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace.errors import KernelError
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.pallas_kernels.quantized_matmul import TABLE, QuantizedWeight, matmul

IN, OUT = 48, 24


@pytest.fixture(params=[entry.name for entry in TABLE])
def kernels(request: pytest.FixtureRequest) -> KernelChoices:
    return KernelChoices("cpu", {"quantized_matmul": request.param})


def draw(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


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
    weight = QuantizedWeight(values, jnp.linspace(0.001, 0.02, OUT))
    assert weight.shape == (OUT, IN)
    x = draw(num_rows, IN, dtype=dtype)
    y = jax.jit(lambda x, w: matmul(x, w, kernels=kernels, out_dtype=jnp.float32))(x, weight)
    dense = np.float64(values) * np.float64(weight.scales)[:, None]
    np.testing.assert_allclose(y, np.float64(x) @ dense.T, rtol=1e-4, atol=1e-4)


def test_every_implementation_lowers_for_a_gpu() -> None:
    for entry in TABLE:
        kernels = KernelChoices("gpu", {"quantized_matmul": entry.name})
        run = jax.jit(lambda x, w, kernels=kernels: matmul(x, w, kernels=kernels))
        run.trace(draw(1, IN, dtype="bfloat16"), draw(OUT, IN, dtype="bfloat16")).lower(lowering_platforms=("cuda",))


def test_widths_that_disagree_raise(kernels: KernelChoices) -> None:
    with pytest.raises(KernelError, match=r"wants activations of width 48, got \(3, 40\)"):
        matmul(draw(3, 40), draw(OUT, IN), kernels=kernels)
