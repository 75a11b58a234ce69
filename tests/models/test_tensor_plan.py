"""The plans of the committed checkpoints: every tensor read, every parameter made, and how tensors are laid out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from millrace import CheckpointError
from millrace.models.config import MoeSpec
from millrace.models.decoder import AbstractDecoder
from millrace.models.families import FAMILIES, config_from_hf, tensor_plan
from millrace.models.families.source import Source

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = sorted(path.name for path in (FIXTURES / "checkpoints").iterdir())
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


def read_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FIXTURES / "checkpoints" / name / "config.json").read_text())
    return config


def read_tensors(name: str) -> dict[str, np.ndarray]:
    tensors = {}
    for path in (FIXTURES / "checkpoints" / name).glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}
    return tensors


def shapes_of(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_makes_every_parameter_of_the_decoder_in_its_shape(name: str) -> None:
    config, tensors = config_from_hf(read_config(name)), read_tensors(name)
    shapes = {
        path: leaf.shape(shapes_of(tensors)) for path, leaf in tensor_plan(config, tensors, read_config(name)).items()
    }
    specs = AbstractDecoder(config, jnp.dtype("float32")).specs
    leaves = jax.tree.leaves_with_path(specs, is_leaf=lambda node: not isinstance(node, dict))
    assert shapes == {"/".join(key.key for key in path): spec.shape for path, spec in leaves}


@pytest.mark.parametrize("name", NAMES)
def test_the_pieces_have_the_shapes_that_were_planned_and_fill_the_leaf_once(name: str) -> None:
    tensors = read_tensors(name)
    for leaf in tensor_plan(config_from_hf(read_config(name)), tensors, read_config(name)).values():
        shape = leaf.shape(shapes_of(tensors))
        leading = shape[: len(leaf.pieces[0].index)]
        assert [piece.index for piece in leaf.pieces] == list(np.ndindex(leading))
        assert {piece.build(tensors).shape for piece in leaf.pieces} == {shape[len(leading) :]}


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_the_checkpoint_is_read(name: str) -> None:
    tensors = read_tensors(name)
    plan = tensor_plan(config_from_hf(read_config(name)), tensors, read_config(name))
    used = {tensor for leaf in plan.values() for piece in leaf.pieces for tensor in piece.names}
    assert set(tensors) - used == {tensor for tensor in tensors if tensor.startswith("vision_tower.")}


@pytest.mark.parametrize("name", [name for name in NAMES if "mxfp4" not in name])
def test_every_element_of_the_read_tensors_is_placed_once(name: str) -> None:
    tensors = {key: np.arange(value.size).reshape(value.shape) for key, value in read_tensors(name).items()}
    plan = tensor_plan(config_from_hf(read_config(name)), tensors, read_config(name))
    placed: dict[str, list[np.ndarray]] = {}
    for piece in (piece for leaf in plan.values() for piece in leaf.pieces):
        placed.setdefault(piece.names[0], []).append(piece.build(tensors).reshape(-1))
    for key, parts in placed.items():
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(tensors[key].size))


def llama_names(config: dict[str, Any] = LLAMA) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of `config` holds, without its values."""
    model, names = config_from_hf(config), {}
    for source in (source for sources in FAMILIES["llama"].sources(model).values() for source in sources):
        names |= dict.fromkeys(name for layer in range(model.num_layers) for name in source.resolve(layer))
    return {name: () for name in names if not name.endswith((".bias", "q_norm.weight", "k_norm.weight"))}


def test_a_missing_tensor_is_named() -> None:
    names = llama_names()
    del names["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        tensor_plan(config_from_hf(LLAMA), names)


def test_tensors_that_are_left_over_are_named() -> None:
    extra = {"model.layers.3.mlp.up_proj.weight": (), "model.layers.0.self_attn.q_proj.bias": ()}
    with pytest.raises(CheckpointError, match=r"does not read: model\.layers\.0\.self_attn\.q_proj\.bias, model"):
        tensor_plan(config_from_hf(LLAMA), {**llama_names(), **extra})


def test_constants_and_the_copy_of_a_tied_embedding_may_be_left_over() -> None:
    names = {**llama_names(), "model.layers.0.self_attn.rotary_emb.inv_freq": ()}
    assert "head/weight" in tensor_plan(config_from_hf(LLAMA), names)
    assert "head/weight" not in tensor_plan(config_from_hf({**LLAMA, "tie_word_embeddings": True}), names)


def test_a_layer_unlike_its_siblings_is_named() -> None:
    plan = tensor_plan(config_from_hf(LLAMA), llama_names())
    leaf = plan["stages/0/0/mlp/up/weight"]
    shapes = {name: (64, 32) for piece in leaf.pieces for name in piece.names}
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight should be laid out"):
        leaf.shape({**shapes, "model.layers.2.mlp.up_proj.weight": (64, 31)})


@pytest.mark.parametrize("name", ["mixtral_default", "qwen3_moe_norm"])
def test_stacked_experts_give_what_single_ones_give(name: str) -> None:
    config, single = config_from_hf(read_config(name)), read_tensors(name)
    module = "block_sparse_moe" if name.startswith("mixtral") else "mlp"
    gate, up, down = ("w1", "w3", "w2") if name.startswith("mixtral") else ("gate_proj", "up_proj", "down_proj")
    stacked = {key: value for key, value in single.items() if ".experts." not in key}
    for layer in range(config.num_layers):
        experts = f"model.layers.{layer}.{module}.experts."

        def stack(projection: str, experts: str = experts) -> np.ndarray:
            spec = config.layers[0].mlp
            assert isinstance(spec, MoeSpec)
            return np.stack([single[f"{experts}{e}.{projection}.weight"] for e in range(spec.num_experts)])

        stacked[experts + "gate_up_proj"] = np.concatenate([stack(gate), stack(up)], axis=1)
        stacked[experts + "down_proj"] = stack(down)
    plans = tensor_plan(config, single), tensor_plan(config, stacked)
    for path in plans[0]:
        wholes = []
        for plan, tensors in zip(plans, (single, stacked), strict=True):
            whole = np.zeros(plan[path].shape(shapes_of(tensors)), np.float32)
            for piece in plan[path].pieces:
                whole[piece.index] = piece.build(tensors)
            wholes.append(whole)
        np.testing.assert_array_equal(*wholes)


def test_a_tensor_with_too_few_axes_is_refused() -> None:
    with pytest.raises(CheckpointError, match="too few axes"):
        Source(names=("weight",), transpose=True, axis=1).shape([(4,)])
