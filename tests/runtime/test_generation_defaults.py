"""generation_config.json: the defaults of a request, and what ends a sequence."""

import pytest

from millrace.errors import CheckpointError
from millrace.runtime.generation_defaults import default_sampling_params, eos_token_ids
from millrace.runtime.sampling_params import SamplingParams


def test_defaults_are_read_under_hugging_face_names():
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 64, "min_p": None}
    expected = SamplingParams(temperature=0.6, top_p=0.9, top_k=20, max_tokens=64)
    assert default_sampling_params({**config, "transformers_version": "5", "pad_token_id": 0}) == expected


def test_empty_config_gives_plain_defaults():
    assert default_sampling_params({}) == SamplingParams()


def test_explicit_do_sample_false_is_greedy():
    assert default_sampling_params({"do_sample": False, "temperature": 0.6}).temperature == 0.0


@pytest.mark.parametrize(
    "config", [{"temperature": "hot"}, {"top_p": 0}, {"top_k": 1.5}, {"do_sample": 1}, {"max_new_tokens": -1}]
)
def test_malformed_value_is_a_checkpoint_error(config):
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        default_sampling_params(config)


def test_eos_comes_from_generation_config_then_config_then_tokenizer():
    assert eos_token_ids({"eos_token_id": [5, 6, 5]}, {"eos_token_id": 7}, 8) == (5, 6)
    assert eos_token_ids({"eos_token_id": 0}, {"eos_token_id": 7}, 8) == (0,)
    assert eos_token_ids({"eos_token_id": None}, {"eos_token_id": 7}, 8) == (7,)
    assert eos_token_ids({}, {"text_config": {"eos_token_id": [9]}}, 8) == (9,)
    assert eos_token_ids({}, {}, 8) == (8,)
    assert eos_token_ids({}, {}, None) == ()


@pytest.mark.parametrize("value", ["</s>", -1, True, 1.0, [1, "2"]])
def test_malformed_eos_is_a_checkpoint_error(value):
    with pytest.raises(CheckpointError, match="eos_token_id"):
        eos_token_ids({"eos_token_id": value}, {}, None)
