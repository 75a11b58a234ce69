"""quantization_config and the tensors of published layouts: what is read, and what is refused by name."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from millrace import CheckpointError, UnsupportedModelError
from millrace.models.config import ModelConfig
from millrace.models.families import config_from_hf, tensor_plan
from millrace.models.families.published.packing import Blocks, PackedInputs, PackedOutputs, Powers, RowScales
from millrace.models.families.published.scheme import Modules
from millrace.pallas_kernels.quantized_matmul import FORMATS, WeightFormat
from millrace.runtime.checkpoint import open_checkpoint

ROOT = Path(__file__).parent.parent / "fixtures" / "quantized"
Q = "model.layers.0.self_attn.q_proj"

type Tensors = dict[str, np.ndarray]


def read_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ROOT / name / "config.json").read_text())
    return config


def changed(name: str, **changes: Any) -> dict[str, Any]:
    """The fixture's config with other values in its quantization_config."""
    config = read_config(name)
    return {**config, "quantization_config": {**config["quantization_config"], **changes}}


def regrouped(name: str, part: str, **changes: Any) -> dict[str, Any]:
    """The fixture's config with other values for its group's weights or input_activations."""
    config = copy.deepcopy(read_config(name))
    group = config["quantization_config"]["config_groups"]["group_0"]
    group[part] = {**(group[part] or {}), **changes}
    return config


def read_tensors(name: str) -> Tensors:
    checkpoint = open_checkpoint(ROOT / name)
    return {tensor: checkpoint.read(tensor) for tensor in checkpoint.tensor_names}


def build(config: dict[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    """Everything that is done with tensors before they are placed; the parts of layer 0 by their path."""
    built = {}
    for path, leaf in tensor_plan(config_from_hf(config), tensors, config).items():
        leaf.shape({name: tensor.shape for name, tensor in tensors.items()})
        for piece in leaf.pieces:
            piece.check_dtypes({name: tensors[name].dtype for name in piece.names})
            built.setdefault(path.removeprefix("stages/0/0/"), piece.build(tensors))
    return built


def formats(config: dict[str, Any]) -> set[WeightFormat]:
    model = config_from_hf(config)
    specs = [spec for layer in model.layers for spec in (layer.attention, layer.mlp)]
    return {format for spec in specs for _, format in spec.formats}


def test_formats_are_those_that_the_configs_describe() -> None:
    int4 = WeightFormat(name="int4", storage="uint4", group=32, scale="float16", zeros=True)
    assert formats(read_config("qwen2_awq")) == {int4}
    assert formats(read_config("llama_gptq")) == {dataclasses.replace(int4, zeros=False)}
    assert formats(read_config("qwen3_gptq_asymmetric")) == {dataclasses.replace(int4, scale="float32")}
    assert formats(read_config("mistral_gptq_8bit")) == {FORMATS["int8_a16"]}
    assert formats(read_config("phi3_packed")) == {dataclasses.replace(int4, scale="float32")}
    assert formats(read_config("llama_nvfp4")) == {FORMATS["nvfp4"]}
    assert formats(read_config("llama_fp8_channel")) == {FORMATS["fp8"]} == formats(read_config("llama_fp8_tensor"))
    assert formats(read_config("qwen3_int8_channel")) == {FORMATS["int8"]}
    assert formats(read_config("qwen3_fp8_block")) == {FORMATS["fp8_block"]}


def head_of(name: str) -> WeightFormat | None:
    model: ModelConfig = config_from_hf(read_config(name))
    return model.head_format


def test_a_head_is_quantized_only_where_the_config_says_so() -> None:
    assert head_of("llama_fp8_channel") == FORMATS["fp8"]
    assert head_of("qwen3_int8_channel") is None and head_of("qwen2_awq") is None and head_of("llama_gptq") is None


def test_listed_modules_stay_plain() -> None:
    layers = config_from_hf(read_config("qwen2_awq")).layers
    assert dict(layers[0].mlp.formats).keys() == {"gate", "up", "down"}
    assert dict(layers[1].mlp.formats).keys() == {"gate", "up"}


@pytest.mark.parametrize(
    ("entry", "module", "is_in"),
    [
        ("mlp.gate", "model.layers.3.mlp.gate", True),
        ("mlp.gate", "model.layers.3.mlp.gate_proj", False),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("model.layers.*.self_attn", "model.layers.7.self_attn.q_proj", True),
        ("model.layers.*.self_attn", "model.layers.7.mlp.self_attn", False),
        ("lm_head", "lm_head", True),
        ("q_proj", Q, True),
    ],
)
def test_a_listed_name_means_whole_parts_between_dots(entry: str, module: str, is_in: bool) -> None:
    assert (module in Modules(frozenset({entry}))) == is_in


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (changed("qwen2_awq", quant_method="aqlm"), "'quant_method' should be one of millrace, gguf, awq"),
        (changed("qwen2_awq", bits=3), "'bits' should be 4"),
        (changed("qwen2_awq", version="gemv"), "'version' should be 'gemm'"),
        (changed("qwen2_awq", zero_point=False), "'zero_point' should be true"),
        (changed("qwen2_awq", group_size=0), "'group_size' should be a whole number"),
        (changed("qwen2_awq", group_size=48), "attention/q .*64 inputs do not divide into groups of 48"),
        (changed("qwen2_awq", modules_to_not_convert="lm_head"), "a list of names of modules"),
        (changed("qwen2_awq", clip=True), "'clip' is true"),
        (changed("llama_gptq", bits=2), "'bits' should be 4 or 8"),
        (changed("llama_gptq", bits=8, sym=False), "'sym' should be true where 'bits' is 8"),
        (changed("llama_gptq", checkpoint_format="marlin"), "'checkpoint_format' should be one of gptq, gptq_v2"),
        (changed("llama_gptq", dynamic={"-:.*": {}}), "'dynamic' should be"),
        (changed("llama_gptq", modules_in_block_to_quantize=["q_proj"]), "a list of lists of names"),
        (changed("llama_fp8_tensor", fmt="e5m2"), "'fmt' should be 'e4m3'"),
        (changed("qwen3_fp8_block", weight_block_size=[128]), "two whole numbers above 0"),
        (changed("qwen3_fp8_block", weight_block_size=[96, 128]), "128 outputs do not divide into blocks of 96"),
        (changed("qwen3_fp8_block", activation_scheme="none"), "'activation_scheme' should be one of dynamic, static"),
        (changed("phi3_packed", format="marlin-24"), "packed integers .*got .*'format' 'marlin-24'"),
        (
            changed("llama_gptq", checkpoint_format="gptq", format="gptq_v2"),
            "contradicts itself: .*'format' is 'gptq_v2'",
        ),
        (changed("llama_gptq", hyb_act=True), "'hyb_act' should be false"),
        (changed("qwen2_awq", format="marlin"), "'format' should be 'gemm'"),
        (changed("qwen2_awq", lm_head=True), "'lm_head' should be false"),
        (changed("phi3_packed", ignore=["re:(a+)+$"]), "no repeated group"),
        (changed("phi3_packed", ignore=["re:" + ".?" * 60 + "X"]), "at most 4,096 characters, 4 repetitions"),
        (changed("phi3_packed", ignore=["re:" + "(a|a)" * 60 + "X"]), "with many choices"),
        (changed("phi3_packed", ignore=[f"re:.*.*.*.*({'|' * 120})({'|' * 120})X"]), "with many choices"),
        (changed("phi3_packed", format=["pack-quantized"]), "'format' should be the name of a layout"),
        (regrouped("phi3_packed", "weights", type={}), "'type' should be one of int, float"),
        (regrouped("phi3_packed", "weights", num_bits=[8]), "'num_bits' should be a whole number"),
        (changed("phi3_packed", ignore=["re:["]), "names and patterns"),
        (changed("phi3_packed", sparsity_config={"format": "sparse-24-bitmask"}), "'format' should be 'dense'"),
        (changed("phi3_packed", transform_config={"config_groups": {"R1": {}}}), "'transform_config' should be"),
        (changed("phi3_packed", config_groups={}), "an object of at least one group"),
        (regrouped("phi3_packed", "weights", num_bits=3), "got 'type' 'int', 'num_bits' 3"),
        (regrouped("phi3_packed", "weights", actorder="group"), "'actorder' should be"),
        (regrouped("qwen3_int8_channel", "weights", symmetric=False), "'symmetric' False"),
        (regrouped("qwen3_int8_channel", "input_activations", num_bits=6), "'num_bits' should be 8"),
    ],
)
def test_an_unknown_scheme_is_refused_by_name(config: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UnsupportedModelError, match=wanted):
        config_from_hf(config)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("llama_gptq", {"format": "gptq", "hyb_act": False, "v2": False, "v2_alpha": 0.25, "lm_head": False}),
        ("llama_gptq", {"iters": 200, "nsamples": 128, "seqlen": 2048, "autoround_version": "0.5", "data_type": "int"}),
        (
            "qwen2_awq",
            {"format": "gemm", "checkpoint_format": "gemm", "desc_act": False, "meta": {"damp_percent": 0.1}},
        ),
        ("qwen2_awq", {"lm_head": False, "pack_dtype": "int32", "sym": False, "dynamic": {}}),
        ("phi3_packed", {"sparsity_config": {"format": "dense", "global_sparsity": 0.1, "targets": []}}),
        ("phi3_packed", {"transform_config": {"config_groups": {}}}),
        ("phi3_packed", {"ignore": [rf"re:nothing\.({'|'.join(map(str, range(80)))})\.mlp\.down_proj$"]}),
    ],
)
def test_what_tools_write_beside_the_format_changes_nothing(name: str, written: dict[str, Any]) -> None:
    assert formats(changed(name, **written)) == formats(read_config(name))


def test_the_group_that_names_a_module_most_closely_is_its_own() -> None:
    """As compressed-tensors has it: by name, by pattern, and last by class; the order of groups is that of the file."""
    config = read_config("phi3_packed")
    groups = config["quantization_config"]["config_groups"]
    every = next(iter(groups.values()))
    by_pattern = {**every, "targets": [r"re:.*down_proj$"], "weights": {**every["weights"], "num_bits": 8}}
    by_pattern["weights"] |= {"symmetric": True}
    config["quantization_config"]["config_groups"] = {"group_0": every, "group_1": by_pattern}
    found = dict(config_from_hf(config).layers[1].mlp.formats)
    assert found["down"].name == "int8_a16" and found["gate"].name == found["up"].name == "int4"


def test_experts_that_differ_are_refused() -> None:
    config = changed("qwen3_moe_gptq", quant_method="awq", sym=None, desc_act=None, damp_percent=None)
    config["quantization_config"]["modules_to_not_convert"] = ["model.layers.1.mlp.experts.2.up_proj"]
    with pytest.raises(UnsupportedModelError, match="every expert of a layer in one format"):
        config_from_hf(config)


def test_static_scales_of_activations_are_said_to_be_unused(caplog: pytest.LogCaptureFixture) -> None:
    tensors = read_tensors("llama_fp8_tensor")
    assert f"{Q}.input_scale" in tensors
    build(read_config("llama_fp8_tensor"), tensors)
    assert "static scales (input_scale), which are not used" in caplog.text
    build(read_config("llama_fp8_channel"), read_tensors("llama_fp8_channel"))
    assert caplog.text.count("not used") == 1


def test_scales_of_a_cache_are_left_where_they_are(caplog: pytest.LogCaptureFixture) -> None:
    config, tensors = changed("qwen3_int8_channel", kv_cache_scheme={"num_bits": 8}), read_tensors("qwen3_int8_channel")
    tensors["model.layers.0.self_attn.k_scale"] = np.ones(1, np.float32)
    build(config, tensors)
    assert "kv_cache_dtype says how the cache is kept" in caplog.text


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, value: Any) -> Callable[[Tensors], None]:
    """The tensor with another first value."""

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[:1] = value

    return change


def replace(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


@pytest.mark.parametrize(
    ("name", "change", "wanted"),
    [
        ("qwen2_awq", drop(f"{Q}.scales"), rf"no tensor {Q}\.scales, from which .*q/scales is made"),
        ("qwen2_awq", drop(f"{Q}.qzeros"), rf"no tensor {Q}\.qzeros"),
        ("qwen2_awq", put(f"{Q}.scales", 0), rf"{Q}\.scales: scales should be finite and not zero"),
        ("qwen2_awq", put(f"{Q}.scales", np.nan), rf"{Q}\.scales: scales should be finite"),
        ("qwen2_awq", put(f"{Q}.scales", np.inf), rf"{Q}\.scales: scales should be finite"),
        ("qwen2_awq", replace(f"{Q}.qweight", lambda w: w.astype(np.int16)), r"qweight: expected int32 or uint32; got"),
        ("qwen2_awq", replace(f"{Q}.scales", lambda w: w[..., None]), r"scales: two axes were expected"),
        ("qwen2_awq", replace(f"{Q}.qweight", lambda w: w[:-1]), r"qweight: an even number of inputs was expected"),
        ("llama_gptq", put(f"{Q}.g_idx", 1), r"g_idx.*: inputs were expected in the order of their groups"),
        ("llama_gptq", replace(f"{Q}.g_idx", lambda w: w[:-1]), r"g_idx.*\[64\] was expected .*shape is \[63\]"),
        ("llama_gptq", replace(f"{Q}.qzeros", lambda w: w[:, :-1]), r"qzeros.*was expected beside these scales"),
        ("llama_gptq", put(f"{Q}.qzeros", 0), r"qzeros.*'sym': true, so all zero points should be 8"),
        ("llama_gptq", put(f"{Q}.bias", 1), r"bias: a bias of zeros was expected"),
        ("qwen3_moe_gptq", put(f"{Q}.qzeros", -1), r"qzeros: a stored zero point of 15 stands for 16 or for 0"),
        ("llama_nvfp4", put(f"{Q}.weight_global_scale", 0), r"weight_global_scale: scales should be finite"),
        ("llama_nvfp4", drop(f"{Q}.weight_global_scale"), r"no tensor .*weight_global_scale"),
        ("qwen3_fp8_block", drop(f"{Q}.weight_scale_inv"), r"no tensor .*weight_scale_inv and no .*weight_scale,"),
        ("llama_fp8_tensor", replace(f"{Q}.weight_scale", lambda w: np.ones(3, w.dtype)), "should be laid out"),
    ],
)
def test_tensors_that_cannot_be_right_are_named(name: str, change: Callable[[Tensors], None], wanted: str) -> None:
    tensors = read_tensors(name)
    change(tensors)
    with pytest.raises(CheckpointError, match=wanted):
        build(read_config(name), tensors)


@pytest.mark.parametrize("dropped", [(), (".bias",), (".g_idx",), (".bias", ".g_idx")])
def test_gptq_is_read_with_and_without_what_versions_of_its_tools_write(dropped: tuple[str, ...]) -> None:
    config, tensors = read_config("llama_gptq"), read_tensors("llama_gptq")
    fewer = {name: tensor for name, tensor in tensors.items() if not name.endswith(dropped or "nothing")}
    np.testing.assert_array_equal(build(config, fewer)["attention/q/scales"], tensors[f"{Q}.scales"].T)


def test_symmetric_gptq_may_store_its_zero_points_either_way() -> None:
    config, tensors = read_config("llama_gptq"), read_tensors("llama_gptq")
    eights = {n: np.full_like(t, 0x8888_8888 - 2**32) if n.endswith("qzeros") else t for n, t in tensors.items()}
    np.testing.assert_array_equal(*(build(config, each)["attention/q/weight"] for each in (tensors, eights)))


def test_scales_that_the_store_cannot_hold_are_refused() -> None:
    config, tensors = read_config("llama_gptq"), read_tensors("llama_gptq")
    tensors[f"{Q}.scales"] = tensors[f"{Q}.scales"].astype(np.float32) * 1e-12
    with pytest.raises(CheckpointError, match="once they are float16"):
        build(config, tensors)


def test_inputs_in_words_lie_lowest_first() -> None:
    words = np.asarray([[0x7654_3210]], np.int32)
    np.testing.assert_array_equal(PackedInputs(bits=4).build([words]), [[0x10, 0x32, 0x54, 0x76]])
    np.testing.assert_array_equal(PackedInputs(bits=8).build([words]), [[-112, -78, -44, -10]])
    np.testing.assert_array_equal(PackedInputs(bits=4, words_first=True).build([words.T]), [[16, 50, 84, 118]])


def test_awq_words_hold_even_outputs_before_odd_ones() -> None:
    two_inputs = np.asarray([[0x7531_6420], [0x0000_000F]], np.int32)
    values = PackedOutputs(order=(0, 4, 1, 5, 2, 6, 3, 7)).build([two_inputs])
    np.testing.assert_array_equal(values[:, 0], [0xF0, 1, 2, 3, 4, 5, 6, 7])


def test_blocks_of_gpt_oss_are_read_as_they_lie() -> None:
    blocks = np.arange(2 * 3 * 2 * 16, dtype=np.uint8).reshape(2, 3, 2, 16)
    np.testing.assert_array_equal(Blocks().build([blocks]), blocks.reshape(2, 3, 32))
    with pytest.raises(CheckpointError, match=r"\[experts, out, groups, 16\] was expected"):
        Blocks().shape([(2, 3, 2, 8)])


def test_a_power_that_is_not_a_number_is_refused() -> None:
    assert Powers().build([np.asarray([[127]], np.uint8)]).astype(float) == 1
    with pytest.raises(CheckpointError, match="an exponent of 255"):
        Powers().build([np.asarray([[127, 255]], np.uint8)])


def test_one_scale_serves_all_rows_and_scales_of_rows_are_cut_with_them() -> None:
    one, many = np.asarray([2.0], np.float32), np.arange(1, 7, dtype=ml_dtypes.bfloat16)[:, None]
    packing = RowScales(num_rows=2, rows=slice(4, None))
    np.testing.assert_array_equal(packing.build([one]), [[2], [2]])
    np.testing.assert_array_equal(packing.build([many]), [[5], [6]])
    assert packing.shape([(1,)]) == packing.shape([(6, 1)]) == packing.shape([(6,)]) == (2, 1)
