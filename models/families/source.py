"""Where a parameter comes from: names of tensors in a checkpoint, and how their arrays are laid out anew."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ...errors import CheckpointError

ALL = slice(None)

type Shape = tuple[int, ...]


class Packing(Protocol):
    """How tensors of a published layout make one array: values two in a byte, scales a row, zero points of groups."""

    @property
    def dtypes(self) -> tuple[tuple[str, ...], ...]:
        """Names of the dtypes that each of the tensors may have."""

    def build(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[out, ...], or [experts, out, ...]; raises CheckpointError for numbers that cannot be right."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape that `build` gives; raises CheckpointError if the tensors' shapes do not fit together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One spelling of one parameter: templates of names, which may hold {layer} and {expert}, and a new layout.

    In this order: undo the `packing`, swap the last two axes (`transpose`), keep `rows` of `axis`. The result is
    [out, in], [out], or those with a leading axis of experts.
    """

    names: tuple[str, ...]
    packing: Packing | None = None
    transpose: bool = False
    rows: slice = ALL
    axis: int = 0

    @property
    def per_expert(self) -> bool:
        """Each expert has tensors of its own."""
        return "{expert}" in self.names[0]

    def resolve(self, layer: int = 0, expert: int = 0) -> tuple[str, ...]:
        """The names of one layer's (one expert's) tensors."""
        return tuple(name.format(layer=layer, expert=expert) for name in self.names)

    def build(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The parameter of one layer (and expert) from the arrays of `names`; a view where possible."""
        return self._arrange(arrays[0] if self.packing is None else self.packing.build(arrays))

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape that `build` gives for tensors of these shapes; raises CheckpointError if it cannot."""
        shape = shapes[0] if self.packing is None else self.packing.shape(shapes)
        if len(shape) < max(self.axis + 1 if self.rows != ALL else 0, 2 if self.transpose else 0):
            raise CheckpointError(f"too few axes for what config.json makes of it: {list(shape)}")
        return self._arrange(np.broadcast_to(np.int8(0), shape)).shape

    def _arrange(self, array: np.ndarray) -> np.ndarray:
        if self.transpose:
            array = np.swapaxes(array, -1, -2)
        return array if self.rows == ALL else array[(ALL,) * self.axis + (self.rows,)]
