"""A runtime's sizes for a command that knows how much it will ask: fewer programs, and a cache of fewer slots.

A start compiles or loads a program for each bucket, and fills the cache with zeros. Sizes come from few steps, so that
one command finds the programs that another left.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .prompts import Prompt

_NUM_SLOTS = (1, 8)
_STEP_TOKENS = (64, 256)
# What makes other sizes than the defaults the user's business, or an artifact's.
_DECIDED = ("config", "set", "artifact", "num_slots", "max_step_tokens")


def fitted(values: Mapping[str, Any], num_sequences: int, num_tokens: int | None = None) -> Mapping[str, Any]:
    """The flags with `num_slots`, and `max_step_tokens` for prompts of `num_tokens` in all, where none chose sizes."""
    if any(values.get(name) for name in _DECIDED):
        return values
    num_slots = next((size for size in _NUM_SLOTS if size >= num_sequences), None)
    if num_slots is None:
        return values
    step_tokens = next((size for size in _STEP_TOKENS if num_tokens is not None and size >= num_tokens), None)
    return {**values, "num_slots": str(num_slots), "max_step_tokens": step_tokens and str(step_tokens)}


def most_tokens(prompts: Sequence[Prompt]) -> int:
    """An estimate from above of the prompts' tokens; a longer prompt is computed in more steps."""
    return sum(1 + len(prompt.encode(errors="replace") if isinstance(prompt, str) else prompt) for prompt in prompts)
