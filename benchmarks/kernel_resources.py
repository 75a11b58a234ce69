"""What the compilers say about a Mosaic GPU kernel, and how many of its thread blocks a multiprocessor holds."""

import dataclasses
import itertools
import re

# Environment in which a process prints what `parse_dump` reads.
DUMP_ENVIRONMENT = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1"}
# Of Hopper and Blackwell (CUDA C++ programming guide, compute capabilities 9.0 to 10.x).
SHARED_BYTES, RESERVED_SHARED_BYTES, REGISTERS, MAX_THREADS, MAX_BLOCKS = 233_472, 1024, 65_536, 2048, 32
TENSOR_MEMORY_COLUMNS = 512
_BARRIER_BYTES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelResources:
    """One compiled kernel; `spill_bytes` are those of stores and loads together."""

    name: str
    threads: int
    registers: int  # of a thread
    spill_bytes: int
    shared_bytes: int  # of a thread block, barriers included
    tensor_memory_columns: int = 0

    @property
    def occupancy(self) -> int:
        """Thread blocks that one multiprocessor holds at once."""
        registers = -(-self.registers // 8) * 8 * self.threads  # given out in eights
        limits = [
            MAX_BLOCKS,
            MAX_THREADS // self.threads,
            REGISTERS // registers,
            SHARED_BYTES // (self.shared_bytes + RESERVED_SHARED_BYTES),
        ]
        if self.tensor_memory_columns:
            limits.append(TENSOR_MEMORY_COLUMNS // self.tensor_memory_columns)
        return min(limits)


def parse_dump(text: str) -> list[KernelResources]:
    """The kernels of one program, of what its process printed under DUMP_ENVIRONMENT while it lowered and compiled it.

    Memory is named when a kernel is lowered, registers when it is compiled: all of the first, then all of the second,
    in one order. Kernels that are alike, as those of k and v, are compiled once.

    Raises:
      ValueError: the compilers said less than they used to; or the process had compiled a kernel before, and now only
        lowered it: nothing says which.
    """
    memory = re.findall(r"^Resources\(.*$", text, re.MULTILINE)
    starts = [match.start() for match in re.finditer(r"^\.visible \.entry ", text, re.MULTILINE)]
    for i in reversed(range(len(memory))):
        if len(memory) > len(starts) and memory[i] in memory[:i]:
            del memory[i]
    if len(memory) != len(starts):
        raise ValueError(f"{len(memory)} kernels were lowered and {len(starts)} compiled; expected one for each")
    compiled = [text[start:end] for start, end in itertools.pairwise([*starts, len(text)])]
    return [_parse_one(*parts) for parts in zip(memory, compiled, strict=True)]


def _parse_one(memory: str, compiled: str) -> KernelResources:
    barriers = sum(int(size) * int(n) for size, n in re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", memory))
    columns = (_number(rf"\btmem_{kind}scratch_cols=(\d+)", memory) for kind in ("", "collective_"))
    name = re.match(r"\.visible \.entry (\w+)", compiled)
    return KernelResources(
        name="" if name is None else name[1].removesuffix("_mosaic_gpu_kernel"),
        threads=_number(r"\.(?:maxntid|reqntid) (\d+)", compiled),
        registers=_number(r"Used (\d+) registers", compiled),
        spill_bytes=sum(_number(rf"(\d+) bytes spill {what}", compiled) for what in ("stores", "loads")),
        shared_bytes=_number(r"smem_scratch_bytes=(\d+)", memory) + barriers * _BARRIER_BYTES,
        tensor_memory_columns=max(columns),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compilers' output should have {pattern}; they print something else now")
    return int(found[1])
