"""Who may write a store, and how far a writer got: what makes conversions resumable, and safe side by side.

The journal is a file of the store until its manifest is there. It names what the store is made of and every finished
array, and is replaced after each. Writers of one local folder take turns by a lock on a file in it; elsewhere a writer
that finds that another one replaced the journal gives up.
"""

import contextlib
import dataclasses
import fcntl
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json_files import parse_object
from .store_format import FORMAT_VERSION, JOURNAL_FILE, LOCK_FILE, MANIFEST_FILE, to_json
from .store_root import StoreRoot

_JOURNAL_FORMAT = "millrace-conversion"


def is_lock(name: str) -> bool:
    """Whether a file is a lock of TensorStore's own, which a killed writer leaves."""
    return name.endswith(".__lock")


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a store is made of: equal origins make equal stores."""

    source: Mapping[str, str | None]  # name, revision, fingerprint; without a fingerprint nothing is ever resumed
    dtype: str
    quantization: Mapping[str, Any] | None = None  # as config.json will have it


class Journal:
    """A claim on a store's root, and the SHA-256 of each array that is finished; threads may share it."""

    def __init__(self, root: StoreRoot, origin: Origin, finished: dict[str, str], generation: bytes) -> None:
        self._root = root
        self._origin = origin
        self._generation = generation
        self._lock = threading.Lock()
        self.finished = finished
        self._replace()

    def note(self, path: str, sha256: str) -> None:
        """One more array is finished.

        Raises:
          CheckpointError: another writer has taken over.
        """
        with self._lock:
            self.finished[path] = sha256
            self._replace()

    def still_stands(self) -> bool:
        """Whether no other writer has taken over."""
        return self._root.read_stamped(JOURNAL_FILE)[1] == self._generation

    def _replace(self) -> None:
        # The process makes it differ from an equal journal of another writer.
        content = {**_head(self._origin), "arrays": self.finished, "process": f"{os.uname().nodename} {os.getpid()}"}
        generation = self._root.write_if(self._generation, JOURNAL_FILE, to_json(content))
        if generation is None:
            raise CheckpointError(
                f"{self._root.url}: another process is converting into it. Wait until it is done, or choose another "
                "destination."
            )
        self._generation = generation


def is_finished(root: StoreRoot, origin: Origin) -> bool:
    """Whether the root holds a whole store of this origin.

    Raises:
      CheckpointError: it holds a store of another origin, or of another format.
    """
    content = root.read([MANIFEST_FILE])[MANIFEST_FILE]
    if content is None:
        return False
    found = parse_object(content, f"{root.url}/{MANIFEST_FILE}")
    is_same = (found.get("version"), *_kind(found)) == (FORMAT_VERSION, *_kind(_head(origin)))
    if not is_same or origin.source.get("fingerprint") is None:
        raise CheckpointError(
            f"{root.url}: expected a new or empty place, or this conversion's own; it holds a store already, of "
            f"{_named(*_kind(found))}, where {_named(*_kind(_head(origin)))} should go. Choose another destination, or "
            "remove it."
        )
    return True


def open_journal(root: StoreRoot, origin: Origin) -> Journal:
    """The journal of a root that holds nothing, or an interrupted conversion of the same origin.

    Raises:
      CheckpointError: it holds something else.
    """
    content, generation = root.read_stamped(JOURNAL_FILE)
    if content is None:
        names = root.list() or ()
        others = [name for name in names if name != LOCK_FILE and not is_lock(name)]
        if others:
            raise CheckpointError(
                f"{root.url}: a store is written to a new or empty place; this one holds something: "
                f"{sorted(others)[:3]}. Choose another destination."
            )
        return Journal(root, origin, {}, generation)
    journal = parse_object(content, f"{root.url}/{JOURNAL_FILE}")
    is_resumable = origin.source.get("fingerprint") is not None
    is_locked = root.folder is not None  # so whoever wrote this journal is gone
    if {key: journal.get(key) for key in _head(origin)} != _head(origin) or not (is_resumable or is_locked):
        raise CheckpointError(
            f"{root.url}: expected a new or empty place, or this conversion's own; it holds an interrupted conversion "
            f"of {_named(*_kind(journal))}, where {_named(*_kind(_head(origin)))} should go. Choose another "
            "destination, or remove it."
        )
    return Journal(root, origin, dict(journal.get("arrays", {})) if is_resumable else {}, generation)


def _kind(found: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Source, dtype and quantization, as a manifest or a journal has them."""
    return found.get("source"), found.get("dtype"), found.get("quantization")


def _named(source: Any, dtype: Any, quantization: Any) -> str:
    """For people; the fingerprint tells apart what has one name."""
    name, revision, mark = (source.get(key) for key in ("name", "revision", "fingerprint")) if source else (None,) * 3
    quantized = f", quantized as {quantization}" if quantization else ""
    return f"{name} (revision {revision or 'none'}, fingerprint {str(mark)[:8]}) in {dtype}{quantized}"


def _head(origin: Origin) -> dict[str, Any]:
    return {
        "format": _JOURNAL_FORMAT,
        "version": FORMAT_VERSION,
        "source": dict(origin.source),
        "dtype": origin.dtype,
        "quantization": None if origin.quantization is None else dict(origin.quantization),
    }


@contextlib.contextmanager
def exclusively(root: StoreRoot) -> Iterator[None]:
    """Hold the lock of a local folder, which is made if it is not there; says so on stderr when it must wait.

    Raises:
      CheckpointError: the folder or the lock cannot be made.
    """
    if root.folder is None:
        yield
        return
    try:
        fd = _locked(root.folder / LOCK_FILE)
    except OSError as error:
        raise CheckpointError(
            f"{root.url}: expected a folder that can be written to ({error}). Mend its permissions, or choose another."
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(root.folder / LOCK_FILE)
        os.close(fd)


def _locked(file: Path) -> int:
    """A descriptor that holds the lock on this very file: whoever held it before has removed its own."""
    is_told = False
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not is_told:
                print(f"millrace: {file.parent} is being written by another process; waiting for it", file=sys.stderr)
                is_told = True
            fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(file).st_ino == os.fstat(fd).st_ino:
                return fd
        os.close(fd)
