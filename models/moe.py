"""Mixture of experts: dropless, each token through its own few gated MLPs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from ..pallas_kernels.gated_activation import gated_activation
from ..pallas_kernels.grouped_matmul import Weight, grouped_matmul
from ..pallas_kernels.row_exchange import exchange_rows, segment_rows, starts_of
from ..sharding.axes import Axes
from .config import MoeSpec
from .linear import Linear, Projection
from .step import Step


class Experts(Projection):
    """One projection of every expert, weights [places, out, in]."""

    def __init__(
        self, spec: MoeSpec, name: str, shape: tuple[int, int], axes: Axes, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        full, format = (spec.num_places, *shape), dict(spec.formats).get(name)
        super().__init__(full, axes, dtype=dtype, rngs=rngs, format=format, num_experts=spec.num_experts)
        bias = jnp.zeros(full[:2], dtype)
        self.bias = nnx.Param(bias, axes=axes[:2], num_experts=spec.num_experts) if spec.bias else None


class Moe(nnx.Module):
    """sum over the picked experts of weight * down(activation(gate(x)) * up(x)).

    Each device routes the tokens of its own data shard. Its rows, one for each token and pick, travel over the mesh
    axis `expert` to the devices that have the places of their experts, and back.
    """

    def __init__(self, spec: MoeSpec, embed_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.spec = spec
        inner, outer = (spec.mlp_dim, embed_dim), (embed_dim, spec.mlp_dim)
        # Every device routes all tokens of its data shard: the router is small, so it is not sharded.
        router = (spec.num_experts, embed_dim)
        self.router = Linear(router, (None, "embed"), bias=spec.bias, dtype=dtype, rngs=rngs)
        self.gate = Experts(spec, "gate", inner, ("experts", "mlp", "embed"), dtype=dtype, rngs=rngs)
        self.up = Experts(spec, "up", inner, ("experts", "mlp", "embed"), dtype=dtype, rngs=rngs)
        self.down = Experts(spec, "down", outer, ("experts", "embed", "mlp"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "R T D"], step: Step) -> Float[Array, "R T D"]:
        tokens: Axes = ("shard", "tokens", None)
        projections = (self.gate, self.up, self.down)
        biases = [p.bias for p in projections if p.bias is not None]

        def local(x: Array, logits: Array, *weights: Any) -> Array:
            y = self.run_shard(x[0], *self.route(logits[0]), weights, step)
            return (jax.lax.psum(y, "tensor") if step.placement.size("tensor") > 1 else y)[None]

        axes = [*(p.value_axes for p in projections), *(bias.get_metadata("axes") for bias in biases)]
        run = step.placement.map_shards(local, [tokens, tokens, *axes], tokens)
        values = [*(p.value for p in projections), *(bias[...] for bias in biases)]
        y: Array = run(x, self.router(x, step), *values)
        return y

    def route(self, logits: Float[Array, "T E"]) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
        """The weights and the numbers of the experts that each token is sent to."""
        logits = logits.astype(jnp.float32)
        if self.spec.routing == "topk_softmax":
            picked, experts = jax.lax.top_k(logits, self.spec.num_experts_per_token)
            return jax.nn.softmax(picked, axis=-1), experts
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.spec.num_experts_per_token)
        if self.spec.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, experts

    def run_shard(
        self, x: Float[Array, "T D"], weights: Float[Array, "T k"], experts: Int[Array, "T k"],
        arrays: tuple[Any, ...], step: Step,
    ) -> Float[Array, "T D"]:  # fmt: skip
        """This device's tokens through their experts; on a sharded mlp axis its part of the sum."""
        num_picks, num_places = weights.shape[1], self.spec.num_places
        places = self.places(experts).reshape(-1)
        order = jnp.argsort(places, stable=True)
        sizes = jnp.bincount(places, length=num_places).astype(jnp.int32)
        rows = x[order // num_picks]
        if self.spec.num_expert_parts == 1:
            y = self.run_places(rows, sizes, arrays, step)
        else:
            y = self.run_elsewhere(rows, sizes, arrays, step)
        picked = y[jnp.argsort(order)].reshape(*weights.shape, -1).astype(jnp.float32)
        return jnp.sum(picked * weights[..., None], axis=1).astype(x.dtype)

    def places(self, experts: Int[Array, "T k"]) -> Int[Array, "T k"]:
        """A place of each expert: the tokens of a step take turns among its places."""
        num_experts = self.spec.num_experts
        num_replicas = (self.spec.num_places - 1 - experts) // num_experts + 1
        turn = jnp.arange(experts.shape[0])[:, None] + jax.lax.axis_index("expert")
        return experts + num_experts * (turn % num_replicas)

    def run_elsewhere(
        self, rows: Float[Array, "M D"], sizes: Int32[Array, " places"], arrays: tuple[Any, ...], step: Step
    ) -> Float[Array, "M D"]:
        """`run_places` on the devices that have the places; rows are in the order of places."""
        num_parts = self.spec.num_expert_parts
        num_local, num_picks = self.spec.num_places // num_parts, self.spec.num_experts_per_token
        # The picks of a token are of different experts, and a device has no expert twice.
        capacity = rows.shape[0] // num_picks * min(num_picks, num_local)
        table = jax.lax.all_gather(sizes, "expert").reshape(num_parts, num_parts, num_local)
        sent = table.sum(-1)
        mine = table[:, jax.lax.axis_index("expert")]  # [senders, local places]

        def exchange(rows: Array, sizes: Array, num_received: int) -> Array:
            return exchange_rows(
                rows, sizes, num_received=num_received, capacity=capacity, axis="expert", kernels=step.kernels
            )

        received = exchange(rows, sent, num_parts * capacity)
        by_place = segment_rows(received, starts_of(mine).T.reshape(-1), mine.T.reshape(-1), received.shape[0])
        y = self.run_places(by_place, mine.sum(0), arrays, step)
        by_sender = segment_rows(y, starts_of(mine.T).T.reshape(-1), mine.reshape(-1), received.shape[0])
        return exchange(by_sender, sent.T, rows.shape[0])

    def run_places(
        self, rows: Float[Array, "M D"], sizes: Int32[Array, " local"], arrays: tuple[Any, ...], step: Step
    ) -> Float[Array, "M D"]:
        """Rows in the order of this device's places, each through the expert of its place."""
        gate, up, down, *biases = arrays
        row = jnp.arange(rows.shape[0], dtype=jnp.int32)
        place = jnp.minimum(jnp.searchsorted(jnp.cumsum(sizes), row, side="right"), sizes.shape[0] - 1)

        def project(rows: Array, weight: Weight, bias: Array | None) -> Array:
            y = grouped_matmul(rows, weight, sizes, kernels=step.kernels)
            return y if bias is None else y + bias[place]

        gate_bias, up_bias, down_bias = biases or (None, None, None)
        if down_bias is not None:  # the parts of a sharded mlp axis are summed: only one of them adds the bias
            down_bias = jnp.where(jax.lax.axis_index("tensor") == 0, down_bias, 0)
        inner = self.activate(project(rows, gate, gate_bias), project(rows, up, up_bias), step)
        return project(inner, down, down_bias)

    def activate(self, gate: Float[Array, "M F"], up: Float[Array, "M F"], step: Step) -> Float[Array, "M F"]:
        """The gated activation; with `swiglu_alpha`, gpt-oss's clamped one."""
        if self.spec.swiglu_alpha is None:
            return gated_activation(gate, up, activation=self.spec.activation, kernels=step.kernels)
        limit = self.spec.clamp_limit
        if limit is not None:
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(gate * self.spec.swiglu_alpha) * (up + 1)
