"""A checkpoint or store, written as a store: `millrace convert`, and what the first use of a checkpoint does.

Several arrays are on their way at once, each part by part: read, laid out and converted by the code that loads them,
hashed and written. What they hold together is bounded, so the host needs little more than the largest tensor.
"""

import contextlib
import dataclasses
import hashlib
import math
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..errors import CheckpointError, ConfigError
from ..models.config import ModelConfig
from ..models.decoder import AbstractDecoder
from ..models.families import config_from_hf
from ..models.families.quantization import CALIBRATION, KEY, quantization_config
from ..models.quantization import is_quantized, uniformly, with_formats
from ..pallas_kernels.quantized_matmul import WeightFormat
from ..sharding.specs import ParamSpec, whole_region
from .byte_bar import byte_bar
from .calibration import CalibrationText, calibration_text, fitted_layers
from .checkpoint import CONFIG_FILE, Checkpoint
from .param_tree import flatten
from .quantizing import QuantizedLeaf, quantized_leaves
from .store import Store, open_store
from .store_format import MANIFEST_FILE, PARAMS_FOLDER, to_json
from .store_journal import Origin
from .store_root import is_disk_full
from .store_writer import StoreWriter, open_writer
from .weights import Leaf, Part, source_leaves
from .weights import convert as to_dtype

_NUM_WORKERS = 4
_BUDGET_BYTES = 384 << 20  # of parts on their way; a larger one goes alone


class _Budget:
    """A bound on the bytes that threads hold together."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._held = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Wait until there is room; what is larger than the budget waits until nothing else is held."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + num_bytes <= self._num_bytes)
            self._held += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= num_bytes
                self._changed.notify_all()


def convert(
    source: Checkpoint | Store,
    place: Path | str,
    *,
    dtype: np.dtype | None = None,
    quantization: WeightFormat | None = None,
    calibrate: Path | None = None,
    show_progress: bool = True,
) -> Store:
    """The store of `source` at a path or URL, in `dtype` or the model's own; an interrupted conversion goes on.

    `quantization` is what plain weights are made; None leaves them, and those that are quantized, as they are. With
    `calibrate`, a file of text, they are rounded to what the model computes of it. A place that holds this conversion
    already is left as it is, which is said on stderr.

    Raises:
      CheckpointError: the source is damaged or unlike its config, the place holds something else, the disk is full.
      ConfigError: a weight's shape does not fit the format, or the text is too short.
    """
    model = config_from_hf(dict(source.config))
    own_dtype = np.dtype(jnp.dtype(source.dtype if isinstance(source, Store) else model.dtype))
    text = None
    if calibrate is not None:
        if quantization is None:
            has = "the source's are quantized already" if is_quantized(model) else "quantization is not set"
            raise ConfigError(
                f"calibrate goes with the quantization of plain weights, as in --quantization=int4; {has}."
            )
        text = calibration_text(calibrate, source.load_tokenizer(), model)
    return write_store(source, model, dtype or own_dtype, place, quantization, text, show_progress=show_progress)


def write_store(
    source: Checkpoint | Store,
    model: ModelConfig,
    dtype: np.dtype,
    place: Path | str,
    quantization: WeightFormat | None = None,
    text: CalibrationText | None = None,
    *,
    show_progress: bool,
) -> Store:
    """`convert`, for who knows the dtype, what config.json says of the model, and the text to calibrate with."""
    target = model if quantization is None else with_formats(model, uniformly(quantization))
    specs, _ = flatten(AbstractDecoder(target, jnp.dtype(dtype)).specs)
    declared = source.config.get(KEY) if quantization is None else quantization_config(quantization)
    if text is not None and declared is not None:
        declared = {**declared, CALIBRATION: text.declared}
    origin = Origin({**source_name(source), "fingerprint": fingerprint(source)}, str(dtype), declared)
    jobs = _jobs(source, model, target, dtype)
    with open_writer(place, origin, specs) as writer:
        if writer is None:
            print(f"millrace: {place} holds this conversion already: nothing to do", file=sys.stderr)
        else:
            unfinished = set(writer.unfinished)
            _check_room(writer, sum(specs[path].num_bytes for path in unfinished))
            if text is not None:
                jobs = _write_fitted(writer, model, jobs, text, show_progress)
            jobs = [job for job in jobs if unfinished.intersection(job.specs)]
            _write_all(writer, jobs, sum(spec.num_bytes for spec in specs.values()), show_progress)
            writer.finish(_files(source, declared))
    return open_store(place)


@dataclasses.dataclass(frozen=True)
class _Job:
    """One array of the source, and the arrays that its parts are written to."""

    leaf: Leaf
    quantized: QuantizedLeaf | None  # None: the leaf is written as it is

    @property
    def specs(self) -> Mapping[str, ParamSpec]:
        """What is written, by path."""
        return {self.leaf.path: self.leaf.spec} if self.quantized is None else self.quantized.specs

    def part_bytes(self, part: Part) -> int:
        """Bytes that are written for a part."""
        return sum(spec.num_bytes // math.prod(spec.shape[: len(part.index)]) for spec in self.specs.values())

    def convert(self, values: np.ndarray) -> Mapping[str, np.ndarray]:
        """What a part is written as, by path."""
        if self.quantized is not None:
            return self.quantized.quantize(values)
        return {self.leaf.path: to_dtype(values, self.leaf.spec.dtype, self.leaf.path)}


def source_name(source: Checkpoint | Store) -> dict[str, str | None]:
    """What the manifest calls a source: a folder's name, or a repository of the hub and its commit; never a path."""
    if isinstance(source, Store):
        return {"name": source.url.rsplit("/", 1)[-1], "revision": None}
    snapshots = source.path.parent
    repository = snapshots.parent.name
    if snapshots.name == "snapshots" and repository.startswith("models--"):
        return {"name": repository.removeprefix("models--").replace("--", "/"), "revision": source.path.name}
    return {"name": source.path.name, "revision": None}


def fingerprint(source: Checkpoint | Store) -> str:
    """A digest that changes when the source does: of a store's manifest; of a checkpoint's files, but for content."""
    if isinstance(source, Store):
        return hashlib.sha256(source.root.read([MANIFEST_FILE])[MANIFEST_FILE] or b"").hexdigest()
    stats = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.source_files())
    return hashlib.sha256(to_json({"files": stats})).hexdigest()


def _files(source: Checkpoint | Store, quantization: Mapping[str, Any] | None) -> dict[str, bytes]:
    """What lies beside the weights, by name; config.json says how they are quantized."""
    if isinstance(source, Store):
        names = [name for name in source.files if not name.startswith(f"{PARAMS_FOLDER}/")]
        files = {name: content for name, content in source.root.read(names).items() if content is not None}
    else:
        files = source.small_files()
    if source.config.get(KEY) != quantization:
        files[CONFIG_FILE] = to_json({**source.config, KEY: quantization})
    return files


def _jobs(source: Checkpoint | Store, model: ModelConfig, target: ModelConfig, dtype: np.dtype) -> list[_Job]:
    """Every array of the source, which has the weights of `model`; those of `target` are written."""
    plain, _ = flatten(AbstractDecoder(model, jnp.dtype(dtype)).specs)
    leaves = list(source_leaves(source, model, plain, whole=False))
    if target == model:
        return [_Job(leaf, None) for leaf in leaves]
    specs, _ = flatten(AbstractDecoder(target, jnp.dtype(dtype)).specs)
    return [
        _Job(each.source, each) if isinstance(each, QuantizedLeaf) else _Job(each, None)
        for each in quantized_leaves(leaves, target, specs)
    ]


def _write_fitted(
    writer: StoreWriter, model: ModelConfig, jobs: list[_Job], text: CalibrationText, show_progress: bool
) -> list[_Job]:
    """Write the layers' quantized weights, fitted to a text; the jobs that remain.

    An interrupted conversion computes the text again from its beginning, and writes the arrays that were not finished.
    """
    unfinished = frozenset(writer.unfinished)
    fitted = {j.leaf.path: j.quantized for j in jobs if j.quantized is not None and j.leaf.spec.axes[0] == "layers"}
    if any(unfinished.intersection(quantized.specs) for quantized in fitted.values()):
        leaves = {job.leaf.path: job.leaf for job in jobs}
        for layer, arrays in fitted_layers(model, leaves, fitted, text, show_progress=show_progress):
            for path, array in arrays.items():
                if path in unfinished:
                    writer.write_part(path, (layer,), array)
    return [job for job in jobs if job.leaf.path not in fitted]


def _check_room(writer: StoreWriter, num_bytes: int) -> None:
    """Raise CheckpointError if the disk cannot hold what is still to be written."""
    folder = writer.root.folder
    if folder is None:
        return
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise CheckpointError(
            f"{folder}: {num_bytes:,} bytes are still to be written; the disk has {free:,} free. Make room and run it "
            "again: it resumes."
        )


def _write_all(writer: StoreWriter, jobs: list[_Job], total: int, show_progress: bool) -> None:
    """Every part of the jobs, several jobs at once; a bar on stderr counts bytes."""
    budget, is_stopped = _Budget(_BUDGET_BYTES), threading.Event()
    unfinished = frozenset(writer.unfinished)
    done_bytes = total - sum(spec.num_bytes for job in jobs for spec in job.specs.values())
    with (
        byte_bar("Converting weights", total, show=show_progress, done=done_bytes) as advance,
        ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="millrace-convert") as workers,
    ):
        pending = [workers.submit(_write_parts, writer, job, unfinished, budget, is_stopped, advance) for job in jobs]
        try:
            for done in as_completed(pending):
                done.result()
        except BaseException as error:
            is_stopped.set()
            workers.shutdown(wait=False, cancel_futures=True)
            if is_disk_full(error.__cause__):
                raise CheckpointError(f"{error} The arrays take {total:,} bytes in all.") from error.__cause__
            raise


def _write_parts(
    writer: StoreWriter,
    job: _Job,
    unfinished: Collection[str],
    budget: _Budget,
    is_stopped: threading.Event,
    on_bytes: Callable[[int], None],
) -> None:
    """The arrays of a job that are still to be written, part by part."""
    for part in job.leaf.parts:
        if is_stopped.is_set():
            return
        shape, part_bytes = job.leaf.spec.shape[len(part.index) :], job.part_bytes(part)
        with budget.hold(part.source_bytes + part_bytes):
            values = part.read([whole_region(shape)])[0]
            for path, array in job.convert(values).items():
                if path in unfinished:
                    writer.write_part(path, part.index, array)
        on_bytes(part_bytes)
