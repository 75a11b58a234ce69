"""What sampling remembers per slot: it lives on the device from step to step and is donated to every program.

Pure functions without the data shard axis R; programs vmap them over it.
"""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .limits import MAX_BAD_WORD_LEN, MAX_BAD_WORDS, MAX_EOS_IDS, MAX_STOP_TOKEN_IDS

RECENT_LEN: Final = MAX_BAD_WORD_LEN
"""Tokens of a sequence that a slot remembers."""
MAX_STOP_IDS: Final = MAX_STOP_TOKEN_IDS + MAX_EOS_IDS
"""A request's stop_token_ids and the model's end of sequence ids."""
IN_PROMPT: Final = 1 << 30
"""Bit of a count that says: the token is in the prompt. The bits below it count how often it was generated."""


class SlotState(NamedTuple):
    """The sampling state of S slots; without the leading S, the state of one."""

    last_tokens: Int[Array, "*S"]
    counts: Int[Array, "*S V"]  # times generated, plus IN_PROMPT
    bias: Float[Array, "*S V"]  # logit_bias; -inf where a token is not allowed
    recent: Int[Array, "*S W"]  # the last tokens of the sequence, right aligned, -1 before its start
    bad_words: Int[Array, "*S M W"]  # each right aligned after -1s; all -1: none
    stop_ids: Int[Array, "*S E"]  # the ids that end the sequence, then -1s


def empty_slots(num_slots: int, vocab_len: int) -> SlotState:
    """The state of slots that nobody holds."""
    return SlotState(
        last_tokens=jnp.zeros((num_slots,), jnp.int32),
        counts=jnp.zeros((num_slots, vocab_len), jnp.int32),
        bias=jnp.zeros((num_slots, vocab_len), jnp.float32),
        recent=jnp.full((num_slots, RECENT_LEN), -1, jnp.int32),
        bad_words=jnp.full((num_slots, MAX_BAD_WORDS, RECENT_LEN), -1, jnp.int32),
        stop_ids=jnp.full((num_slots, MAX_STOP_IDS), -1, jnp.int32),
    )


def slot_row(
    vocab_len: int,
    *,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int] = (),
    logit_bias: Mapping[int, float] | None = None,
    allowed_ids: Sequence[int] | None = None,
    bad_words: Sequence[Sequence[int]] = (),
    stop_ids: Sequence[int] = (),
) -> SlotState:
    """One slot's state in numpy, on the host, for a request whose ids and lengths were validated.

    output_ids: what the sequence had generated before it was preempted. allowed_ids None: all.
    """
    assert len(bad_words) <= MAX_BAD_WORDS and len(stop_ids) <= MAX_STOP_IDS
    known = [*prompt_ids, *output_ids]
    counts = np.bincount(np.asarray(output_ids, np.int64), minlength=vocab_len).astype(np.int32)
    counts[np.asarray(prompt_ids, np.int64)] |= IN_PROMPT
    bias = np.zeros((vocab_len,), np.float32)
    if allowed_ids is not None:
        bias[:] = -np.inf
        bias[np.asarray(allowed_ids, np.int64)] = 0.0
    for token, amount in (logit_bias or {}).items():
        bias[token] += amount
    words = [_right_aligned(word) for word in bad_words]
    words += [_right_aligned(())] * (MAX_BAD_WORDS - len(words))
    ends = np.full((MAX_STOP_IDS,), -1, np.int32)
    ends[: len(stop_ids)] = stop_ids
    return SlotState(
        last_tokens=np.asarray(known[-1], np.int32),  # type: ignore[arg-type]  # numpy in the place of device arrays
        counts=counts,  # type: ignore[arg-type]
        bias=bias,  # type: ignore[arg-type]
        recent=_right_aligned(known[-RECENT_LEN:]),  # type: ignore[arg-type]
        bad_words=np.stack(words),  # type: ignore[arg-type]
        stop_ids=ends,  # type: ignore[arg-type]
    )


def _right_aligned(ids: Sequence[int]) -> np.ndarray:
    assert len(ids) <= RECENT_LEN
    row = np.full((RECENT_LEN,), -1, np.int32)
    row[RECENT_LEN - len(ids) :] = ids
    return row


def install(state: SlotState, slot: Int[Array, ""], row: SlotState) -> SlotState:
    """Write one slot's row when a sequence is admitted; a slot out of range (S: another shard's) writes nothing."""
    return SlotState(*(slots.at[slot].set(one, mode="drop") for slots, one in zip(state, row, strict=True)))


def record(state: SlotState, slots: Int[Array, " B"], tokens: Int[Array, " B"], active: Bool[Array, " B"]) -> SlotState:
    """Append each active row's token to its slot; a slot occurs at most once, and the token -1 is not recorded."""
    num_slots = state.last_tokens.shape[0]
    target = jnp.where(active & (tokens >= 0), slots, num_slots)
    recent = jnp.concatenate([rows_of(state.recent, slots)[:, 1:], tokens[:, None]], axis=1)
    return state._replace(
        last_tokens=state.last_tokens.at[target].set(tokens, mode="drop"),
        counts=state.counts.at[target, tokens].add(1, mode="drop"),
        recent=state.recent.at[target].set(recent, mode="drop"),
    )


def rows_of(array: Array, slots: Int[Array, " B"]) -> Array:
    """The rows [B, ...] of these slots; a slot out of range (a padding row) reads the last one."""
    return jnp.take(array, slots, axis=0, mode="clip")
