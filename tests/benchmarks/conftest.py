"""Benchmarks are programs beside the package: their folders go where they put them themselves."""

import sys
from pathlib import Path

import pytest

import millrace

_FOLDER = Path(millrace.__file__).parent / "benchmarks"
for folder in (_FOLDER / "gpu", _FOLDER):
    sys.path.insert(0, str(folder))

DUMP = """
Resources(smem_scratch_bytes=229376, tmem_scratch_cols=0, tmem_collective_scratch_cols=0, barrier_counts=Counter(\
{Barrier(arrival_count=2, num_barriers=4, orders_tensor_core=False): 2}), scoped_gmem_semaphores={})

.visible .entry matmul_mosaic_gpu_kernel(
.maxntid 384, 1, 1
ptxas info    : Compiling entry function 'matmul_mosaic_gpu_kernel' for 'sm_90a'
ptxas         .     0 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 158 registers, used 16 barriers, 17 bytes smem
"""


@pytest.fixture
def dump() -> str:
    """What the compilers print about one kernel of 384 threads, 158 registers and eight barriers."""
    return DUMP
