"""CPU kernels in C++, called through jax.ffi: compiled on first use by the compiler that is here, kept in the cache.

An implementation's `unsupported` begins with `unavailable()`, and its calls name one of `library().instruction_sets`
in an attribute, so that programs of two instruction sets are never taken for each other.
"""

import ctypes
import dataclasses
import platform
import threading
from pathlib import Path

from ...errors import NativeError
from .build import built_library
from .compiler import INSTRUCTION_SETS

__all__ = ["Library", "library", "unavailable"]

ARCHITECTURES = ("x86_64", "AMD64", "amd64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Library:
    """The library, loaded, its targets registered with XLA."""

    path: Path
    compiler: str  # that it was built with
    instruction_sets: tuple[str, ...]  # that may be used here, best first: some of amx, avx512_bf16, ..., avx2
    left_out: tuple[str, ...]  # sets that this CPU has and that are not used, each with its reason
    targets: tuple[str, ...]  # of jax.ffi.ffi_call


class _Target(ctypes.Structure):
    """targets.h"""


_Target._fields_ = [("name", ctypes.c_char_p), ("handler", ctypes.c_void_p), ("next", ctypes.POINTER(_Target))]

_lock = threading.Lock()
_outcome: list[Library | str] = []  # one, once it was tried: the library, or why there is none


def library(*, show_progress: bool = False) -> Library:
    """The library of this process; the first call builds it where the cache has it not.

    Raises:
      NativeError: with the reason for which there is none.
    """
    with _lock:
        if not _outcome:
            try:
                _outcome.append(_load(show_progress))
            except NativeError as error:
                _outcome.append(str(error))
        (outcome,) = _outcome
    if isinstance(outcome, str):
        raise NativeError(outcome)
    return outcome


def unavailable(*, show_progress: bool = False) -> str | None:
    """Why there is no library, None where there is one; the first call of either builds it."""
    try:
        library(show_progress=show_progress)
    except NativeError as error:
        return str(error)
    return None


def _load(show_progress: bool) -> Library:
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise NativeError(f"the native kernels are for x86-64 CPUs; this one is {machine}, which XLA serves.")
    built = built_library(show_progress=show_progress)
    try:
        opened = ctypes.CDLL(str(built.path))
    except OSError as error:
        raise NativeError(f"{built.path} cannot be loaded ({error}). Remove its folder to build it again.") from error
    of_cpu, usable = _instruction_sets(opened)
    if not usable:
        raise NativeError(
            "this CPU, or its operating system, has no AVX2 (with FMA and F16C), which the native kernels need."
        )
    reasons = {True: "the operating system does not allow it", False: "the compiler does not know it"}
    left_out = tuple(f"{name}: {reasons[name in built.known_sets]}" for name in of_cpu if name not in usable)
    return Library(
        path=built.path,
        compiler=built.compiler,
        instruction_sets=usable,
        left_out=left_out,
        targets=_register(opened),
    )


def _instruction_sets(opened: ctypes.CDLL) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sets that the CPU has, and those that may be used; best first."""
    of_cpu, usable = ctypes.c_uint32(), ctypes.c_uint32()
    opened.millrace_instruction_sets(ctypes.byref(of_cpu), ctypes.byref(usable))

    def names(bits: int) -> tuple[str, ...]:
        return tuple(name for number, name in enumerate(INSTRUCTION_SETS) if bits >> number & 1)[::-1]

    return names(of_cpu.value), names(usable.value)


def _register(opened: ctypes.CDLL) -> tuple[str, ...]:
    """Make the library's targets known to XLA; their names."""
    import jax.ffi

    opened.millrace_first_target.restype = ctypes.POINTER(_Target)
    target, names = opened.millrace_first_target(), []
    while target:
        name = target.contents.name.decode()
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(target.contents.handler), platform="cpu")
        names.append(name)
        target = target.contents.next
    return tuple(sorted(names))
