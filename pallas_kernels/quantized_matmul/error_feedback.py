"""Rounding that looks at what a layer is given: errors of one input's weights are made good by those of the next.

Least squared error of the outputs, tr((W - Wq) H (W - Wq)^T) with H = X^T X of the inputs X, one column of W after the
other (Frantar et al. 2022, GPTQ; the columns of the largest inputs first). Scales are those of plain rounding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ...errors import KernelError
from .contract import QuantizedWeight, WeightFormat
from .formats import decode, encode, pack_nibbles, quantize

_BLOCK = 128  # columns that are rounded before the others hear of it
_DAMPING = 0.01  # of the mean square of an input: few rows leave H singular
_HIGHEST = jax.lax.Precision.HIGHEST


@functools.partial(jax.jit, static_argnames="format")
def quantize_with_feedback(
    weight: Float[Array, "out in"], gram: Float[Array, "in in"], format: WeightFormat
) -> QuantizedWeight:
    """The weight in a format, rounded to fit inputs whose sum of x^T x is `gram`.

    Inputs that are not finite give values that are not either, where the format has such; check `gram` before.

    Raises:
      KernelError: its shape does not fit the format, or that has zero points.
    """
    if format.zeros:
        raise KernelError(f"{format.name} with zero points cannot be fitted to inputs; choose it without")
    plain = quantize(weight, format)
    order = jnp.argsort(-jnp.diag(gram))
    factor = _inverse_factor(gram[order][:, order])
    codes = _round(weight.astype(jnp.float32)[:, order], _wide_scales(plain)[:, order], factor, format)
    codes = codes[:, jnp.argsort(order)]
    return dataclasses.replace(plain, values=pack_nibbles(codes) if format.is_packed else codes)


def _wide_scales(weight: QuantizedWeight) -> Float[Array, "out in"]:
    """The scale of every value."""
    out_dim, in_dim = weight.shape
    scales = weight.scales.astype(jnp.float32)
    if weight.global_scale is not None:
        scales = scales * weight.global_scale
    scales = jnp.repeat(scales, out_dim // scales.shape[0], axis=0)
    return jnp.repeat(scales, in_dim // scales.shape[1], axis=1)


def _inverse_factor(gram: Float[Array, "in in"]) -> Float[Array, "in in"]:
    """Upper triangular U with U^T U = H^-1, H being the damped gram.

    H = V V^T with V upper is a Cholesky factor of H read backwards, and U = V^-1.
    """
    size = gram.shape[0]
    mean = jnp.mean(jnp.diag(gram))
    damped = gram + jnp.where(mean > 0, _DAMPING * mean, 1.0) * jnp.eye(size)
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    factor: Array = jax.scipy.linalg.solve_triangular(upper, jnp.eye(size), lower=False)
    return factor


def _round(
    weight: Float[Array, "out in"], scales: Float[Array, "out in"], factor: Float[Array, "in in"], format: WeightFormat
) -> Shaped[Array, "out in"]:
    """Codes of the columns, from the first to the last."""
    out_dim, in_dim = weight.shape
    missing = -in_dim % _BLOCK
    weight = jnp.pad(weight, ((0, 0), (0, missing)))
    scales = jnp.pad(scales, ((0, 0), (0, missing)), constant_values=1)
    factor = jnp.pad(factor, (0, missing)) + jnp.diag(jnp.pad(jnp.zeros(in_dim), (0, missing), constant_values=1))
    columns = jnp.arange(in_dim + missing)

    def block(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, codes = carry
        start = number * _BLOCK
        rows = jax.lax.dynamic_slice_in_dim(factor, start, _BLOCK)
        square = jax.lax.dynamic_slice_in_dim(rows, start, _BLOCK, axis=1)
        part, steps = (jax.lax.dynamic_slice_in_dim(x, start, _BLOCK, axis=1) for x in (weight, scales))
        made, errors = _round_block(part, steps, square, format)
        later = jnp.where(columns >= start + _BLOCK, rows, 0)
        weight = weight - jnp.matmul(errors, later, precision=_HIGHEST)
        return weight, jax.lax.dynamic_update_slice_in_dim(codes, made, start, axis=1)

    codes = jnp.zeros(weight.shape, jax.eval_shape(functools.partial(encode, format=format), weight).dtype)
    made: Array = jax.lax.fori_loop(0, len(columns) // _BLOCK, block, (weight, codes))[1]
    return made[:, :in_dim]


def _round_block(
    weight: Float[Array, "out block"], scales: Float[Array, "out block"], square: Float[Array, "block block"],
    format: WeightFormat,
) -> tuple[Shaped[Array, "out block"], Float[Array, "out block"]]:  # fmt: skip
    """Codes of a block of columns, and the error of each in steps of its place in the factor."""

    def column(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weight, codes, errors = carry
        code = encode(weight[:, i] / scales[:, i], format)
        error = (weight[:, i] - decode(code, format) * scales[:, i]) / square[i, i]
        later = jnp.where(jnp.arange(_BLOCK) > i, square[i], 0)
        return weight - error[:, None] * later, codes.at[:, i].set(code), errors.at[:, i].set(error)

    codes = jnp.zeros(weight.shape, jax.eval_shape(functools.partial(encode, format=format), weight).dtype)
    _, codes, errors = jax.lax.fori_loop(0, _BLOCK, column, (weight, codes, jnp.zeros_like(weight)))
    return codes, errors
