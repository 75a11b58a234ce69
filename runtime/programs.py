"""The compiled programs, made before the first request from `program_specs`; nothing compiles after start.

Resident weights: one program per bucket. Streamed weights: three per bucket, embed, layer (one for each kind of layer)
and head, which `StreamedStep` runs one after the other. And two for the slots' state: its first value, and requests
that come in.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jax.stages import Compiled
from jaxtyping import Array
from tqdm import tqdm

from ..errors import CheckpointError
from .batching import Layout
from .buckets import Bucket
from .host_arrays import place
from .program_specs import (
    INITIAL_STATE,
    INSTALL,
    ProgramSpec,
    abstract_control,
    layer_names,
    layer_number,
    program_specs,
    step_name,
)
from .steps import DeviceState, StepModel, StepOutputs
from .weight_streaming import StreamedParams

# XLA plans with 80 % of a GPU's memory. Where weights and cache take more, it computes things twice to hold less at a
# time, whole matmuls among them; what fits is planned here (sizes), to the byte.
_COMPILER_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}
_MAX_AT_ONCE = 8  # programs that are compiled together, each with some hundred megabytes
_STACK_BYTES = 64 << 20  # of a thread that compiles
# Called with the arguments of its spec: compiled here, or loaded from an artifact.
type Program = Callable[..., Any]
type CompilerOptions = Mapping[str, bool | int | str]
# (params, state, packed, flags) -> (state, outputs); the state is donated
type StepProgram = Callable[[Any, DeviceState, Any, Any], tuple[DeviceState, StepOutputs]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """All that a runtime ever runs on its devices."""

    steps: Mapping[Bucket, StepProgram]
    install: Program  # (state, slot of each shard [R], SlotState of one slot) -> state; the state is donated
    initial_state: Program  # () -> state


class StepInterrupted(Exception):
    """A step that stopped between two layers; `state` is what it left, in which its own rows mean nothing."""

    def __init__(self, reason: str, state: DeviceState) -> None:
        super().__init__(reason)
        self.state = state


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamedStep:
    """One step, layer by layer, each as soon as its weights are there; called as the program of a whole step is."""

    embed: Program
    layers: tuple[Program, ...]  # of each of the model's layers; layers of one kind share theirs
    head: Program
    layer_numbers: tuple[Array, ...]
    control_shardings: tuple[Any, Any]  # of packed and flags

    def __call__(
        self, params: StreamedParams, state: DeviceState, packed: Any, flags: Any
    ) -> tuple[DeviceState, StepOutputs]:
        """Raises StepInterrupted if the weights of a layer cannot be read."""
        control = place((packed, flags), self.control_shardings)
        cache, slots = state
        x = self.embed(params.top, slots, control)
        for number, layer in enumerate(self.layers):
            try:
                weights = params.stream.take(number)
            except CheckpointError as error:
                reason = f"the weights of layer {number} could not be read: {error}"
                raise StepInterrupted(reason, DeviceState(cache, slots)) from error
            x, cache = layer(weights, x, cache, self.layer_numbers[number], control)
            del weights  # the room's arrays, where they are the device's, must go before it is filled again
            params.stream.give_back(number, after=x)
        slots, outputs = self.head(params.top, slots, x, control)
        return DeviceState(cache, slots), outputs


def compile_programs(
    model: StepModel,
    buckets: tuple[Bucket, ...],
    *,
    streams: bool = False,
    show_progress: bool,
    before_each: Callable[[], object] = lambda: None,
    compiler_options: CompilerOptions | None = None,
) -> Programs:
    """Lower and compile every program of a runtime, from shapes alone: no weight need exist.

    `before_each` is called before each program, and may raise to stop; `compiler_options` are XLA's.
    """
    made = {}
    specs = program_specs(model, buckets, streams=streams)
    each = compile_each(specs, show_progress=show_progress, before_each=before_each, compiler_options=compiler_options)
    for name, compiled, _ in each:
        made[name] = compiled
    return join_programs(model, buckets, made, streams=streams)


def compile_each(
    specs: Mapping[str, ProgramSpec],
    *,
    show_progress: bool,
    before_each: Callable[[], object] = lambda: None,
    compiler_options: CompilerOptions | None = None,
) -> Iterator[tuple[str, Compiled, float]]:
    """Each program by its name, with the seconds that it took, in the order of `specs`; several are made at once."""

    def compile_one(spec: ProgramSpec) -> tuple[Compiled, float]:
        before_each()
        started_s = time.perf_counter()
        return spec.lower().compile({**_COMPILER_OPTIONS, **(compiler_options or {})}), time.perf_counter() - started_s

    bar = tqdm(total=len(specs), desc="compiling", unit="program", delay=1, disable=not show_progress)
    with bar, _compiler_threads() as threads:
        pending = {name: threads.submit(compile_one, spec) for name, spec in specs.items()}
        for name, future in pending.items():
            bar.set_postfix_str(name)
            yield name, *future.result()
            bar.update()


@contextlib.contextmanager
def _compiler_threads() -> Iterator[ThreadPoolExecutor]:
    """One for each processor; XLA overflows the usual stack when it compiles several programs at once."""
    size = threading.stack_size(_STACK_BYTES)
    pool = ThreadPoolExecutor(min(_MAX_AT_ONCE, os.cpu_count() or 1), thread_name_prefix="millrace-compile")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        threading.stack_size(size)


def join_programs(
    model: StepModel, buckets: tuple[Bucket, ...], made: Mapping[str, Program], *, streams: bool
) -> Programs:
    """What a runtime runs, of programs by the names of their specs."""
    steps: dict[Bucket, StepProgram] = {
        bucket: _join_streamed(model, bucket, made) if streams else made[step_name(bucket)] for bucket in buckets
    }
    return Programs(steps=steps, install=made[INSTALL], initial_state=made[INITIAL_STATE])


def _join_streamed(model: StepModel, bucket: Bucket, made: Mapping[str, Program]) -> StreamedStep:
    name, number = step_name(bucket), layer_number(model)
    packed, flags = abstract_control(model, Layout(bucket, model.pages_per_slot))
    return StreamedStep(
        embed=made[f"{name}-embed"],
        layers=tuple(made[layer] for layer in layer_names(model, bucket)),
        head=made[f"{name}-head"],
        layer_numbers=tuple(place(np.asarray(n, np.int32), number.sharding) for n in range(len(model.decoder.layers))),
        control_shardings=(packed.sharding, flags.sharding),
    )
