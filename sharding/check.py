"""Divisibility, checked before anything is placed."""

from ..errors import ConfigError
from .axes import LogicalAxis
from .rules import RULES, Placement


def check_divisible(placement: Placement, axis: LogicalAxis, size: int, what: str) -> None:
    """Raise ConfigError unless `size` splits evenly over the mesh axis that the rules give `axis`."""
    if axis in placement.replicated or axis not in RULES:
        return
    mesh_axis = RULES[axis]
    parts = placement.size(mesh_axis)
    if size % parts:
        fits = [str(n) for n in range(1, parts) if size % n == 0]
        raise ConfigError(
            f"{what} ({axis}) is {size}, which does not split over the mesh axis {mesh_axis} of {parts} devices. "
            f"Sizes of {mesh_axis} that fit: {', '.join(fits)}."
        )
