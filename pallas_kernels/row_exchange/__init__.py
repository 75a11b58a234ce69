"""Rows that travel between the devices of a mesh axis, each device sending any number to any other: MoE dispatch."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int32

from ...errors import KernelError
from ..dispatch import Implementation, KernelChoices, Platform, anywhere
from . import dense, ragged, reference
from .segments import segment_rows, starts_of

__all__ = ["TABLE", "RowExchangeProblem", "exchange_rows", "segment_rows", "starts_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowExchangeProblem:
    """What an implementation may be unable to serve."""

    platform: Platform
    num_devices: int
    num_rows: int
    row_dim: int
    dtype: str


TABLE: tuple[Implementation[RowExchangeProblem], ...] = (
    Implementation("ragged", ragged.exchange_rows, ragged.unsupported),
    Implementation("dense", dense.exchange_rows, anywhere),
    Implementation("reference", reference.exchange_rows, anywhere),
)


def exchange_rows(
    rows: Float[Array, "M D"],
    sizes: Int32[Array, "X X"],
    *,
    num_received: int,
    capacity: int,
    axis: str,
    kernels: KernelChoices,
) -> Float[Array, "N D"]:
    """What the devices of a mesh axis send to this one, in the order of the senders; N = num_received.

    Runs under `shard_map`. sizes[a, b] rows, at most `capacity`, go from device a to device b; they lie end to end in
    the order of the receivers. Rows beyond what was received are zeros. With the transposed sizes it brings every row
    back to where it was. Raises KernelError if the shapes disagree or the implementation cannot serve.
    """
    if rows.ndim != 2 or sizes.ndim != 2 or sizes.shape[0] != sizes.shape[1]:
        raise KernelError(f"expected rows [M, D] and sizes [X, X], got {rows.shape} and {sizes.shape}")
    problem = RowExchangeProblem(
        platform=kernels.platform,
        num_devices=sizes.shape[0],
        num_rows=rows.shape[0],
        row_dim=rows.shape[1],
        dtype=rows.dtype.name,
    )
    chosen = kernels.choose("row_exchange", TABLE, problem)
    received: jax.Array = chosen.fn(rows, sizes, num_received=num_received, capacity=capacity, axis=axis)
    return received
