"""The finite set of step shapes for which programs exist."""

import dataclasses

from ..errors import ProgramError


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """A step shape of one data shard. Decode buckets have one query per row: num_tokens == num_rows."""

    is_decode: bool
    num_tokens: int  # T
    num_rows: int  # B

    def __str__(self) -> str:
        return f"decode of {self.num_rows}" if self.is_decode else f"mixed step of {self.num_tokens} tokens"


def make_buckets(num_slots: int, max_step_tokens: int) -> tuple[Bucket, ...]:
    """Decode buckets of one sequence, and from 8 by 4 up to the slots; mixed ones by 4 up to the tokens of a step."""
    decode = [Bucket(True, rows, rows) for rows in sorted({1, *_grow(min(8, num_slots), num_slots)})]
    mixed = [Bucket(False, tokens, num_slots) for tokens in _grow(min(64, max_step_tokens), max_step_tokens)]
    return (*decode, *mixed)


def _grow(first: int, last: int) -> list[int]:
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(min(4 * sizes[-1], last))
    return sizes


def pick(buckets: tuple[Bucket, ...], is_decode: bool, num_tokens: int) -> Bucket:
    """The smallest bucket that holds a step.

    Raises:
      ProgramError: no bucket does; nothing is compiled after start.
    """
    fitting = [b for b in buckets if b.is_decode == is_decode and b.num_tokens >= num_tokens]
    if not fitting:
        kind = "decode" if is_decode else "mixed"
        raise ProgramError(
            f"no {kind} program holds {num_tokens} tokens a shard; there are: {', '.join(map(str, buckets))}. "
            "Raise num_slots or max_step_tokens."
        )
    return min(fitting, key=lambda b: b.num_tokens)
