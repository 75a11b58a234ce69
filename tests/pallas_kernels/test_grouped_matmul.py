"""The contract of the grouped matmul, held by every implementation of its table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace.errors import KernelError
from millrace.pallas_kernels.dispatch import KernelChoices, anywhere
from millrace.pallas_kernels.grouped_matmul import TABLE, Weight, grouped_matmul
from millrace.pallas_kernels.quantized_matmul import FORMATS, QuantizedWeight, WeightFormat
from millrace.pallas_kernels.quantized_matmul.formats import dequantize, quantize

IN, OUT = 24, 16

# Rows, then the size of each group: one row a group, empty groups at both ends, one group with everything, a group
# of several tiles, rows beyond the sum, no row at all.
GROUPINGS: dict[str, tuple[int, list[int]]] = {
    "singles": (4, [1, 0, 1, 0, 0, 1, 1, 0]),
    "uneven": (40, [0, 17, 0, 3, 9, 0]),
    "one": (200, [0, 200]),
    "large": (230, [70, 1, 129]),
    "none": (6, [0, 0, 0]),
}


# Kernels that are made for a chip have tests of their own.
ANYWHERE = [entry.name for entry in TABLE if entry.unsupported is anywhere]


@pytest.fixture(params=ANYWHERE)
def kernels(request: pytest.FixtureRequest) -> KernelChoices:
    return KernelChoices("cpu", {"grouped_matmul": request.param})


def draw(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


def place(grouping: str) -> tuple[np.ndarray, np.ndarray]:
    """The sizes, and the group of every row, E for those beyond the sum."""
    num_rows, sizes = GROUPINGS[grouping]
    group = np.repeat(np.arange(len(sizes) + 1), [*sizes, num_rows - sum(sizes)])
    return np.array(sizes, np.int32), group


def quantized(weight: jax.Array, format: WeightFormat) -> QuantizedWeight:
    """Rounded by numpy, which is faster here than jax op by op, to the same numbers."""
    made: QuantizedWeight = jax.tree.map(jnp.asarray, quantize(np.asarray(weight, np.float32), format))
    return made


def product(x: jax.Array, weight: jax.Array, group: np.ndarray) -> np.ndarray:
    padded = np.concatenate([np.float64(weight), np.zeros((1, *weight.shape[1:]))])
    return np.einsum("mi,moi->mo", np.float64(x), padded[group])


def run(x: jax.Array, weight: Weight, sizes: np.ndarray, kernels: KernelChoices) -> jax.Array:
    return jax.jit(lambda *arrays: grouped_matmul(*arrays, kernels=kernels))(x, weight, sizes)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_every_row_meets_its_groups_weight(kernels: KernelChoices, grouping: str) -> None:
    sizes, group = place(grouping)
    x, weight = draw(len(group), IN), draw(len(sizes), OUT, IN)
    np.testing.assert_allclose(run(x, weight, sizes, kernels), product(x, weight, group), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grouping", ["singles", "uneven"])
def test_bfloat16_is_accumulated_in_float32(kernels: KernelChoices, grouping: str) -> None:
    sizes, group = place(grouping)
    x, weight = draw(len(group), 2048, dtype="bfloat16"), draw(len(sizes), OUT, 2048, dtype="bfloat16")
    y = grouped_matmul(x, weight, sizes, kernels=kernels, out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, product(x, weight, group), rtol=1e-4, atol=1e-3)
    assert grouped_matmul(x, weight, sizes, kernels=kernels).dtype == jnp.bfloat16


def test_rows_beyond_the_sum_and_weights_of_empty_groups_are_not_read(kernels: KernelChoices) -> None:
    sizes, group = place("uneven")
    x, weight = draw(len(group), IN), draw(len(sizes), OUT, IN)
    expected = product(x, weight, group)
    x = x.at[sizes.sum() :].set(jnp.nan)
    weight = weight.at[np.flatnonzero(sizes == 0)].set(jnp.nan)
    np.testing.assert_allclose(run(x, weight, sizes, kernels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_groups_meet_the_weights_that_they_stand_for(kernels: KernelChoices, name: str) -> None:
    sizes, group = place("uneven")
    x, weight = draw(len(group), 128), quantized(draw(len(sizes), 128, 128), FORMATS[name])
    y, stands_for = run(x, weight, sizes, kernels), dequantize(jax.tree.map(np.asarray, weight))
    expected = product(x, stands_for, group)
    rounding = 1e-5 if FORMATS[name].activations == "own" else 0.04  # of activations
    assert np.linalg.norm(y - expected) < rounding * np.linalg.norm(expected)
    assert not np.any(y[group == len(sizes)])


def test_groups_have_their_own_offsets(kernels: KernelChoices) -> None:
    sizes, group = place("uneven")
    format, random = WeightFormat(name="offsets", storage="int8", group=16, offsets=True), np.random.default_rng(5)
    values = random.integers(-128, 128, (len(sizes), 16, 32)).astype(np.int8)
    scales, offsets = (random.normal(size=(len(sizes), 16, 2)).astype(np.float32) for _ in range(2))
    weight = QuantizedWeight(values=values, scales=scales, offsets=offsets, format=format)
    x = draw(len(group), 32)
    expected = product(x, dequantize(weight), group)
    assert np.linalg.norm(run(x, weight, sizes, kernels) - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("grouping", ["singles", "uneven", "large"])
def test_gradients_follow_the_definition(kernels: KernelChoices, grouping: str) -> None:
    sizes, group = place(grouping)
    x, weight, push = draw(len(group), IN), draw(len(sizes), OUT, IN), draw(len(group), OUT)

    @jax.jit
    def pull(x: jax.Array, weight: jax.Array, push: jax.Array) -> tuple[jax.Array, jax.Array]:
        gradients: tuple[jax.Array, jax.Array] = jax.vjp(
            lambda x, weight: grouped_matmul(x, weight, sizes, kernels=kernels), x, weight
        )[1](push)
        return gradients

    x_grad, weight_grad = pull(x, weight, push)
    np.testing.assert_allclose(x_grad, product(push, weight.swapaxes(1, 2), group), rtol=1e-5, atol=1e-5)
    expected = [np.float64(push)[group == e].T @ np.float64(x)[group == e] for e in range(len(sizes))]
    np.testing.assert_allclose(weight_grad, expected, rtol=1e-4, atol=1e-4)


def test_gradients_keep_the_dtypes(kernels: KernelChoices) -> None:
    sizes, group = place("singles")
    x, weight = draw(len(group), IN, dtype="bfloat16"), draw(len(sizes), OUT, IN, dtype="float32")
    gradients = jax.grad(lambda x, w: grouped_matmul(x, w.astype(x.dtype), sizes, kernels=kernels).sum(), (0, 1))
    x_grad, weight_grad = gradients(x, weight)
    assert (x_grad.dtype, weight_grad.dtype) == (jnp.bfloat16, jnp.float32)


def test_float32_is_never_rounded_to_tf32(kernels: KernelChoices) -> None:
    sizes, group = place("singles")
    lowered = jax.jit(lambda x, w: grouped_matmul(x, w, sizes, kernels=kernels)).lower(
        draw(len(group), IN), draw(len(sizes), OUT, IN)
    )
    assert "HIGHEST" in lowered.as_text()


def test_every_implementation_lowers_for_a_gpu() -> None:
    sizes, group = place("uneven")
    for name in ANYWHERE:
        kernels = KernelChoices("gpu", {"grouped_matmul": name})
        step = jax.jit(lambda x, w, kernels=kernels: grouped_matmul(x, w, sizes, kernels=kernels))
        step.trace(draw(len(group), IN), draw(len(sizes), OUT, IN)).lower(lowering_platforms=("cuda",))


def test_shapes_that_disagree_raise(kernels: KernelChoices) -> None:
    with pytest.raises(KernelError, match=r"expected x \[M, in\], weight \[E, out, in\] and sizes \[E\]"):
        grouped_matmul(draw(4, IN), draw(3, OUT, IN), jnp.zeros(2, jnp.int32), kernels=kernels)
