"""The linear layer, weights [out, in], plain or quantized."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..pallas_kernels.gated_activation import Activation, gated_activation
from ..pallas_kernels.gated_matmul import gated_matmul
from ..pallas_kernels.quantized_matmul import LayerOf, QuantizedWeight, WeightFormat, matmuls
from ..sharding.axes import Axes, LogicalAxis
from ..sharding.rules import RULES
from .step import Step


def init_weight(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Normal noise of variance 1 / fan-in, the last axis being the input."""
    return jax.random.normal(rngs.params(), shape, dtype) / math.sqrt(shape[-1])


@dataclasses.dataclass(frozen=True)
class InStack:
    """In a parameter's place while a program is traced: the stack of all layers' arrays, and the layer's number."""

    stack: Array
    layer: Array


class Projection(nnx.Module):
    """The parameters of a weight [*lead, out, in]: `weight`, and beside a quantized one's values what they need.

    A plain weight begins as noise; a quantized one, which is loaded and never trained, as zeros. `num_experts` is that
    of the parameters' specs, where the first axis counts places.
    """

    def __init__(
        self, shape: tuple[int, ...], axes: Axes, *, dtype: jnp.dtype, rngs: nnx.Rngs,
        format: WeightFormat | None = None, num_experts: int | None = None,
    ) -> None:  # fmt: skip
        self.format = format
        if format is None:
            self.weight = nnx.Param(init_weight(rngs, shape, dtype), axes=axes, num_experts=num_experts)
            return
        *lead, out_dim, in_dim = shape
        group_axes = (*axes[:-1], None if format.group is None else axes[-1])
        values = jnp.zeros((*lead, *format.values_shape(out_dim, in_dim)), format.values_dtype)
        scales = jnp.ones((*lead, *format.scales_shape(out_dim, in_dim)), format.scales_dtype)
        self.weight = nnx.Param(values, axes=axes, num_experts=num_experts)
        self.scales = nnx.Param(scales, axes=group_axes, num_experts=num_experts)
        if format.zeros:
            self.zeros = nnx.Param(jnp.zeros(scales.shape, jnp.uint8), axes=group_axes, num_experts=num_experts)
        if format.offsets:
            offsets = jnp.zeros(scales.shape, scales.dtype)
            self.offsets = nnx.Param(offsets, axes=group_axes, num_experts=num_experts)
        if format.global_scale:
            self.global_scale = nnx.Param(jnp.ones(lead, jnp.float32), axes=axes[:-2], num_experts=num_experts)

    @property
    def value(self) -> Array | QuantizedWeight | LayerOf:
        """The weight, as the matmuls take it."""
        held: Any = self.weight.get_value()
        if not isinstance(held, InStack):
            weight: Array | QuantizedWeight = self._weight(lambda param: param[...])
            return weight
        return LayerOf(stack=self._weight(lambda param: param.get_value().stack), layer=held.layer)

    @property
    def value_axes(self) -> Any:
        """The Axes of `value`, in a tree of its form."""
        if not isinstance(self.weight.get_value(), InStack):
            return self._weight(lambda param: param.get_metadata("axes"))
        return LayerOf(stack=self._weight(lambda param: ("layers", *param.get_metadata("axes"))), layer=())  # type: ignore[arg-type]

    def _weight(self, of: Any) -> Any:
        format = self.format
        if format is None:
            return of(self.weight)
        return QuantizedWeight(
            values=of(self.weight),
            scales=of(self.scales),
            zeros=of(self.zeros) if format.zeros else None,
            global_scale=of(self.global_scale) if format.global_scale else None,
            offsets=of(self.offsets) if format.offsets else None,
            format=format,
        )

    def project(
        self, x: Float[Array, "*rows in"], step: Step, out_dtype: DTypeLike | None = None
    ) -> Float[Array, "*rows out"]:
        """x [R, T, in], or [T, in] under a vmap over shards, times a weight without leading axes."""
        return project_each([self], x, step, out_dtype)[0]


def project_each(
    projections: Sequence[Projection], x: Float[Array, "*rows in"], step: Step, out_dtype: DTypeLike | None = None
) -> Sequence[Float[Array, "*rows out"]]:
    """x [R, T, in], or [T, in] under a vmap over shards, times each of some weights whose inputs have the same axis."""
    are_plain = {projection.format is None for projection in projections}
    if len(are_plain) > 1:
        return [projection.project(x, step, out_dtype) for projection in projections]
    if are_plain == {True}:
        values = [projection.value for projection in projections]
        return matmuls(x, values, kernels=step.kernels, out_dtype=out_dtype, is_partitioned=step.is_partitioned)

    def multiply(inputs: Sequence[Array], weights: Sequence[Any], out_dtype: DTypeLike) -> Sequence[Array]:
        (x,) = inputs
        return matmuls(x, weights, kernels=step.kernels, out_dtype=out_dtype)

    return _by_shards(multiply, projections, [x], step, out_dtype)


def _by_shards(
    multiply: Callable[[Sequence[Array], Sequence[Any], DTypeLike], Sequence[Array]],
    projections: Sequence[Projection],
    inputs: Sequence[Array],
    step: Step,
    out_dtype: DTypeLike | None,
) -> Sequence[Array]:
    """multiply(inputs, weights, dtype) of quantized weights, which are met shard by shard, for kernels would gather
    them; where `in` is split, the parts are summed over tensor."""
    (in_axis,) = {projection.weight.get_metadata("axes")[1] for projection in projections}
    rows: Axes = ("shard", "tokens") if inputs[0].ndim == 3 else (None,) * (inputs[0].ndim - 1)
    dtype = out_dtype or inputs[0].dtype
    is_split = step.placement.num_parts(in_axis) > 1

    def local(inputs: list[Array], weights: list[QuantizedWeight | LayerOf]) -> tuple[Array, ...]:
        if not is_split:
            return tuple(multiply(inputs, weights, dtype))
        parts = multiply(inputs, weights, jnp.float32)
        return tuple(jax.lax.psum(part, RULES[in_axis]).astype(dtype) for part in parts)

    in_axes = [(*rows, in_axis) for _ in inputs]
    weight_axes = [projection.value_axes for projection in projections]
    out_axes = [(*rows, projection.weight.get_metadata("axes")[0]) for projection in projections]
    run = step.placement.map_shards(local, [in_axes, weight_axes], out_axes)
    ys: tuple[Array, ...] = run(list(inputs), [projection.value for projection in projections])
    return ys


class Linear(Projection):
    """x @ weight.T + bias; `axes` names (out, in)."""

    def __init__(
        self, shape: tuple[int, int], axes: tuple[LogicalAxis | None, LogicalAxis], *, bias: bool, dtype: jnp.dtype,
        rngs: nnx.Rngs, format: WeightFormat | None = None,
    ) -> None:  # fmt: skip
        super().__init__(shape, axes, dtype=dtype, rngs=rngs, format=format)
        self.bias = nnx.Param(jnp.zeros(shape[:1], dtype), axes=axes[:1]) if bias else None

    def __call__(self, x: Float[Array, "*rows in"], step: Step) -> Float[Array, "*rows out"]:
        return linear_each([self], x, step)[0]

    def of_gated(
        self, gate: Float[Array, "R T in"], up: Float[Array, "R T in"], activation: Activation, step: Step
    ) -> Float[Array, "R T out"]:
        """What it makes of activation(gate) * up."""

        def multiply(inputs: Sequence[Array], weights: Sequence[Any], out_dtype: DTypeLike) -> Sequence[Array]:
            (gate, up), (weight,) = inputs, weights
            return [gated_matmul(gate, up, weight, activation=activation, kernels=step.kernels, out_dtype=out_dtype)]

        if self.format is None:
            inner = gated_activation(
                gate, up, activation=activation, kernels=step.kernels, is_partitioned=step.is_partitioned
            )
            return self(step.placement.constrain(inner, "shard", "tokens", "mlp"), step)
        (y,) = _by_shards(multiply, [self], [gate, up], step, None)
        return y if self.bias is None else y + self.bias[...]


def linear_each(layers: Sequence[Linear], x: Float[Array, "*rows in"], step: Step) -> list[Float[Array, "*rows out"]]:
    """What each of some layers makes of the same x: their matmuls are one where kernels can."""
    ys = project_each(layers, x, step)
    return [y if one.bias is None else y + one.bias[...] for one, y in zip(layers, ys, strict=True)]
