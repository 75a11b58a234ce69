"""Sampling against its definitions in plain numpy. Two programs are compiled for the whole file: 256 rows, and one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace.runtime.sampling import SamplingRows, Wants, process_logits, sample
from millrace.runtime.slot_state import empty_slots, install, record, slot_row

ROWS, SLOTS, VOCAB = 256, 4, 24
LOGITS = np.random.default_rng(3).normal(size=VOCAB).astype(np.float32)
NOTHING = np.float32(-np.inf)

run = jax.jit(sample)
run_process = jax.jit(process_logits)


def make_rows(num_rows=ROWS, **values):
    """Sampling parameters that change nothing, but for these values."""
    neutral = {"top_p": 1.0, "repetition": 1.0}
    rows = SamplingRows(*(values.get(name, neutral.get(name, 0)) for name in SamplingRows._fields))
    integers = {"slots", "top_k", "n_index", "min_position"}
    types = [np.int32 if n in integers else np.uint32 if "seed" in n else np.float32 for n in SamplingRows._fields]
    return SamplingRows(*(np.broadcast_to(np.asarray(v, t), num_rows) for v, t in zip(rows, types, strict=True)))


def wants_of(rows, *more):
    wanted = {
        "any_random": (rows.temperature > 0).any(),
        "any_top_k": (rows.top_k > 0).any(),
        "any_top_p": (rows.top_p < 1).any(),
    } | dict.fromkeys(more, True)
    return Wants(*(np.bool_(wanted.get(name, False)) for name in Wants._fields))


@functools.cache
def slots():
    return empty_slots(SLOTS, VOCAB)


def draw(logits, rows, *more, positions=None, state=None):
    """Tokens of one step, as numpy; the same logits for all rows if there is one row of them."""
    num_rows = len(rows.slots)
    logits = np.broadcast_to(np.asarray(logits, np.float32), (num_rows, VOCAB))
    positions = np.arange(num_rows, dtype=np.int32) if positions is None else positions
    return run(logits, slots() if state is None else state, rows, positions, wants_of(rows, *more))


def many_tokens(logits, rows, steps=20):
    """Every row of every step at a position of its own: steps * ROWS independent draws."""
    positions = np.arange(steps * ROWS, dtype=np.int32).reshape(steps, ROWS)
    return np.concatenate([draw(logits, rows, positions=p).tokens for p in positions])


@dataclasses.dataclass(frozen=True)
class Filter:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def probabilities(self, logits):
        """The definition, in float64 with a sort."""
        p = np.exp((logits.astype(np.float64) - logits.max()) / self.temperature)
        p[p < self.min_p * p.max()] = 0
        if self.top_k:
            p[logits < np.sort(logits)[-self.top_k :].min()] = 0
        falling = np.sort(p / p.sum())[::-1]
        last = np.flatnonzero(np.cumsum(falling) >= self.top_p - 1e-12)[0]
        p[p / p.sum() < falling[last] * (1 - 1e-9)] = 0
        return p / p.sum()


FILTERS = [
    Filter(top_k=1),
    Filter(top_k=5),
    Filter(top_k=VOCAB),
    Filter(top_k=VOCAB + 1000),
    Filter(top_p=0.01),
    Filter(top_p=0.5),
    Filter(top_p=0.9, temperature=2.0),
    Filter(min_p=0.2),
    Filter(min_p=1.0),
    Filter(min_p=0.1, temperature=0.5),
    Filter(top_k=8, top_p=0.7),
    Filter(top_k=10, top_p=0.8, min_p=0.3, temperature=1.5),
]


@pytest.mark.parametrize("filter", FILTERS, ids=str)
def test_what_is_sampled_is_exactly_what_the_filters_keep(filter):
    tokens = many_tokens(LOGITS, make_rows(**dataclasses.asdict(filter), seed_lo=11))
    assert set(tokens.tolist()) == set(np.flatnonzero(filter.probabilities(LOGITS)).tolist())


@pytest.mark.parametrize("filter", [Filter(), Filter(temperature=0.6), Filter(top_k=8, top_p=0.8)], ids=str)
def test_tokens_are_distributed_as_the_softmax(filter):
    tokens = many_tokens(LOGITS, make_rows(**dataclasses.asdict(filter), seed_hi=5, seed_lo=6), steps=60)
    expected = filter.probabilities(LOGITS) * len(tokens)
    seen = np.bincount(tokens, minlength=VOCAB)[expected > 0]
    expected = expected[expected > 0]
    degrees = len(expected) - 1
    assert ((seen - expected) ** 2 / expected).sum() < degrees + 4 * np.sqrt(2 * degrees)


def test_rows_with_different_filters_share_a_batch():
    rows = make_rows(
        temperature=np.arange(ROWS) % 4 != 0,
        top_k=np.where(np.arange(ROWS) % 4 == 1, 2, 0),
        top_p=np.where(np.arange(ROWS) % 4 == 2, 0.3, 1.0),
    )
    kind = np.tile(np.arange(4), 60 * ROWS // 4)
    tokens = many_tokens(LOGITS, rows, steps=60)
    kept = [Filter(top_k=1), Filter(top_k=2), Filter(top_p=0.3), Filter()]
    for number, filter in enumerate(kept):
        assert set(tokens[kind == number]) == set(np.flatnonzero(filter.probabilities(LOGITS)))


def test_ties_with_the_last_kept_logit_are_kept():
    logits = np.full(VOCAB, -3.0)
    logits[[2, 9, 17]] = 1.0
    assert set(many_tokens(logits, make_rows(temperature=1.0, top_k=2), steps=2)) == {2, 9, 17}
    assert set(many_tokens(logits, make_rows(temperature=1.0, top_p=0.4), steps=2)) == {2, 9, 17}


def test_top_k_tells_neighbouring_floats_apart_and_takes_both_zeros_as_one():
    rows = make_rows(temperature=1.0, top_k=1)
    for best in (1.0, -1.0, 3e37, -3e37):
        logits = np.full(VOCAB, np.nextafter(np.float32(best), NOTHING))
        logits[7] = best
        assert set(many_tokens(logits, rows, steps=1)) == {7}
    logits = np.full(VOCAB, -1e-30, np.float32)
    logits[[4, 5]] = 0.0, -0.0
    assert set(many_tokens(logits, rows, steps=1)) == {4, 5}


def test_a_greedy_row_takes_the_first_of_the_highest():
    logits = LOGITS.copy()
    logits[[6, 20]] = logits.max() + 1
    assert set(draw(logits, make_rows()).tokens.tolist()) == {6}


@pytest.mark.parametrize("temperature", [1e-38, 1e-20, 1e-6])
def test_a_tiny_temperature_is_greedy_and_finite(temperature):
    logits = LOGITS * np.float32(1e30)
    tokens = draw(logits, make_rows(temperature=temperature)).tokens
    assert set(tokens.tolist()) == {int(LOGITS.argmax())}


def test_a_row_alone_samples_what_it_samples_among_others():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(ROWS, VOCAB)).astype(np.float32)
    positions = rng.integers(0, 1000, ROWS).astype(np.int32)
    rows = make_rows(
        temperature=rng.choice([0.0, 0.7, 1.0], ROWS),
        top_k=rng.choice([0, 3, 8], ROWS),
        top_p=rng.choice([0.5, 0.9, 1.0], ROWS),
        min_p=rng.choice([0.0, 0.1], ROWS),
        seed_hi=rng.integers(0, 2**32, ROWS, np.uint32),
        seed_lo=rng.integers(0, 2**32, ROWS, np.uint32),
        n_index=rng.integers(0, 4, ROWS),
        slots=rng.integers(0, SLOTS, ROWS),
    )
    together = draw(logits, rows, positions=positions).tokens
    order = rng.permutation(ROWS)
    shuffled = draw(logits[order], SamplingRows(*(x[order] for x in rows)), positions=positions[order]).tokens
    np.testing.assert_array_equal(shuffled, together[order])
    for row in range(32):
        one = SamplingRows(*(x[row : row + 1] for x in rows))
        assert draw(logits[row], one, positions=positions[row : row + 1]).tokens[0] == together[row]


@pytest.mark.parametrize("change", [{"seed_hi": 1}, {"seed_lo": 2**32 - 1}, {"n_index": 1}, {"positions": 1}], ids=str)
def test_tokens_depend_on_seed_both_halves_n_index_and_position(change):
    rows = make_rows(temperature=1.0)
    base = draw(np.zeros(VOCAB), rows).tokens
    np.testing.assert_array_equal(draw(np.zeros(VOCAB), rows).tokens, base)
    positions = np.arange(ROWS, dtype=np.int32) + 1000 * change.get("positions", 0)
    change = {name: value for name, value in change.items() if name != "positions"}
    other = draw(np.zeros(VOCAB), make_rows(temperature=1.0, **change), positions=positions).tokens
    assert (np.asarray(other) == base).mean() < 0.2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_row_gives_minus_one_and_its_neighbours_their_tokens(temperature):
    logits = np.tile(LOGITS, (ROWS, 1))
    rows = make_rows(temperature=temperature, top_k=4)
    expected = np.array(draw(logits, rows).tokens)
    logits[0, 0], logits[3, 12], logits[5, VOCAB - 1] = np.nan, np.nan, np.nan
    logits[7], logits[9, 4], logits[11] = -np.inf, np.inf, np.nan
    expected[[0, 3, 5, 7, 9, 11]] = -1
    np.testing.assert_array_equal(draw(logits, rows).tokens, expected)


def test_a_nan_is_not_hidden_by_a_mask():
    row = slot_row(VOCAB, prompt_ids=[1], allowed_ids=[5, 6], bad_words=[[2]], stop_ids=[3])
    state = install(slots(), 0, row)
    logits = np.tile(LOGITS, (ROWS, 1))
    logits[[0, 1, 2], [9, 2, 3]] = np.nan
    masks = ("any_biased", "any_bad_words", "any_min_tokens", "any_penalized")
    for temperature in (0.0, 1.0):
        rows = make_rows(temperature=temperature, min_position=10_000)
        tokens = np.asarray(draw(logits, rows, *masks, state=state).tokens)
        assert (tokens[:3] == -1).all() and set(tokens[3:]) <= {5, 6}


def test_a_row_whose_every_token_is_masked_gives_minus_one():
    state = install(slots(), 0, slot_row(VOCAB, prompt_ids=[1], allowed_ids=[5], stop_ids=[5]))
    rows = make_rows(temperature=1.0, min_position=np.arange(ROWS) * 2)
    tokens = draw(LOGITS, rows, "any_biased", "any_min_tokens", state=state).tokens
    assert tokens.tolist() == [5] + [-1] * (ROWS - 1)


def processed(state, *wanted, positions=100, **values):
    """LOGITS of the slots 0 .. 3 in the first four rows, after process_logits."""
    rows = make_rows(slots=np.arange(ROWS) % SLOTS, **values)
    logits = np.broadcast_to(LOGITS, (ROWS, VOCAB))
    at = np.full(ROWS, positions, np.int32)
    return np.asarray(run_process(logits, state, rows, at, wants_of(rows, *wanted)))[:SLOTS]


def test_nothing_wanted_changes_nothing():
    np.testing.assert_array_equal(processed(slots(), repetition=2.0), np.tile(LOGITS, (SLOTS, 1)))


def test_penalties_follow_their_definitions():
    prompt, output = [1, 2, 3, 3], [3, 4, 4, 4, 5]
    state = install(slots(), 1, slot_row(VOCAB, prompt_ids=prompt, output_ids=output))
    found = processed(state, "any_penalized", repetition=1.3, frequency=0.25, presence=-0.5)
    expected = LOGITS.astype(np.float64)
    for token in set(prompt + output):
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token in set(output):
        expected[token] -= 0.25 * output.count(token) - 0.5
    np.testing.assert_allclose(found[1], expected, rtol=1e-6)
    np.testing.assert_array_equal(found[[0, 2, 3]], np.tile(LOGITS, (3, 1)))


def test_neutral_penalties_change_no_bit():
    state = install(slots(), 1, slot_row(VOCAB, prompt_ids=[1, 2], output_ids=[2, 3]))
    np.testing.assert_array_equal(processed(state, "any_penalized"), np.tile(LOGITS, (SLOTS, 1)))


def test_bias_is_added_and_only_allowed_ids_stay():
    state = install(slots(), 0, slot_row(VOCAB, prompt_ids=[1], logit_bias={3: 7.5, VOCAB - 1: -100.0}))
    state = install(state, 2, slot_row(VOCAB, prompt_ids=[1], logit_bias={3: 1.0, 4: 1.0}, allowed_ids=[4, 8]))
    found = processed(state, "any_biased")
    expected = np.tile(LOGITS, (SLOTS, 1))
    expected[0, [3, VOCAB - 1]] += [7.5, -100.0]
    expected[2] = -np.inf
    expected[2, [4, 8]] = LOGITS[[4, 8]] + [1, 0]
    np.testing.assert_array_equal(found, expected)


def test_a_bad_word_is_banned_where_its_last_token_would_complete_it():
    bad_words = [[9], [5, 10], [4, 5, 11], [3, 5, 12], [5, 5, 13], [1, 2, 3, 4, 5, 14]]
    for slot, prompt in enumerate([[3, 4, 5], [1, 2, 3, 4, 5], [5], [4, 5, 6]]):
        state = install(slots(), slot, slot_row(VOCAB, prompt_ids=prompt, bad_words=bad_words))
        banned = np.flatnonzero(np.isneginf(processed(state, "any_bad_words")[slot]))
        assert banned.tolist() == [[9, 10, 11], [9, 10, 11, 14], [9, 10], [9]][slot]


def test_a_bad_word_is_followed_through_recorded_tokens():
    state = install(slots(), 2, slot_row(VOCAB, prompt_ids=[1], bad_words=[[6, 7, 8]]))
    for token, is_banned in ((6, False), (7, True), (7, False)):
        state = record(state, jnp.asarray([2]), jnp.asarray([token]), jnp.asarray([True]))
        assert np.isneginf(processed(state, "any_bad_words")[2, 8]) == is_banned


def test_stop_ids_are_masked_before_min_position_only():
    state = install(slots(), 3, slot_row(VOCAB, prompt_ids=[1], stop_ids=[0, 21]))
    for position, banned in ((19, [0, 21]), (20, []), (21, [])):
        found = processed(state, "any_min_tokens", positions=position, min_position=20)
        assert np.flatnonzero(np.isneginf(found[3])).tolist() == banned
        assert np.isfinite(found[:3]).all()


def test_scores_are_of_the_raw_logits_whatever_was_changed():
    state = install(slots(), 0, slot_row(VOCAB, prompt_ids=[1], allowed_ids=[5, 6], logit_bias={5: 100.0}))
    found = draw(LOGITS, make_rows(temperature=0.5), "any_biased", "any_logprobs", state=state)
    assert set(found.tokens.tolist()) == {5}
    exact = LOGITS.astype(np.float64) - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    np.testing.assert_allclose(found.logprob, exact[5], atol=1e-5)
    assert (found.rank == 1 + (LOGITS > LOGITS[5]).sum()).all()
    np.testing.assert_array_equal(found.top_ids[0], np.argsort(-LOGITS)[:20])
    np.testing.assert_allclose(found.top_logprobs[0], np.sort(exact)[::-1][:20], atol=1e-5)


def test_scores_are_zeros_where_nobody_wants_them():
    assert not any(np.any(x) for x in draw(LOGITS, make_rows(temperature=1.0))[1:])


def test_the_step_under_vmap_still_skips_and_never_copies_the_state():
    def step(logits, state, rows, positions, wants):
        found = sample(logits, state, rows, positions, wants)
        return found, record(state, rows.slots, found.tokens, positions >= 0)

    num_rows, num_slots, vocab_len = 4, 256, 1024
    inputs = (
        jax.ShapeDtypeStruct((num_rows, vocab_len), jnp.float32),
        jax.eval_shape(lambda: empty_slots(num_slots, vocab_len)),
        jax.eval_shape(lambda: make_rows(num_rows)),
        jax.ShapeDtypeStruct((num_rows,), jnp.int32),
    )
    sharded = [jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), tree) for tree in inputs]
    wants = Wants(*(jax.ShapeDtypeStruct((), jnp.bool_) for _ in Wants._fields))
    program = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, 0, None)), donate_argnums=1).lower(*sharded, wants).compile()
    state_bytes = sum(x.size * x.dtype.itemsize for x in inputs[1])
    assert program.memory_analysis().alias_size_in_bytes >= state_bytes
    assert program.memory_analysis().temp_size_in_bytes < 8 * num_rows * vocab_len * 4
    assert program.as_text().count(" conditional(") == len(Wants._fields) + 1
