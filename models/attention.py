"""The attention block: projections, q/k norm, rope, and the call to however queries meet keys."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..pallas_kernels.paged_attention import KvCache
from .config import AttentionSpec, ModelConfig
from .linear import Linear, linear_each
from .norm import RMSNorm
from .rope import rotate
from .step import Step


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, spec: AttentionSpec, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.spec = spec
        embed, heads, kv = config.embed_dim, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        make, formats = functools.partial(Linear, dtype=dtype, rngs=rngs), dict(spec.formats)
        self.q = make((heads, embed), ("heads", "embed"), bias=spec.qkv_bias, format=formats.get("q"))
        self.k = make((kv, embed), ("kv_heads", "embed"), bias=spec.qkv_bias, format=formats.get("k"))
        self.v = make((kv, embed), ("kv_heads", "embed"), bias=spec.qkv_bias, format=formats.get("v"))
        self.o = make((embed, heads), ("embed", "heads"), bias=spec.out_bias, format=formats.get("o"))
        if spec.qk_norm == "head":
            self.q_norm = RMSNorm(spec.head_dim, config, axis="head_dim", dtype=dtype)
            self.k_norm = RMSNorm(spec.head_dim, config, axis="head_dim", dtype=dtype)
        elif spec.qk_norm == "full":
            self.q_norm = RMSNorm(heads, config, axis="heads", dtype=dtype)
            self.k_norm = RMSNorm(kv, config, axis="kv_heads", dtype=dtype)
        self.sinks = nnx.Param(jnp.zeros((spec.num_heads,), dtype), axes=("heads",)) if spec.sinks else None

    def __call__(
        self, x: Float[Array, "R T D"], cache: KvCache[Array] | None, layer: jax.Array, step: Step
    ) -> tuple[Float[Array, "R T D"], KvCache[Array] | None]:
        spec = self.spec
        q, k, v = linear_each([self.q, self.k, self.v], x, step)
        if spec.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*y.shape[:2], -1, spec.head_dim) for y in (q, k, v))
        if spec.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.rope is not None:
            q, k = rotate(q, step.ropes[spec.rope]), rotate(k, step.ropes[spec.rope])
        sinks = None if self.sinks is None else self.sinks[...]
        out, cache = step.attend(q, k, v, cache, layer, spec, sinks)
        return self.o(out.reshape(*x.shape[:2], -1), step), cache
