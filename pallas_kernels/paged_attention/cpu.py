"""Paged attention on x86-64 CPUs, in C++: native/paged_attention*.{h,cc}, where the schedules are told.

The whole cache goes to the call with the layer's number: nothing is sliced, gathered or copied.
"""

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np

from .. import native
from .contract import KvCache, PagedAttentionProblem, PagedAttentionSpec, PagedBatch

INSTRUCTION_SETS = ("amx", "avx512", "avx2")  # that there are kernels for, best first


def unsupported(problem: PagedAttentionProblem) -> str | None:
    """Why these kernels cannot serve a problem."""
    if problem.platform != "cpu":
        return f"it is made for CPUs, not for {problem.platform}"
    if problem.dtype not in ("float32", "bfloat16", "float16"):
        return f"queries must be float32, bfloat16 or float16, not {problem.dtype}"
    return native.unavailable()


def instruction_sets() -> tuple[str, ...]:
    """Those that this machine has kernels for, best first; raises NativeError where the library cannot be had."""
    return tuple(name for name in INSTRUCTION_SETS if name in native.library().instruction_sets)


def paged_attention(
    q: jax.Array,
    cache: KvCache[jax.Array],
    layer: jax.Array,
    batch: PagedBatch,
    *,
    spec: PagedAttentionSpec,
    sinks: jax.Array | None,
    instruction_set: str | None = None,
) -> jax.Array:
    """See the contract; `instruction_set` is the best there is unless it is named."""
    usable = instruction_sets()  # which loads the library
    none = jnp.zeros(0, jnp.float32)
    call = jax.ffi.ffi_call("millrace_paged_attention", jax.ShapeDtypeStruct(q.shape, q.dtype))
    output: jax.Array = call(
        q,
        cache.values,
        none if cache.scales is None else cache.scales,
        layer,
        *(jnp.asarray(array, jnp.int32) for array in batch),
        none if sinks is None else sinks.astype(jnp.float32),
        scale=np.float32(spec.scale),
        window=np.int64(spec.window or 0),
        soft_cap=np.float32(spec.soft_cap or 0),
        one_query_per_slot=spec.one_query_per_slot,
        instruction_set=instruction_set or usable[0],
    )
    return output
