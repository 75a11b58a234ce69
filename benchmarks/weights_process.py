"""Millrace's side of weights.py, and safetensors': loads, conversions and steps, each timed without imports."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import disk
import numpy as np
from processes import disk_bytes, memory, serve

from millrace.runtime.assembly import Engine, assemble
from millrace.runtime.config import RuntimeConfig
from millrace.runtime.request import validate
from millrace.runtime.sampling_params import SamplingParams


def load_safetensors(*, path: str) -> dict[str, Any]:
    """`safetensors.flax.load_file`, until every array is on the device."""
    import jax
    from safetensors.flax import load_file

    _start_device()
    started_s = time.perf_counter()
    jax.block_until_ready(load_file(path))
    return {"seconds": time.perf_counter() - started_s}


def load_store(*, path: str, direct_io: bool) -> dict[str, Any]:
    """Opening the store and loading all of it, until every array is on the device."""
    import jax

    from millrace.models.decoder import AbstractDecoder
    from millrace.models.partition import partition
    from millrace.runtime.model_source import compute_dtype, open_model
    from millrace.runtime.store import open_store
    from millrace.runtime.weights import load_params
    from millrace.sharding.mesh import make_mesh

    config = open_model(path, None).config
    specs = AbstractDecoder(config, compute_dtype(config, None)).specs
    placement = partition(config, make_mesh({}))
    _start_device()
    started_s = time.perf_counter()
    store = open_store(path, direct_io=direct_io)
    jax.block_until_ready(load_params(store, config, specs, placement, show_progress=False))
    return {"seconds": time.perf_counter() - started_s}


def _start_device() -> None:
    import jax

    jax.block_until_ready(jax.numpy.zeros(2) + 1)


def convert_checkpoint(*, source: str, destination: str) -> dict[str, Any]:
    """Converting a checkpoint until the last byte is on the disk, and how much memory that takes at most."""
    from millrace.runtime.checkpoint import open_checkpoint
    from millrace.runtime.convert import convert

    before = memory()["resident"]
    started_s = time.perf_counter()
    convert(open_checkpoint(source), destination, show_progress=False)
    disk.flush(Path(destination))
    return {"seconds": time.perf_counter() - started_s, "peak_bytes": memory()["peak"] - before}


class Stepper:
    """One engine, and decode steps of any number of sequences up to its slots."""

    _engine: Engine

    def open(self, **options: Any) -> dict[str, Any]:
        """Assemble it, with the weights that the store has; `options` are RuntimeConfig's."""
        self._engine = assemble(RuntimeConfig(**options, quantization="none", progress=False))
        return {}

    def steps(self, *, batch: int, num_steps: int) -> dict[str, Any]:
        """Median seconds of a decode step of `batch` sequences, host's work included, and bytes read from the disk.

        The plan before them computes the prompts, of one token each, and is not counted: a stream has read ahead
        for it while nothing ran.
        """
        engine = self._engine
        params = SamplingParams(temperature=1.0, max_tokens=num_steps + 1, ignore_eos=True, seed=1)
        for row in range(batch):
            engine.scheduler.add(validate(str(row), [5 + row], params, engine.limits))
        seconds, num_bytes = [], []
        while (plan := engine.scheduler.plan()) is not None:
            started_s, before = time.perf_counter(), disk_bytes()
            engine.scheduler.commit(plan, engine.executor.run(plan).tokens())
            seconds.append(time.perf_counter() - started_s)
            num_bytes.append(disk_bytes() - before)
        if len(seconds) != num_steps + 1:
            raise SystemExit(f"expected {num_steps} decode steps of {batch}; ran {len(seconds) - 1}")
        return {"seconds": statistics.median(seconds[1:]), "disk_bytes": statistics.mean(num_bytes[1:])}

    def read(self) -> dict[str, Any]:
        """Read the layers of a step as a stream does, a room for each reader, and compute nothing."""
        from millrace.models.decoder import AbstractDecoder
        from millrace.runtime.model_source import compute_dtype
        from millrace.runtime.param_tree import flatten
        from millrace.runtime.weight_streaming import RING_ROOMS, StoreLayers, plan_stream

        source, config, placement = self._engine.source, self._engine.config, self._engine.executor.placement
        decoder = AbstractDecoder(source.config, compute_dtype(source.config, config.dtype))
        stay = plan_stream(decoder, placement, config.weights_memory).resident
        numbers = [number for number in range(len(decoder.layers)) if number not in stay]
        layers = StoreLayers(source.weights, decoder, placement)
        num_bytes = sum(spec.num_bytes for n in numbers for spec in flatten(decoder.layers[n].specs)[0].values())

        def read_every(first: int, room: np.ndarray) -> None:
            for number in numbers[first::RING_ROOMS]:
                layers.fetch(number, room)

        rooms = [layers.new_room() for _ in range(RING_ROOMS)]
        started_s = time.perf_counter()
        with ThreadPoolExecutor(RING_ROOMS) as readers:
            list(readers.map(read_every, range(RING_ROOMS), rooms))
        return {"seconds": time.perf_counter() - started_s, "num_bytes": num_bytes}


if __name__ == "__main__":
    stepper = Stepper()
    serve(
        {
            "load_safetensors": load_safetensors,
            "load_store": load_store,
            "convert": convert_checkpoint,
            "open": stepper.open,
            "steps": stepper.steps,
            "read": stepper.read,
            "memory": memory,
        }
    )
