"""Token embedding, whose table the output head may share."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .linear import init_weight


class Embedding(nnx.Module):
    """A table [V, D], sharded over the vocabulary."""

    def __init__(self, vocab_size: int, embed_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(init_weight(rngs, (vocab_size, embed_dim), dtype), axes=("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "R T"]) -> Float[Array, "R T D"]:
        # Out-of-range ids (padding) take row 0: their results are never used, but NaN would spread.
        return jnp.take(self.weight[...], tokens, axis=0, mode="clip")
