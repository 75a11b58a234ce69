"""What every implementation of the matmuls with weights owes its contract."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from millrace import KernelError
from millrace.pallas_kernels import grouped_matmul as grouped
from millrace.pallas_kernels import quantized_matmul as quantized
from millrace.pallas_kernels.dispatch import Implementation, KernelChoices, choose

TOLERANCE = {np.float32: 1e-5, ml_dtypes.bfloat16: 2e-2}


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.fixture(params=[entry.name for entry in quantized.TABLE])
def matmul_kernels(request: pytest.FixtureRequest) -> KernelChoices:
    return KernelChoices("cpu", {"quantized_matmul": request.param})


@pytest.fixture(params=[entry.name for entry in grouped.TABLE])
def grouped_kernels(request: pytest.FixtureRequest) -> KernelChoices:
    return KernelChoices("cpu", {"grouped_matmul": request.param})


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [(1,), (2, 1), (3, 5), ()], ids=str)
def test_matmul_is_x_times_the_transposed_weight(
    matmul_kernels: KernelChoices, rows: tuple[int, ...], dtype: Any
) -> None:
    x, weight = normal(*rows, 24, dtype=dtype), normal(10, 24, dtype=dtype, seed=1)
    found = quantized.matmul(x, weight, kernels=matmul_kernels, out_dtype=jnp.float32)
    assert found.shape == (*rows, 10) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, x.astype(np.float64) @ weight.astype(np.float64).T, rtol=1e-4, atol=1e-4)
    assert quantized.matmul(x, weight, kernels=matmul_kernels).dtype == dtype


def test_an_int8_weight_counts_as_its_values_times_its_scales(matmul_kernels: KernelChoices) -> None:
    values = np.random.default_rng(0).integers(-127, 128, (10, 24)).astype(np.int8)
    scales = np.linspace(0.01, 0.1, 10, dtype=np.float32)
    x = normal(4, 24)
    weight = quantized.QuantizedWeight(values, scales)
    found = quantized.matmul(x, weight, kernels=matmul_kernels)
    np.testing.assert_allclose(found, x @ (values * scales[:, None]).T, rtol=1e-4, atol=1e-4)


def test_matmul_has_the_gradient_of_the_definition(matmul_kernels: KernelChoices) -> None:
    x, weight = normal(3, 8), normal(5, 8, seed=1)
    found = jax.grad(lambda w: quantized.matmul(x, w, kernels=matmul_kernels).sum())(weight)
    np.testing.assert_allclose(found, np.broadcast_to(x.sum(0), (5, 8)), rtol=1e-5)


def test_matmul_refuses_a_width_that_does_not_fit(matmul_kernels: KernelChoices) -> None:
    with pytest.raises(KernelError, match="width 24"):
        quantized.matmul(normal(2, 23), normal(10, 24), kernels=matmul_kernels)


def defined(x: np.ndarray, weight: np.ndarray, sizes: list[int]) -> np.ndarray:
    output, start = np.zeros((len(x), weight.shape[1])), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        output[rows] = x[rows].astype(np.float64) @ weight[group].astype(np.float64).T
        start += size
    return output


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sizes", [[3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0], [1, 1, 1, 1], [40, 0, 70, 13]], ids=str
)
def test_each_row_meets_the_weight_of_its_group_and_rows_beyond_give_zeros(
    grouped_kernels: KernelChoices, sizes: list[int], dtype: Any
) -> None:
    x, weight = normal(sum(sizes) + 3, 16, dtype=dtype), normal(4, 6, 16, dtype=dtype, seed=1)
    arrays = (jnp.array(x), jnp.array(weight), jnp.array(sizes, jnp.int32))
    found = grouped.grouped_matmul(*arrays, kernels=grouped_kernels, out_dtype=jnp.float32)
    np.testing.assert_allclose(found, defined(x, weight, sizes), rtol=1e-4, atol=1e-4)


def test_grouped_matmul_refuses_shapes_that_do_not_fit(grouped_kernels: KernelChoices) -> None:
    with pytest.raises(KernelError):
        grouped.grouped_matmul(normal(2, 5), normal(3, 4, 6), jnp.zeros(3, jnp.int32), kernels=grouped_kernels)


def never(problem: object) -> str:
    return "it is Tuesday"


SERVES = Implementation[object]("serves", lambda: None, lambda problem: None)
REFUSES = Implementation[object]("refuses", lambda: None, never)


def test_the_first_implementation_that_serves_is_chosen() -> None:
    assert choose("matmul", [REFUSES, SERVES], object()) is SERVES


def test_a_named_implementation_that_cannot_serve_raises_its_reason() -> None:
    with pytest.raises(KernelError, match="it is Tuesday"):
        choose("matmul", [REFUSES, SERVES], object(), "refuses")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(KernelError, match="refuses, serves"):
        choose("matmul", [REFUSES, SERVES], object(), "cuda")
    with pytest.raises(KernelError, match="no operation 'matmull'"):
        KernelChoices("cpu", {"matmull": "xla"})


def test_choices_are_remembered_once(caplog: pytest.LogCaptureFixture) -> None:
    kernels = KernelChoices("cpu")
    for _ in range(2):
        quantized.matmul(normal(2, 24), normal(10, 24), kernels=kernels)
    assert kernels.made == (("quantized_matmul", quantized.TABLE[0].name),)
