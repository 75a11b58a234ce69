"""RuntimeConfig: each option that cannot be served is one ConfigError that names it, when it is made."""

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from millrace import ConfigError, RuntimeConfig
from millrace.pallas_kernels.paged_attention import CacheDType
from millrace.pallas_kernels.quantized_matmul import FORMATS
from millrace.runtime import config as config_module

HUGE = pytest.param(10**5000, id="huge")  # more digits than Python agrees to print
INTEGERS = (
    "max_context_len", "num_slots", "page_size", "max_step_tokens", "kv_cache_bytes", "max_decode_steps", "seed",
    "weights_memory", "num_processes", "process_id",
)  # fmt: skip
TEXTS = (
    "target",
    "artifact",
    "coordinator_address",
    "model",
    "revision",
    "compile_cache_dir",
    "store_cache_dir",
    "weights",
    "weights_io",
)
DTYPES = ("dtype", "kv_cache_dtype")
FLAGS = ("prefix_caching", "progress", "store")
PAIRS = ("mesh", "kernels")


def test_every_option_is_tried_here() -> None:
    assert {field.name for field in dataclasses.fields(RuntimeConfig)} == {
        *INTEGERS, *TEXTS, *DTYPES, *FLAGS, *PAIRS, "quantization",
    }  # fmt: skip


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 10**30, HUGE, True, "8", 1.0, [8], b"8", 8j])
def test_integers_refuse_what_is_no_whole_number_in_range(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        RuntimeConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(set(INTEGERS) - {"seed", "process_id"}))
def test_integers_refuse_zero_where_it_would_mean_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        RuntimeConfig(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["page_size", "max_decode_steps"])
def test_integers_without_a_default_of_their_own_refuse_none(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        RuntimeConfig(**{name: None})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("value", [math.nan, -1, HUGE, True, "int4", "", "bfloat", np.float32, ["float32"]])
def test_dtypes_refuse_what_is_no_known_spelling(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        RuntimeConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["int5", "", "INT8", 8, True, ["int8"], np.int8, math.nan])
def test_quantization_refuses_what_is_no_format_and_lists_them(value: object) -> None:
    with pytest.raises(ConfigError, match="quantization must be one of int8, int8_a16, fp8, .*nvfp4, none, got"):
        RuntimeConfig(quantization=value)  # type: ignore[arg-type]


def test_the_formats_of_the_option_are_those_of_the_contract() -> None:
    assert get_args(config_module.Quantization) == tuple(FORMATS)


def test_an_unknown_dtype_of_the_cache_lists_the_choices() -> None:
    with pytest.raises(
        ConfigError, match=r"float32, bfloat16, float16, float8_e4m3fn, int8 \(bf16.*fp8 too\), got 'e5'"
    ):
        RuntimeConfig(kv_cache_dtype="e5")
    assert get_args(config_module.CacheDType) == get_args(CacheDType)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_weights_and_activations_have_no_dtype_of_the_cache_alone(dtype: str) -> None:
    with pytest.raises(ConfigError, match="dtype must be one of float32, bfloat16, float16 "):
        RuntimeConfig(dtype=dtype)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1, HUGE, True, ["x"], b"x"])
def test_texts_refuse_what_is_no_string(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        RuntimeConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["", None])
def test_a_model_must_be_named(value: object) -> None:
    with pytest.raises(ConfigError, match="model"):
        RuntimeConfig(model=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [math.nan, 0, 1, -1, HUGE, "true", None])
def test_flags_refuse_what_is_no_bool(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        RuntimeConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    "value",
    [
        math.nan, -1, HUGE, True, "data", ["data"], [("data",)], [("data", 2, 3)], {1: 2}, {"data": None},
        {"data": math.nan}, {"data": True}, {"data": 2.0}, {"data": [2]},
    ],
)  # fmt: skip
def test_pairs_refuse_what_is_no_pair_of_a_name_and_a_value(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        RuntimeConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -2, 10**30, HUGE, "2"])
def test_a_mesh_axis_refuses_a_size_that_no_machine_has(size: object) -> None:
    with pytest.raises(ConfigError, match="mesh"):
        RuntimeConfig(mesh=(("data", size),))  # type: ignore[arg-type]


def test_a_mesh_axis_may_be_named_only_once() -> None:
    with pytest.raises(ConfigError, match="twice"):
        RuntimeConfig(mesh=(("data", 2), ("data", 2)))


def test_a_step_must_hold_more_tokens_than_there_are_slots() -> None:
    with pytest.raises(ConfigError, match="max_step_tokens"):
        RuntimeConfig(num_slots=64, max_step_tokens=64)
    assert RuntimeConfig(num_slots=64, max_step_tokens=65).max_step_tokens == 65


@pytest.mark.parametrize("value", ["disk", "", "Stream"])
def test_weights_are_in_one_of_three_places_and_read_in_one_of_three_ways(value: str) -> None:
    with pytest.raises(ConfigError, match="resident, stream, host"):
        RuntimeConfig(weights=value)
    with pytest.raises(ConfigError, match="auto, cached, direct"):
        RuntimeConfig(weights_io=value)


def test_resident_weights_take_no_budget() -> None:
    with pytest.raises(ConfigError, match="weights=stream"):
        RuntimeConfig(weights_memory=10**9)
    assert RuntimeConfig(weights="stream", weights_memory=10**9).weights_memory == 10**9


def test_an_error_stays_short_whatever_came() -> None:
    with pytest.raises(ConfigError) as caught:
        RuntimeConfig(num_slots="x" * 10**6)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="num_slot"):
        RuntimeConfig(num_slot=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ({"dtype": "BF16"}, {"dtype": "bfloat16"}),
        ({"kv_cache_dtype": "half"}, {"kv_cache_dtype": "float16"}),
        ({"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "float8_e4m3fn"}),
        ({"model": Path("a") / "b"}, {"model": str(Path("a") / "b")}),
        ({"mesh": {"data": 2}}, {"mesh": (("data", 2),)}),
        ({"mesh": [["tensor", 4]]}, {"mesh": (("tensor", 4),)}),
        ({"kernels": {"matmul": "xla"}}, {"kernels": (("matmul", "xla"),)}),
        ({"num_slots": np.int64(4)}, {"num_slots": 4}),
    ],
)
def test_spellings_of_one_value_are_held_alike(given: dict[str, Any], held: dict[str, Any]) -> None:
    config = RuntimeConfig(**given)
    assert config == RuntimeConfig(**held) and hash(config) == hash(RuntimeConfig(**held))
    assert all(type(getattr(config, name)) is type(value) for name, value in held.items())


def test_replace_checks_again() -> None:
    with pytest.raises(ConfigError, match="page_size"):
        RuntimeConfig().replace(page_size=-1)
