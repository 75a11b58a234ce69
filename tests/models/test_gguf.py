"""GGUF's types, formats and metadata: the numbers of the gguf package, and every refusal by name."""

from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest

from millrace.errors import CheckpointError, UnsupportedModelError
from millrace.models.config import ModelConfig
from millrace.models.families import config_from_hf
from millrace.models.families.gguf import ARCHITECTURES, Metadata, section_of
from millrace.models.families.gguf.blocks import BLOCK_TYPES
from millrace.models.families.gguf.formats import FORMATS, MAX_KINDS
from millrace.models.families.gguf.packing import Plain, Quantized
from millrace.models.families.published.scheme import parts
from millrace.models.families.quantization import KEY
from millrace.models.quantization import format_paths
from millrace.pallas_kernels.quantized_matmul import WeightFormat
from millrace.pallas_kernels.quantized_matmul.formats import dequantize_part

ROWS, BLOCKS = 8, 3


def random_blocks(name: str) -> np.ndarray:
    """[ROWS, BLOCKS] blocks of arbitrary bits, scales of either sign, one of them zero."""
    random, dtype = np.random.default_rng(0), BLOCK_TYPES[name].dtype
    blocks = random.integers(0, 256, (ROWS, BLOCKS * dtype.itemsize), np.uint8).view(dtype)
    for field in {"d", "m", "dmin"}.intersection(dtype.names or ()):
        blocks[field] = random.normal(size=blocks.shape)
    if "d" in (dtype.names or ()):
        blocks["d"][0, 0] = 0
    else:
        blocks["e"] = random.integers(100, 140, blocks.shape)
    return blocks


def dequantized(blocks: np.ndarray, format: WeightFormat, **options: Any) -> np.ndarray:
    arrays = {leaf: Quantized(leaf=leaf, format=format, **options).build([blocks]) for leaf in parts(format)}  # type: ignore[arg-type]
    shapes = {"weight": format.values_dtype, "scales": format.scales_dtype, "offsets": format.scales_dtype}
    for leaf, array in arrays.items():
        in_dim = BLOCKS * next(each for each in BLOCK_TYPES.values() if each.dtype == blocks.dtype).num_inputs
        assert array.dtype == shapes[leaf]
        assert array.shape == Quantized(leaf=leaf, format=format).shape([(ROWS, in_dim)])  # type: ignore[arg-type]
    assert np.all(arrays["scales"].astype(np.float32) != 0)
    whole = dequantize_part(arrays["weight"], arrays["scales"], None, None, arrays.get("offsets"), format=format)
    return np.asarray(whole)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_become_the_numbers_of_the_gguf_package(name: str) -> None:
    kind, blocks = BLOCK_TYPES[name], random_blocks(name)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (kind.num_inputs, kind.dtype.itemsize)
    wanted = gguf.quants.dequantize(blocks.view(np.uint8), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(dequantized(blocks, kind.format), wanted)
    np.testing.assert_array_equal(Plain().build([blocks]), wanted)


@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if name != "MXFP4"])
def test_a_common_format_holds_the_same_numbers(name: str) -> None:
    blocks = random_blocks(name)
    wanted = gguf.quants.dequantize(blocks.view(np.uint8), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(dequantized(blocks, FORMATS["int8_g16_offsets"]), wanted)


def test_rows_of_heads_come_back_in_order() -> None:
    rows = np.arange(12, dtype=np.float32)[:, None] * np.ones((1, 32), np.float32)
    interleaved = rows.reshape(2, 2, 3, 32).swapaxes(1, 2).reshape(12, 32)
    np.testing.assert_array_equal(Plain(head_dim=6).build([interleaved]), rows)
    kind = BLOCK_TYPES["Q8_0"]
    blocks = gguf.quants.quantize(interleaved, gguf.GGMLQuantizationType.Q8_0).view(kind.dtype)
    values = Quantized(leaf="scales", format=kind.format, head_dim=6).build([blocks])
    np.testing.assert_allclose(values[1:, 0] * 127, rows[1:, 0], rtol=1e-3)
    assert values[0] == 1  # of a row of zeros
    with pytest.raises(CheckpointError, match="whole heads of 6"):
        Plain(head_dim=6).shape([(8, 32)])


@pytest.mark.parametrize("leaf", ["scales", "offsets"])
def test_a_scale_that_is_not_finite_is_refused(leaf: Any) -> None:
    blocks = random_blocks("Q4_K")
    blocks["d" if leaf == "scales" else "dmin"][1, 1] = np.nan
    with pytest.raises(CheckpointError, match="finite scales were expected"):
        Quantized(leaf=leaf, format=BLOCK_TYPES["Q4_K"].format).build([blocks])
    with pytest.raises(CheckpointError, match="finite weights were expected"):
        Plain().build([blocks])


# ---- formats


def llama(num_layers: int) -> dict[str, Any]:
    """Rows of 256, where K-quants want them."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 16}
    return gguf_files.model_config("llama", num_hidden_layers=num_layers, **sizes)


def types_of(down: list[str], rest: str = "Q4_K") -> dict[str, str]:
    """Of every tensor, those of `down` layer by layer."""
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")
    types = {f"blk.{layer}.{name}.weight": rest for layer in range(len(down)) for name in names}
    types |= {f"blk.{layer}.ffn_down.weight": kind for layer, kind in enumerate(down)}
    return {**types, "output.weight": "Q6_K", "token_embd.weight": rest}


def section(types: dict[str, str], num_layers: int) -> dict[str, Any] | None:
    model = config_from_hf(llama(num_layers))
    return section_of(model, ARCHITECTURES["llama"].sources(model), types)


def with_section(down: list[str]) -> ModelConfig:
    return config_from_hf({**llama(len(down)), KEY: section(types_of(down), len(down))})


def test_layers_of_unlike_types_keep_their_own_formats() -> None:
    # As llama.cpp mixes Q4_K_M for 32 layers.
    more = [i < 4 or i >= 28 or (i - 4) % 3 == 2 for i in range(32)]
    found = with_section(["Q6_K" if each else "Q4_K" for each in more])
    downs = [dict(layer.mlp.formats)["down"].name for layer in found.layers]
    assert downs == ["q6_k" if each else "q4_k" for each in more]
    assert found.head_format == FORMATS["q6_k"]
    assert sum(len(stage.period) for stage in found.stages) == 5  # and not 32: runs of layers scan as they did


def test_too_many_kinds_of_layers_become_one_format_that_holds_all() -> None:
    kinds = np.random.default_rng(0).choice(["Q4_K", "Q5_K", "Q6_K", "Q8_0"], 24).tolist()
    found = with_section(kinds)
    assert len(set(kinds[:MAX_KINDS])) > 2
    assert set(format_paths(found).values()) == {FORMATS["int8_g16_offsets"], FORMATS["q4_k"], FORMATS["q6_k"]}
    assert len(found.stages) == 1


def test_plain_layers_and_quantized_ones_may_mix() -> None:
    made = section(types_of(["F16", "Q8_0"], "BF16"), 2)
    assert made == {"quant_method": "gguf", "formats": {"mlp/down": [None, "q8_0"], "head": "q6_k"}}
    layers = config_from_hf({**llama(2), KEY: made}).layers
    assert [dict(layer.mlp.formats) for layer in layers] == [{}, {"down": FORMATS["q8_0"]}]


def test_experts_of_their_own_are_of_one_type() -> None:
    config = gguf_files.model_config("mixtral", hidden_size=256, intermediate_size=256, num_attention_heads=16)
    model = config_from_hf(config)
    types = {f"blk.{layer}.ffn_gate.{expert}.weight": "Q4_K" for layer in range(2) for expert in range(4)}
    names = ARCHITECTURES["llama"].sources(model)
    assert section_of(model, names, types) == {"quant_method": "gguf", "formats": {"moe/gate": "q4_k"}}
    with pytest.raises(UnsupportedModelError, match=r"every expert of layer 1 in one type; moe/gate has .*Q4_K.*Q6_K"):
        section_of(model, names, {**types, "blk.1.ffn_gate.3.weight": "Q6_K"})


@pytest.mark.parametrize(
    "formats, message",
    [
        (None, "'formats' should be an object"),
        ({"mlp/down": "q9"}, "'formats' should be names of formats, which are q4_0"),
        ({"mlp/down": ["q8_0"] * 2 + [3]}, "'formats' should be names of formats"),
        ({"mlp/down": [None, "q8_0"]}, "'mlp/down' should have a format for each layer, but there are 2"),
        ({"attention/q": "q4_k"}, "attention/q .* cannot be quantized as q4_k"),
    ],
)
def test_a_section_that_makes_no_sense_is_named(formats: Any, message: str) -> None:
    config = gguf_files.model_config("llama", num_hidden_layers=3, hidden_size=72, head_dim=18)
    with pytest.raises(UnsupportedModelError, match=message):
        config_from_hf({**config, KEY: {"quant_method": "gguf", "formats": formats}})


# ---- metadata

LLAMA = {
    "block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


def read(architecture: str = "llama", tensors: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    values = {f"{architecture}.{key}": value for key, value in {**LLAMA, **keys}.items() if value is not None}
    shapes = {"token_embd.weight": (320, 64), **dict.fromkeys(tensors, (8,))}
    metadata = Metadata(
        {"general.architecture": architecture, **values}, shapes, lambda name: np.full(8, -1.0, np.float32), "file.gguf"
    )
    config = ARCHITECTURES[architecture].config(metadata)
    metadata.reader.finish()
    return config


def test_keys_become_a_config() -> None:
    model = config_from_hf(read(rope__freq_base=5e5, vocab_size=320, attention__head_count=[4, 4]))
    assert (model.family, model.vocab_size, model.num_layers, model.tie_embeddings) == ("llama", 320, 2, True)
    assert model.layers[0].attention.rope is not None and model.layers[0].attention.rope.theta == 5e5


def test_a_window_makes_a_mistral_and_experts_a_mixtral() -> None:
    assert config_from_hf(read(attention__sliding_window=32)).layers[0].attention.window == 32
    assert config_from_hf(read(expert_count=4, expert_used_count=2)).family == "mixtral"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block_count": None}, "lacks 'block_count'"),
        ({"block_count": 2**40}, "'block_count' should be a whole number from 1"),
        ({"block_count": 4000}, "'num_hidden_layers' should be at most 1024"),
        ({"attention__head_count": [4, 2]}, "'attention.head_count' should be a whole number"),
        ({"attention__head_count": 5}, "'embedding_length' should be a multiple of 5 heads"),
        ({"attention__value_length": 8}, "'attention.value_length' should be 16"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "should be a finite number above 0"),
        ({"rope__dimension_count": 8}, "'rope.dimension_count' should be 16"),
        ({"rope__scaling__type": "spiral"}, "'rope.scaling.type' should be none, linear, yarn, or longrope beside"),
        ({"rope__scaling__type": "longrope"}, "or longrope beside its two tensors of factors, but it is 'longrope'"),
        ({"rope__scaling__attn_factor": 2.0}, "'rope.scaling.attn_factor' should be 1.0"),
        ({"tensors": ("rope_factors_long.weight",)}, "expected a tensor rope_factors_short.weight"),
        ({"attention__temperature_scale": 0.1}, "does not implement .* 'attention.temperature_scale' is 0.1"),
        ({"tensors": ("rope_freqs.weight",)}, "rope_freqs.weight should hold 8 numbers above 0"),
    ],
)
def test_metadata_that_is_not_understood_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        config_from_hf(read(**changes))


def test_factors_are_read_for_any_architecture_and_beside_no_other_scaling() -> None:
    shapes = {"token_embd.weight": (320, 64), "rope_factors_long.weight": (8,), "rope_factors_short.weight": (8,)}
    values = {f"qwen2.{key}": value for key, value in LLAMA.items()}
    values |= {"general.architecture": "qwen2", "qwen2.rope.scaling.type": "longrope",
               "qwen2.rope.scaling.original_context_length": 32}  # fmt: skip
    metadata = Metadata(values, shapes, lambda name: np.full(8, 2.0 if "long" in name else 1.0, np.float32), "file")
    scaling = ARCHITECTURES["qwen2"].config(metadata)["rope_scaling"]
    assert (scaling["short_factor"], scaling["long_factor"]) == ([1.0] * 8, [2.0] * 8)
    metadata = Metadata({**values, "qwen2.rope.scaling.factor": 4.0}, shapes, lambda name: np.ones(8, np.float32), "")
    with pytest.raises(UnsupportedModelError, match=r"'rope.scaling.factor' should be 1.0 or null, but it is 4.0"):
        ARCHITECTURES["qwen2"].config(metadata)


def test_factors_may_be_of_any_type() -> None:
    blocks = np.zeros(1, BLOCK_TYPES["Q8_0"].dtype)
    blocks["d"], blocks["qs"] = 0.5, 4
    metadata = Metadata({}, {"rope_freqs.weight": (32,)}, lambda name: blocks, "file")
    assert metadata.factors("rope_freqs.weight", 32) == [2.0] * 32
    with pytest.raises(UnsupportedModelError, match="should hold 8 numbers above 0, .* it holds 32"):
        metadata.factors("rope_freqs.weight", 8)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_share_no_rows_of_a_tensor(name: str) -> None:
    names = ARCHITECTURES[name].sources(config_from_hf(llama(2)))
    sources = [source for spellings in names.values() for source in spellings]
    assert all(isinstance(source.packing, Plain) and len(source.names) == 1 for source in sources)
    assert len({(source.names, source.rows) for source in sources}) == len(sources)
