"""Gradients of kernels that have none of their own."""

import functools
from collections.abc import Callable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from ..dispatch import Platform
from . import xla


def with_xla_gradients(
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    x: Float[Array, "M in"],
    weight: Float[Array, "E out in"],
    group_sizes: Int32[Array, " E"],
    *,
    platform: Platform,
    out_dtype: DTypeLike,
) -> Float[Array, "M out"]:
    """multiply(x, weight), whose gradients are those of the xla implementation."""

    @jax.custom_vjp
    def run(x: jax.Array, weight: jax.Array) -> jax.Array:
        return multiply(x, weight)

    def forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return run(x, weight), (x, weight)

    def backward(saved: tuple[jax.Array, jax.Array], push: jax.Array) -> tuple[jax.Array, jax.Array]:
        plain = functools.partial(xla.grouped_matmul, platform=platform, out_dtype=out_dtype)
        _, pull = jax.vjp(lambda x, weight: plain(x, weight, group_sizes), *saved)
        gradients: tuple[jax.Array, jax.Array] = pull(push)
        return gradients

    run.defvjp(forward, backward)
    output: jax.Array = run(x, weight)
    return output
