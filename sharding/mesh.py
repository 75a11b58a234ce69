"""The device mesh: every program runs over one, even of a single device."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ..errors import ConfigError
from .axes import MESH_AXES


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
        wanted = " x ".join(f"{name} {size}" for name, size in zip(MESH_AXES, shape, strict=True))
        raise ConfigError(
            f"mesh {wanted} needs {math.prod(shape)} devices; {len(devices)} {devices[0].platform} devices are here. "
            "Choose a smaller mesh."
        )
    grid = np.array(devices[: math.prod(shape)]).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
