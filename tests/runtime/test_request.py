"""validate(): one clear error for what a runtime cannot serve, one complete Request for what it can."""

import numpy as np
import pytest

from millrace.errors import InvalidRequestError
from millrace.runtime.request import RequestLimits, SamplingParams, validate

V = 320  # the logits are wider than the tokenizer's 300


@pytest.fixture(scope="session")
def limits(byte_level):
    return RequestLimits(vocab_size=V, max_context_len=64, eos_ids=(1, 10**6), tokenizer=byte_level)


@pytest.fixture(scope="session")
def without_tokenizer():
    return RequestLimits(vocab_size=V, max_context_len=64, eos_ids=(1,), tokenizer=None)


def test_text_prompt_is_tokenized_and_kept(limits, byte_level):
    request = validate("a", "the cat", SamplingParams(seed=7), limits)
    assert (request.prompt, request.prompt_token_ids) == ("the cat", tuple(byte_level.encode("the cat")))
    assert request.params.seed == 7


def test_numpy_prompt_becomes_plain_integers(limits):
    request = validate("a", np.array([5, 6], dtype=np.int32), SamplingParams(), limits, text="rendered")
    assert (request.prompt, request.prompt_token_ids) == ("rendered", (5, 6))
    assert all(type(id) is int for id in request.prompt_token_ids)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "empty"),
        ([], "empty"),
        ([5, 300], "prompt token 1 .* 0 to 299.*logits 320 wide.*300 ids"),
        ([-1], "prompt token 0"),
        ([10**5000], "prompt token 0"),
        ([True], "prompt token 0 must be an integer"),
        ([1.0], "prompt token 0 must be an integer"),
        (["a"], "prompt token 0 must be an integer"),
        (5, "string or a list"),
        (None, "string or a list"),
        (b"ab", "string or a list"),
        ({1: 2}, "string or a list"),
        (np.array(5), "string or a list"),
        (np.zeros((2, 2), int), "prompt token 0 must be an integer"),
        ("half \ud800", "surrogate"),
        ([5] * 64, "64 tokens.*max_context_len=64"),
    ],
)
def test_wrong_prompt_is_refused(prompt, reason, limits):
    with pytest.raises(InvalidRequestError, match=reason):
        validate("a", prompt, SamplingParams(), limits)


@pytest.mark.parametrize("id", [300, 319, 320, 2**31 - 1])
def test_option_ids_without_a_token_are_refused_by_name(id, limits):
    for options in ({"stop_token_ids": [id]}, {"allowed_token_ids": [5, id]}, {"logit_bias": {id: 1.0}}):
        with pytest.raises(InvalidRequestError, match=next(iter(options))):
            validate("a", [5], SamplingParams(**options), limits)


def test_params_of_another_type_are_refused(limits):
    with pytest.raises(InvalidRequestError, match="SamplingParams"):
        validate("a", [5], {"n": 1}, limits)


def test_missing_seed_is_drawn_afresh(limits):
    seeds = {validate("a", [5], SamplingParams(), limits).params.seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize(("max_tokens", "resolved"), [(16, 16), (None, 60), (1000, 60)])
def test_new_tokens_end_at_the_context(max_tokens, resolved, limits):
    assert validate("a", [5] * 4, SamplingParams(max_tokens=max_tokens), limits).max_new_tokens == resolved


def test_min_tokens_past_the_context_is_refused(limits):
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        validate("a", [5] * 4, SamplingParams(min_tokens=61, max_tokens=None), limits)


def test_ending_ids_are_resolved(limits):
    request = validate("a", [5], SamplingParams(stop_token_ids=[9]), limits)
    assert (request.eos_ids, request.stop_ids) == ({1}, {1, 9})
    request = validate("a", [5], SamplingParams(stop_token_ids=[9], ignore_eos=True), limits)
    assert (request.eos_ids, request.stop_ids) == (frozenset(), {9})


def test_bad_words_are_tokenized_with_and_without_a_space(limits, byte_level):
    request = validate("a", [5], SamplingParams(bad_words=["cat", " cat", "\n"]), limits)
    spellings = [byte_level.encode(text, add_special_tokens=False) for text in ("cat", " cat", "\n", " \n")]
    assert request.bad_word_ids == tuple(map(tuple, spellings))


def test_too_many_or_too_long_bad_words_are_refused(limits):
    with pytest.raises(InvalidRequestError, match="bad_words.*16 tokens"):
        validate("a", [5], SamplingParams(bad_words=["zqjx" * 20]), limits)
    with pytest.raises(InvalidRequestError, match="bad_words makes .* the most is 128"):
        validate("a", [5], SamplingParams(bad_words=[f"z{i}" for i in range(100)]), limits)


def test_text_options_are_refused_by_name_without_a_tokenizer(without_tokenizer):
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        validate("a", "text", SamplingParams(), without_tokenizer)
    for options in ({"stop": "x"}, {"bad_words": ["x"]}):
        with pytest.raises(InvalidRequestError, match=f"{next(iter(options))} needs a tokenizer"):
            validate("a", [5], SamplingParams(**options), without_tokenizer)


def test_token_ids_reach_the_logits_width_without_a_tokenizer(without_tokenizer):
    params = SamplingParams(stop_token_ids=[V - 1], logit_bias={V - 1: 2.0}, allowed_token_ids=[V - 1])
    assert validate("a", [V - 1], params, without_tokenizer).prompt_token_ids == (V - 1,)
    with pytest.raises(InvalidRequestError, match="no ids in the tokenizer"):
        validate("a", [V], SamplingParams(), without_tokenizer)


def test_options_that_leave_no_token_are_refused(limits, byte_level):
    with pytest.raises(InvalidRequestError, match="no token is left"):
        validate("a", [5], SamplingParams(allowed_token_ids=[1], min_tokens=2), limits)
    validate("a", [5], SamplingParams(allowed_token_ids=[1], min_tokens=2, ignore_eos=True), limits)
    newline = byte_level.encode("\n", add_special_tokens=False)
    with pytest.raises(InvalidRequestError, match="no token is left"):
        validate("a", [5], SamplingParams(allowed_token_ids=newline, bad_words=["\n"]), limits)
