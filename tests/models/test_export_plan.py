"""The way back of the committed checkpoints: their names and shapes, each filled once; a config of the same model."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from millrace.models.config import ModelConfig
from millrace.models.decoder import AbstractDecoder
from millrace.models.families import config_from_hf, tensor_plan
from millrace.models.families.export import export_config, export_plan
from millrace.models.families.source import Source
from millrace.models.quantization import without_formats

CHECKPOINTS = Path(__file__).parent.parent / "fixtures" / "checkpoints"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir())
SPELLED_ANEW = {"gemma3_nested", "gpt_oss_mxfp4"}  # part of a multimodal model; packed


def read_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CHECKPOINTS / name / "config.json").read_text())
    return config


def read_model(name: str) -> ModelConfig:
    """As it is exported: plain."""
    return without_formats(config_from_hf(read_config(name)))


def read_shapes(name: str) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path in (CHECKPOINTS / name).glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    return shapes


def leaf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    specs = AbstractDecoder(model, jnp.dtype("float32")).specs
    leaves = jax.tree.leaves_with_path(specs, is_leaf=lambda node: not isinstance(node, dict))
    return {"/".join(key.key for key in path): spec.shape for path, spec in leaves}


def exported_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in export_plan(model, leaf_shapes(model))}


def without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SPELLED_ANEW])
def test_tensors_have_the_names_and_shapes_of_the_published_checkpoint(name: str) -> None:
    assert exported_shapes(read_model(name)) == read_shapes(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_of_a_tensor_fill_every_element_once(name: str) -> None:
    model = read_model(name)
    shapes = leaf_shapes(model)
    for tensor in export_plan(model, shapes):
        times = np.zeros(tensor.shape, np.int8)
        for part in tensor.parts:
            place = part.place(times)
            assert place.shape == shapes[part.path][len(part.index) :]
            place += 1
        assert (times == 1).all(), tensor.name


@pytest.mark.parametrize("name", NAMES)
def test_every_part_of_every_parameter_is_exported_once(name: str) -> None:
    model = read_model(name)
    shapes = leaf_shapes(model)
    found = [(part.path, part.index) for tensor in export_plan(model, shapes) for part in tensor.parts]
    plan = tensor_plan(model, exported_shapes(model))
    assert sorted(found) == sorted((path, piece.index) for path, leaf in plan.items() for piece in leaf.pieces)


def test_packed_experts_become_plain_ones() -> None:
    model = read_model("gpt_oss_mxfp4")
    mlp, names = model.layers[0].mlp, exported_shapes(model)
    assert names["model.layers.0.mlp.experts.gate_up_proj"] == (6, model.embed_dim, 2 * mlp.mlp_dim)
    assert not any(name.endswith(("_blocks", "_scales")) for name in names)


def test_the_text_part_of_a_multimodal_model_becomes_a_model_of_its_own() -> None:
    model = config_from_hf(read_config("gemma3_nested"))
    plain = {name.removeprefix("language_model."): shape for name, shape in read_shapes("gemma3_nested").items()}
    assert exported_shapes(model) == {name: shape for name, shape in plain.items() if name.startswith("model.")}


def test_layers_come_in_the_order_of_their_numbers() -> None:
    config = {**read_config("llama_default"), "num_hidden_layers": 11}
    names = list(exported_shapes(config_from_hf(config)))
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)


def test_a_part_is_placed_where_its_source_reads_it() -> None:
    tensor = np.zeros((2, 3, 4), np.float32)
    source = Source(names=("x",), transpose=True, axis=1, rows=slice(1, None, 2))
    values = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    source.build([tensor])[...] = values
    np.testing.assert_array_equal(tensor[:, :, 1::2], np.swapaxes(values, 1, 2))
    assert not tensor[:, :, ::2].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_config_describes_the_same_model_in_the_exported_dtype(name: str) -> None:
    exported = config_from_hf(export_config(read_config(name), "float16"))
    assert exported == dataclasses.replace(read_model(name), dtype="float16")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SPELLED_ANEW])
def test_all_but_the_dtype_of_a_plain_config_stays(name: str) -> None:
    config = read_config(name)
    (key,) = {"dtype", "torch_dtype"} & config.keys()
    assert export_config(config, "float16") == {**config, key: "float16"}


def test_a_config_without_a_dtype_gets_one() -> None:
    config = without(read_config("llama_default"), "dtype", "torch_dtype")
    assert export_config(config, "bfloat16") == {**config, "dtype": "bfloat16"}


def test_neither_packing_nor_code_is_named() -> None:
    config = {**read_config("gpt_oss_mxfp4"), "auto_map": {"AutoModel": "code.Model"}}
    assert export_config(config, "bfloat16") == without(config, "quantization_config", "auto_map")


def test_the_config_of_a_text_part_names_no_other_part() -> None:
    config = read_config("gemma3_nested")
    exported = export_config(config, "bfloat16")
    assert exported["model_type"] == "gemma3_text" and exported["architectures"] == ["Gemma3ForCausalLM"]
    assert exported["eos_token_id"] == config["eos_token_id"]
    assert not {"text_config", "vision_config", "image_token_index"} & exported.keys()
