"""Weights from disk to their shards on the mesh, part by part.

A leaf is allocated on its devices at once and filled by its parts (a layer, or a layer's expert), each read, laid
out and converted on the host; one that is small, or a single part, is put together there, two at a time. So the host
holds, beside what is placed there, two parts twice at most: as read and as converted, or as converted and on its way.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ..errors import CheckpointError
from ..models.config import ModelConfig
from ..models.families.plan import LeafPlan, Piece
from ..models.quantization import is_scale
from ..sharding.rules import Placement
from ..sharding.specs import ParamSpec, Region, SpecTree, whole_region
from .byte_bar import byte_bar
from .checkpoint import Checkpoint
from .param_tree import flatten
from .safetensors_file import check_finite
from .store import Store

_SMALL_BYTES = 16 << 20  # leaves up to here are put together on the host: no program is compiled for them
_NUM_WHOLE = 2  # leaves put together on the host at once: while one ends, the next one's chunks are on their way

type Source = Checkpoint | Store


@dataclasses.dataclass(frozen=True)
class Part:
    """What lies at `index` of a leaf's leading axes; `read` gives regions of it in the dtype on disk."""

    index: tuple[int, ...]
    read: Callable[[Sequence[Region]], Sequence[np.ndarray]]
    source_bytes: int = 0  # that are read for the whole of it, where a source is read


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter and the parts that fill it."""

    path: str
    spec: ParamSpec
    parts: Sequence[Part]

    @property
    def is_one_part(self) -> bool:
        """Whether a single part fills all of it."""
        return len(self.parts) == 1 and not self.parts[0].index


def load_params(
    source: Source,
    model: ModelConfig,
    specs: SpecTree,
    placement: Placement,
    *,
    show_progress: bool = True,
    on_part: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """The parameter tree of `specs` (shapes, dtypes and axes), read from `source` and sharded by `placement`.

    A bar on stderr counts bytes when loading takes longer than a second. `on_part` is called between parts, and may
    raise to stop.

    Raises:
      CheckpointError: before anything is placed, if names, shapes or kinds of dtype disagree with the model; while
        loading, if a file changed or was damaged, or a weight is NaN, infinite, or too large for its new dtype.
    """
    flat, definition = flatten(specs)
    leaves = list(source_leaves(source, model, flat, whole=placement.on_host))
    placed = place_leaves(leaves, placement, show_progress=show_progress, on_part=on_part)
    params: dict[str, Any] = jax.tree.unflatten(definition, [placed[path] for path in flat])
    return params


def source_leaves(source: Source, model: ModelConfig, specs: Mapping[str, ParamSpec], *, whole: bool) -> Iterator[Leaf]:
    """The leaves of a source that was found to have these parameters; `whole`: each of a store's in one part."""
    if isinstance(source, Store):
        check_store(source, specs)
        return store_leaves(source, specs, whole=whole)
    return checkpoint_leaves(source, source.plan(model), specs)


def place_leaves(
    leaves: Sequence[Leaf],
    placement: Placement,
    *,
    show_progress: bool,
    on_part: Callable[[], object] = lambda: None,
) -> dict[str, jax.Array]:
    """Every leaf's array by its path: those put together on the host two at a time, then the others part by part."""
    placed: dict[str, jax.Array] = {}
    whole = [leaf for leaf in leaves if leaf.spec.num_bytes <= _SMALL_BYTES or leaf.is_one_part]
    by_parts = [leaf for leaf in leaves if leaf.spec.num_bytes > _SMALL_BYTES and not leaf.is_one_part]
    total = sum(leaf.spec.num_bytes for leaf in leaves)

    with byte_bar("Loading weights", total, show=show_progress) as count:

        def advance(num_bytes: int) -> None:
            count(num_bytes)
            on_part()

        readers = ThreadPoolExecutor(_NUM_WHOLE)
        try:
            for leaf, array in zip(whole, readers.map(lambda leaf: _place_whole(leaf, placement), whole), strict=True):
                placed[leaf.path] = array
                advance(leaf.spec.num_bytes)
        finally:
            readers.shutdown(cancel_futures=True)
        for leaf in by_parts:
            placed[leaf.path] = _place_by_parts(leaf, placement, advance)
    return placed


def _place_whole(leaf: Leaf, placement: Placement) -> jax.Array:
    """A leaf put together on the host."""
    spec = leaf.spec
    if leaf.is_one_part:
        return _place(leaf.path, leaf.parts[0], spec, placement)
    whole = np.empty(spec.stored_shape, spec.dtype)
    for part in leaf.parts:
        shape = whole.shape[len(part.index) :]
        whole[part.index] = convert(part.read([whole_region(shape)])[0], spec.dtype, leaf.path)
    return _place(leaf.path, Part((), lambda regions: [whole[region] for region in regions]), spec, placement)


def _place_by_parts(leaf: Leaf, placement: Placement, on_bytes: Callable[[int], object]) -> jax.Array:
    """A leaf allocated on its devices and filled in place."""
    spec, sharding = leaf.spec, placement.sharding(leaf.spec.axes)
    array = jnp.zeros(spec.shape, spec.dtype, device=sharding)
    # jax knows equal functions with equal shardings: one program per shape, not per leaf or part.
    write = jax.jit(_write, donate_argnums=0, out_shardings=sharding)
    for part in leaf.parts:
        part_spec = spec.below(len(part.index))
        placed = _place(leaf.path, part, part_spec, placement)
        for index in spec.indices(part.index):
            array = write(array, placed, np.asarray(index, np.int32))
            array.block_until_ready()  # else the parts waiting to be written would fill the host
            on_bytes(part_spec.num_bytes)
    return array


def _write(array: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    """`array` with `part` at `index` of its leading axes."""
    starts = [index[axis] for axis in range(index.size)] + [np.int32(0)] * part.ndim
    return jax.lax.dynamic_update_slice(array, part.reshape((1,) * index.size + part.shape), starts)


def _place(path: str, part: Part, spec: ParamSpec, placement: Placement) -> jax.Array:
    """A part as an array of its own, of which each device gets its shard; only this process' shards are read."""
    sharding = placement.sharding(spec.axes)
    regions = list(shard_regions(sharding, spec.shape))
    wanted = [list(spec.stored_regions(tuple(slice(*bounds) for bounds in region))) for region in regions]
    read = iter(part.read([stored for pieces in wanted for stored, _ in pieces]))
    shards = {}
    for region, pieces in zip(regions, wanted, strict=True):
        values = [convert(next(read), spec.dtype, path) for _ in pieces]
        shards[region] = values[0] if len(values) == 1 else np.concatenate(values, spec.axes.index("experts"))
    return jax.make_array_from_callback(spec.shape, sharding, lambda region: shards[_key(region, spec.shape)])


def shard_regions(
    sharding: NamedSharding, shape: tuple[int, ...]
) -> dict[tuple[tuple[int, int], ...], tuple[jax.Device, ...]]:
    """The distinct parts of an array that this process' devices hold, by (start, stop) along each dimension."""
    devices: dict[tuple[tuple[int, int], ...], tuple[jax.Device, ...]] = {}
    for device, region in sharding.addressable_devices_indices_map(shape).items():
        key = _key(region, shape)
        devices[key] = (*devices.get(key, ()), device)
    return devices


def _key(region: Region | None, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Start and stop along each dimension; equal regions may be written as unequal slices."""
    return tuple(part.indices(size)[:2] for part, size in zip(region or whole_region(shape), shape, strict=True))


def convert(values: np.ndarray, dtype: np.dtype, path: str) -> np.ndarray:
    """`values` in the dtype asked for; floats of 16 bits and more convert to each other, nothing else converts.

    Raises:
      CheckpointError: they do not convert, or are too large; scales are zero or not finite; names the array.
    """
    if is_scale(path):
        _check_scales(values, path)
    if values.dtype == dtype:
        return values
    if not (_is_float(values.dtype) and _is_float(dtype)):
        raise CheckpointError(f"{path}: expected floating-point weights to make {dtype} of; got {values.dtype}.")
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(values.astype(dtype))
    check_finite(converted, f"{path}, converted from {values.dtype} to {dtype},")  # large values overflow
    return converted


def _check_scales(scales: np.ndarray, path: str) -> None:
    """A weight whose scale is zero or NaN is lost."""
    wide = scales.astype(np.float32)
    if not np.all(np.isfinite(wide) & (wide != 0)):
        what = "zero" if np.all(np.isfinite(wide)) else "NaN or infinite"
        raise CheckpointError(
            f"{path} should hold scales other than zero, all finite; one of them is {what}. The quantized weights are "
            "damaged: quantize the model again."
        )


def alias(array: jax.Array) -> jax.Array:
    """The same buffers under another object: jax keeps what it copies to the host for as long as the object lives."""
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def _is_float(dtype: np.dtype) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating)) and dtype.itemsize >= 2  # narrower ones need their scales


def checkpoint_leaves(
    checkpoint: Checkpoint, plan: Mapping[str, LeafPlan], specs: Mapping[str, ParamSpec]
) -> Iterator[Leaf]:
    """The leaves as their plan builds them from tensors; all shapes are compared before the first is read."""
    _check_paths(plan, specs, f"{checkpoint.path}: the model's plan")
    shapes = {name: checkpoint.shape(name) for name in checkpoint.tensor_names}
    for path, spec in specs.items():
        for piece in plan[path].pieces:
            _check_piece(checkpoint, piece, path, spec, shapes)
    for path, spec in specs.items():
        yield Leaf(path, spec, [_piece_part(checkpoint, piece) for piece in plan[path].pieces])


def _check_piece(
    checkpoint: Checkpoint, piece: Piece, path: str, spec: ParamSpec, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """The tensors of a piece must give the shape that the model's config gives the parameter, in a usable dtype."""
    expected, found = spec.stored_shape[len(piece.index) :], piece.shape(shapes)
    names = " and ".join(piece.names)
    if found != expected:
        came = " and ".join(str(list(shapes[name])) for name in piece.names)
        raise CheckpointError(
            f"{checkpoint.path}: {names}: config.json asks for {list(expected)} in {path}; the checkpoint has {came}"
            f"{'' if len(piece.names) == 1 and found == shapes[names] else f', which makes {list(found)}'}. "
            "Weights and config.json are of different models: fetch them again."
        )
    piece.check_dtypes({name: checkpoint.dtype(name) for name in piece.names})
    dtype = checkpoint.dtype(piece.names[0])
    if piece.source.packing is None and dtype != spec.dtype and not (_is_float(dtype) and _is_float(spec.dtype)):
        wanted = "floating-point weights" if _is_float(spec.dtype) else f"{path} as {spec.dtype}"
        raise CheckpointError(
            f"{checkpoint.path}: {names}: expected {wanted}; got {dtype}. Weights that are quantized otherwise than "
            "config.json says are not read: use the model's unquantized checkpoint."
        )


def _piece_part(checkpoint: Checkpoint, piece: Piece) -> Part:
    def read(regions: Sequence[Region]) -> list[np.ndarray]:
        built = piece.build({name: checkpoint.read(name) for name in piece.names})
        return [built[region] for region in regions]

    return Part(piece.index, read, sum(checkpoint.num_bytes(name) for name in piece.names))


def store_leaves(store: Store, specs: Mapping[str, ParamSpec], *, whole: bool) -> Iterator[Leaf]:
    """Leaves of a checked store: each as a whole, or large ones layer by layer where its chunks allow it."""
    for path, spec in specs.items():
        is_large = spec.num_bytes > _SMALL_BYTES and spec.axes[0] == "layers"
        by_layer = not whole and is_large and store.arrays[path].chunk_shape[0] == 1
        indices: Iterable[tuple[int, ...]] = [(layer,) for layer in range(spec.shape[0])] if by_layer else [()]
        yield Leaf(path, spec, [_array_part(store, path, index) for index in indices])


def check_store(store: Store, specs: Mapping[str, ParamSpec]) -> None:
    """Raises CheckpointError unless the store's arrays can serve these parameters."""
    _check_paths(store.arrays, specs, f"{store.url}: the store")
    for path, spec in specs.items():
        entry = store.arrays[path]
        if entry.shape != spec.stored_shape:
            raise CheckpointError(
                f"{store.url}: config.json asks for {list(spec.stored_shape)} in {path}; the store has "
                f"{list(entry.shape)}. Weights and config.json are of different models: convert the model again."
            )
        if entry.dtype != spec.dtype and not (_is_float(entry.dtype) and _is_float(spec.dtype)):
            raise CheckpointError(f"{store.url}: expected {path} as {spec.dtype}; the store has {entry.dtype}.")


def _array_part(store: Store, path: str, index: tuple[int, ...]) -> Part:
    prefix = tuple(slice(i, i + 1) for i in index)

    def read(regions: Sequence[Region]) -> list[np.ndarray]:
        found = (store.read(path, prefix + region) for region in regions)
        return [values.reshape(values.shape[len(index) :]) for values in found]

    entry = store.arrays[path]
    return Part(index, read, entry.num_bytes // math.prod(entry.shape[: len(index)]))


def _check_paths(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Both sides must name the same parameters."""
    found, expected = set(found), set(expected)
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise CheckpointError(
            f"{what} should hold the parameters of config.json; it lacks {missing[:5]} and has besides {extra[:5]}. "
            "They are of different models: convert or fetch the model again."
        )
