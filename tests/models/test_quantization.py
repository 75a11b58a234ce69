"""Which weights are quantized and how, read from a config.json and checked before anything is placed."""

from typing import Any

import jax.numpy as jnp
import pytest

from millrace import CheckpointError, ConfigError
from millrace.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, MoeSpec
from millrace.models.decoder import AbstractDecoder
from millrace.models.families import config_from_hf
from millrace.models.families.quantization import quantization_config, wanted_format
from millrace.models.partition import partition
from millrace.models.quantization import format_paths, named_format, uniformly, with_formats, without_formats
from millrace.pallas_kernels.quantized_matmul import FORMATS
from millrace.runtime.param_tree import flatten
from millrace.sharding.mesh import make_mesh

ATTENTION = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=16, scale=1.0, rope=None)
MOE = MoeSpec(num_experts=4, num_experts_per_token=2, mlp_dim=64)
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 96, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip


def model(mlp: MlpSpec | MoeSpec | None = None, *, tied: bool = False, num_layers: int = 2) -> ModelConfig:
    layers = (LayerSpec(attention=ATTENTION, mlp=mlp or MlpSpec(mlp_dim=256)),) * num_layers
    return ModelConfig(
        family="llama", vocab_size=64, embed_dim=128, layers=layers, max_context_len=32, tie_embeddings=tied
    )


def made(name: str, group: int | None = None, **fields: Any) -> ModelConfig:
    return with_formats(model(**fields), uniformly(named_format(name, group)))


def shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    specs, _ = flatten(AbstractDecoder(config, jnp.dtype("bfloat16")).specs)
    return {path: (spec.shape, str(spec.dtype)) for path, spec in specs.items()}


def test_projections_and_an_untied_head_get_arrays_of_their_format() -> None:
    found = shapes(made("int4"))
    assert found["stages/0/0/attention/k/weight"] == ((2, 32, 64), "uint8")
    assert found["stages/0/0/attention/k/scales"] == ((2, 32, 2), "bfloat16")
    assert found["stages/0/0/mlp/down/weight"] == ((2, 128, 128), "uint8")
    assert found["head/weight"] == ((64, 128), "int8") and found["head/scales"] == ((64, 1), "float32")
    assert found["embed/weight"] == ((64, 128), "bfloat16")
    assert found["final_norm/scale"] == ((128,), "bfloat16")


def test_experts_are_quantized_each_and_their_router_is_not() -> None:
    found = shapes(made("nvfp4", mlp=MOE))
    assert found["stages/0/0/moe/gate/weight"] == ((2, 4, 64, 64), "uint8")
    assert found["stages/0/0/moe/gate/scales"] == ((2, 4, 64, 8), "float8_e4m3fn")
    assert found["stages/0/0/moe/gate/global_scale"] == ((2, 4), "float32")
    assert found["stages/0/0/moe/router/weight"] == ((2, 4, 128), "bfloat16")


def test_a_tied_head_stays_the_embedding() -> None:
    config = made("int8", tied=True)
    assert config.head_format is None
    assert not any(path.startswith("head") for path in shapes(config))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_head_of_8_bits(name: str) -> None:
    head = uniformly(FORMATS[name])(None, "head")
    assert head is not None and head.bits == 8 and head.group is None


def test_layers_in_other_formats_are_other_layers() -> None:
    config = with_formats(model(num_layers=4), lambda layer, path: FORMATS["int8"] if layer != 3 else None)
    assert [(len(stage.period), stage.num_repeats) for stage in config.stages] == [(1, 3), (1, 1)]
    assert set(format_paths(config)) == {"head"} | {
        f"stages/0/0/{path}" for path in [*(f"attention/{p}" for p in "qkvo"), "mlp/gate", "mlp/up", "mlp/down"]
    }
    assert without_formats(config) == model(num_layers=4)


# ---- config.json


@pytest.mark.parametrize("name, group", [("int8", None), ("int4", 32), ("nvfp4", None), ("fp8_block", 64)])
def test_a_config_json_gives_the_formats_that_it_was_written_for(name: str, group: int | None) -> None:
    format = named_format(name, group)
    config = config_from_hf({**LLAMA, "quantization_config": quantization_config(format)})
    assert config == with_formats(config_from_hf(LLAMA), uniformly(format))
    assert config.layers[0].attention.formats[0] == ("q", format)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"quant_method": "spqr"}, "'quant_method' should be one of millrace"),
        ({"quant_method": "millrace"}, "lacks 'format'"),
        ({"quant_method": "millrace", "format": "int3"}, "'format' should be one of int8, int8_a16, fp8"),
        ({"quant_method": "millrace", "format": "int4", "group_size": 48}, "should be one of 32, 64, 128; got 48"),
        ({"quant_method": "millrace", "format": "int8", "twist": 1}, "'twist' is 1"),
        ({"quant_method": "millrace", "format": "int4", "group_size": 128}, "mlp/down .* 192 inputs do not divide"),
        ("int8", "should be a JSON object"),
    ],
)
def test_a_quantization_config_that_is_not_implemented_is_named(section: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_from_hf({**LLAMA, "quantization_config": section})


# ---- what is asked for


def test_an_unknown_format_is_answered_with_all() -> None:
    with pytest.raises(ConfigError, match=r"one of int8, int8_a16, fp8, .*nvfp4; got 'int5'"):
        named_format("int5")


@pytest.mark.parametrize(
    "name, message", [("int8", "left out: it has none"), ("mxfp4", "one of 32"), ("int4", "one of")]
)
def test_a_group_size_that_a_format_has_not_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"group_size of {name} should be {message}.*; got 48"):
        named_format(name, 48)


def test_a_width_that_groups_do_not_divide_is_named_with_the_sizes_that_fit() -> None:
    wide = LayerSpec(attention=ATTENTION, mlp=MlpSpec(mlp_dim=96))
    config = ModelConfig(family="llama", vocab_size=64, embed_dim=128, layers=(wide,), max_context_len=32)
    message = r"mlp/down \[out, in\] = \[128, 96\].*int4: its 96 inputs do not divide into groups of 64.*of 32 fits"
    with pytest.raises(ConfigError, match=message):
        with_formats(config, uniformly(FORMATS["int4"]))


def test_weights_that_are_quantized_otherwise_are_refused_with_both_names() -> None:
    config = {**LLAMA, "quantization_config": quantization_config(FORMATS["int8"])}
    with pytest.raises(ConfigError, match="folder: expected plain weights to quantize as int4.*'format': 'int8'"):
        wanted_format(config, "int4", None, "folder")
    assert wanted_format(config, "int8", None, "folder") is None  # they are so already
    assert wanted_format(config, None, None, "folder") is None
    assert wanted_format(LLAMA, "int4", 32, "folder") == named_format("int4", 32)


# ---- meshes


def test_a_mesh_that_splits_a_group_is_named() -> None:
    config = made("int4", 128)
    message = r"groups of 128 inputs of attention/o .heads. is 1, which does not split.*tensor of 2 .*mesh tensor=2"
    with pytest.raises(ConfigError, match=message):
        partition(config, make_mesh({"tensor": 2}))
    partition(made("int4", 64), make_mesh({"tensor": 2}))


def test_a_mesh_that_splits_a_block_of_outputs_is_named() -> None:
    config = made("fp8_block", 32)
    with pytest.raises(ConfigError, match=r"blocks of 32 outputs of attention/k .kv_heads. is 1, which does not split"):
        partition(config, make_mesh({"tensor": 2}))
    partition(config, make_mesh({"tensor": 4}))  # two heads are repeated there, whole
