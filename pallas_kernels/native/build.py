"""Builds the library from this folder's C++, once, into a folder of the cache, and finds it there afterwards.

    SOURCES-COMPILER/millrace.so    SOURCES: a digest of all that goes into it; COMPILER: of what the compiler is
    SOURCES-COMPILER/built.json     the compiler, the instruction sets that it knew, and the library's SHA-256

A folder gets its name when all of it is written. Processes that build at once take turns, and the later ones find what
the first has built. A library that was damaged is built again; those that were used least recently are removed.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...errors import NativeError
from .compiler import (
    FLAGS,
    INSTRUCTION_SETS,
    WARNINGS,
    Compiler,
    compiled_sources,
    definitions,
    find_compiler,
    set_flags,
    set_of,
)

SOURCES = Path(__file__).parent
CACHE_DIR = Path("~/.cache/millrace/native")
LIBRARY_FILE = "millrace.so"
_RECORD_FILE = "built.json"
_LOCK_FILE = "lock"
_UNFINISHED = "unfinished-"
_NUM_KEPT = 16  # libraries; each has a megabyte or two
_MAX_AT_ONCE = 8  # compilers, each with some hundred megabytes
_SILENT_S = 2.0  # what is built faster needs no words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """A library of the cache, as good as when it was built."""

    path: Path
    compiler: str  # the first line of its version
    known_sets: tuple[str, ...]  # instruction sets that it had flags for, least first


def built_library(*, show_progress: bool) -> Built:
    """The library of these sources, from the cache or from the compiler; says on stderr when that takes long.

    Without a compiler one that was built here before still serves.

    Raises:
      NativeError: there is no compiler, it fails, or the cache cannot be written.
    """
    cache = CACHE_DIR.expanduser()
    sources = sources_digest()
    try:
        compiler = find_compiler()
    except NativeError:
        for folder in sorted(cache.glob(f"{sources}-*")):
            if (found := _open(folder)) is not None:
                return found
        raise
    folder = cache / f"{sources}-{hashlib.sha256(compiler.version.encode()).hexdigest()[:8]}"
    if (found := _open(folder)) is not None:
        return found
    try:
        with _exclusively(cache, show_progress):
            if (found := _open(folder)) is None:
                found = _build(compiler, folder, show_progress)
                _prune(cache, folder)
            return found
    except OSError as error:
        raise NativeError(f"the cache {cache} cannot be written ({error}). Mend its permissions.") from error


def sources_digest() -> str:
    """A digest of all that a library is made of but the compiler: sources, flags, XLA's headers, architecture."""
    total = hashlib.sha256(repr((FLAGS, INSTRUCTION_SETS, platform.machine(), sys.platform)).encode())
    for path in [*source_files(), *sorted(Path(include_dir()).rglob("*.h"))]:
        total.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def source_files() -> list[Path]:
    """The C++ of this folder, headers included."""
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".cc", ".h"))


def include_dir() -> str:
    """Where XLA's FFI headers are."""
    import jax.ffi

    return jax.ffi.include_dir()


def compile_command(source: Path, output: Path, known_sets: tuple[str, ...], flags: tuple[str, ...] = ()) -> list[str]:
    """The arguments that compile one file; `flags` go behind the usual ones."""
    includes = ["-isystem", include_dir(), "-iquote", str(SOURCES)]
    own = [*FLAGS, *WARNINGS, *set_flags(set_of(source)), *definitions(known_sets), *flags]
    return [*own, *includes, "-c", str(source), "-o", str(output)]


def _open(folder: Path) -> Built | None:
    """What a folder of the cache holds; None where there is none, or it is damaged."""
    try:
        record = json.loads((folder / _RECORD_FILE).read_text())
        content = (folder / LIBRARY_FILE).read_bytes()
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            return None
        built = Built(
            path=folder / LIBRARY_FILE, compiler=str(record["compiler"]), known_sets=tuple(record["known_sets"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)  # when it was used last
    return built


@contextlib.contextmanager
def _exclusively(cache: Path, show_progress: bool) -> Iterator[None]:
    """Hold the cache's lock, which a process that dies lets go."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / _LOCK_FILE, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if show_progress:
                _say("another process builds the CPU kernels; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(compiler: Compiler, folder: Path, show_progress: bool) -> Built:
    """Compile, each file in a process of its own, link, and give the folder its name."""
    known_sets = compiler.known_sets()
    sources = compiled_sources(SOURCES, known_sets)
    words = f"building the CPU kernels, once, in {folder} ({len(sources)} files, {compiler.path}) ..."
    timer = threading.Timer(_SILENT_S, _say, [words])
    timer.daemon = True
    if show_progress:
        timer.start()
    place = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder.parent))
    try:
        objects = [place / f"{source.stem}.o" for source in sources]
        commands = [compile_command(*pair, known_sets) for pair in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(min(_MAX_AT_ONCE, os.cpu_count() or 1)) as pool:
            list(pool.map(compiler.run, commands))
        compiler.run(["-shared", "-pthread", *map(str, objects), "-o", str(place / LIBRARY_FILE)])
        for path in objects:
            path.unlink()
        digest = hashlib.sha256((place / LIBRARY_FILE).read_bytes()).hexdigest()
        record = {"compiler": compiler.name, "known_sets": known_sets, "sha256": digest}
        (place / _RECORD_FILE).write_text(json.dumps(record) + "\n")
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or it would not be built
        place.rename(folder)
    finally:
        timer.cancel()
        shutil.rmtree(place, ignore_errors=True)
    return Built(path=folder / LIBRARY_FILE, compiler=compiler.name, known_sets=known_sets)


def _prune(cache: Path, built: Path) -> None:
    """Remove what killed builds left, and all libraries but those that were used last. With the lock held."""
    folders = [path for path in cache.iterdir() if path.is_dir() and path != built]
    unfinished = [path for path in folders if path.name.startswith(_UNFINISHED)]
    finished = sorted(set(folders) - set(unfinished), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in [*unfinished, *finished[_NUM_KEPT - 1 :]]:
        shutil.rmtree(path, ignore_errors=True)


def _say(words: str) -> None:
    print(f"millrace: {words}", file=sys.stderr, flush=True)
