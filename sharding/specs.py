"""What an array is before it exists: one abstract tree yields shardings, initial values and the restore target."""

import dataclasses

import numpy as np

from .axes import Axes


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, dtype and the logical axis of each dimension of one parameter."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: Axes

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array, over all its shards."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


# A nested dict of ParamSpec, with the keys of the parameter tree.
type SpecTree = dict[str, ParamSpec | SpecTree]
