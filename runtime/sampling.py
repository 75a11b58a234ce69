"""From raw logits to one token per row, on the device, without a sort.

bias and allowed ids -> penalties -> bad words -> min tokens -> temperature -> min-p -> top-k -> top-p -> Gumbel noise
-> the highest. Greedy rows (temperature 0) leave after min tokens. Where nothing of this is wanted a step costs one
search for the highest logit: the scalars in Wants choose the work, so they must be the same for all that is vmapped.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from .logprobs import TopK, no_scores, score
from .noise import gumbel, random_bits
from .slot_state import IN_PROMPT, SlotState, rows_of

MIN_TEMPERATURE = np.float32(1e-30)
"""A greedy row (0) in a batch with random ones divides by this, so that no NaN arises where none is meant."""


class SamplingRows(NamedTuple):
    """The sampling parameters of the rows that sample in this step."""

    slots: Int[Array, " B"]
    temperature: Float[Array, " B"]  # 0: greedy
    top_k: Int[Array, " B"]  # 0 or less: all
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]
    repetition: Float[Array, " B"]
    seed_hi: UInt32[Array, " B"]
    seed_lo: UInt32[Array, " B"]
    n_index: Int[Array, " B"]
    min_position: Int[Array, " B"]  # stop ids are masked at positions before it


class Wants(NamedTuple):
    """What any row of the step needs; the host knows, and what nobody needs is skipped."""

    any_random: Bool[Array, ""]  # temperature > 0
    any_top_k: Bool[Array, ""]
    any_top_p: Bool[Array, ""]
    any_biased: Bool[Array, ""]  # logit_bias or allowed ids
    any_penalized: Bool[Array, ""]
    any_bad_words: Bool[Array, ""]
    any_min_tokens: Bool[Array, ""]
    any_logprobs: Bool[Array, ""]


class Sampled(NamedTuple):
    """A token per row and, where any row wants logprobs, its raw scores (else zeros)."""

    tokens: Int[Array, " B"]  # -1: the logits held a NaN or +inf, or every token was masked
    logprob: Float[Array, " B"]
    rank: Int[Array, " B"]
    top_ids: Int[Array, "B 20"]
    top_logprobs: Float[Array, "B 20"]


def sample(
    logits: Float[Array, "B V"],
    state: SlotState,
    rows: SamplingRows,
    positions: Int[Array, " B"],
    wants: Wants,
    top_k: TopK = lax.top_k,
) -> Sampled:
    """Choose the token of each row; positions are the absolute ones of the tokens that are being chosen.

    `top_k` is for their scores, where the vocabulary may be sharded.
    """
    logits = logits.astype(jnp.float32)
    plain = ~(wants.any_random | wants.any_biased | wants.any_penalized | wants.any_bad_words | wants.any_min_tokens)
    tokens = lax.cond(
        plain,
        lambda: _highest(logits)[0],
        lambda: _choose(process_logits(logits, state, rows, positions, wants), rows, positions, wants),
    )
    scores = lax.cond(wants.any_logprobs, lambda: score(logits, tokens, top_k), lambda: no_scores(logits.shape[0]))
    return Sampled(tokens, *scores)


def process_logits(
    logits: Float[Array, "B V"], state: SlotState, rows: SamplingRows, positions: Int[Array, " B"], wants: Wants
) -> Float[Array, "B V"]:
    """Apply what changes even a greedy choice; masked tokens become -inf, and a NaN stays one."""

    def bad_words(x: Array) -> Array:
        return _ban(x, _completions(rows_of(state.bad_words, rows.slots), rows_of(state.recent, rows.slots)))

    def min_tokens(x: Array) -> Array:
        early = (positions < rows.min_position)[:, None]
        return _ban(x, jnp.where(early, rows_of(state.stop_ids, rows.slots), -1))

    steps: tuple[tuple[Array, Callable[[Array], Array]], ...] = (
        (wants.any_biased, lambda x: x + rows_of(state.bias, rows.slots)),
        (wants.any_penalized, lambda x: _penalized(x, rows_of(state.counts, rows.slots), rows)),
        (wants.any_bad_words, bad_words),
        (wants.any_min_tokens, min_tokens),
    )
    for wanted, step in steps:
        logits = lax.cond(wanted, step, lambda x: x, logits)
    return logits


def _penalized(logits: Float[Array, "B V"], counts: Int[Array, "B V"], rows: SamplingRows) -> Float[Array, "B V"]:
    """Repetition over prompt and output, then frequency and presence over the output, as vLLM defines them."""
    repetition = rows.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(counts > 0, repeated, logits)
    generated = counts & (IN_PROMPT - 1)
    return logits - rows.frequency[:, None] * generated - rows.presence[:, None] * (generated > 0)


def _completions(bad_words: Int[Array, "B M W"], recent: Int[Array, "B W"]) -> Int[Array, "B M"]:
    """The last token of each bad word whose other tokens are the sequence's last ones, else -1."""
    before = bad_words[:, :, :-1]
    begun = jnp.all((before < 0) | (before == recent[:, None, 1:]), axis=-1)
    return jnp.where(begun, bad_words[:, :, -1], -1)


def _ban(logits: Float[Array, "B V"], ids: Int[Array, "B I"]) -> Float[Array, "B V"]:
    """Mask these ids (-1: none); by adding -inf, so that a NaN is not hidden."""
    outside = jnp.where(ids < 0, logits.shape[-1], ids)
    masked: Array = jax.vmap(lambda row, banned: row.at[banned].add(-jnp.inf, mode="drop"))(logits, outside)
    return masked


def _choose(
    logits: Float[Array, "B V"], rows: SamplingRows, positions: Int[Array, " B"], wants: Wants
) -> Int[Array, " B"]:
    greedy, top = _highest(logits)

    def random() -> Array:
        # The top is subtracted first: a tiny temperature gives 0 and -inf, never inf - inf.
        scaled = (logits - top[:, None]) / jnp.maximum(rows.temperature, MIN_TEMPERATURE)[:, None]
        likely = scaled >= jnp.log(rows.min_p)[:, None]
        kept = likely & (logits >= _floor(logits, scaled, likely, rows, wants)[:, None])
        bits = random_bits((rows.seed_hi, rows.seed_lo), rows.n_index, positions, logits.shape[-1])
        tokens, _ = _highest(jnp.where(kept, scaled + gumbel(bits), -jnp.inf))
        return jnp.where((rows.temperature > 0) & (greedy >= 0), tokens, greedy)

    tokens: Array = lax.cond(wants.any_random, random, lambda: greedy)
    return tokens


def _highest(logits: Float[Array, "B V"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The first index of the highest value, and that value; -1 where a row has a NaN, +inf, or nothing but -inf.

    Two plain reductions: XLA's argmax is 5 to 10 times slower on a CPU, hides -inf rows, and gathers a sharded
    vocabulary. A CPU's max does not propagate NaN, so the second one looks for it.
    """
    # The values must exist once: computed twice, in two fusions, they could differ in the last bit.
    logits = lax.optimization_barrier(logits)
    top = jnp.max(logits, axis=-1)
    index = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    at_top = jnp.where(logits == top[:, None], index, logits.shape[-1])
    first = jnp.min(jnp.where(jnp.isnan(logits), -1, at_top), axis=-1)
    return jnp.where(jnp.isfinite(top), first, -1), top


def _floor(
    logits: Float[Array, "B V"],
    scaled: Float[Array, "B V"],
    likely: Bool[Array, "B V"],
    rows: SamplingRows,
    wants: Wants,
) -> Float[Array, " B"]:
    """The lowest logit that top-k and then top-p keep: what equals it is kept too, so ties may exceed k.

    top-k keeps what is at least the k-th highest logit. top-p keeps the smallest set of highest logits that holds
    top_p of the probability that min-p and top-k left.
    """
    everything = jnp.full(logits.shape[:1], -jnp.inf)

    def top_k() -> Array:
        num_kept = jnp.where(rows.top_k > 0, rows.top_k, logits.shape[-1])
        return _lowest_kept(logits, lambda kept: jnp.sum(kept, axis=-1, dtype=jnp.int32) >= num_kept)

    def top_p(floor: Array) -> Array:
        weights = jnp.where(likely & (logits >= floor[:, None]), jnp.exp(scaled), 0.0)
        wanted = rows.top_p * jnp.sum(weights, axis=-1)
        lowest = _lowest_kept(logits, lambda kept: jnp.sum(jnp.where(kept, weights, 0.0), axis=-1) >= wanted)
        # At top_p 1 a tail too light to change the rounded sum would be lost, but only beside rows with top_p < 1.
        return jnp.where(rows.top_p < 1, jnp.maximum(floor, lowest), floor)

    floor: Array = lax.cond(wants.any_top_k, top_k, lambda: everything)
    floor = lax.cond(wants.any_top_p, top_p, lambda x: x, floor)
    return floor


def _lowest_kept(
    logits: Float[Array, "B V"], enough: Callable[[Bool[Array, "B V"]], Bool[Array, " B"]]
) -> Float[Array, " B"]:
    """The highest value that is enough to keep from, found exactly, bit by bit, in 32 passes of one reduction."""
    keys = _order_keys(logits)

    def try_bit(i: Array, floor: Array) -> Array:
        candidate = floor | (np.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(keys >= candidate[:, None]), candidate, floor)

    floor = lax.fori_loop(0, 32, try_bit, jnp.zeros(logits.shape[:1], jnp.uint32))
    floor = jnp.maximum(floor, np.uint32(0x007FFFFF))  # the key of -inf; below it are only NaNs
    bits = jnp.where(floor >> 31 == 1, floor & np.uint32(0x7FFFFFFF), ~floor)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _order_keys(values: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Unsigned integers in the order of the floats; -0.0 comes before 0.0."""
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
