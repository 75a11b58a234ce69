"""One array of a store as TensorStore sees it, by the same settings whether it is read or written."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorstore

from ..errors import CheckpointError
from ..sharding.specs import Region
from .store_format import ArrayEntry, array_key, zarr_metadata
from .store_root import StoreRoot, io_context, remedy


def open_array(root: StoreRoot, path: str, entry: ArrayEntry) -> Any:
    """The array; nothing is read, for its entry says all that TensorStore wants to know.

    Raises:
      CheckpointError: it cannot be opened.
    """
    spec = {
        "driver": "zarr3",
        "kvstore": (root.keys / array_key(path, "")).spec(retain_context=False).to_json(),
        "metadata": zarr_metadata(entry.shape, entry.dtype, entry.chunk_shape),
        "fill_missing_data_reads": False,  # a missing chunk is an error, not zeros
        "store_data_equal_to_fill_value": True,  # so zeros are no missing chunk
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }
    try:
        return tensorstore.open(spec, open=True, assume_metadata=True, context=io_context()).result()
    except ValueError as error:
        raise CheckpointError(f"{root.url}: {path} cannot be opened ({error}). {remedy(error)}") from error


def read_sha256(
    root: StoreRoot, path: str, entry: ArrayEntry, on_bytes: Callable[[int], object] = lambda num_bytes: None
) -> str:
    """The SHA-256 of an array's plain bytes as they are stored.

    Raises:
      CheckpointError: names the array, and the first of its regions that cannot be read.
    """
    array = open_array(root, path, entry)
    digest = hashlib.sha256()
    for region in entry.slabs():
        try:
            values = np.asarray(array[region].read(order="C").result())
        except (ValueError, OSError) as error:
            raise unreadable(root, path, region, error) from error
        digest.update(values.reshape(-1).view(np.uint8).data)
        on_bytes(values.nbytes)
    return digest.hexdigest()


def unreadable(root: StoreRoot, path: str, region: Region, error: Exception) -> CheckpointError:
    """What went wrong with a region of an array, as an error that names both."""
    spans = (str(part.start) if part.stop == part.start + 1 else f"{part.start}:{part.stop}" for part in region)
    return CheckpointError(f"{root.url}: {path}[{', '.join(spans)}] cannot be read ({error}). {remedy(error)}")


def region_shape(region: Region) -> tuple[int, ...]:
    """The shape of what a region holds."""
    return tuple(part.stop - part.start for part in region)
