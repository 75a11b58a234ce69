"""What one step computes: numpy and host objects only, frozen once the scheduler has decided."""

import dataclasses
from collections.abc import Sequence as Items

import numpy as np

from .sequence import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Known tokens `start` to `start + num_tokens` of a sequence; the last one's logits are sampled if `samples`."""

    sequence: Sequence
    slot: int
    start: int
    num_tokens: int
    samples: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One data shard's part. Rows of the step are the decoding slots, in order, then the chunks."""

    decoding: tuple[Sequence, ...]
    slots: np.ndarray  # [decoding]
    positions: np.ndarray  # [decoding] of the token that is fed in: the one that the slot sampled last
    budgets: np.ndarray  # [decoding] tokens to sample in this step, at most StepPlan.num_steps
    is_last: np.ndarray  # [decoding] whether its length ends it with this step
    chunks: tuple[Chunk, ...]
    page_tables: np.ndarray  # [decoding + chunks, pages of the longest sequence with a slot]

    @property
    def num_tokens(self) -> int:
        """Query tokens of one pass."""
        num_tokens = len(self.decoding)
        return num_tokens + sum(chunk.num_tokens for chunk in self.chunks) if self.chunks else num_tokens

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return len(self.decoding) + len(self.chunks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One dispatch: `num_steps` decode steps, or one step in which chunks and decodes are mixed."""

    shards: tuple[ShardPlan, ...]
    num_steps: int
    admitted: tuple[Sequence, ...]  # their slots' sampling state is installed before the step

    @property
    def is_decode(self) -> bool:
        """Whether every row has one query."""
        return not any(shard.chunks for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Query tokens of the fullest shard: what the bucket must hold."""
        return max(shard.num_tokens for shard in self.shards)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What a committed step brought: one object for all rows, of which there may be a thousand."""

    plan: StepPlan
    tokens: tuple[list[tuple[int, ...] | None], ...]  # by shard and row, those that count; None: it had ended before
    ended: tuple[Sequence, ...]  # because of these tokens


def numbered(counts: Items[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """i and 0 ... counts[i] - 1 for each i: of rows of shards, an index of arrays [R, B, ...]."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
