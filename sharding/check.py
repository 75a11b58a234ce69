"""Divisibility, checked before anything is placed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from ..errors import ConfigError
from .axes import LogicalAxis, MeshAxis
from .mesh import mesh_text
from .rules import RULES

_NUM_SHOWN = 3  # meshes that a message proposes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dimension:
    """Something of a model that the rules split; what `repeats` may also be fewer than the parts, and divide them."""

    what: str
    axis: LogicalAxis
    size: int
    repeats: bool = False

    def fits(self, mesh: Mapping[MeshAxis, int]) -> bool:
        """Whether every device of a mesh with these axis sizes gets as much as the others."""
        parts = math.prod(mesh[axis] for axis in RULES.get(self.axis, ()))
        return self.size % parts == 0 or (self.repeats and parts % self.size == 0)


def check_dimensions(mesh: Mapping[MeshAxis, int], dimensions: Sequence[Dimension]) -> None:
    """Raise ConfigError unless every dimension splits evenly over the axes that the rules give it."""
    for dimension in dimensions:
        if not dimension.fits(mesh):
            axes = " and ".join(f"{axis} of {mesh[axis]} devices" for axis in RULES[dimension.axis])
            fit = "; ".join(map(mesh_text, nearest_meshes(mesh, dimensions)[:_NUM_SHOWN]))
            raise ConfigError(
                f"{dimension.what} ({dimension.axis}) is {dimension.size}, which does not split over the mesh axis "
                f"{axes} (mesh {mesh_text(mesh)}){', nor repeat evenly over it' if dimension.repeats else ''}. "
                f"Nearest meshes that fit: {fit}."
            )


def nearest_meshes(mesh: Mapping[MeshAxis, int], dimensions: Sequence[Dimension]) -> list[dict[MeshAxis, int]]:
    """The meshes of as many devices over which every dimension splits, those of the most similar axes first."""
    num_devices = math.prod(mesh.values())
    found: list[dict[MeshAxis, int]] = []
    for expert in _divisors(num_devices):
        for tensor in _divisors(num_devices // expert):
            sizes: dict[MeshAxis, int] = {
                "data": num_devices // expert // tensor, "expert": expert, "tensor": tensor
            }  # fmt: skip
            if all(dimension.fits(sizes) for dimension in dimensions):
                found.append(sizes)
    axes: tuple[MeshAxis, ...] = ("expert", "tensor")
    return sorted(found, key=lambda sizes: sum(abs(math.log(sizes[axis] / mesh[axis])) for axis in axes))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
