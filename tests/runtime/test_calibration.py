"""Conversions that fit quantized weights to a text."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace.errors import CheckpointError, ConfigError
from millrace.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig
from millrace.models.families import config_from_hf
from millrace.models.quantization import named_format
from millrace.pallas_kernels import native
from millrace.pallas_kernels.quantized_matmul import matmuls
from millrace.runtime import calibration
from millrace.runtime.calibration import CalibrationText, calibration_text
from millrace.runtime.checkpoint import open_checkpoint
from millrace.runtime.convert import convert, write_store
from millrace.runtime.store import open_store

GROUP = 32
LAYER = LayerSpec(
    attention=AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=1.0, rope=None), mlp=MlpSpec(mlp_dim=128)
)


class Words:
    """A tokenizer of which every word is a token."""

    def encode(self, text):
        return [len(word) for word in text.split()]


def calibrated(checkpoint, place, seed=0, name="int4", num_windows=4):
    """The store of a tiny checkpoint, fitted to random tokens."""
    model = config_from_hf(dict(checkpoint.config))
    tokens = np.random.default_rng(seed).integers(0, model.vocab_size, (num_windows, 24), np.int32)
    text = CalibrationText(tokens=tokens, sha256=f"{seed}")
    format = named_format(name, GROUP if name == "int4" else None)
    return write_store(checkpoint, model, np.dtype(jnp.bfloat16), place, format, text, show_progress=False)


def arrays(store):
    return {
        path: store.read(path, tuple(slice(0, size) for size in entry.shape)) for path, entry in store.arrays.items()
    }


def model_of(max_context_len):
    """A model of 256 tokens and a context."""
    return ModelConfig(family="llama", vocab_size=256, embed_dim=64, layers=(LAYER,), max_context_len=max_context_len)


LARGE_SET = [pytest.param(name, marks=pytest.mark.kernels) for name in ("qwen3_moe_mixed", "gemma2_caps")]


@pytest.fixture(scope="module", params=["gpt_oss_plain", *LARGE_SET])
def conversion(request, fixture_checkpoints, tmp_path_factory):
    """A checkpoint, the folder of its fitted store, and what was logged while it was made."""
    checkpoint, folder = open_checkpoint(fixture_checkpoints / request.param), tmp_path_factory.mktemp("fitted")
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger(calibration.__name__).addHandler(handler)
    calibrated(checkpoint, folder / "store")
    logging.getLogger(calibration.__name__).removeHandler(handler)
    return checkpoint, folder / "store", [record.getMessage() for record in records]


@pytest.mark.skipif(native.unavailable() is not None, reason="needs the native kernels")
def test_of_weights_that_meet_the_same_activations_each_is_observed():
    observer, seen = calibration._Observer(jax.devices("cpu")[0]), []
    observer.begin(LAYER)
    observer._observed = lambda name, fn: lambda *x, **options: seen.append(name) or fn(*x, **options)
    matmuls(jnp.ones((2, 64), jnp.bfloat16), [jnp.ones((16, 64), jnp.bfloat16)] * 3, kernels=observer)
    assert seen == ["attention/q", "attention/k", "attention/v"]


def test_only_the_values_of_projections_differ_from_a_plain_conversion(conversion, tmp_path):
    checkpoint, folder, _ = conversion
    options = {"dtype": jnp.dtype("bfloat16"), "quantization": named_format("int4", GROUP)}
    plain = arrays(convert(checkpoint, tmp_path / "plain", show_progress=False, **options))
    fitted = arrays(open_store(folder))
    different = {path for path in plain if not np.array_equal(plain[path], fitted[path])}
    assert plain.keys() == fitted.keys()
    assert all(path.startswith("stages/") and path.endswith("/weight") for path in different)
    assert {path.split("/")[3] for path in different} >= {"attention"}


def test_a_store_says_what_it_was_fitted_to(conversion):
    checkpoint, folder, _ = conversion
    store = open_store(folder)
    assert store.config["quantization_config"]["calibration"] == {"text_sha256": "0", "num_tokens": 96}
    assert config_from_hf(dict(store.config)).layers[0].attention.formats
    with pytest.raises(CheckpointError, match="holds a store already"):
        calibrated(checkpoint, folder, seed=1)


def test_experts_that_saw_little_are_named(conversion):
    checkpoint, _, said = conversion
    has_experts = "gemma" not in checkpoint.config["model_type"]
    assert any(f"saw fewer than {calibration.MIN_ROWS} rows" in line for line in said) == has_experts


def test_a_short_text_is_refused_with_what_is_needed(tmp_path):
    (tmp_path / "text").write_text("one two three")
    with pytest.raises(ConfigError, match="at least 4,096 tokens, got 3"):
        calibration_text(tmp_path / "text", Words(), model_of(1024))


def test_windows_are_spread_over_the_text(tmp_path):
    (tmp_path / "text").write_text(" ".join("a" * (1 + i // 1000 % 7) for i in range(100_000)))
    text = calibration_text(tmp_path / "text", Words(), model_of(256))
    assert text.tokens.shape == (calibration.MAX_TOKENS // 256, 256)
    assert set(text.tokens.ravel().tolist()) == set(range(1, 8))


@pytest.mark.parametrize(
    ("tokenizer", "file", "message"),
    [
        (None, "text", "no|none"),
        (Words(), "absent", "cannot be read"),
        (Words(), "bytes", "bytes: expected a file of UTF-8 text"),
        (Words(), "zeros", "bytes of zero"),
        (Words(), "long", "makes token 300 of the text, but the model has 256 tokens"),
    ],
)
def test_a_text_that_cannot_be_tokens_is_refused(tokenizer, file, message, tmp_path):
    (tmp_path / "text").write_text("one two three")
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    (tmp_path / "zeros").write_bytes(bytes(100))
    (tmp_path / "long").write_text("a" * 300)
    with pytest.raises(ConfigError, match=message):
        calibration_text(tmp_path / file, tokenizer, model_of(1024))


def test_calibration_without_a_format_is_refused(fixture_checkpoints, tmp_path):
    checkpoint = open_checkpoint(fixture_checkpoints / "llama_default")
    with pytest.raises(ConfigError, match="--quantization"):
        convert(checkpoint, tmp_path / "store", calibrate=tmp_path / "text", show_progress=False)
