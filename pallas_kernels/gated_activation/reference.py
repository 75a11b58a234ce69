"""The definition, which XLA fuses."""

from collections.abc import Callable, Mapping

import jax

from .contract import Activation

ACTIVATIONS: Mapping[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def gated_activation(gate: jax.Array, up: jax.Array, *, activation: Activation) -> jax.Array:
    """See the contract."""
    return ACTIVATIONS[activation](gate) * up
