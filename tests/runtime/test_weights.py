"""Weights arrive on the mesh as they are on disk; a checkpoint unlike its config is refused before any is placed."""

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from millrace.errors import CheckpointError
from millrace.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, RopeSpec
from millrace.models.families.plan import LeafPlan, Piece
from millrace.models.families.source import Source
from millrace.runtime import weights
from millrace.runtime.checkpoint import open_checkpoint
from millrace.runtime.param_tree import flatten
from millrace.runtime.store import open_store
from millrace.runtime.store_writer import save_store
from millrace.runtime.weights import checkpoint_leaves, load_params, place_leaves, store_leaves
from millrace.sharding.mesh import make_mesh
from millrace.sharding.rules import Placement
from millrace.sharding.specs import ParamSpec

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
NUM_LAYERS, EMBED, MLP = 3, 4, 6
random = np.random.default_rng(0)
TENSORS = {
    "embed": random.normal(size=(8, EMBED)).astype(np.float32),
    **{f"up.{layer}": random.normal(size=(MLP, EMBED)).astype(np.float32) for layer in range(NUM_LAYERS)},
    # Stored as [in, out], so its plan turns it round; two experts per layer.
    **{f"moe.{layer}.{e}": random.normal(size=(EMBED, MLP)).astype(np.float32) for layer in range(3) for e in range(2)},
}
PLAN = {
    "embed": LeafPlan(pieces=(Piece(index=(), names=("embed",), source=Source(names=("embed",))),)),
    "up": LeafPlan(
        pieces=tuple(
            Piece(index=(layer,), names=(f"up.{layer}",), source=Source(names=("up.{layer}",)))
            for layer in range(NUM_LAYERS)
        )
    ),
    "moe": LeafPlan(
        pieces=tuple(
            Piece(index=(layer, e), names=(f"moe.{layer}.{e}",), source=Source(names=("moe.{layer}",), transpose=True))
            for layer in range(NUM_LAYERS)
            for e in range(2)
        )
    ),
}
EXPECTED = {
    "embed": TENSORS["embed"],
    "up": np.stack([TENSORS[f"up.{layer}"] for layer in range(NUM_LAYERS)]),
    "moe": np.stack([np.stack([TENSORS[f"moe.{layer}.{e}"].T for e in range(2)]) for layer in range(NUM_LAYERS)]),
}


def make_specs(dtype=F32):
    return {
        "embed": ParamSpec((8, EMBED), dtype, ("vocab", "embed")),
        "up": ParamSpec((NUM_LAYERS, MLP, EMBED), dtype, ("layers", "mlp", "embed")),
        "moe": ParamSpec((NUM_LAYERS, 2, MLP, EMBED), dtype, ("layers", "experts", "mlp", "embed")),
    }


def make_checkpoint(path, tensors=None):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    save_file(TENSORS if tensors is None else tensors, path / "model.safetensors")
    return open_checkpoint(path)


def place(leaves):
    return place_leaves(list(leaves), Placement(make_mesh()), show_progress=False)


@pytest.fixture(params=["put together on the host", "part by part"])
def way(request, monkeypatch):
    """Small leaves and large ones take different ways."""
    if request.param == "part by part":
        monkeypatch.setattr(weights, "_SMALL_BYTES", 0)


def equals(placed, expected=EXPECTED, dtype=F32):
    assert placed.keys() == expected.keys()
    for name, values in expected.items():
        assert placed[name].dtype == dtype
        np.testing.assert_array_equal(np.asarray(placed[name]), values.astype(dtype))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.usefixtures("way")
def test_checkpoint_is_placed_in_the_dtype_asked_for(dtype, tmp_path):
    equals(place(checkpoint_leaves(make_checkpoint(tmp_path), PLAN, make_specs(dtype))), dtype=dtype)


def test_bfloat16_widens_exactly(tmp_path):
    narrow = {name: values.astype(BF16) for name, values in TENSORS.items()}
    placed = place(checkpoint_leaves(make_checkpoint(tmp_path, narrow), PLAN, make_specs(F32)))
    equals(placed, {name: values.astype(BF16) for name, values in EXPECTED.items()})


def test_value_that_overflows_the_new_dtype_is_refused(tmp_path):
    tensors = TENSORS | {"up.1": np.full((MLP, EMBED), 1e30, np.float32)}
    with pytest.raises(CheckpointError, match="up, converted from float32 to float16, should hold finite"):
        place(checkpoint_leaves(make_checkpoint(tmp_path, tensors), PLAN, make_specs(F16)))


def test_nan_is_refused_and_its_tensor_named(tmp_path):
    tensors = TENSORS | {"moe.1.0": np.full((EMBED, MLP), np.nan, np.float32)}
    with pytest.raises(CheckpointError, match="'moe.1.0' should hold finite"):
        place(checkpoint_leaves(make_checkpoint(tmp_path, tensors), PLAN, make_specs()))


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("up.2", (MLP, EMBED + 1), r"up.2: config.json asks for \[6, 4\] in up; the checkpoint has \[6, 5\]\."),
        ("moe.1.0", (MLP, EMBED), r"moe.1.0: .* \[6, 4\] in moe; the checkpoint has \[6, 4\], which makes \[4, 6\]"),
        ("embed", (7, EMBED), r"embed: config.json asks for \[8, 4\] in embed; the checkpoint has \[7, 4\]"),
    ],
)
def test_shape_unlike_the_config_is_refused_before_anything_is_read(name, shape, message, tmp_path):
    checkpoint = make_checkpoint(tmp_path, TENSORS | {name: np.full(shape, np.nan, np.float32)})
    with pytest.raises(CheckpointError, match=message):
        list(checkpoint_leaves(checkpoint, PLAN, make_specs()))


def test_integers_for_floats_are_refused_before_anything_is_read(tmp_path):
    checkpoint = make_checkpoint(tmp_path, TENSORS | {"up.1": np.ones((MLP, EMBED), np.int8)})
    with pytest.raises(CheckpointError, match=r"up.1: expected floating-point weights; got int8"):
        list(checkpoint_leaves(checkpoint, PLAN, make_specs()))


def test_plan_that_lacks_a_parameter_is_refused(tmp_path):
    plan = {path: leaf for path, leaf in PLAN.items() if path != "up"}
    with pytest.raises(CheckpointError, match=r"it lacks \['up'\]"):
        list(checkpoint_leaves(make_checkpoint(tmp_path), plan, make_specs()))


MODEL = ModelConfig(
    family="llama",
    vocab_size=8,
    embed_dim=EMBED,
    max_context_len=8,
    layers=(
        LayerSpec(
            attention=AttentionSpec(
                num_heads=2, num_kv_heads=1, head_dim=2, scale=1.0, rope=RopeSpec(theta=1e4, rotary_dim=2)
            ),
            mlp=MlpSpec(mlp_dim=MLP),
        ),
    )
    * 2,
)


def save(path, params):
    """A store of these arrays, stacked ones with a chunk for each layer."""
    axes = {2: ("mlp", "embed"), 3: ("layers", "mlp", "embed"), 4: ("layers", "experts", "mlp", "embed")}
    specs = jax.tree.map(lambda a: ParamSpec(a.shape, a.dtype, axes[a.ndim]), params)
    save_store(path, params, specs, {}, {})


def load_store(path, specs=None):
    return load_params(open_store(path), MODEL, specs or make_specs(), Placement(make_mesh()), show_progress=False)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by layer"])
def test_store_is_placed_in_the_dtype_asked_for(dtype, whole, tmp_path):
    save(tmp_path / "store", EXPECTED)
    leaves = list(store_leaves(open_store(tmp_path / "store"), make_specs(dtype), whole=whole))
    equals(place(leaves), dtype=dtype)


def test_loading_stops_where_it_is_told_to(tmp_path):
    def stop():
        raise KeyboardInterrupt

    save(tmp_path / "store", EXPECTED)
    with pytest.raises(KeyboardInterrupt):
        load_params(
            open_store(tmp_path / "store"), MODEL, make_specs(), Placement(make_mesh()), show_progress=False,
            on_part=stop,
        )  # fmt: skip


def test_store_with_another_shape_is_refused(tmp_path):
    save(tmp_path / "store", EXPECTED | {"up": EXPECTED["up"][:2]})
    with pytest.raises(CheckpointError, match=r"asks for \[3, 6, 4\] in up; the store has \[2, 6, 4\]"):
        load_store(tmp_path / "store")


def test_store_of_other_kinds_of_number_is_refused(tmp_path):
    save(tmp_path / "store", EXPECTED | {"up": EXPECTED["up"].astype(np.int8)})
    with pytest.raises(CheckpointError, match="expected up as float32; the store has int8"):
        load_store(tmp_path / "store")


def test_store_of_other_parameters_is_refused(tmp_path):
    save(tmp_path / "store", {"embed": EXPECTED["embed"], "down": EXPECTED["up"]})
    with pytest.raises(CheckpointError, match=r"it lacks \['moe', 'up'\] and has besides \['down'\]"):
        load_store(tmp_path / "store")


def test_load_params_has_the_tree_of_its_specs(tmp_path):
    nested = {"a": {"embed": EXPECTED["embed"]}, "b": {"0": {"up": EXPECTED["up"]}}}
    specs = {"a": {"embed": make_specs()["embed"]}, "b": {"0": {"up": make_specs()["up"]}}}
    save(tmp_path / "store", nested)
    params = load_store(tmp_path / "store", specs)
    assert jax.tree.structure(params) == jax.tree.structure(nested)
    equals(flatten(params)[0], flatten(nested)[0])


LLAMA_LAYER = {
    "attention/q/weight": ("self_attn.q_proj", (4, EMBED)),
    "attention/k/weight": ("self_attn.k_proj", (2, EMBED)),
    "attention/v/weight": ("self_attn.v_proj", (2, EMBED)),
    "attention/o/weight": ("self_attn.o_proj", (EMBED, 4)),
    "mlp/gate/weight": ("mlp.gate_proj", (MLP, EMBED)),
    "mlp/up/weight": ("mlp.up_proj", (MLP, EMBED)),
    "mlp/down/weight": ("mlp.down_proj", (EMBED, MLP)),
    "attention_norm/scale": ("input_layernorm", (EMBED,)),
    "mlp_norm/scale": ("post_attention_layernorm", (EMBED,)),
}
LLAMA_TOP = {
    "embed/weight": ("model.embed_tokens", (8, EMBED)),
    "final_norm/scale": ("model.norm", (EMBED,)),
    "head/weight": ("lm_head", (8, EMBED)),
}


def test_hugging_face_names_of_a_family_arrive_at_their_parameters(tmp_path):
    tensors, expected = {}, {}
    for path, (name, shape) in LLAMA_TOP.items():
        expected[path] = tensors[f"{name}.weight"] = random.normal(size=shape).astype(np.float32)
    for path, (name, shape) in LLAMA_LAYER.items():
        stacked = expected[f"stages/0/0/{path}"] = random.normal(size=(2, *shape)).astype(np.float32)
        tensors |= {f"model.layers.{layer}.{name}.weight": stacked[layer].copy() for layer in range(2)}
    specs = {path: ParamSpec(values.shape, F32, (None,) * values.ndim) for path, values in expected.items()}
    checkpoint = make_checkpoint(tmp_path, tensors)
    equals(load_params(checkpoint, MODEL, specs, Placement(make_mesh()), show_progress=False), expected)


def test_second_leaf_of_a_shape_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_SMALL_BYTES", 0)
    checkpoint, plan, specs = make_checkpoint(tmp_path), {"one": PLAN["up"]}, {"one": make_specs()["up"]}
    place(checkpoint_leaves(checkpoint, plan, specs))
    compiled = []

    def listen(event, _, **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        place(checkpoint_leaves(checkpoint, plan, specs))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("from_store", [False, True], ids=["checkpoint", "store"])
def test_each_device_gets_its_shard(from_store, tmp_path):
    placement = Placement(make_mesh({"data": 2, "tensor": 2, "expert": 2}))
    if from_store:
        save(tmp_path / "store", EXPECTED)
        placed = load_params(open_store(tmp_path / "store"), MODEL, make_specs(), placement, show_progress=False)
    else:
        leaves = list(checkpoint_leaves(make_checkpoint(tmp_path), PLAN, make_specs()))
        placed = place_leaves(leaves, placement, show_progress=False)
    equals(placed)
    for name, spec in make_specs().items():
        assert placed[name].sharding == placement.sharding(spec.axes)
    assert {shard.data.shape for shard in placed["moe"].addressable_shards} == {(NUM_LAYERS, 1, MLP // 2, EMBED)}
