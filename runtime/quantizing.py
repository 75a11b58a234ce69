"""Plain weights on their way to a format, part by part on the host.

A quantized weight is several arrays: its values, its scales, and what else the format has. A `QuantizedLeaf` makes
them all of one plain leaf, so that a conversion reads and rounds each weight once.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..models.config import ModelConfig
from ..models.decoder import AbstractDecoder
from ..models.quantization import format_paths, without_formats
from ..pallas_kernels.quantized_matmul.contract import QuantizedWeight, WeightFormat
from ..pallas_kernels.quantized_matmul.formats import dequantize_part, global_scale, quantize_part
from ..sharding.rules import Placement
from ..sharding.specs import ParamSpec, Region, SpecTree, whole_region
from .param_tree import flatten
from .safetensors_file import check_finite
from .weights import Leaf, Part, Source, place_leaves, source_leaves

_SLAB_VALUES = 1 << 17  # rounded in one go: the temporaries stay in the cache


@dataclasses.dataclass(frozen=True)
class QuantizedLeaf:
    """A plain weight, and the parameters that it becomes, by path."""

    source: Leaf
    format: WeightFormat
    specs: Mapping[str, ParamSpec]

    def quantize(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """What a part [*lead, out, in] of the plain weight becomes, by path.

        Raises:
          CheckpointError: it holds NaN or infinity.
        """
        prefix = self.source.path.removesuffix("weight")
        made = {name: np.stack(arrays) for name, arrays in self._by_weight(values).items()}
        lead = values.shape[:-2]
        return {f"{prefix}{name}": array.reshape((*lead, *array.shape[1:])) for name, array in made.items()}

    def named(self, weight: QuantizedWeight) -> dict[str, np.ndarray]:
        """The arrays of a weight that was quantized elsewhere, by path."""
        arrays = {
            "weight": weight.values,
            "scales": weight.scales,
            "zeros": weight.zeros,
            "global_scale": weight.global_scale,
            "offsets": weight.offsets,
        }
        prefix = self.source.path.removesuffix("weight")
        return {f"{prefix}{name}": np.asarray(array) for name, array in arrays.items() if array is not None}

    def _by_weight(self, values: np.ndarray) -> dict[str, list[np.ndarray]]:
        made: dict[str, list[np.ndarray]] = {}
        for weight in values.reshape(-1, *values.shape[-2:]):
            for name, array in self._arrays(weight).items():
                made.setdefault(name, []).append(array)
        return made

    def _arrays(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        """One weight [out, in], slab by slab."""
        format, (out_dim, in_dim) = self.format, weight.shape
        step = max(1, _SLAB_VALUES // (in_dim * format.block_rows)) * format.block_rows
        slabs = [weight[start : start + step] for start in range(0, out_dim, step)]
        whole: np.float32 | None = None
        if format.global_scale:
            whole = np.max([global_scale(slab, format) for slab in slabs])
        values: list[np.ndarray] = []
        scales: list[np.ndarray] = []
        zeros: list[np.ndarray] = []
        for slab in slabs:
            wide = np.ascontiguousarray(slab, np.float32)
            check_finite(wide, self.source.path)
            for found, array in zip((values, scales, zeros), quantize_part(wide, format, whole), strict=True):
                found.append(array)
        arrays = {"weight": np.concatenate(values), "scales": np.concatenate(scales)}
        if format.zeros:
            arrays["zeros"] = np.concatenate(zeros)
        return arrays if whole is None else {**arrays, "global_scale": np.asarray(whole)}

    def leaves(self) -> Iterator[Leaf]:
        """The parameters as leaves of their own, each of which reads and rounds the whole weight."""
        for path, spec in self.specs.items():
            yield Leaf(path, spec, [Part(part.index, self._reader(path, part)) for part in self.source.parts])

    def _reader(self, path: str, part: Part) -> Callable[[Sequence[Region]], Sequence[np.ndarray]]:
        shape = self.source.spec.stored_shape[len(part.index) :]

        def read(regions: Sequence[Region]) -> list[np.ndarray]:
            values = part.read([whole_region(shape)])[0]
            made = self.quantize(values)[path]
            return [made[region] for region in regions]

        return read


def dequantize_into(place: np.ndarray, arrays: Mapping[str, np.ndarray], format: WeightFormat) -> None:
    """Fill `place` [*lead, out, in] with the weights that `arrays`, by the names of their parameters, stand for."""
    for index in np.ndindex(place.shape[:-2]):
        one = {name: array[index] for name, array in arrays.items()}
        step = max(1, _SLAB_VALUES // (place.shape[-1] * format.block_rows)) * format.block_rows
        for start in range(0, place.shape[-2], step):
            rows = slice(start, start + step)
            blocks = slice(start // format.block_rows, (start + step) // format.block_rows)
            zeros = one["zeros"][blocks] if format.zeros else None
            offsets = one["offsets"][blocks] if format.offsets else None
            place[(*index, rows)] = dequantize_part(
                one["weight"][rows], one["scales"][blocks], zeros, one.get("global_scale"), offsets, format=format
            )


def load_quantized(
    source: Source,
    model: ModelConfig,
    specs: SpecTree,
    placement: Placement,
    *,
    show_progress: bool = True,
    on_part: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """As `load_params`, from a source of plain weights: they are quantized, on the host, as `model` has them.

    Each weight is read and rounded once for each of its arrays: a store that was converted before loads faster.
    """
    flat, definition = flatten(specs)
    plain_model = without_formats(model)
    plain, _ = flatten(AbstractDecoder(plain_model, jnp.dtype(flat["embed/weight"].dtype)).specs)
    leaves: list[Leaf] = []
    for each in quantized_leaves(source_leaves(source, plain_model, plain, whole=False), model, flat):
        leaves += each.leaves() if isinstance(each, QuantizedLeaf) else [each]
    placed = place_leaves(leaves, placement, show_progress=show_progress, on_part=on_part)
    params: dict[str, Any] = jax.tree.unflatten(definition, [placed[path] for path in flat])
    return params


def quantized_leaves(
    plain: Iterable[Leaf], model: ModelConfig, specs: Mapping[str, ParamSpec]
) -> Iterator[Leaf | QuantizedLeaf]:
    """The leaves of a plain model on their way to `model`, whose parameters have these specs."""
    formats = format_paths(model)
    for leaf in plain:
        projection, _, name = leaf.path.rpartition("/")
        if name == "weight" and projection in formats:
            made = {path: spec for path, spec in specs.items() if path.rpartition("/")[0] == projection}
            made.pop(f"{projection}/bias", None)
            yield QuantizedLeaf(leaf, formats[projection], made)
        else:
            yield leaf
