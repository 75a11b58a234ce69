"""Gated activations follow the definition: XLA's, and those of every instruction set of this CPU."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace.errors import KernelError
from millrace.pallas_kernels import native
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.pallas_kernels.gated_activation import Activation, cpu, gated_activation, reference

KERNELS = KernelChoices("cpu")
SHAPES = ((3, 5, 7), (1, 48), (40, 512), (0, 8))
BOUNDS = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-10}  # relative errors
needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="needs the native kernels")


def draw(*shape: int, dtype: str, seed: int = 0) -> jax.Array:
    return jnp.asarray(4 * np.random.default_rng(seed).standard_normal(shape), dtype)


def expected(gate: jax.Array, up: jax.Array, activation: Activation) -> np.ndarray:
    """By the definition in float64, of which the reference falls short where a float32 tanh is nearly -1."""
    x, y = np.asarray(gate, np.float64), np.asarray(up, np.float64)
    with np.errstate(over="ignore"):
        if activation == "gelu":
            return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) * y
        if activation == "silu":
            return x / (1 + np.exp(-x)) * y
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * y


@needs_native
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
def test_every_instruction_set_follows_the_definition(activation: Activation, dtype: str) -> None:
    for name in native.library().instruction_sets:
        for shape in SHAPES:
            gate, up = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
            y = cpu.gated_activation(gate, up, activation=activation, instruction_set=name)
            assert y.dtype == gate.dtype and y.shape == gate.shape
            bound, wanted = BOUNDS[dtype], expected(gate, up, activation)
            np.testing.assert_allclose(np.asarray(y, np.float32), wanted, rtol=bound, atol=1e-7)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_the_reference_follows_the_definition(activation: Activation) -> None:
    gate, up = draw(5, 33, dtype="float32"), draw(5, 33, dtype="float32", seed=1)
    y = reference.gated_activation(gate, up, activation=activation)
    np.testing.assert_allclose(np.asarray(y), expected(gate, up, activation), rtol=1e-5, atol=1e-4)


@needs_native
@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
def test_large_gates_and_nan_are_as_in_the_definition(activation: Activation) -> None:
    gate = jnp.asarray([1e30, -1e38, 200.0, -200.0, 0.0, -0.0, jnp.nan, jnp.inf], jnp.float32)
    up = jnp.full(8, 2.0, jnp.float32)
    for name in native.library().instruction_sets:
        y = cpu.gated_activation(gate, up, activation=activation, instruction_set=name)
        np.testing.assert_allclose(np.asarray(y), expected(gate, up, activation), rtol=1e-6, atol=1e-30)


@needs_native
@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
def test_gradients_are_those_of_the_definition(activation: Activation) -> None:
    gate, up = draw(3, 33, dtype="float32"), draw(3, 33, dtype="float32", seed=1)
    found = jax.grad(lambda *x: gated_activation(*x, activation=activation, kernels=KERNELS).sum(), (0, 1))(gate, up)
    wanted = jax.grad(lambda *x: reference.gated_activation(*x, activation=activation).sum(), (0, 1))(gate, up)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


@needs_native
def test_a_vmap_is_one_call_over_more_rows() -> None:
    gate, up = draw(4, 3, 20, dtype="float32"), draw(3, 20, dtype="float32", seed=1)
    run = jax.jit(jax.vmap(lambda g: gated_activation(g, up, activation="silu", kernels=KERNELS)))
    assert run.lower(gate).as_text().count("@millrace_gated_activation") == 1
    np.testing.assert_allclose(
        run(gate), expected(gate, jnp.broadcast_to(up, gate.shape), "silu"), rtol=2e-6, atol=1e-6
    )


def test_arrays_on_several_devices_are_left_to_xla() -> None:
    kernels = KernelChoices("cpu")
    x = draw(2, 8, dtype="float32")
    gated_activation(x, x, activation="silu", kernels=kernels, is_partitioned=True)
    assert kernels.made == (("gated_activation", "xla"),)


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(KernelError, match=r"one shape and dtype, got float32 \(2, 8\) and float32 \(2, 9\)"):
        gated_activation(draw(2, 8, dtype="float32"), draw(2, 9, dtype="float32"), activation="silu", kernels=KERNELS)
