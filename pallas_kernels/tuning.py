"""Tuned sizes of kernels: one JSON file per device kind in each operation's folder, and which chips are alike."""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ..errors import KernelError

Generation = Literal["hopper", "blackwell"]

_CHIPS: Mapping[str, Generation] = {
    "H100": "hopper", "H200": "hopper", "H20": "hopper", "H800": "hopper", "GH200": "hopper",
    "B200": "blackwell", "GB200": "blackwell", "B300": "blackwell", "GB300": "blackwell",
}  # fmt: skip


def generation(device_kind: str) -> Generation | None:
    """The generation of a device that jax names so, as in "NVIDIA H100 80GB HBM3"; None if no kernel knows it."""
    chip = _chip(device_kind)
    return None if chip is None else _CHIPS[chip]


def tuned(operation: str, device_kind: str, key: str) -> Mapping[str, int]:
    """The sizes under `key` in OPERATION/tuning/CHIP.json, where a chip without a file has its generation's.

    Raises KernelError where the file has no such key.
    """
    chip = _chip(device_kind)
    folder = Path(__file__).parent / operation / "tuning"
    names = () if chip is None else (chip.lower(), _CHIPS[chip])
    path = next((path for name in names if (path := folder / f"{name}.json").is_file()), None)
    if path is None:
        raise KernelError(f"{operation} has no tuned sizes for {device_kind!r}: expected {folder}/CHIP.json")
    sizes = _read(path)
    if key not in sizes:
        raise KernelError(f"{path.name} of {operation} has no sizes for {key!r}; it has {', '.join(sizes)}")
    return sizes[key]


def _chip(device_kind: str) -> str | None:
    return next((word for word in re.split(r"[ -]", device_kind) if word in _CHIPS), None)


@functools.cache
def _read(path: Path) -> Mapping[str, Mapping[str, int]]:
    sizes: Mapping[str, Mapping[str, int]] = json.loads(path.read_text(encoding="utf-8"))
    return sizes
