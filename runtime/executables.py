"""Compiled programs as bytes, and back: what jax keeps private of XLA's serialization is used here and nowhere else.

jax's own serialize_executable pickles, and a pickle runs whatever it holds. Bytes that are loaded here are machine
code: take them from those whom you would trust with a program.
"""

import contextlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import core
from jax._src.interpreters import pxla
from jax._src.lib import xla_client  # type: ignore[attr-defined]
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Sharding
from jax.stages import Compiled

from ..errors import ProgramError
from .host_arrays import place
from .program_specs import ProgramSpec

# Flags of XLA that do not change what a program is.
_NOT_OF_PROGRAMS = ("xla_dump", "xla_force_host_platform_device_count", "xla_gpu_cuda_data_dir", "xla_detailed_logging")


def serialize(compiled: Compiled) -> bytes:
    """The machine code of a program, for as many devices as it was compiled for."""
    return bytes(compiled.runtime_executable().serialize())  # type: ignore[union-attr]


def used_leaves(compiled: Compiled) -> tuple[int, ...]:
    """Which leaves of its arguments a program takes, by their numbers: the others it does not read."""
    return tuple(sorted(compiled._executable._kept_var_idx))  # type: ignore[attr-defined]


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Inside, jax's persistent cache is off: what a CPU's program took from there serializes without its functions."""
    was_enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it looks at its settings once only
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was_enabled)
        compilation_cache.reset_cache()


def compiler_flags() -> dict[str, str]:
    """XLA's flags as this process compiles with them; of one that is given several times, all its values."""
    options = xla_client.CompileOptions()  # what is inside it lives no longer than it does
    build = options.executable_build_options
    text = repr(build.debug_options)
    flags: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon and name.startswith("xla_") and not name.startswith(_NOT_OF_PROGRAMS):
            flags[name] = f"{flags[name]} {value.strip()}" if name in flags else value.strip()
    return flags


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Mapping[str, Any]:
    """The machine's architecture and what its processor can do, which a CPU's programs may use.

    `cpuinfo` stands in for the file of Linux in tests; elsewhere the processor's name is all that is known.
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    words = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), None)
    return {"architecture": platform.machine(), "features": sorted(words or [platform.processor()])}


class LoadedProgram:
    """A program that was compiled elsewhere; it is called, and takes over donated arguments, as a compiled one."""

    def __init__(self, spec: ProgramSpec, content: bytes, used: Sequence[int]) -> None:
        """`used` as in `used_leaves`. Raises RuntimeError if XLA does not take the bytes."""
        inputs, in_tree = jax.tree.flatten(spec.arguments)
        self._in_tree: Any = in_tree
        outputs, self._out_tree = jax.tree.flatten(spec.outputs)
        devices = xla_client.DeviceList(tuple(outputs[0].sharding.mesh.devices.flat))
        client = outputs[0].sharding.mesh.local_devices[0].client
        self._name = spec.name
        self._executable = client.deserialize_executable(content, devices)
        self._used: list[tuple[int, Sharding]] = [(number, inputs[number].sharding) for number in used]
        self._shapes = [leaf.shape for leaf in inputs]
        avals = [core.ShapedArray(leaf.shape, leaf.dtype) for leaf in outputs]
        shardings = [leaf.sharding for leaf in outputs]
        self._handlers = pxla.global_avals_to_results_handler(avals, shardings, committed=True).handlers

    def __call__(self, *arguments: Any) -> Any:
        """Raises ProgramError if the arguments are not those that it was compiled for."""
        tree: Any
        leaves, tree = jax.tree.flatten(arguments)
        if tree != self._in_tree or [np.shape(leaf) for leaf in leaves] != self._shapes:
            raise ProgramError(
                f"{self._name}: expected arguments {self._in_tree} of shapes {self._shapes}; got {tree} of "
                f"{[np.shape(leaf) for leaf in leaves]}. Load the artifact for this model."
            )
        arrays = [_placed(leaves[number], sharding) for number, sharding in self._used]
        results = self._executable.execute_sharded(arrays).consume_with_handlers(self._handlers)
        return jax.tree.unflatten(self._out_tree, results)


def _placed(leaf: Any, sharding: Sharding) -> jax.Array:
    if not isinstance(leaf, jax.Array):
        array = np.asarray(leaf)
        if sharding.num_devices == 1:  # as jax does within its own calls; its device_put does much more
            shape: Any = core.ShapedArray(array.shape, array.dtype)
            one: jax.Array = pxla.batched_device_put(shape, sharding, [array], list(sharding.device_set))
            return one
        placed: jax.Array = place(array, sharding)
        return placed
    if leaf.sharding is sharding or leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    moved: jax.Array = jax.device_put(leaf, sharding)
    return moved
