"""The process that compiles, checks and times kernels for kernels.py, which starts several of them side by side.

They compile at the same time; on the GPU they are one at a time, behind a lock. One that holds it for long has a
kernel that never ends: it ends itself.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import Case, implementations
from timing import time_call

from millrace.pallas_kernels import tuning
from millrace.pallas_kernels.dispatch import KernelChoices

ENDLESS_S = 20.0  # what is run on the GPU at a time takes less
_REPEATS = 3
CHOSEN = "chosen"  # the implementation that a runtime takes


class Unit(NamedTuple):
    """A case, an implementation, and what is changed of its tuned sizes: JSON of {key: {size: value}}, or ""."""

    case: str
    implementation: str
    change: str = ""


class Gpu:
    """The GPU, which is used by one process at a time; the lock's file holds the bandwidth of a copy."""

    def __init__(self, lock: Path) -> None:
        self._lock = lock

    @contextlib.contextmanager
    def alone(self, limit_s: float = ENDLESS_S) -> Iterator[Any]:
        """The lock's file; the process ends if it takes longer than `limit_s`."""
        with self._lock.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            watch = threading.Timer(limit_s, _end)
            watch.daemon = True
            watch.start()
            try:
                yield file
            finally:
                watch.cancel()

    def copy_bytes_per_s(self) -> float:
        """Bytes a second, read and written together, of copying 1 GiB; measured by the first that asks."""
        with self.alone() as file:
            file.seek(0)
            if not (text := file.read()):
                text = str(copy_bandwidth(2**29 if jax.default_backend() != "cpu" else 2**20))
                file.write(text)
                file.flush()
        return float(text)


def copy_bandwidth(size: int) -> float:
    """Bytes a second, read and written together, of copying so many bfloat16, one copy after the other."""
    x, y = (jnp.full(size, value, jnp.bfloat16) for value in (1, 2))
    copy = jax.jit(lambda y, x: y.at[:].set(x), donate_argnums=0)
    seconds = []
    for _ in range(3):
        for count in (1, 11):
            jax.block_until_ready(y)
            started_s = time.perf_counter()
            for _ in range(count):
                y = copy(y, x)
            jax.block_until_ready(y)
            seconds.append(time.perf_counter() - started_s)
    return 10 * 2 * x.nbytes / (min(seconds[1::2]) - min(seconds[::2]))


def _end() -> None:
    say({"row": {"error": "it did not end"}})
    os._exit(1)


class Worker:
    """Runs units one after the other and says what it found, a line of JSON each."""

    def __init__(self, known: Sequence[Case], lock: Path) -> None:
        device = jax.devices()[0]
        self._gpu = Gpu(lock)
        self._known = {case.name: case for case in known}
        self._platform = "cpu" if device.platform == "cpu" else "gpu"
        self._kind = device.device_kind
        self._truths: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def run(self, units: Sequence[Unit]) -> None:
        """Say hello, then for each unit that it begins, and what it found."""
        say({"hello": {"device": self._kind, "copy_bytes_per_s": self._gpu.copy_bytes_per_s()}})
        for unit in units:
            case = self._known[unit.case]
            name = self._serving(case, unit.implementation)
            if name is None:
                continue
            say({"begin": list(unit)})
            try:
                row = {"implementation": name, **self._measure(case, unit._replace(implementation=name))}
            except Exception as error:
                say({"row": {"error": f"{type(error).__name__}: {str(error)[:300]}"}})
                jnp.zeros(()).block_until_ready()  # a device that failed fails again, which ends this process
            else:
                say({"row": row})
        say({"done": True})

    def _serving(self, case: Case, name: str) -> str | None:
        """The implementation of that name, or the one that is CHOSEN; None if it does not serve the case."""
        if self._platform == "cpu":
            return name
        serving = [entry for entry, reason in implementations(case, self._kind).items() if reason is None]
        if name == CHOSEN:
            return serving[0]
        return name if name in serving else None

    def _measure(self, case: Case, unit: Unit) -> dict[str, Any]:
        make, compute = self._truth(case)
        call = self._compile(case, unit)
        with self._gpu.alone():
            arguments = make(jax.random.key(7))
            expected = compute(*arguments)
            outputs = [call(*arguments) for _ in range(_REPEATS)]
            pairs = zip(jax.tree.leaves(outputs[0]), jax.tree.leaves(expected), strict=True)
            found = max((compare(*pair, case.tolerance) for pair in pairs), key=lambda each: each.difference)
            repeats = all(_are_equal(outputs[0], output) for output in outputs[1:])
            del outputs, expected
            timing = time_call(call, arguments)
        return {
            "us": 1e6 * timing.seconds,
            **dataclasses.asdict(found),
            "repeats": repeats,
            "bytes_per_s": case.moved_bytes() / timing.seconds,
            "tflops": case.flops / timing.seconds / 1e12,
            "timed_by": timing.taken_by,
            "kernels_us": {name: round(us, 2) for name, us in timing.kernels_us.items()},
        }

    def _truth(self, case: Case) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What makes a case's arguments, and what computes what it should give; nothing is tried out for speed."""
        if case.name not in self._truths:
            self._truths.clear()
            plain = {} if self._platform == "cpu" else {"xla_gpu_autotune_level": 0}
            make = jax.jit(case.arguments).lower(jax.random.key(7)).compile(plain)
            named = {"quantized_matmul": "reference", case.operation: truth(case)}
            call = functools.partial(case.call, KernelChoices(self._platform, named, device_kind=self._kind))
            self._truths[case.name] = make, jax.jit(call).lower(*case.shapes()).compile(plain)
        return self._truths[case.name]

    def _compile(self, case: Case, unit: Unit) -> Callable[..., Any]:
        call = functools.partial(case.call, self._choices(case, unit.implementation))
        with changed_sizes(json.loads(unit.change or "{}")):
            lowered = jax.jit(call).lower(*case.shapes())
        if unit.implementation not in ("xla", "reference"):
            return lowered.compile()
        with self._gpu.alone(limit_s=3 * ENDLESS_S):  # XLA tries its kernels out
            return lowered.compile()

    def _choices(self, case: Case, name: str) -> KernelChoices:
        return KernelChoices(self._platform, {case.operation: name}, device_kind=self._kind)


@contextlib.contextmanager
def changed_sizes(change: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Tuned sizes with some of them changed."""
    read = tuning._read
    with mock.patch.object(
        tuning, "_read", lambda path: {key: {**sizes, **change.get(key, {})} for key, sizes in read(path).items()}
    ):
        yield


def truth(case: Case) -> str:
    """What a case is compared with: the reference gathers all keys for each query, which prompts do not allow."""
    if case.operation == "gated_matmul":
        return "apart"
    return "xla" if case.operation == "paged_attention" and not case.is_decode else "reference"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The largest difference as a share of the largest value, infinite where either is not a number."""

    difference: float
    agrees: bool
    wrong: str = ""  # where it does not agree: how much of it, and where


def compare(output: jax.Array, expected: jax.Array, tolerance: float) -> Comparison:
    """On the device, but for a wrong output, which is looked at here."""
    apart, greatest = _apart(output, expected)
    difference = float(apart) / max(float(greatest), 1e-30)
    if difference <= tolerance:
        return Comparison(difference, True)
    found, right = (np.asarray(x.astype(jnp.float32)) for x in (output, expected))
    is_wrong = ~(np.abs(found - right) <= tolerance * np.abs(right[np.isfinite(right)]).max(initial=0.0))
    first = np.unravel_index(int(is_wrong.argmax()), is_wrong.shape)
    places = [
        np.flatnonzero(is_wrong.any(axis=tuple(a for a in range(found.ndim) if a != axis)))
        for axis in range(found.ndim)
    ]
    described = "; ".join(
        f"axis {axis}: {len(at)} of {found.shape[axis]}, {at[:6].tolist()}" for axis, at in enumerate(places)
    )
    return Comparison(
        difference if np.isfinite(difference) else float("inf"), False,
        f"{is_wrong.mean():.3%} wrong, {(~np.isfinite(found)).mean():.3%} not finite ({described}); "
        f"at {[int(i) for i in first]} {found[first]:.5g} and not {right[first]:.5g}",
    )  # fmt: skip


def _are_equal(one: Any, other: Any) -> bool:
    """In all of their arrays."""
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), one, other)))


@jax.jit
def _apart(output: jax.Array, expected: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest difference, infinite where there is none, and the largest value."""
    apart = jnp.abs(output.astype(jnp.float32) - expected.astype(jnp.float32))
    return jnp.where(jnp.isfinite(apart), apart, jnp.inf).max(), jnp.abs(expected.astype(jnp.float32)).max()


def say(what: Mapping[str, Any]) -> None:
    """One line for the process that waits."""
    print(json.dumps(what), flush=True)
