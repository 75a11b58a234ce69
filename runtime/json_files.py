"""JSON that decides what is loaded: one object, no key twice, never larger than a header may be."""

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MAX_JSON_BYTES = 100_000_000  # the safetensors format's own limit for a header


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`; `what` names it in errors.

    Raises:
      CheckpointError: not UTF-8, not JSON, a key given twice, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(f"{what}: every key should occur once; {key!r} occurs twice. Remove one of them.")
            result[key] = value
        return result

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: expected JSON; it does not parse ({error}). Fetch the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{what}: expected a JSON object {{...}}; got {type(value).__name__}. Fetch the file again."
        )
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      CheckpointError: the file is not there, is not readable, is too large, or does not hold one JSON object.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a JSON file; there is none. Is this the model's directory?")
        return parse_object(read_bounded(path), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Check its permissions.") from error


def read_bounded(path: Path) -> bytes:
    """A small file whole.

    Raises:
      CheckpointError: it is too large.
      OSError: it cannot be read.
    """
    num_bytes = path.stat().st_size
    if num_bytes > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: expected at most {MAX_JSON_BYTES} bytes; it has {num_bytes}.")
    return path.read_bytes()
