"""Where a store lies: a directory or any key-value URL that TensorStore opens, read and written in one way."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import tensorstore

from ..errors import CheckpointError

ANSWER_S = 20.0  # a URL that says nothing for so long is taken for dead
STALL_S = 120.0  # and so is one that was asked for a chunk
_FILES_AT_ONCE = 32  # each is synced to the disk by itself: more of them share the waiting
_SIGNS_OF_DAMAGE = ("is missing", "is damaged", "DATA_LOSS", "Not enough data")
_RETRIES = {"max_retries": 2, "initial_delay": "200ms", "max_delay": "1s"}


@functools.cache
def io_context() -> tensorstore.Context:
    """TensorStore's settings: files mapped into memory, and networks that fail in seconds.

    The stores of one process share it, so that what one writes to memory:// another finds there.
    """
    schemes = ("http_request_retries", "gcs_request_retries", "s3_request_retries")
    files = {"file_io_mode": {"mode": "memmap"}, "file_io_concurrency": {"limit": _FILES_AT_ONCE}}
    return tensorstore.Context(files | dict.fromkeys(schemes, _RETRIES))


@dataclasses.dataclass(frozen=True)
class StoreRoot:
    """The place of a store; keys are paths below it. Errors name the URL, what failed, and what would mend it."""

    url: str  # as errors show it: a local folder as its path
    folder: Path | None  # where the URL is a local folder
    keys: tensorstore.KvStore

    def read(self, names: Iterable[str]) -> dict[str, bytes | None]:
        """The contents by name, all read at once; None where there is no such key."""
        pending = {name: self.keys.read(name) for name in names}
        found: dict[str, bytes | None] = {}
        for name, future in pending.items():
            with self._named_errors(f"{name} cannot be read"):
                result = future.result(timeout=ANSWER_S)
            found[name] = result.value if result.state == "value" else None
        return found

    def write(self, name: str, content: bytes) -> None:
        """Replace one key, atomically."""
        with self._named_errors(f"{name} cannot be written"):
            self.keys.write(name, content).result()

    def read_stamped(self, name: str) -> tuple[bytes | None, bytes]:
        """A key's content, None where there is none, and its generation, which `write_if` compares with."""
        with self._named_errors(f"{name} cannot be read"):
            result = self.keys.read(name).result(timeout=ANSWER_S)
        return result.value if result.state == "value" else None, result.stamp.generation

    def write_if(self, generation: bytes, name: str, content: bytes) -> bytes | None:
        """Replace one key if nobody else did since; its new generation, or None."""
        with self._named_errors(f"{name} cannot be written"):
            stamp = self.keys.write(name, content, if_equal=generation).result()
        return stamp.generation or None

    def delete(self, names: Iterable[str]) -> None:
        """Remove keys, those that exist."""
        with self._named_errors("files cannot be removed"):
            if self.folder is not None:  # TensorStore would not touch its own lock files
                for name in names:
                    (self.folder / name).unlink(missing_ok=True)
                return
            for future in [self.keys.write(name, None) for name in names]:
                future.result()

    def list(self) -> frozenset[str] | None:
        """Every key, TensorStore's own lock files among them; None where the server (http) keeps no list."""
        if self.folder is not None:
            files = (Path(base) / name for base, _, names in os.walk(self.folder) for name in names)
            return frozenset(file.relative_to(self.folder).as_posix() for file in files)
        if self.url.startswith(("http:", "https:")):
            return None
        with self._named_errors("its keys cannot be listed"):
            return frozenset(key.decode() for key in self.keys.list().result())

    @contextlib.contextmanager
    def _named_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise CheckpointError(
                f"{self.url}: {what}: no answer within {ANSWER_S:.0f} s. Check the URL and the network."
            ) from error
        except (ValueError, OSError, NotImplementedError) as error:  # the last: http takes no writes
            raise CheckpointError(f"{self.url}: {what} ({error}). {remedy(error)}") from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether this is an error of TensorStore, or the system, for want of room."""
    return any(cause in str(error) for cause in ("RESOURCE_EXHAUSTED", "No space left", "Disk quota"))


def remedy(error: Exception) -> str:
    """What mends an input or output error: the system's, of a chunk's file, or TensorStore's one for all."""
    text = str(error)
    if "PERMISSION_DENIED" in text or "Permission denied" in text:
        return "Check its permissions."
    if is_disk_full(error):
        return "The disk is full: make room and run it again."
    if any(sign in text for sign in _SIGNS_OF_DAMAGE):
        return "It was damaged or removed after it was saved: fetch the store or convert the model again."
    return "Check that the place can be reached."


def is_url(place: Path | str) -> bool:
    """Whether this is a URL rather than a path."""
    return isinstance(place, str) and "://" in place


def open_root(place: Path | str) -> StoreRoot:
    """The root at a path or URL; nothing is read yet.

    Raises:
      CheckpointError: TensorStore does not know such URLs.
    """
    spec: str | dict[str, str]
    if is_url(place):
        spec = f"{str(place).rstrip('/')}/"
    else:
        spec = {"driver": "file", "path": f"{os.path.abspath(Path(place).expanduser())}/"}
    try:
        keys = tensorstore.KvStore.open(spec, context=io_context()).result(timeout=ANSWER_S)
    except (ValueError, TimeoutError) as error:
        raise CheckpointError(
            f"{place}: expected a directory or a URL such as file://, gs://, s3:// or https:// ({error})."
        ) from error
    folder = Path(keys.path) if keys.url.startswith("file:") else None
    return StoreRoot(str(folder or keys.url.rstrip("/")), folder, keys)
