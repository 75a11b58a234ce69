"""Weights that are larger than the memory they are given: read layer by layer, ahead of the layer that computes.

Some layers stay (as many as the budget holds, spread evenly), and the others pass through a ring of rooms for one
layer each. A room is filled again once the layer that computed with it is done, so that reading and computing
overlap; at the end of a step the ring goes on with the first layers of the next one. Where the device's memory is the
host's (CPU), the arrays that programs see are the rooms themselves; elsewhere (GPU) a room is a place to read into on
the host, and its contents go through pinned memory into buffers of the device.
"""

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from tqdm import tqdm

from ..errors import CheckpointError, ConfigError
from ..models.decoder import AbstractDecoder, LayerParams, Params
from ..sharding.rules import Placement
from ..sharding.specs import Region
from .param_tree import flatten
from .safetensors_file import aligned_empty
from .store import PendingRead, Store
from .weights import check_store, convert, place_leaves, shard_regions, store_leaves

type Progress = Callable[[Sequence[int], str], Iterable[int]]  # layer numbers again, with a bar named by the text

RING_ROOMS = 3  # one that computes, one that is ready, one that is being read
_ALIGNMENT = 4096  # of a shard in a room: jax takes it over without a copy, and direct I/O may write there


@dataclasses.dataclass(frozen=True)
class StreamSizes:
    """How a budget is spent, in bytes of one device."""

    top_bytes: int
    layer_bytes: int  # of the largest layer
    resident: frozenset[int]  # layers that stay
    num_rooms: int  # of the ring

    @property
    def num_bytes(self) -> int:
        """The most that weights ever take."""
        return self.top_bytes + self.layer_bytes * (len(self.resident) + self.num_rooms)


def plan_stream(decoder: AbstractDecoder, placement: Placement, budget: int) -> StreamSizes:
    """Which layers stay and how many rooms the ring has, for `budget` bytes of weights on each device.

    Raises:
      ConfigError: the budget does not hold embedding, head and one layer; says what would.
    """
    top, _ = flatten(decoder.without_layers.specs)
    top_bytes = sum(map(placement.shard_bytes, top.values()))
    layer_bytes = max(sum(map(placement.shard_bytes, flatten(layer.specs)[0].values())) for layer in decoder.layers)
    num_layers, num_held = len(decoder.layers), (budget - top_bytes) // layer_bytes
    if num_held < 1:
        raise ConfigError(
            f"weights_memory={budget:,} does not hold the embedding and head ({top_bytes:,} bytes on each device) and "
            f"one layer ({layer_bytes:,}). The least that works is {top_bytes + layer_bytes:,}; from "
            f"{top_bytes + 2 * layer_bytes:,} on, reading and computing overlap."
        )
    if num_held >= num_layers:
        return StreamSizes(top_bytes, layer_bytes, frozenset(range(num_layers)), 0)
    num_rooms = min(num_held, RING_ROOMS)
    num_resident = num_held - num_rooms
    resident = (n for n in range(num_layers) if (n + 1) * num_resident // num_layers > n * num_resident // num_layers)
    return StreamSizes(top_bytes, layer_bytes, frozenset(resident), num_rooms)


@dataclasses.dataclass(frozen=True)
class _Shard:
    """What some devices hold of one leaf of a layer, and where it lies in a room."""

    leaf: str
    region: Region
    shape: tuple[int, ...]
    offset: int
    devices: tuple[jax.Device, ...]


class LayerShape:
    """How the parameters of one kind of layer lie in a room."""

    def __init__(self, layer: LayerParams, placement: Placement) -> None:
        self.specs, self._definition = flatten(layer.specs)
        self._shardings = {leaf: placement.sharding(spec.axes) for leaf, spec in self.specs.items()}
        self._shards: list[_Shard] = []
        self.num_bytes = 0
        for leaf, spec in self.specs.items():
            for region, devices in shard_regions(self._shardings[leaf], spec.shape).items():
                slices = tuple(slice(*bounds) for bounds in region)
                shape = tuple(stop - start for start, stop in region)
                self._shards.append(_Shard(leaf, slices, shape, self.num_bytes, devices))
                self.num_bytes += -(-math.prod(shape) * spec.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def read(self, store: Store, layer: LayerParams, room: np.ndarray) -> None:
        """Fill a room with a layer of this kind, all its shards at once.

        Raises:
          CheckpointError: names the array that cannot be read, and why.
        """
        pending: list[PendingRead] = []
        errors: list[CheckpointError] = []
        for shard in self._shards:
            path, view = f"{layer.path}/{shard.leaf}", self._view(room, shard)
            try:
                for stored, within in self.specs[shard.leaf].stored_regions(shard.region):
                    region = (slice(layer.index, layer.index + 1), *stored)
                    if store.arrays[path].dtype == view.dtype:
                        pending.append(store.start_read(path, region, view[(None, *within)]))
                    else:  # one after the other, so that little lies beside the rooms
                        view[within] = convert(store.read(path, region)[0], view.dtype, path)
            except CheckpointError as error:
                errors.append(error)
        for read in pending:  # all of them, whatever fails: nothing may write to the room any more
            try:
                read.result()
            except CheckpointError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def place(self, room: np.ndarray, memory_kind: str | None = None) -> Params:
        """The layer's parameters in a memory of their devices: the usual one, or "pinned_host"."""
        parts: dict[str, list[jax.Array]] = {}
        for shard in self._shards:
            view = self._view(room, shard)
            places = (SingleDeviceSharding(device, memory_kind=memory_kind) for device in shard.devices)
            parts.setdefault(shard.leaf, []).extend(jax.device_put(view, place) for place in places)
        arrays = [
            jax.make_array_from_single_device_arrays(spec.shape, _in_memory(sharding, memory_kind), parts[leaf])
            for (leaf, spec), sharding in zip(self.specs.items(), self._shardings.values(), strict=True)
        ]
        params: Params = jax.tree.unflatten(self._definition, arrays)
        return params

    def to_devices(self, pinned: Params) -> Params:
        """From pinned memory of the host to the devices' own; returns when they are there."""
        shardings = jax.tree.unflatten(self._definition, list(self._shardings.values()))
        moved: Params = jax.block_until_ready(jax.device_put(pinned, shardings))
        return moved

    def _view(self, room: np.ndarray, shard: _Shard) -> np.ndarray:
        dtype = self.specs[shard.leaf].dtype
        num_bytes = math.prod(shard.shape) * dtype.itemsize
        view: np.ndarray = room[shard.offset : shard.offset + num_bytes].view(dtype)
        return view.reshape(shard.shape)


def _in_memory(sharding: NamedSharding, memory_kind: str | None) -> NamedSharding:
    return sharding if memory_kind is None else sharding.with_memory_kind(memory_kind)


class StoreLayers:
    """The layers of a store, read each time that they are asked for.

    `staged`: whether a layer goes through pinned memory of the host; by default where devices have their own.
    """

    def __init__(
        self, store: Store, decoder: AbstractDecoder, placement: Placement, *, staged: bool | None = None
    ) -> None:
        self._store = store
        self.layers = decoder.layers
        self._shapes = {layer.spec: LayerShape(layer, placement) for layer in decoder.layers}
        self._room_bytes = max(shape.num_bytes for shape in self._shapes.values())
        self.staged = not placement.on_host if staged is None else staged

    def new_room(self) -> np.ndarray:
        """Room for any one layer."""
        return aligned_empty(self._room_bytes, _ALIGNMENT)

    def fetch(self, number: int, room: np.ndarray) -> Params:
        """A layer's parameters, which may lie in `room` for as long as they are used.

        Raises:
          CheckpointError: names the array that cannot be read, and why.
        """
        shape = self.read(number, room)
        return shape.to_devices(shape.place(room, "pinned_host")) if self.staged else shape.place(room)

    def read(self, number: int, room: np.ndarray) -> LayerShape:
        """Fill a room with a layer; returns how it lies there."""
        layer = self.layers[number]
        shape = self._shapes[layer.spec]
        shape.read(self._store, layer, room)
        return shape

    def keep(self, number: int) -> tuple[LayerShape, Params]:
        """A layer read once, to stay in the host's memory: pinned where the devices have their own."""
        room = self.new_room()
        shape = self.read(number, room)
        return shape, jax.block_until_ready(shape.place(room, "pinned_host" if self.staged else None))


class HostLayers:
    """All layers kept in the host's memory, and moved to devices that have their own."""

    def __init__(self, source: StoreLayers, progress: Progress) -> None:
        self.layers = source.layers
        self._staged = source.staged
        numbers = progress(range(len(source.layers)), "Loading layers into host memory")
        self._kept = [source.keep(number) for number in numbers]

    def new_room(self) -> np.ndarray:
        """Nothing: the layers have their place."""
        return np.empty(0, np.uint8)

    def fetch(self, number: int, room: np.ndarray) -> Params:
        """A layer's parameters on the devices."""
        shape, params = self._kept[number]
        return shape.to_devices(params) if self._staged else params


type LayerSource = StoreLayers | HostLayers


class WeightStream:
    """The ring: `take` and `give_back` layer by layer, in order, step after step."""

    def __init__(self, source: LayerSource, sizes: StreamSizes, progress: Progress) -> None:
        self.sizes = sizes
        self._progress = progress
        self._pool = ThreadPoolExecutor(max(sizes.num_rooms, 1), thread_name_prefix="millrace-weights")
        self._rooms = [source.new_room() for _ in range(sizes.num_rooms)]
        self._streamed = [n for n in range(len(source.layers)) if n not in sizes.resident]
        self._ahead: deque[tuple[int, np.ndarray, Future[Params]]] = deque()
        self._taken: dict[int, np.ndarray] = {}
        self.switch(source)

    def switch(self, source: LayerSource) -> None:
        """Take the layers from another source from now on; call it between two steps.

        Raises:
          CheckpointError: a layer that stays cannot be read; the former source remains.
        """
        numbers = self._progress(sorted(self.sizes.resident), "Loading the layers that stay")
        self._resident = {number: source.fetch(number, source.new_room()) for number in numbers}
        self._source = source
        self._restart()

    def take(self, number: int) -> Params:
        """The parameters of a layer, once they are there.

        Raises:
          CheckpointError: they could not be read; the next layer to take is the first.
        """
        if number in self._resident:
            return self._resident[number]
        if self._ahead[0][0] != number:  # the step before was given up
            self._restart()
        _, room, fill = self._ahead.popleft()
        self._taken[number] = room
        try:
            return fill.result()
        except BaseException:
            self._restart()
            raise

    def give_back(self, number: int, after: jax.Array) -> None:
        """A layer's room may be filled again once `after` exists, which was computed with it."""
        if number in self._taken:
            self._fill(self._taken.pop(number), after)

    def close(self) -> None:
        """End reading."""
        self._pool.shutdown(cancel_futures=True)

    def _restart(self) -> None:
        """Read the first layers next, whatever was ahead."""
        wait([fill for _, _, fill in self._ahead])
        self._ahead.clear()
        self._taken.clear()
        self._following = itertools.cycle(self._streamed)
        for room in self._rooms:
            self._fill(room, None)

    def _fill(self, room: np.ndarray, after: jax.Array | None) -> None:
        number = next(self._following)
        self._ahead.append((number, room, self._pool.submit(self._fetch, number, room, after)))

    def _fetch(self, number: int, room: np.ndarray, after: jax.Array | None) -> Params:
        if after is not None:
            after.block_until_ready()
        return self._source.fetch(number, room)


@dataclasses.dataclass(frozen=True)
class StreamedParams:
    """What the programs of a streamed step take their weights from."""

    top: Params  # embedding, final norm, head: resident
    stream: WeightStream
    switched: Callable[[Store], "StreamedParams"]  # the same from another store, between two steps


def open_stream(
    store: Store,
    decoder: AbstractDecoder,
    placement: Placement,
    sizes: StreamSizes,
    *,
    in_host_memory: bool,
    show_progress: bool,
    on_part: Callable[[], object] = lambda: None,
) -> StreamedParams:
    """Start reading layers ahead; `in_host_memory` keeps all of them there once they were read.

    `on_part` is called between parts of what is read first, and may raise to stop.

    Raises:
      CheckpointError: the store is of another model, or what stays in memory cannot be read.
    """

    def source_of(store: Store) -> tuple[Params, LayerSource]:
        check_store(store, flatten(decoder.specs)[0])
        flat, definition = flatten(decoder.without_layers.specs)
        leaves = list(store_leaves(store, flat, whole=placement.on_host))
        placed = place_leaves(leaves, placement, show_progress=show_progress, on_part=on_part)
        top = jax.tree.unflatten(definition, [placed[path] for path in flat])
        layers = StoreLayers(store, decoder, placement)
        return top, HostLayers(layers, progress) if in_host_memory else layers

    def progress(numbers: Sequence[int], what: str) -> Iterator[int]:
        for number in tqdm(numbers, desc=what, unit="layer", delay=1, disable=not show_progress):
            on_part()
            yield number

    top, layers = source_of(store)
    stream = WeightStream(layers, sizes, progress)

    def switched(store: Store) -> StreamedParams:
        top, layers = source_of(store)
        stream.switch(layers)
        return StreamedParams(top, stream, switched)

    return StreamedParams(top, stream, switched)
