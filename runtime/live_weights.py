"""The weights of a running runtime: replaced between two steps without a compile, and written out while steps go on.

Nothing is replaced before all of it was checked. Resident weights are then replaced array by array, each placed when
the one before it has gone, so that an update needs room for one array more.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import CheckpointError, ConfigError
from ..models.config import ModelConfig
from ..models.families import config_from_hf
from ..sharding.rules import Placement
from ..sharding.specs import ParamSpec, Region, SpecTree, whole_region
from .checkpoint import GENERATION_FILE, ModelFiles
from .convert import convert, source_name
from .executor import Executor
from .loop import StepLoop
from .model_source import ModelSource
from .safetensors_file import check_finite
from .sampling_params import OnWeightsUpdate
from .spelling import nearest, shown
from .store import Store, open_store
from .store_format import to_json
from .store_writer import save_store
from .weights import Leaf, Part, alias, check_store, place_leaves, store_leaves
from .weights import convert as to_dtype

type Weights = Mapping[str, Any] | Path | str


class HalfUpdated(Exception):
    """An update failed when some arrays were replaced already: the weights are of no version, and the loop ends."""


class LiveWeights:
    """What updates and saves the weights; thread-safe. Updates wait their turn in the order in which they were made."""

    def __init__(self, loop: StepLoop, executor: Executor, source: ModelSource, *, show_progress: bool) -> None:
        self._loop = loop
        self._executor = executor
        self._source = source
        self._show_progress = show_progress
        self._streamed = source.weights if isinstance(source.weights, Store) else None
        self._swapping = threading.Lock()  # so that what is saved is of one version

    def update(self, weights: Weights, running: OnWeightsUpdate) -> int:
        """Replace weights and return the new version; see Runtime.update_weights."""
        self._loop.check_open()
        if running not in get_args(OnWeightsUpdate):
            raise ConfigError(f'running should be "drain" or "immediate"; got {shown(running)}')
        if isinstance(weights, str | Path):
            swap = self.swap_from_store(weights)
        elif isinstance(weights, Mapping) and self._loop.group.num_processes > 1:
            raise ConfigError("a group of several processes takes weights from a store: give its path or URL.")
        elif isinstance(weights, Mapping):
            swap = self._swap_from_arrays(weights)
        else:
            raise ConfigError(f"weights should be a dict of arrays, or a store's path or URL; got {shown(weights)}")
        version = self._loop.update_weights(swap, running, str(weights) if isinstance(weights, str | Path) else "")
        try:
            return version.result()
        except BaseException:
            version.cancel()  # of no effect unless it still waits and the caller was interrupted
            raise

    def save(self, place: Path | str) -> None:
        """Write the weights of this moment as a store; see Runtime.save_weights."""
        self._loop.check_open()
        if not isinstance(place, str | Path):
            raise ConfigError(f"save_weights() takes the path or URL of a new store; got {shown(place)}")
        if self._loop.group.num_processes > 1:
            raise ConfigError("save_weights() writes what one process holds; this is a group of several.")
        with self._swapping:
            params, streamed, version = self._executor.params, self._streamed, self._loop.weights_version
            snapshot = None if params is None else jax.tree.map(alias, params)
        if snapshot is None:
            assert streamed is not None
            convert(streamed, place, show_progress=self._show_progress)
            return
        model, specs = self._source.weights, self._executor.specs
        tree: SpecTree = {**specs}
        name = f"{source_name(model)['name']}, weights version {version}"
        save_store(place, snapshot, tree, model.config, _files(model), name=name)

    def _swap_from_arrays(self, weights: Mapping[str, Any]) -> Callable[[], None]:
        if self._executor.params is None:
            raise ConfigError(
                "streamed weights are read from a store: update them with the path or URL of one; got arrays. "
                "Or open the runtime with weights=resident."
            )
        arrays = _checked(weights, self._executor.specs)
        leaves = [Leaf(path, self._executor.specs[path], [_part(array)]) for path, array in arrays.items()]
        _check_values(leaves)
        placement = self._executor.placement
        ready = {leaf.path: arrays[leaf.path] for leaf in leaves if _is_placed(arrays[leaf.path], leaf.spec, placement)}
        return lambda: self._replace(leaves, ready)

    def swap_from_store(self, place: Path | str) -> Callable[[], None]:
        """What replaces the weights by a store's, which is checked now.

        Raises:
          CheckpointError: what is wrong with it.
        """
        store, specs = open_store(place), self._executor.specs
        check_store(store, specs)
        _check_model(store, self._source.config)
        if isinstance(self._source.weights, Store) and self._source.weights.direct_io:
            store = store.with_direct_io()
        _check_values(store_leaves(store, specs, whole=False))
        if self._executor.params is None:
            return lambda: self._stream_from(store)
        leaves = list(store_leaves(store, specs, whole=True))  # writing layer by layer would compile
        return lambda: self._replace(leaves, {})

    def _stream_from(self, store: Store) -> None:
        with self._swapping:
            self._executor.stream_from(store)
            self._streamed = store

    def _replace(self, leaves: Sequence[Leaf], ready: Mapping[str, jax.Array]) -> None:
        """Swap arrays, of which those in `ready` are where they belong."""
        is_begun = False

        def placed() -> Iterator[tuple[str, jax.Array]]:
            nonlocal is_begun
            for leaf in sorted(leaves, key=lambda leaf: -leaf.spec.num_bytes):  # what has no room fails first
                array = ready.get(leaf.path)
                if array is None:
                    array = place_leaves([leaf], self._executor.placement, show_progress=False)[leaf.path]
                is_begun = True
                yield leaf.path, array

        try:
            with self._swapping:
                self._executor.update(placed())
        except Exception as error:
            if is_begun:
                raise HalfUpdated(f"some weights were replaced before this happened: {error}") from error
            raise CheckpointError(f"no weight was replaced, the old ones stand: {error}") from error


# ---- arrays from the user


def _checked(weights: Mapping[str, Any], specs: Mapping[str, ParamSpec]) -> dict[str, Any]:
    """The arrays by path, of names, shapes and kinds that the model has."""
    arrays: dict[str, Any] = {}
    for path, array in _by_path(weights):
        if path not in specs:
            raise ConfigError(f"weights: the model has no {shown(path)}; {nearest(path, specs)}")
        if path in arrays:
            raise ConfigError(f"weights: {path} is there twice, under its path and as a nested dict. Leave one out.")
        _check_array(path, array, specs[path])
        arrays[path] = array
    if not arrays:
        raise ConfigError("weights: expected at least one array; got none")
    return arrays


def _by_path(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _by_path(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _check_array(path: str, array: object, spec: ParamSpec) -> None:
    if not isinstance(array, np.ndarray | jax.Array):
        raise ConfigError(f"weights: {path} should be a numpy or jax array; got {shown(array)}")
    if array.shape != spec.stored_shape:
        raise ConfigError(f"weights: {path} should have the shape {list(spec.stored_shape)}; got {list(array.shape)}")
    are_floats = jnp.issubdtype(array.dtype, jnp.floating) and jnp.issubdtype(spec.dtype, jnp.floating)
    if array.dtype != spec.dtype and not are_floats:
        is_plain = jnp.issubdtype(spec.dtype, jnp.floating)
        instead = f"or floats to make {spec.dtype} of" if is_plain else 'unless opened with quantization="none"'
        raise ConfigError(f"weights: {path} should be {spec.dtype}, {instead}; got {array.dtype}")
    if isinstance(array, jax.Array) and array.is_deleted():
        raise ConfigError(f"weights: {path} was deleted, or donated to a program. Give an array that still is.")


def _part(array: np.ndarray | jax.Array) -> Part:
    """The whole of an array, copied: on a CPU, what is placed may lie where the copy does."""

    def read(regions: Sequence[Region]) -> list[np.ndarray]:
        values = np.asarray(alias(array) if isinstance(array, jax.Array) else array)
        return [np.array(values[region], order="C") for region in regions]

    return Part((), read)


def _is_placed(array: object, spec: ParamSpec, placement: Placement) -> bool:
    """Whether a user's array can be taken as it is."""
    sharding = placement.sharding(spec.axes)
    return (
        isinstance(array, jax.Array)
        and array.shape == spec.shape
        and array.dtype == spec.dtype
        and array.sharding.is_equivalent_to(sharding, len(spec.shape))
    )


# ---- any kind


def _check_values(leaves: Iterable[Leaf]) -> None:
    """Read everything once, a part at a time.

    Raises:
      CheckpointError: something cannot be read, or is NaN, infinite, or too large for its new dtype; names the array.
    """
    for leaf in leaves:
        for part in leaf.parts:
            region = whole_region(leaf.spec.stored_shape[len(part.index) :])
            check_finite(to_dtype(part.read([region])[0], leaf.spec.dtype, leaf.path), leaf.path)


def _check_model(store: Store, model: ModelConfig) -> None:
    """Equal shapes do not make an equal model; only the dtype may be another."""
    found = dataclasses.replace(config_from_hf(dict(store.config)), dtype=model.dtype)
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(model, field.name), getattr(found, field.name)
        if ours != theirs:
            raise CheckpointError(
                f"{store.url}: expected a store of the model that runs; by config.json its {field.name} is "
                f"{shown(theirs)} instead of {shown(ours)}. Open a new Runtime for another model."
            )


def _files(model: ModelFiles) -> dict[str, Path | bytes]:
    """What lies beside the weights in a store, by name."""
    generation = {GENERATION_FILE: to_json(model.generation_config)} if model.generation_config else {}
    return {**model.tokenizer_files, **generation}
