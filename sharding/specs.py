"""What an array is before it exists: one abstract tree yields shardings, initial values and the restore target."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from .axes import Axes

type Region = tuple[slice, ...]  # one slice per dimension, with start and stop


def whole_region(shape: Iterable[int]) -> Region:
    """The region that is all of an array."""
    return tuple(slice(0, size) for size in shape)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, dtype and the logical axis of each dimension of one parameter."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: Axes
    num_experts: int | None = None  # where the axis of experts counts places: place p holds expert p % num_experts

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array, over all its shards."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that stores and checkpoints have, in which every expert is there once."""
        if self.num_experts is None:
            return self.shape
        return _with_item(self.shape, self.axes.index("experts"), self.num_experts)

    def below(self, rank: int) -> "ParamSpec":
        """What lies at one index of the first `rank` axes."""
        num_experts = self.num_experts if "experts" in self.axes[rank:] else None
        return ParamSpec(self.shape[rank:], self.dtype, self.axes[rank:], num_experts)

    def indices(self, stored_index: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Where everything belongs that a checkpoint has at `stored_index` of its leading axes."""
        if self.num_experts is None or "experts" not in self.axes[: len(stored_index)]:
            yield stored_index
            return
        axis = self.axes.index("experts")
        for place in range(stored_index[axis], self.shape[axis], self.num_experts):
            yield _with_item(stored_index, axis, place)

    def stored_regions(self, region: Region) -> Iterator[tuple[Region, Region]]:
        """The regions of a store that make up a region of the array, each with where in that it belongs."""
        within = tuple(slice(0, part.stop - part.start) for part in region)
        if self.num_experts is None:
            yield region, within
            return
        axis = self.axes.index("experts")
        first = place = region[axis].start
        while place < region[axis].stop:
            expert = place % self.num_experts
            count = min(self.num_experts - expert, region[axis].stop - place)
            to = slice(place - first, place - first + count)
            yield _with_item(region, axis, slice(expert, expert + count)), _with_item(within, axis, to)
            place += count


def _with_item[T](items: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    return (*items[:index], item, *items[index + 1 :])


# A nested dict of ParamSpec, with the keys of the parameter tree.
type SpecTree = dict[str, ParamSpec | SpecTree]
