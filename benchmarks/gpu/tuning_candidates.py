"""Sizes that kernels.py --tune tries beside the tuned ones: what changes of a case's sizes, each on its own."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

type Change = Mapping[str, Mapping[str, int]]

# Case: the key of its sizes in OPERATION/tuning/CHIP.json, and lists of values that are tried in all combinations.
_GRIDS: Mapping[str, tuple[str, Sequence[Mapping[str, Sequence[int]]]]] = {
    "fp8 70b_gate M=1": ("w8a8_8", [
        {"warpgroups": [1], "stages": [11], "cluster": [1, 4]}, {"warpgroups": [2], "stages": [5], "cluster": [1, 2]},
    ]),
    "fp8 70b_gate M=16": ("w8a8_16", [
        {"warpgroups": [1], "stages": [10], "cluster": [1, 2]}, {"warpgroups": [2], "stages": [5], "cluster": [1, 2]},
        {"warpgroups": [1], "stages": [4], "cluster": [1, 2], "blocks": [264]},
    ]),
    "fp8 70b_gate M=64": ("w8a8_64", [
        {"warpgroups": [2], "stages": [4], "cluster": [1, 2]}, {"warpgroups": [1], "stages": [6], "cluster": [1, 2]},
    ]),
    "fp8 70b_down M=64": ("w8a8_64", [
        {"warpgroups": [2], "stages": [4], "cluster": [1, 2]}, {"warpgroups": [1], "stages": [6], "cluster": [1, 2]},
    ]),
    "fp8 70b_gate M=256": ("w8a8_512", [
        {"n": [128], "stages": [6], "cluster": [1]}, {"n": [256], "stages": [4], "cluster": [1, 2]},
        {"n": [192], "stages": [4], "cluster": [1, 2]}, {"panel": [2, 4]},
    ]),
    "fp8 70b_down M=256": ("w8a8_512", [
        {"n": [128], "stages": [6], "cluster": [1]}, {"n": [256], "stages": [4], "cluster": [1, 2]}, {"panel": [2]},
    ]),
    "fp8 70b_gate M=4096": ("w8a8_wide", [
        {"n": [256], "stages": [3, 4], "cluster": [1]}, {"n": [256], "stages": [4], "panel": [4, 16]},
    ]),
    "int4 70b_gate M=1": ("w4a16_8", [
        {"stages": [3, 4], "cluster": [1, 2], "blocks": [264]},
        {"stages": [8], "cluster": [1, 2], "blocks": [132]},
        {"warpgroups": [1], "stages": [4], "cluster": [1, 2], "blocks": [396]},
    ]),
    "int4 70b_gate M=16": ("w4a16_16", [
        {"stages": [3], "cluster": [1, 2], "blocks": [264]},
        {"stages": [6], "cluster": [1, 2], "blocks": [132]},
        {"warpgroups": [1], "stages": [4], "cluster": [1, 2], "blocks": [264, 396]},
    ]),
    "int4 70b_gate M=64": ("w4a16_64", [
        {"stages": [3], "cluster": [1, 2, 4]},
        {"stages": [3], "pieces": [4], "n_slots": [8], "cluster": [1, 2, 4]},
        {"warpgroups": [1], "stages": [3], "pieces": [4], "n_slots": [6], "cluster": [1, 2], "blocks": [264]},
    ]),
    "int4 70b_gate M=256": ("w4a16_128", [
        {"stages": [3], "cluster": [1, 2]}, {"stages": [2], "n_slots": [7], "cluster": [2]},
        {"warpgroups": [1], "stages": [2], "n_slots": [4], "cluster": [1, 2], "blocks": [264]},
    ]),
    "decode float8_e4m3fn 256 x 2k": ("decode_float8_e4m3fn_128", [
        {"stages": [2], "ctas_per_sm": [3, 4]}, {"stages": [3, 4], "ctas_per_sm": [3]},
    ]),
    "decode float8_e4m3fn 4 x 64k": ("decode_float8_e4m3fn_128", [
        {"max_splits": [16, 32]}, {"stages": [2], "max_splits": [16, 32, 64]},
        {"stages": [4], "ctas_per_sm": [3], "max_splits": [12, 24, 64]},
    ]),
    "decode int8 256 x 2k": ("decode_int8_128", [{"stages": [2, 4], "ctas_per_sm": [3]}]),
    "decode int8 4 x 64k": ("decode_int8_128", [
        {"max_splits": [16, 32]}, {"stages": [2, 4], "ctas_per_sm": [3], "max_splits": [12, 64]},
    ]),
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
