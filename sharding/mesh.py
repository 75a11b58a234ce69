"""The device mesh: every program runs over one, even of a single device."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ..errors import ConfigError
from .axes import MESH_AXES, MeshAxis


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes of `MESH_AXES`, absent ones of size 1, over the first devices of `devices`.

    Axes are Auto: the compiler propagates shardings from the constraints that the model states.

    Raises:
      ConfigError: an unknown axis, a size below 1, or more devices asked for than there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(sizes or {})
    if unknown := sorted(set(sizes) - set(MESH_AXES)):
        raise ConfigError(f"mesh axes are {', '.join(MESH_AXES)}; got {', '.join(unknown)}. Rename or remove them.")
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"mesh axis {name} needs a whole number of devices, at least 1; got {size!r}.")
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    if math.prod(shape) > len(devices):
        raise ConfigError(
            f"mesh {mesh_text(dict(zip(MESH_AXES, shape, strict=True)))} needs {math.prod(shape)} devices; "
            f"{len(devices)} {devices[0].platform} devices are here. Choose a smaller mesh."
        )
    grid = np.array(devices[: math.prod(shape)]).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(mesh: Mesh) -> dict[MeshAxis, int]:
    """The size of every axis."""
    return {axis: int(mesh.shape[axis]) for axis in MESH_AXES}


def mesh_text(sizes: Mapping[MeshAxis, int]) -> str:
    """As the launcher reads it: data=18,tensor=4; axes of size 1 are left out."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"
