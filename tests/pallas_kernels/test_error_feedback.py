"""Rounding that is fitted to what a weight is given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace.errors import KernelError
from millrace.pallas_kernels.quantized_matmul import FORMATS
from millrace.pallas_kernels.quantized_matmul.error_feedback import quantize_with_feedback
from millrace.pallas_kernels.quantized_matmul.formats import dequantize, quantize

OUT, IN = 32, 192  # not a multiple of the block of columns


def weight_and_inputs(seed=0):
    """A weight, and inputs of which a few directions hold most."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((OUT, IN), np.float32) / IN**0.5
    inputs = random.standard_normal((256, 24), np.float32) @ random.standard_normal((24, IN), np.float32)
    return jnp.asarray(weight), jnp.asarray(inputs + 0.1 * random.standard_normal((256, IN), np.float32))


def output_error(weight, quantized, inputs):
    return float(jnp.sum(((dequantize(quantized) - weight) @ inputs.T) ** 2))


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_feedback_halves_the_error_of_outputs(name):
    weight, inputs = weight_and_inputs()
    fitted = quantize_with_feedback(weight, inputs.T @ inputs, FORMATS[name])
    plain = quantize(weight, FORMATS[name])
    assert output_error(weight, fitted, inputs) < 0.5 * output_error(weight, plain, inputs)
    assert (fitted.values.shape, fitted.values.dtype) == (plain.values.shape, plain.values.dtype)
    np.testing.assert_array_equal(fitted.scales, plain.scales)


@pytest.mark.parametrize("gram", [jnp.eye(IN), jnp.zeros((IN, IN))], ids=["independent", "nothing"])
def test_inputs_that_say_nothing_give_plain_rounding(gram):
    weight, _ = weight_and_inputs()
    fitted, plain = (
        quantize_with_feedback(weight, gram, FORMATS["int4"]),
        jax.jit(lambda weight: quantize(weight, FORMATS["int4"]))(weight),
    )
    np.testing.assert_array_equal(fitted.values, plain.values)


def test_an_input_that_is_always_zero_does_no_harm():
    weight, inputs = weight_and_inputs()
    inputs = inputs.at[:, 5].set(0)
    fitted = quantize_with_feedback(weight, inputs.T @ inputs, FORMATS["int4"])
    assert bool(jnp.isfinite(dequantize(fitted)).all())


def test_zero_points_are_refused():
    weight, inputs = weight_and_inputs()
    with pytest.raises(KernelError, match="zero points"):
        quantize_with_feedback(weight, inputs.T @ inputs, dataclasses.replace(FORMATS["int4"], zeros=True))
