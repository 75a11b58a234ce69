import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace.runtime.limits import MAX_LOGPROBS
from millrace.runtime.logprobs import BLOCK_LEN, prompt_logprobs, score

VOCAB = 50


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=(6, VOCAB)).astype(np.float32) * 4 + 100


def test_logprobs_are_the_log_softmax(logits):
    tokens = np.arange(6, dtype=np.int32) * 9
    scores = score(jnp.asarray(logits), jnp.asarray(tokens))
    np.testing.assert_allclose(scores.logprob, log_softmax(logits)[np.arange(6), tokens], atol=2e-5)
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(scores.top_ids, best)
    np.testing.assert_allclose(scores.top_logprobs, np.take_along_axis(log_softmax(logits), best, -1), atol=2e-5)


def test_rank_is_one_more_than_the_number_of_likelier_tokens():
    logits = jnp.asarray([[1.0, 5.0, 5.0, 3.0, -jnp.inf]] * 5)
    assert score(logits, jnp.arange(5)).rank.tolist() == [4, 1, 1, 3, 5]


def test_a_small_vocabulary_leaves_the_last_places_empty():
    scores = score(jnp.asarray([[0.0, 1.0, 2.0]]), jnp.asarray([0]))
    assert scores.top_ids[0, :4].tolist() == [2, 1, 0, -1] and scores.top_ids.shape == (1, MAX_LOGPROBS)
    assert np.isneginf(scores.top_logprobs[0, 3:]).all()


def test_prompt_logprobs_are_those_of_each_row_whatever_the_block():
    rng = np.random.default_rng(1)
    head = jnp.asarray(rng.normal(size=(8, VOCAB)), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(2 * BLOCK_LEN + 3, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, len(hidden)), jnp.int32)

    def scores_of(hidden, targets, wanted):
        return prompt_logprobs(hidden, lambda block: block @ head, targets, wanted)

    found, expected = jax.jit(scores_of)(hidden, targets, True), score(hidden @ head, targets)
    np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-5)
    np.testing.assert_array_equal(found.rank, expected.rank)
    np.testing.assert_array_equal(found.top_ids, expected.top_ids)
    np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, atol=1e-5)
    assert not any(np.any(x) for x in jax.jit(scores_of)(hidden, targets, False))
    assert f"{len(hidden)},{VOCAB}]" not in str(jax.make_jaxpr(scores_of)(hidden, targets, True))
