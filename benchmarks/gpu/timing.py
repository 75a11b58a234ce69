"""How long a function takes on the GPU, without the host's part."""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

_FEW, _MANY = 4, 20
_ROUNDS = 5
_SLOW_S = 0.02  # a call that takes so long hides the host's part behind it, and is not made many times


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one call: median seconds, how they were taken, and the share of each kernel, where it is known."""

    seconds: float
    taken_by: str
    kernels_us: dict[str, float]


def time_call(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Timing:
    """The time of `call(*arguments)`, which may be compiled already.

    By the kernels' own times ("cupti") where NVIDIA's profiler can be had; else by what one more call in a queue of
    them adds ("queue"), which for very short ones is the host's time. Slow calls by the clock on the wall ("wall").
    """
    compiled = call if isinstance(call, jax.stages.Compiled) else jax.jit(call).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    times = [_queue_s(compiled, arguments, 1) for _ in range(3)]
    if min(times) > _SLOW_S:
        return Timing(statistics.median(times), "wall", {})
    if jax.default_backend() != "cpu":
        try:
            return _time_kernels(compiled, arguments)
        except Exception as error:  # whatever keeps CUPTI from being loaded
            print(f"no times of kernels: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    few, many = (statistics.median(_queue_s(compiled, arguments, n) for _ in range(_ROUNDS)) for n in (_FEW, _MANY))
    return Timing(max(many - few, 1e-9) / (_MANY - _FEW), "queue", {})


def _queue_s(call: Callable[..., Any], arguments: tuple[Any, ...], count: int) -> float:
    started_s = time.perf_counter()
    outputs = [call(*arguments) for _ in range(count)]
    jax.block_until_ready(outputs)
    return time.perf_counter() - started_s


def _time_kernels(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Timing:
    """The kernels' times of one call, medians; the first calls are left out."""
    from jax.experimental.mosaic.gpu import profiler

    _, calls = profiler.measure(call, aggregate=False, iterations=_MANY)(*arguments)
    if not calls:
        raise RuntimeError("the profiler saw no kernel")
    names = [name for name, _ in calls[0]]
    medians = [statistics.median(one[i][1] for one in calls[2:]) for i in range(len(names))]
    kernels_us: dict[str, float] = {}
    for name, ms in zip(names, medians, strict=True):
        kernels_us[name] = kernels_us.get(name, 0.0) + 1e3 * ms
    return Timing(sum(medians) / 1e3, "cupti", kernels_us)
