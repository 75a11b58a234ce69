"""Llamas with random weights that are made on the device, for benchmarks that need no checkpoint."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from millrace import RuntimeConfig, SamplingParams
from millrace.models.config import ModelConfig
from millrace.models.families import config_from_hf
from millrace.runtime import assembly, deployment
from millrace.runtime.api import Runtime
from millrace.runtime.buckets import Bucket, make_buckets
from millrace.runtime.deployment import Deployment
from millrace.runtime.model_source import ModelSource
from millrace.runtime.param_tree import flatten
from millrace.runtime.program_specs import abstract_params

# Widths, layers, attention and KV heads, vocabulary, of Llama-3.1-8B and Llama-2-70B; heads are of 128.
SHAPES = {"8b": (4096, 14336, 32, 32, 8, 128256), "70b": (8192, 28672, 80, 64, 8, 32000)}


def hf_config(
    model: str, *, num_layers: int | None = None, scale: int = 1, quantization: str | None = None
) -> dict[str, Any]:
    """config.json of a model of SHAPES; `scale` divides its widths, to try a benchmark on a small machine."""
    embed, mlp, layers, heads, kv_heads, vocab = SHAPES[model]
    config = {
        "model_type": "llama", "hidden_size": embed // scale, "intermediate_size": mlp // scale, "head_dim": 128,
        "num_attention_heads": max(heads // scale, 1), "num_key_value_heads": max(kv_heads // scale, 1),
        "num_hidden_layers": num_layers or layers, "vocab_size": vocab // scale, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "eos_token_id": 1, "dtype": "bfloat16",
    }  # fmt: skip
    if quantization is not None:
        config["quantization_config"] = {"quant_method": "millrace", "format": quantization}
    return config


def make_params(deployment: Deployment) -> Any:
    """Random parameters of a deployment, each on its devices, of such sizes that activations stay finite."""
    paths = list(flatten(deployment.model.decoder.specs)[0])
    leaves, definition = jax.tree.flatten(abstract_params(deployment.model))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [_leaf(path, leaf, key) for path, leaf, key in zip(paths, leaves, keys, strict=True)]
    return jax.tree.unflatten(definition, made)


def _leaf(path: str, leaf: Any, key: jax.Array) -> jax.Array:
    """One array; the slices along its first axis are made one after the other, or float32 noise would fill memory."""
    make = functools.partial(_values, path.split("/")[-1], leaf.shape[1:], leaf.dtype)
    keys = jax.random.split(key, leaf.shape[0])
    program = jax.jit(lambda keys: jax.lax.map(make, keys), out_shardings=leaf.sharding)
    made: jax.Array = program(keys)
    return made


def _values(name: str, shape: tuple[int, ...], dtype: Any, key: jax.Array) -> jax.Array:
    if name == "scales":  # values have a deviation of 16 (8 bits) or 4 steps (4 bits), weights one of about 0.02
        return jnp.full(shape, 2.0**-10 if jnp.finfo(dtype).bits > 8 else 2.0**-6).astype(dtype)
    if name in ("scale", "global_scale") or not shape:
        return jnp.ones(shape, dtype)
    if dtype in (jnp.uint8, jnp.int8):
        return jax.random.bits(key, shape, jnp.uint8).astype(dtype)
    noise = jax.random.normal(key, shape, jnp.float32)
    return (noise * (16.0 if jnp.finfo(dtype).bits == 8 else 0.02)).astype(dtype)


@contextlib.contextmanager
def random_runtime(config: RuntimeConfig, model: ModelConfig, *, has_few_programs: bool = False) -> Iterator[Runtime]:
    """A Runtime as users open it, except that its weights are made and not read.

    With `has_few_programs` it compiles the largest decode step and mixed step only, which serve smaller ones too.
    """
    source: Any = ModelSource(
        weights=None, config=model, tokenizer=None, eos_ids=(), default_sampling_params=SamplingParams()
    )  # type: ignore[arg-type]
    buckets = _largest if has_few_programs else make_buckets
    with (
        mock.patch.object(deployment, "make_buckets", buckets),
        mock.patch.object(assembly, "open_model", lambda *_: source),
        mock.patch.object(assembly, "_with_weights", lambda source, *_: source),
        mock.patch.object(assembly, "_load", lambda _, made, on_part: make_params(made)),
    ):
        runtime = Runtime(config)
    with runtime:
        yield runtime


def _largest(num_slots: int, max_step_tokens: int) -> tuple[Bucket, ...]:
    """Of all buckets, those of full steps."""
    all_buckets = make_buckets(num_slots, max_step_tokens)
    kinds = ([b for b in all_buckets if b.is_decode == is_decode] for is_decode in (True, False))
    return tuple(max(kind, key=lambda b: b.num_tokens) for kind in kinds)


def model_config(model: str, **options: Any) -> ModelConfig:
    """The config that `hf_config` describes."""
    return config_from_hf(hf_config(model, **options))
