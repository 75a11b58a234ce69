"""What one step computes: numpy and host objects only, frozen once the scheduler has decided."""

import dataclasses

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
    chunks: tuple[Chunk, ...]
    page_tables: np.ndarray  # [decoding + chunks, pages_per_slot]

    @property
    def num_tokens(self) -> int:
        """Query tokens of one pass."""
        return len(self.decoding) + sum(chunk.num_tokens for chunk in self.chunks)

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


@dataclasses.dataclass(slots=True)  # not frozen: a thousand are made in every step, and freezing doubles the cost
class Progress:
    """What one committed step brought a sequence: rows [first, first + len(tokens)) of the step's outputs."""

    sequence: Sequence
    tokens: tuple[int, ...]
    shard: int
    row: int
    chunk: Chunk | None = None  # its prompt logprobs stand at these tokens of the step
    first_token: int = 0  # of the chunk, among the shard's tokens
