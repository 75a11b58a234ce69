"""The families' config readers, on the committed checkpoints and on configs of well-known models."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace import CheckpointError, UnsupportedModelError
from millrace.models.config import MoeSpec
from millrace.models.families import FAMILIES, config_from_hf
from millrace.models.rope import frequencies

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = sorted(path.name for path in (FIXTURES / "checkpoints").iterdir())
# Keys and sizes as published; token ids, versions and Phi-4's factor tables are stand-ins.
KNOWN: dict[str, dict[str, Any]] = json.loads((FIXTURES / "known_configs.json").read_text())
PHI4, GPT_OSS, GEMMA3 = KNOWN["Phi-4-mini-instruct"], KNOWN["gpt-oss-20b"], KNOWN["gemma-3-27b-it"]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


def read_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FIXTURES / "checkpoints" / name / "config.json").read_text())
    return config


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def llama_rope(**rope_scaling: Any) -> dict[str, Any]:
    return {**LLAMA, "rope_scaling": rope_scaling}


def test_every_family_has_two_checkpoints() -> None:
    counts = dict.fromkeys((family.name for family in FAMILIES.values()), 0)
    for name in NAMES:
        counts[config_from_hf(read_config(name)).family] += 1
    assert min(counts.values()) >= 2, counts


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_key_is_named_with_its_value(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="'residual_twist' is 0.5"):
        config_from_hf({**read_config(name), "residual_twist": 0.5})


@pytest.mark.parametrize(
    "config",
    [
        {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "twist": 3}},
        llama_rope(rope_type="linear", factor=2.0, twist=3),
        {**GEMMA3, "text_config": {**GEMMA3["text_config"], "twist": 3}},
        {**GPT_OSS, "quantization_config": {**GPT_OSS["quantization_config"], "twist": 3}},
    ],
)
def test_an_unknown_key_of_a_nested_object_is_named(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="'twist' is 3"):
        config_from_hf(config)


def test_keys_at_their_defaults_and_null_are_accepted() -> None:
    spoken = {"is_decoder": False, "top_k": 50, "mlp_bias": False, "sliding_window": None, "residual_twist": None}
    assert config_from_hf({**LLAMA, **spoken}) == config_from_hf(LLAMA)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("Llama-2-7b-hf", {"max_context_len": 4096, "dtype": "float16", "norm_eps": 1e-5, "tie_embeddings": False}),
        ("Llama-3.1-8B-Instruct", {"max_context_len": 131_072, "num_kv_heads": 8, "head_dim": 128}),
        ("Mistral-7B-v0.1", {"max_context_len": 32_768}),
        ("Qwen2.5-7B-Instruct", {"embed_dim": 3584, "num_layers": 28, "head_dim": 128}),
        ("Qwen3-8B", {"max_context_len": 40_960, "num_layers": 36}),
        ("gemma-2-27b", {"tie_embeddings": True, "final_soft_cap": 30.0, "norm_offset": 1.0}),
        ("gemma-3-1b-it", {"final_soft_cap": None, "max_context_len": 32_768, "num_kv_heads": 1}),
        ("gemma-3-27b-it", {"vocab_size": 262_208, "max_context_len": 131_072, "dtype": "bfloat16"}),
        ("Phi-3-mini-4k-instruct", {"unstretched_len": None, "head_dim": 96}),
        ("Phi-4-mini-instruct", {"unstretched_len": 4096, "max_context_len": 131_072, "tie_embeddings": True}),
        ("OLMo-2-1124-7B", {"dtype": "float32", "norm_eps": 1e-6}),
        ("Mixtral-8x7B-v0.1", {"norm_eps": 1e-5, "num_kv_heads": 8}),
        ("Qwen3-30B-A3B", {"num_layers": 48, "num_kv_heads": 4}),
        ("gpt-oss-20b", {"max_context_len": 131_072, "dtype": "bfloat16", "head_dim": 64}),
    ],
)
def test_configs_of_well_known_models_are_read(name: str, facts: dict[str, Any]) -> None:
    config = config_from_hf(KNOWN[name])
    assert {key: getattr(config, key) for key in facts} == facts


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("Mistral-7B-v0.1", [4096] * 32),
        ("Qwen2.5-7B-Instruct", [None] * 28),
        ("gemma-2-27b", [4096, None] * 23),
        ("gemma-3-1b-it", [*([512] * 5 + [None]) * 4, 512, 512]),
        ("gpt-oss-20b", [128, None] * 12),
    ],
)
def test_windows_lie_in_the_layers_that_have_them(name: str, windows: list[int | None]) -> None:
    assert [layer.attention.window for layer in config_from_hf(KNOWN[name]).layers] == windows


def test_gemma3_layers_have_the_rope_of_their_kind() -> None:
    ropes = [layer.attention.rope for layer in config_from_hf(GEMMA3).layers[:6]]
    assert [(rope.kind, rope.theta, rope.factor) for rope in ropes if rope] == [
        *[("default", 1e4, 1.0)] * 5,
        ("linear", 1e6, 8.0),
    ]


def test_gemma_scales_by_query_pre_attn_scalar_and_not_by_head_dim() -> None:
    assert config_from_hf(KNOWN["gemma-2-27b"]).layers[0].attention.scale == 144**-0.5


def test_qwen3_moe_layers_are_dense_where_the_config_says_so() -> None:
    config = {**KNOWN["Qwen3-30B-A3B"], "num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    sparse = [i for i, layer in enumerate(config_from_hf(config).layers) if isinstance(layer.mlp, MoeSpec)]
    assert sparse == [1, 5, 7]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {**LLAMA, "rope_theta": 500.0, "torch_dtype": "bfloat16"},
            {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "dtype": "bfloat16"},
        ),
        (
            {**llama_rope(type="yarn", **YARN), "rope_theta": 500.0},
            {**LLAMA, "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, **YARN}},
        ),
        (
            {**KNOWN["gemma-2-27b"], "num_hidden_layers": 2},
            {
                **without(KNOWN["gemma-2-27b"], "rope_theta"),
                "num_hidden_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        ),
        (
            KNOWN["gemma-3-1b-it"],
            {
                **without(KNOWN["gemma-3-1b-it"], "rope_theta", "rope_local_base_freq", "sliding_window_pattern"),
                "layer_types": [*(["sliding_attention"] * 5 + ["full_attention"]) * 4, *["sliding_attention"] * 2],
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
        ),
        (
            PHI4,
            {
                **without(PHI4, "rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype"),
                "dtype": "bfloat16",
                "rope_parameters": {
                    **without(PHI4["rope_scaling"], "type"),
                    "rope_type": "longrope",
                    "rope_theta": 10_000.0,
                    "partial_rotary_factor": 0.75,
                    "original_max_position_embeddings": 4096,
                },
            },
        ),
        (
            KNOWN["Qwen3-30B-A3B"],
            {**without(KNOWN["Qwen3-30B-A3B"], "num_experts"), "num_local_experts": 128},
        ),
    ],
    ids=["llama", "yarn", "gemma2", "gemma3", "phi3", "qwen3_moe"],
)
def test_old_and_new_spellings_give_equal_configs(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert config_from_hf(old) == config_from_hf(new)


def test_the_nested_gemma3_equals_the_text_config_in_it() -> None:
    text = {**GEMMA3["text_config"], "torch_dtype": "bfloat16"}
    assert config_from_hf(GEMMA3) == config_from_hf(text)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("hidden_size", -32, "a whole number from 1"),
        ("hidden_size", "32", "a whole number from 1"),
        ("hidden_size", 32.5, "a whole number from 1"),
        ("vocab_size", True, "a whole number from 1"),
        ("vocab_size", 10**12, "a whole number from 1"),
        ("vocab_size", None, "lacks 'vocab_size'"),
        ("num_hidden_layers", 0, "a whole number from 1"),
        ("num_hidden_layers", 10**6, "at most 1024"),
        ("num_key_value_heads", 3, "a divisor of num_attention_heads"),
        ("num_attention_heads", 5, "num_key_value_heads"),
        ("head_dim", 7, "should be even, but it is 7"),
        ("rms_norm_eps", float("nan"), "a finite number above 0"),
        ("rms_norm_eps", -1e-6, "a finite number above 0"),
        ("rope_theta", float("inf"), "a finite number above 1"),
        ("rope_theta", 1.0, "a finite number above 1"),
        ("tie_word_embeddings", "yes", "true or false"),
        ("hidden_act", "relu", "one of silu"),
        ("torch_dtype", "int8", "one of bfloat16"),
        ("rope_scaling", "linear", "JSON object"),
        ("rope_scaling", {"type": "stretchy", "factor": 2.0}, "one of default"),
        ("rope_scaling", {"type": "linear"}, "lacks 'factor'"),
        ("rope_scaling", {"type": "linear", "factor": -2.0}, "a finite number above 0"),
        ("rope_scaling", {"type": "linear", "factor": 0.5}, "at least 1"),
        ("rope_scaling", {"type": "linear", "rope_type": "yarn", "factor": 2.0}, "contradicts itself"),
        ("partial_rotary_factor", 0.5, "'partial_rotary_factor' should be 1"),
        ("quantization_config", {"quant_method": "spqr"}, "'quant_method' should be one of millrace"),
        ("sliding_window", 8, "'sliding_window' is 8"),
        ("auto_map", {"AutoModel": "evil.Model"}, "'auto_map' is"),
    ],
)
def test_a_bad_value_is_refused_with_what_was_expected(key: str, value: Any, wanted: str) -> None:
    with pytest.raises(CheckpointError, match=wanted) as caught:
        config_from_hf({**LLAMA, key: value})
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("Mixtral-8x7B-v0.1", {"num_experts_per_tok": 9}, "at most the number of experts, 8"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [48]}, "a list of layer numbers below 48"),
        ("Qwen3-8B", {"layer_types": ["sliding_attention"] * 36}, "sets no sliding window"),
        ("gemma-2-27b", {"layer_types": ["full_attention"] * 3}, "a list of 46 names"),
        ("gemma-2-27b", {"hidden_act": "silu"}, "'hidden_act' should be 'gelu_pytorch_tanh'"),
        ("Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, "for every layer"),
        ("Phi-4-mini-instruct", {"partial_rotary_factor": 1.5}, "at most 1"),
        ("Phi-4-mini-instruct", {"partial_rotary_factor": 1.0}, "a list of 64 finite numbers"),
        ("Phi-4-mini-instruct", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "'auto_map' should be null"),
        ("gpt-oss-20b", {"quantization_config": {"quant_method": "spqr"}}, "'quant_method' should be one of"),
        ("gpt-oss-20b", {"experts_per_token": 2}, "'experts_per_token' should be 4"),
    ],
)
def test_a_value_that_a_family_cannot_serve_is_refused(name: str, changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UnsupportedModelError, match=wanted):
        config_from_hf({**KNOWN[name], **changes})


def test_an_unknown_family_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(UnsupportedModelError, match="is it a qwen3\\?"):
        config_from_hf({**LLAMA, "model_type": "qwen33"})


def test_an_empty_rope_object_leaves_the_other_spelling_in_force() -> None:
    config = llama_rope(type="linear", factor=2.0)
    assert config_from_hf({**config, "rope_parameters": {}}) == config_from_hf(config)


def test_two_spellings_that_disagree_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="contradicts itself: 'dtype' is 'float32' and 'torch_dtype'"):
        config_from_hf({**LLAMA, "dtype": "float32", "torch_dtype": "bfloat16"})


def test_reading_leaves_the_config_as_it_was() -> None:
    config = copy.deepcopy(GEMMA3)
    config_from_hf(config)
    assert config == GEMMA3


def test_ropes_have_the_frequencies_of_transformers() -> None:
    records = json.loads((FIXTURES / "rope.json").read_text())
    kinds = {record["rope_parameters"]["rope_type"] for record in records}
    assert kinds == {"default", "linear", "dynamic", "yarn", "llama3", "longrope"}
    for record in records:
        keys = ("rope_parameters", "max_position_embeddings", "head_dim")
        rope = config_from_hf({**LLAMA, **{key: record[key] for key in keys}}).layers[0].attention.rope
        assert rope is not None
        inverse, factor = frequencies(rope, record["seq_len"])
        np.testing.assert_allclose(inverse, record["inv_freq"], rtol=2e-6)
        assert factor == pytest.approx(record["attention_factor"], rel=1e-6)


@pytest.mark.parametrize(
    ("scaling", "max_context_len"),
    [
        ({"type": "linear", "factor": 2.5}, 320),
        ({"type": "dynamic", "factor": 2.0}, 256),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
    ],
)
def test_the_context_is_as_long_as_the_scaling_makes_it(scaling: dict[str, Any], max_context_len: int) -> None:
    assert config_from_hf(llama_rope(**scaling)).max_context_len == max_context_len
