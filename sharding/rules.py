"""From logical axes to mesh axes, in one table, and the object that applies it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .axes import Axes, LogicalAxis, MeshAxis
from .specs import ParamSpec

# Axes without a row are not sharded. The devices of an expert group are data shards too: only experts are split there.
RULES: Mapping[LogicalAxis, tuple[MeshAxis, ...]] = {
    "shard": ("data", "expert"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "cache_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
}


@functools.cache
def _named_sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """One object per sharding: jax's fast dispatch path compares them by identity."""
    return NamedSharding(mesh, spec)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules that hold on it; `replicated` names logical axes whose rule is off for this model."""

    mesh: Mesh
    replicated: frozenset[LogicalAxis] = frozenset()

    def size(self, axis: MeshAxis) -> int:
        """Number of devices along a mesh axis."""
        return int(self.mesh.shape[axis])

    def num_parts(self, axis: LogicalAxis) -> int:
        """Parts into which the rules split a logical axis."""
        return 1 if axis in self.replicated else math.prod(map(self.size, RULES.get(axis, ())))

    @property
    def num_shards(self) -> int:
        """R: data shards, each with its own slots and pages."""
        return self.num_parts("shard")

    @property
    def on_host(self) -> bool:
        """Whether the devices' memory is the host's, as that of CPU devices is."""
        return bool(self.mesh.devices.flat[0].platform == "cpu")

    def spec(self, axes: Axes) -> PartitionSpec:
        """The PartitionSpec of an array whose dimensions are `axes`."""
        return PartitionSpec(*(None if a is None or a in self.replicated else RULES.get(a) for a in axes))

    def sharding(self, axes: Axes) -> NamedSharding:
        """The NamedSharding of an array whose dimensions are `axes`."""
        return _named_sharding(self.mesh, self.spec(axes))

    def shard_bytes(self, spec: ParamSpec) -> int:
        """Bytes of one device's part of an array."""
        return math.prod(self.sharding(spec.axes).shard_shape(spec.shape)) * spec.dtype.itemsize

    def constrain(self, x: jax.Array, *axes: LogicalAxis | None) -> jax.Array:
        """`x`, with the compiler held to the sharding of `axes`."""
        constrained: jax.Array = jax.lax.with_sharding_constraint(x, self.sharding(axes))
        return constrained

    def map_shards(self, fn: Callable[..., Any], in_axes: list[Any], out_axes: Any) -> Callable[..., Any]:
        """`fn` run on each device's own part, so that nothing in it can gather across shards.

        `in_axes` has the Axes of each argument, or a tree of them for an argument that is a tree; `out_axes` one, or
        a list for a function that returns a tuple.
        """

        def specs(axes: Any) -> Any:
            return jax.tree.map(self.spec, axes, is_leaf=lambda x: type(x) is tuple)

        out_specs = tuple(specs(out_axes)) if isinstance(out_axes, list) else specs(out_axes)
        in_specs = tuple(specs(in_axes))
        return jax.shard_map(fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
