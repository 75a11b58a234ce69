"""The C++ compiler: which one there is, which instruction sets it knows, and the flags of a file by its name."""

import dataclasses
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ...errors import NativeError

CANDIDATES = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-pthread")
# GCC's own headers of AVX-512 have vectors that they leave undefined on purpose, about which it warns (its bug 105593).
WARNINGS = ("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
# By the end of a file's name, from the least to the best: each has the flags of those before it too, as every CPU that
# has one has those before it. instruction_sets.h has a bit for each, in this order.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "avx512_vnni": ("-mavx512vnni",),
    "avx512_bf16": ("-mavx512bf16",),
    "amx": ("-mamx-tile", "-mamx-int8", "-mamx-bf16"),
}
_LIMIT_S = 900.0  # of one file: a compiler that hangs must not hang a start
_SHOWN_LINES = 12  # of a compiler's complaints


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A compiler on the PATH; `version` is all that it says of itself."""

    path: str
    version: str

    @property
    def name(self) -> str:
        """The first line of its version."""
        return self.version.partition("\n")[0]

    def knows(self, flags: Sequence[str]) -> bool:
        """Whether it takes these flags."""
        command = [self.path, *flags, "-fsyntax-only", "-x", "c++", "/dev/null"]
        return _run(command).returncode == 0

    def known_sets(self) -> tuple[str, ...]:
        """The instruction sets that it has flags for, up to the first that it has not."""
        known: list[str] = []
        for name in INSTRUCTION_SETS:
            if not self.knows(set_flags(name)):
                break
            known.append(name)
        return tuple(known)

    def run(self, arguments: Sequence[str]) -> None:
        """Raises NativeError with the command and its first error, or the last lines that it wrote."""
        command = [self.path, *arguments]
        done = _run(command)
        if done.returncode:
            first, *more = _complaint(done)
            raise NativeError("\n".join([f"the C++ compiler failed: {first}", " ".join(command), *more]))


def find_compiler() -> Compiler:
    """The first of CANDIDATES on the PATH.

    Raises:
      NativeError: there is none, or it does not start.
    """
    path = next(filter(None, map(shutil.which, CANDIDATES)), None)
    if path is None:
        raise NativeError(
            f"there is no C++ compiler on the PATH (looked for {', '.join(CANDIDATES)}). Install one: apt-get install "
            "g++, dnf install gcc-c++, or xcode-select --install."
        )
    done = _run([path, "--version"])
    if done.returncode:
        raise NativeError(f"the C++ compiler {path} does not start: {done.stdout.strip()}. Mend it or install another.")
    return Compiler(path, done.stdout.strip())


def set_of(source: Path) -> str | None:
    """The instruction set that a file is compiled for, by its name; None for any CPU."""
    return next((name for name in reversed(INSTRUCTION_SETS) if source.stem.endswith(f"_{name}")), None)


def set_flags(name: str | None) -> list[str]:
    """The flags of an instruction set: its own and those of all before it; none for any CPU."""
    flags: list[str] = []
    for other, own in INSTRUCTION_SETS.items() if name is not None else ():
        flags += own
        if other == name:
            break
    return flags


def definitions(known_sets: Sequence[str]) -> list[str]:
    """What tells the sources which sets the compiler knows."""
    return [f"-DMILLRACE_HAS_{name.upper()}" for name in known_sets]


def compiled_sources(folder: Path, known_sets: Sequence[str]) -> list[Path]:
    """The files that this compiler can compile, those for any CPU first, then by instruction set.

    The order matters: of an inline function that several files hold, linkers keep the first, which must run wherever
    any of them does.
    """
    ranks = {name: rank for rank, name in enumerate((None, *known_sets))}
    sources = [path for path in folder.glob("*.cc") if set_of(path) in ranks]
    return sorted(sources, key=lambda path: (ranks[set_of(path)], path.name))


def _complaint(done: "subprocess.CompletedProcess[str]") -> list[str]:
    """The lines from the first error on, or the last ones."""
    lines = done.stdout.strip().splitlines()
    first = next((number for number, line in enumerate(lines) if "error" in line), -_SHOWN_LINES)
    return lines[first:][:_SHOWN_LINES] or [f"exit code {done.returncode}"]


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", check=False, timeout=_LIMIT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{' '.join(command)} cannot be run: {error}") from error
