"""The arrays of one step as the decoder consumes them."""

from typing import Any, NamedTuple

from jaxtyping import Array, Int


class StepBatch(NamedTuple):
    """Ragged and flat per data shard: the queries of row b are tokens cu_query_lens[b] to cu_query_lens[b + 1].

    Padding tokens have row B, and rows without queries have no keys; page numbers are local to the shard.
    """

    tokens: Int[Array, "R T"]
    positions: Int[Array, "R T"]
    rows: Int[Array, "R T"]
    page_tables: Int[Array, "R B pages_per_slot"]
    cu_query_lens: Int[Array, "R B+1"]
    kv_lens: Int[Array, "R B"]


_AXES: dict[str, Any] = {
    "tokens": ("shard", "tokens"),
    "positions": ("shard", "tokens"),
    "rows": ("shard", "tokens"),
    "page_tables": ("shard", "slots", None),
    "cu_query_lens": ("shard", "slots"),
    "kv_lens": ("shard", "slots"),
}
BATCH_AXES = StepBatch(**_AXES)  # logical axes in the place of arrays
