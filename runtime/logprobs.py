"""Log probabilities as users see them: the raw log-softmax in float32, before penalties, bias and temperature."""

from collections.abc import Callable
from typing import Final, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..sharding.rules import RULES, Placement
from .limits import MAX_LOGPROBS

BLOCK_LEN: Final = 64
"""Rows of a prompt whose logits exist at the same time."""


type TopK = Callable[[Array, int], tuple[Array, Array]]  # of the last axis: values and ids, the highest first


class Scores(NamedTuple):
    """How a distribution judged one token per row, and its most likely ones."""

    logprob: Float[Array, " B"]
    rank: Int[Array, " B"]  # 1 + how many tokens are strictly more likely
    top_ids: Int[Array, "B 20"]  # the most likely first, of equal ones the lower id; -1 past the vocabulary
    top_logprobs: Float[Array, "B 20"]


def sharded_top_k(placement: Placement) -> TopK:
    """lax.top_k over a vocabulary that may be sharded: each shard's highest, then the highest of those.

    lax.top_k itself would gather the vocabulary, and the rows of other data shards with it.
    """
    (axis,), num_parts = RULES["vocab"], placement.num_parts("vocab")

    def top_k(logits: Float[Array, "B V"], num: int) -> tuple[Array, Array]:
        def local(part: Array) -> tuple[Array, Array]:
            values, ids = lax.top_k(part, min(num, part.shape[-1]))
            if num_parts == 1:
                return values, ids
            ids += lax.axis_index(axis) * part.shape[-1]
            values, ids = (lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True) for x in (values, ids))
            values, places = lax.top_k(values, num)
            return values, jnp.take_along_axis(ids, places, axis=-1)

        found: tuple[Array, Array] = placement.map_shards(local, [(None, "vocab")], [(None, None), (None, None)])(
            logits
        )
        return found

    return top_k


def score(logits: Float[Array, "B V"], tokens: Int[Array, " B"], top_k: TopK = lax.top_k) -> Scores:
    """The scores of one token per row; those of the token -1 mean nothing."""
    logits = logits.astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    normaliser = top + jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=-1)
    width = min(MAX_LOGPROBS, logits.shape[-1])
    values, ids = top_k(logits, width)
    padding = ((0, 0), (0, MAX_LOGPROBS - width))
    return Scores(
        logprob=(chosen - normaliser)[:, 0],
        rank=1 + jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32),
        top_ids=jnp.pad(ids.astype(jnp.int32), padding, constant_values=-1),
        top_logprobs=jnp.pad(values - normaliser, padding, constant_values=-jnp.inf),
    )


def no_scores(num_rows: int) -> Scores:
    """Zeros, for a step in which nobody asked."""
    return Scores(
        logprob=jnp.zeros((num_rows,), jnp.float32),
        rank=jnp.zeros((num_rows,), jnp.int32),
        top_ids=jnp.zeros((num_rows, MAX_LOGPROBS), jnp.int32),
        top_logprobs=jnp.zeros((num_rows, MAX_LOGPROBS), jnp.float32),
    )


def prompt_logprobs(
    hidden: Float[Array, "T D"],
    logits_of: Callable[[Float[Array, "C D"]], Float[Array, "C V"]],
    targets: Int[Array, " T"],
    wanted: Bool[Array, ""],
    top_k: TopK = lax.top_k,
) -> Scores:
    """The scores [T, ...] of each row's target (the token after it), block by block so that [T, V] never exists.

    wanted: False gives zeros and costs nothing; a target of -1 is scored as no token in particular.
    """
    num_rows = hidden.shape[0]
    block_len = min(BLOCK_LEN, num_rows)
    surplus = -num_rows % block_len

    def blocks(rows: Array) -> Array:
        padded = jnp.pad(rows, ((0, surplus),) + ((0, 0),) * (rows.ndim - 1))
        return padded.reshape(-1, block_len, *rows.shape[1:])

    def all_scores() -> Scores:
        scores = lax.map(lambda block: score(logits_of(block[0]), block[1], top_k), (blocks(hidden), blocks(targets)))
        return Scores(*(x.reshape(-1, *x.shape[2:])[:num_rows] for x in scores))

    scores: Scores = lax.cond(wanted, all_scores, lambda: no_scores(num_rows))
    return scores
