"""Paged attention on Blackwell: Hopper's kernels, whose products tcgen05 makes in tensor memory.

Schedule: that of hopper_decode and hopper_prefill, with the same blocks of 64 keys; all that differs is `product_of`
(hopper_tiles). A product of 64 rows comes back from tensor memory in just the layout that wgmma leaves in registers, so
masks, softmax and output are the same. Columns are taken in halves, which their swizzle may not cross: decode pads the
heads of a KV head to 32, and keys lie in lines of 64 bytes for prefill.
Decode reads pages: 54 KB per SM and microsecond, of which three CTAs of an SM have 64 KB and more in flight.
Prefill is bound by its products, each waited for, at 64 of the 128 rows that tcgen05 could take: two CTAs of one
consumer on an SM cover one another's waits. That is far from the chip's peak; tiles of 128 rows with two softmax
warpgroups in turn are what would reach it, once there is a chip to tune them on.

Operands: as there. A product is waited for before its result is used; it is read out of tensor memory before any
thread of the warpgroup passes the barrier `loaded`, behind which the next product may overwrite it.
"""

from . import hopper
from .contract import PagedAttentionProblem

MAX_GROUPS = 32
paged_attention = hopper.paged_attention  # it asks the device kind


def unsupported(problem: PagedAttentionProblem) -> str | None:
    """Why these kernels cannot serve a problem."""
    if problem.head_dim % 32:
        return f"half of a head dimension must fill lines of 32 bytes, which {problem.head_dim} does not"
    num_groups = problem.num_heads // problem.num_kv_heads
    if num_groups > MAX_GROUPS:
        return f"at most {MAX_GROUPS} heads may share a KV head before registers spill, not {num_groups}"
    return hopper.unsupported(problem)
