import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace.runtime.slot_state import IN_PROMPT, RECENT_LEN, empty_slots, install, record, slot_row

VOCAB, SLOTS = 12, 4


@pytest.fixture(scope="module")
def row():
    return slot_row(
        VOCAB,
        prompt_ids=[3, 4, 3],
        output_ids=[4, 5, 5],
        logit_bias={2: 1.5, 4: -2.0},
        allowed_ids=[2, 4, 5],
        bad_words=[[7], [1, 2]],
        stop_ids=[0, 11],
    )


def test_slot_row_counts_the_output_and_marks_the_prompt(row):
    expected = np.zeros(VOCAB, np.int32)
    expected[[3, 4, 5]] = IN_PROMPT, IN_PROMPT + 1, 2
    np.testing.assert_array_equal(row.counts, expected)


def test_slot_row_adds_bias_to_what_is_allowed(row):
    expected = np.full(VOCAB, -np.inf)
    expected[[2, 4, 5]] = 1.5, -2.0, 0.0
    np.testing.assert_array_equal(row.bias, expected)


def test_slot_row_aligns_sequences_to_the_right(row):
    assert row.last_tokens == 5
    assert row.recent.tolist() == [-1] * (RECENT_LEN - 6) + [3, 4, 3, 4, 5, 5]
    assert row.bad_words[0].tolist() == [-1] * (RECENT_LEN - 1) + [7]
    assert row.bad_words[1, -3:].tolist() == [-1, 1, 2]
    assert (row.bad_words[2:] == -1).all()
    assert row.stop_ids[:3].tolist() == [0, 11, -1]


def test_slot_row_has_the_shapes_and_types_of_a_slot(row):
    for one, slots in zip(row, empty_slots(SLOTS, VOCAB), strict=True):
        assert one.shape == slots.shape[1:] and one.dtype == slots.dtype


def test_install_writes_one_slot(row):
    before = empty_slots(SLOTS, VOCAB)
    after = install(before, 2, row)
    for old, new, one in zip(before, after, row, strict=True):
        np.testing.assert_array_equal(new[2], one)
        np.testing.assert_array_equal(np.delete(new, 2, axis=0), np.delete(old, 2, axis=0))


def test_install_out_of_range_writes_nothing(row):
    before = empty_slots(SLOTS, VOCAB)
    jax.tree.map(np.testing.assert_array_equal, install(before, SLOTS, row), before)


def test_record_appends_the_tokens_of_active_rows_only(row):
    before = install(install(empty_slots(SLOTS, VOCAB), 1, row), 3, row)
    slots, tokens = jnp.asarray([3, 1, 0, SLOTS]), jnp.asarray([9, 5, -1, 6])
    after = record(before, slots, tokens, jnp.asarray([True, False, True, True]))
    assert after.last_tokens.tolist() == [0, 5, 0, 9]
    assert after.recent[3].tolist() == [-1] * (RECENT_LEN - 7) + [3, 4, 3, 4, 5, 5, 9]
    assert after.counts[3, 9] == 1
    changed = np.flatnonzero((np.asarray(after.counts) != before.counts).any(axis=1))
    assert changed.tolist() == [3]
    np.testing.assert_array_equal(after.recent[:3], before.recent[:3])
