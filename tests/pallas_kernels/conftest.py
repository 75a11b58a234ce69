"""What the chip does and interpret mode does not."""

import dataclasses
from typing import Any

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from millrace.pallas_kernels.mosaic import TILED_ROWS


@pytest.fixture
def tma_of_tiled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """TMA into tiled shared memory begins at whole tiles of rows, here at the one before; interpret mode at any row."""
    copy = plgpu.copy_gmem_to_smem

    def copy_whole_tiles(source: Any, target: Any, barrier: Any, **options: Any) -> None:
        *before, index = source.transforms
        if len(index.indices) > 1:  # vectors are not tiled
            *first, rows, columns = index.indices
            rows = dataclasses.replace(rows, start=rows.start // TILED_ROWS * TILED_ROWS)
            index = dataclasses.replace(index, indices=(*first, rows, columns))
        copy(dataclasses.replace(source, transforms=(*before, index)), target, barrier, **options)

    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", copy_whole_tiles)
