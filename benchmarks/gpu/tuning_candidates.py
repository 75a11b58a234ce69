"""Sizes that kernels.py --tune tries beside the tuned ones: what changes of a case's sizes, each on its own."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

type Change = Mapping[str, Mapping[str, int]]

# Case: the key of its sizes in OPERATION/tuning/CHIP.json, and lists of values that are tried in all combinations.
_GRIDS: Mapping[str, tuple[str, Sequence[Mapping[str, Sequence[int]]]]] = {
    **{f"fp8 {name} M={rows}": ("w8a8_launch", [{"weights": [3]}])
       for name in ("70b_qkv", "70b_gate_up", "8b_qkv") for rows in (64, 1536)},
    "fp8 70b_gate M=1": ("w8a8_8", [{"warpgroups": [1], "stages": [11], "cluster": [1, 2]}]),
    "fp8 70b_gate M=16": ("w8a8_16", [{"warpgroups": [1], "stages": [4], "cluster": [1, 2], "blocks": [264]}]),
    "fp8 70b_gate M=64": ("w8a8_64", [{"cluster": [1]}, {"warpgroups": [1], "stages": [6], "cluster": [1, 2]}]),
    "fp8 70b_down M=64": ("w8a8_64", [{"cluster": [1]}, {"warpgroups": [1], "stages": [6], "cluster": [1, 2]}]),
    "fp8 70b_down M=256": ("w8a8_square", [{"cluster": [1]}, {"panel": [2]}]),
    "fp8 70b_gate M=4096": ("w8a8_wide", [{"stages": [3, 4], "cluster": [1]}, {"panel": [4, 16]}]),
    "int4 70b_gate M=1": ("w4a16_8", [
        {"stages": [3, 4, 5], "ahead": [0, 1]}, {"stages": [8], "blocks": [132]},
        {"warpgroups": [1], "stages": [4], "blocks": [396]},
    ]),
    "int4 70b_gate M=16": ("w4a16_16", [
        {"stages": [3, 4], "ahead": [0, 1]}, {"stages": [6], "blocks": [132]},
        {"warpgroups": [1], "stages": [4], "blocks": [396]},
    ]),
    "int4 70b_gate M=64": ("w4a16_64", [{"ahead": [0, 1], "stages": [2, 3]}, {"cluster": [1]}]),
    "int4 70b_gate M=256": ("w4a16_128", [{"ahead": [0, 1]}, {"stages": [3]}, {"cluster": [1]}]),
    "decode bfloat16 256 x 2k": ("decode_16bit_128", [{"stages": [2, 3, 4], "ctas_per_sm": [2, 3]}]),
    "decode float8_e4m3fn 256 x 2k": ("decode_float8_e4m3fn_128", [{"stages": [2, 3, 4], "ctas_per_sm": [3, 4, 5]}]),
    "decode int8 256 x 2k": ("decode_int8_128", [{"stages": [2, 3, 4], "ctas_per_sm": [3, 4]}]),
    **{f"decode {cache} 4 x 64k": ("split", [{"num_items": [512, 2048]}]) for cache in ("bfloat16", "float8_e4m3fn")},
    **{f"prefill bfloat16 {length}": ("prefill_16bit_128", [
        {"stages": [3]}, {"overlapped": [1]}, {"block_keys": [128], "stages": [2, 3], "overlapped": [0, 1]},
    ]) for length in ("4k", "16k")},
    "gated fp8 70b_down M=1536": ("rows", [{"units": [7]}]),
    "gated fp8 8b_down M=1536": ("rows", [{"units": [2, 7]}]),
}  # fmt: skip


def candidates(case: str) -> Iterator[str]:
    """Changes of a case's sizes as JSON; none where nothing is known to try."""
    if case not in _GRIDS:
        return
    key, grids = _GRIDS[case]
    for grid in grids:
        for values in itertools.product(*grid.values()):
            change: Any = {key: dict(zip(grid, values, strict=True))}
            yield json.dumps(change)
