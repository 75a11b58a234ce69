"""Where something can be written."""

import tempfile
from pathlib import Path


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written in `folder`, or in the nearest folder above it that exists; None where it can."""
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return error.strerror or str(error)
