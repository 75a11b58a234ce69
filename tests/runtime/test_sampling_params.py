"""SamplingParams: vLLM's names and defaults, and one clear error for each value that cannot be served."""

import math

import numpy as np
import pytest

from millrace.errors import InvalidRequestError
from millrace.runtime.sampling_params import SamplingParams

INTEGERS = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")
NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize")


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)
    assert (params.stop, params.stop_token_ids, params.bad_words) == ((), (), ())


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -2, 10**30, pytest.param(10**5000, id="huge"), True, "1", 1.0, 0.5, [1]]
)
def test_integer_options_refuse_what_is_no_integer_in_range(name, value):
    with pytest.raises(InvalidRequestError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -3, 1e30, pytest.param(10**5000, id="huge"), True, "0.5", None, 1j]
)
def test_number_options_refuse_what_is_no_number_in_range(name, value):
    with pytest.raises(InvalidRequestError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_flags_refuse_what_is_no_bool(name, value):
    with pytest.raises(InvalidRequestError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.0},
        {"max_tokens": 0},
        {"n": 0},
        {"n": None},
        {"n": 129},
        {"logprobs": 21},
        {"logprobs": -1},
        {"prompt_logprobs": 21},
        {"seed": -1},
        {"seed": 2**64},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.1},
        {"min_p": 1.1},
        {"top_k": -2},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [1]},
        {"stop": {"a": 1}},
        {"stop": b"a"},
        {"stop": [f"{i}" for i in range(33)]},
        {"stop": "x" * 513},
        {"stop_token_ids": 5},
        {"stop_token_ids": [True]},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": ["5"]},
        {"stop_token_ids": range(33)},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [1.5]},
        {"bad_words": [""]},
        {"logit_bias": [1]},
        {"logit_bias": {"5": 1.0}},
        {"logit_bias": {-5: 1.0}},
        {"logit_bias": {5: math.nan}},
        {"logit_bias": {5: 100.5}},
        {"logit_bias": {5: True}},
        {"logit_bias": {5: "1"}},
        {"min_tokens": 17},
        {"stop": "a", "detokenize": False},
    ],
)
def test_values_that_cannot_be_served_are_refused_by_name(options):
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        SamplingParams(**options)


def test_misspelt_option_is_refused_with_the_nearest_name():
    with pytest.raises(TypeError, match="temprature.*temperature"):
        SamplingParams(temprature=0.5)
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams().replace(top_q=1)


def test_numpy_scalars_become_python_numbers():
    params = SamplingParams(n=np.int64(2), temperature=np.float32(0.5), logit_bias={np.int32(3): np.float64(1)})
    assert (type(params.n), type(params.temperature)) == (int, float)
    assert [(type(id), type(bias)) for id, bias in params.logit_bias.items()] == [(int, float)]


def test_numpy_bool_is_no_integer():
    with pytest.raises(InvalidRequestError, match="n must be"):
        SamplingParams(n=np.bool_(True))


def test_strings_and_ids_become_tuples_without_repeats():
    params = SamplingParams(stop="ab", bad_words=["x", "x"], stop_token_ids=np.array([3, 3, 5]))
    assert (params.stop, params.bad_words, params.stop_token_ids) == (("ab",), ("x",), (3, 5))
    assert SamplingParams(stop=None, stop_token_ids=None, bad_words=None) == SamplingParams()


def test_tiny_positive_temperature_is_raised_and_zero_is_kept():
    assert SamplingParams(temperature=5e-324).temperature == 0.01
    assert SamplingParams(temperature=0).temperature == 0.0


def test_top_k_minus_one_is_all():
    assert SamplingParams(top_k=-1).top_k == 0


def test_replace_checks_again():
    params = SamplingParams(stop=["a"]).replace(top_p=0.5)
    assert (params.top_p, params.stop) == (0.5, ("a",))
    with pytest.raises(InvalidRequestError, match="top_p"):
        params.replace(top_p=2)


def test_params_keep_their_own_logit_bias_and_are_hashable():
    bias = {5: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[5] = 2.0
    assert params.logit_bias == {5: 1.0}
    assert hash(params) == hash(params.replace())
