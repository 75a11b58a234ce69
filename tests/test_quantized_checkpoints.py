"""Quantized checkpoints as published: loaded as they are, kept quantized, and right beside transformers' answers.

The committed ones (tests/fixtures/make_quantized.py) come with the answers of the weights that they stand for, beside
activations in float32. Where theirs are quantized too, the weights are first tried without that.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from millrace import Runtime, SamplingParams
from millrace.models.config import ModelConfig
from millrace.models.decoder import AbstractDecoder, Params
from millrace.models.families import config_from_hf
from millrace.models.quantization import with_formats
from millrace.pallas_kernels.quantized_matmul import WeightFormat
from millrace.runtime.checkpoint import Checkpoint, open_checkpoint
from millrace.runtime.convert import convert
from millrace.runtime.export import export
from millrace.runtime.param_tree import flatten
from millrace.runtime.store import Store
from millrace.runtime.weights import load_params
from millrace.sharding.mesh import make_mesh
from millrace.sharding.rules import Placement

Forward = Callable[..., np.ndarray]

ROOT = Path(__file__).parent / "fixtures" / "quantized"
NAMES = sorted(path.name for path in ROOT.iterdir())
ROUNDED = {"llama_fp8_channel", "llama_fp8_tensor", "qwen3_fp8_block", "qwen3_int8_channel"}  # activations, that is
EXACT, NEAR = 1e-4, 0.2  # the greatest difference of a log probability; the root of the mean square of them
FLOAT32 = np.dtype("float32")
PROJECTIONS = {"q", "k", "v", "o", "gate", "up", "down"}
PLAIN = {"qwen2_awq": {"stages/1/0/mlp/down"}, "phi3_packed": {"stages/0/0/mlp/down"}}  # as their configs list them
# Programs take long to compile: one by default.
RUN = [pytest.param(name, marks=[] if name == "qwen2_awq" else pytest.mark.kernels) for name in NAMES]


@functools.cache
def load_committed(name: str) -> tuple[ModelConfig, Params]:
    return load(open_checkpoint(ROOT / name))


def load(source: Checkpoint | Store) -> tuple[ModelConfig, Params]:
    model = config_from_hf(dict(source.config))
    specs = AbstractDecoder(model, jnp.dtype("float32")).specs
    return model, load_params(source, model, specs, Placement(make_mesh()), show_progress=False)


def with_own_activations(model: ModelConfig) -> ModelConfig:
    """None of them quantized."""
    formats = [{**dict(layer.attention.formats), **dict(layer.mlp.formats)} for layer in model.layers]

    def rule(layer: int | None, projection: str) -> WeightFormat | None:
        format = model.head_format if layer is None else formats[layer].get(projection.split("/")[-1])
        return None if format is None else dataclasses.replace(format, activations="own")

    return with_formats(model, rule)


def prompt_logprobs(forward: Forward, model: ModelConfig, params: Params, prompt: list[int]) -> np.ndarray:
    """Of each token of the prompt but the first."""
    return forward(model, params, prompt)[np.arange(len(prompt) - 1), prompt[1:]]


def longest_prompt(name: str) -> dict[str, Any]:
    prompts = json.loads((ROOT / name / "expected.json").read_text())["prompts"]
    longest: dict[str, Any] = max(prompts, key=lambda prompt: len(prompt["prompt_token_ids"]))
    return longest


@pytest.mark.parametrize("name", NAMES)
def test_a_published_checkpoint_answers_as_the_weights_that_it_stands_for(forward: Forward, name: str) -> None:
    wanted = longest_prompt(name)
    model, params = load_committed(name)
    found = prompt_logprobs(forward, with_own_activations(model), params, wanted["prompt_token_ids"])
    np.testing.assert_allclose(found, wanted["prompt_logprobs"][1:], atol=EXACT, rtol=0)


@pytest.mark.parametrize("name", sorted(ROUNDED - {"llama_fp8_tensor"}))  # whose format is that of the channels
def test_quantized_activations_cost_what_their_format_costs(forward: Forward, name: str) -> None:
    wanted = longest_prompt(name)
    found = prompt_logprobs(forward, *load_committed(name), wanted["prompt_token_ids"])
    assert EXACT < np.sqrt(np.mean((found - wanted["prompt_logprobs"][1:]) ** 2)) < NEAR


@pytest.mark.parametrize("name", NAMES)
def test_its_projections_stay_quantized_and_its_store_holds_the_same_arrays(name: str, tmp_path: Path) -> None:
    model, params = load_committed(name)
    direct, _ = flatten(params)
    names = {path.removesuffix("/weight") for path in direct if path.endswith("/weight")}
    plain = {path for path in names if f"{path}/scales" not in direct and path.split("/")[-1] in PROJECTIONS}
    assert plain == PLAIN.get(name, set())
    store = convert(open_checkpoint(ROOT / name), tmp_path / "store", dtype=FLOAT32, show_progress=False)
    stored_model, stored = load(store)
    assert stored_model == model
    for path, array in flatten(stored)[0].items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(direct[path]), err_msg=path)


@pytest.mark.parametrize("name", ["phi3_packed", pytest.param("qwen3_moe_gptq", marks=pytest.mark.kernels)])
def test_an_exported_store_is_a_plain_checkpoint_of_what_it_stands_for(
    forward: Forward, name: str, tmp_path: Path
) -> None:
    store = convert(open_checkpoint(ROOT / name), tmp_path / "store", dtype=FLOAT32, show_progress=False)
    exported = open_checkpoint(export(store, tmp_path / "exported", show_progress=False))
    assert "quantization_config" not in exported.config
    wanted = longest_prompt(name)
    found = prompt_logprobs(forward, *load(exported), wanted["prompt_token_ids"])
    np.testing.assert_allclose(found, wanted["prompt_logprobs"][1:], atol=EXACT, rtol=0)


@pytest.mark.parametrize("name", RUN)
def test_a_runtime_generates_the_tokens_of_transformers(name: str, program_cache: str, store_cache: str) -> None:
    expected = json.loads((ROOT / name / "expected.json").read_text())
    ids = [prompt["prompt_token_ids"] for prompt in expected["prompts"]]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    sizes = {"max_context_len": 40, "num_slots": 2, "page_size": 8, "max_step_tokens": 32, "dtype": "float32"}
    caches = {"compile_cache_dir": program_cache, "store_cache_dir": store_cache}
    with Runtime.from_pretrained(str(ROOT / name), **sizes, **caches, progress=False) as runtime:
        outputs = runtime.generate(ids, params, use_tqdm=False)
    for output, prompt in zip(outputs, expected["prompts"], strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert len(tokens) == 12 if name in ROUNDED else tokens == prompt["token_ids"]
