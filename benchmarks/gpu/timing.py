"""How long a function takes on the GPU, without the host's part."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_FEW, _MANY = 4, 20
_ROUNDS = 7
_SLOW_S = 0.02  # a call that takes so long hides the host's part behind it, and is not made many times


def time_call(call: Callable[..., jax.Array], arguments: tuple[Any, ...]) -> tuple[float, str]:
    """Median seconds of `call(*arguments)`, and how they were taken.

    By the kernels' own times ("cupti") where NVIDIA's profiler can be had; else by a loop on the device ("loop"). Slow
    calls by the clock on the wall ("wall").
    """
    compiled = jax.jit(call)
    jax.block_until_ready(compiled(*arguments))
    times = [_wall_s(compiled, arguments) for _ in range(3)]
    if min(times) > _SLOW_S:
        return statistics.median(times), "wall"
    try:
        return _time_kernels(compiled, arguments), "cupti"
    except (ImportError, RuntimeError, TypeError, AttributeError, OSError):
        return time_in_loop(call, arguments), "loop"


def _wall_s(call: Callable[..., jax.Array], arguments: tuple[Any, ...]) -> float:
    started_s = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - started_s


def _time_kernels(call: Callable[..., jax.Array], arguments: tuple[Any, ...]) -> float:
    """The sum of the kernels' times of one call; the first calls are left out."""
    from jax.experimental.mosaic.gpu import profiler

    _, times_ms = profiler.measure(call, iterations=_MANY)(*arguments)
    if not times_ms:
        raise RuntimeError("the profiler saw no kernel")
    return statistics.median(times_ms[2:]) / 1e3


def time_in_loop(call: Callable[..., jax.Array], arguments: tuple[Any, ...]) -> float:
    """What one more turn of a loop costs, in which each call waits for the one before.

    One element of the first argument, the activations, is taken from the last output, which costs a small copy.
    """

    def turns(count: int, first: jax.Array, *rest: Any) -> jax.Array:
        def turn(_: Any, x: jax.Array) -> jax.Array:
            element = call(x, *rest).reshape(-1)[0]
            return x.at[(0,) * x.ndim].set(jnp.where(jnp.isfinite(element), element, 0).astype(x.dtype))

        return jax.lax.fori_loop(0, count, turn, first)

    medians = []
    for count in (_FEW, _MANY):
        program = jax.jit(functools.partial(turns, count)).lower(*arguments).compile()
        jax.block_until_ready(program(*arguments))
        medians.append(statistics.median(_wall_s(program, arguments) for _ in range(_ROUNDS)))
    return max(medians[1] - medians[0], 1e-9) / (_MANY - _FEW)
