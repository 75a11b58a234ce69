"""The gated MLP."""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .config import MlpSpec
from .linear import Linear, linear_each
from .step import Step


class Mlp(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, spec: MlpSpec, embed_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.spec = spec
        inner, formats = (spec.mlp_dim, embed_dim), dict(spec.formats)
        make = functools.partial(Linear, bias=spec.bias, dtype=dtype, rngs=rngs)
        self.gate = make(inner, ("mlp", "embed"), format=formats.get("gate"))
        self.up = make(inner, ("mlp", "embed"), format=formats.get("up"))
        self.down = make(inner[::-1], ("embed", "mlp"), format=formats.get("down"))

    def __call__(self, x: Float[Array, "R T D"], step: Step) -> Float[Array, "R T D"]:
        gate, up = linear_each([self.gate, self.up], x, step)
        return self.down.of_gated(gate, up, self.spec.activation, step)
