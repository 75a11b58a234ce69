"""Mixture of experts: dropless, each token through its own few gated MLPs."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..pallas_kernels.grouped_matmul import grouped_matmul
from ..sharding.axes import Axes
from .config import MoeSpec
from .linear import Linear, init_weight
from .mlp import ACTIVATIONS
from .step import Step


class Experts(nnx.Module):
    """One projection of every expert, weights [E, out, in]."""

    def __init__(self, shape: tuple[int, int, int], axes: Axes, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(init_weight(rngs, shape, dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape[:2], dtype), axes=axes[:2]) if bias else None


class Moe(nnx.Module):
    """sum over the picked experts of weight * down(activation(gate(x)) * up(x))."""

    def __init__(self, spec: MoeSpec, embed_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.spec = spec
        shape = (spec.num_experts, spec.mlp_dim, embed_dim)
        down_shape = (spec.num_experts, embed_dim, spec.mlp_dim)
        router = (spec.num_experts, embed_dim)
        # Every device routes every token of its data shard: the router is small, so it is not sharded.
        self.router = Linear(router, (None, "embed"), bias=spec.bias, dtype=dtype, rngs=rngs)
        self.gate = Experts(shape, ("experts", "mlp", "embed"), bias=spec.bias, dtype=dtype, rngs=rngs)
        self.up = Experts(shape, ("experts", "mlp", "embed"), bias=spec.bias, dtype=dtype, rngs=rngs)
        self.down = Experts(down_shape, ("experts", "embed", "mlp"), bias=spec.bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "R T D"], step: Step) -> Float[Array, "R T D"]:
        weights, experts = self.route(self.router(x, step))
        tokens: Axes = ("shard", "tokens", None)
        projections = (self.gate, self.up, self.down)
        arrays = [p.weight[...] for p in projections]
        axes: list[Axes] = [p.weight.get_metadata("axes") for p in projections]
        if self.spec.bias:
            arrays += [p.bias[...] for p in projections if p.bias is not None]
            axes += [p.bias.get_metadata("axes") for p in projections if p.bias is not None]

        def local(x: Array, weights: Array, experts: Array, *arrays: Array) -> Array:
            total: Array = jax.lax.psum(
                self.run_experts(x[0], weights[0], experts[0], arrays, step), ("tensor", "expert")
            )
            return total[None]

        run = step.placement.map_shards(local, [tokens, tokens, tokens, *axes], tokens)
        y: Array = run(x, weights, experts, *arrays)
        return y

    def route(self, logits: Float[Array, "R T E"]) -> tuple[Float[Array, "R T k"], Int[Array, "R T k"]]:
        """The weights and the numbers of the experts that each token is sent to."""
        logits = logits.astype(jnp.float32)
        if self.spec.routing == "topk_softmax":
            picked, experts = jax.lax.top_k(logits, self.spec.num_experts_per_token)
            return jax.nn.softmax(picked, axis=-1), experts
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.spec.num_experts_per_token)
        if self.spec.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, experts

    def run_experts(
        self, x: Float[Array, "T D"], weights: Float[Array, "T k"], experts: Int[Array, "T k"],
        arrays: tuple[Array, ...], step: Step,
    ) -> Float[Array, "T D"]:  # fmt: skip
        """What this device's experts, and its part of each, add to the sum."""
        gate, up, down, *biases = arrays
        num_local = gate.shape[0]
        local = experts.reshape(-1) - jax.lax.axis_index("expert") * num_local
        # Rows of other devices' experts sort behind the last group, where grouped_matmul gives zeros.
        local = jnp.where((local >= 0) & (local < num_local), local, num_local)
        order = jnp.argsort(local, stable=True)
        sizes = jnp.bincount(local, length=num_local + 1)[:num_local].astype(jnp.int32)
        rows = x[order // weights.shape[1]]
        group = jnp.minimum(local[order], num_local - 1)

        def project(rows: Array, weight: Array, bias: Array | None) -> Array:
            y = grouped_matmul(rows, weight, sizes, kernels=step.kernels)
            return y if bias is None else y + bias[group]

        gate_bias, up_bias, down_bias = biases or (None, None, None)
        if down_bias is not None:  # the parts of a sharded mlp axis are summed: only one of them adds the bias
            down_bias = jnp.where(jax.lax.axis_index("tensor") == 0, down_bias, 0)
        inner = self.activate(project(rows, gate, gate_bias), project(rows, up, up_bias))
        y = project(inner, down, down_bias)
        scale = jnp.where(local[order] < num_local, weights.reshape(-1)[order], 0).astype(y.dtype)
        return jnp.zeros_like(x).at[order // weights.shape[1]].add(y * scale[:, None])

    def activate(self, gate: Float[Array, "M F"], up: Float[Array, "M F"]) -> Float[Array, "M F"]:
        """The gated activation; with `swiglu_alpha`, gpt-oss's clamped one."""
        if self.spec.swiglu_alpha is None:
            return ACTIVATIONS[self.spec.activation](gate) * up
        limit = self.spec.clamp_limit
        if limit is not None:
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(gate * self.spec.swiglu_alpha) * (up + 1)
