"""Attention of whole sequences over themselves, for training: no pages, no cache."""

import jax
from jaxtyping import Array, Float

from ...pallas_kernels.paged_attention import KvCache
from ..config import AttentionSpec


def attend(
    q: Float[Array, "R T N H"], k: Float[Array, "R T K H"], v: Float[Array, "R T K H"],
    cache: KvCache[Array] | None, layer: jax.Array, spec: AttentionSpec, sinks: Float[Array, " N"] | None,
) -> tuple[Float[Array, "R T N H"], KvCache[Array] | None]:  # fmt: skip
    """Causal attention; each R is one sequence. Windows, caps and sinks are not trained here, so they are refused."""
    if spec.window is not None or spec.soft_cap is not None or sinks is not None:
        raise NotImplementedError("training knows plain causal attention only; the embedded model needs no other")
    return jax.nn.dot_product_attention(q, k, v, scale=spec.scale, is_causal=True), cache
