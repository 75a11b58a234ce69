"""Streamed weights: the same tokens from a part of the memory, in every kind of model."""

import gc
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace import CheckpointError, ConfigError, MillraceError, Runtime, SamplingParams
from millrace.models.decoder import AbstractDecoder
from millrace.models.families import config_from_hf
from millrace.models.partition import partition
from millrace.runtime.checkpoint import open_checkpoint
from millrace.runtime.convert import convert
from millrace.runtime.param_tree import flatten
from millrace.runtime.store import open_store
from millrace.runtime.store_writer import save_store
from millrace.runtime.weight_streaming import (
    HostLayers,
    StoreLayers,
    StreamedParams,
    WeightStream,
    plan_stream,
)
from millrace.sharding.mesh import make_mesh

OpenTiny = Callable[..., Runtime]
pytestmark = pytest.mark.usefixtures("quick_compilation")
NUM_LAYERS = 8
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 96, "max_position_embeddings": 128, "num_hidden_layers": NUM_LAYERS, "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {**SMALL, "model_type": "llama", "rope_theta": 1e4},
    "sliding window": {
        **SMALL, "model_type": "gemma2", "sliding_window": 9, "query_pre_attn_scalar": 8, "hidden_activation":
        "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope_theta": 1e4,
    },
    "experts": {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1e4},
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22], list(range(2, 62))]
PARAMS = SamplingParams(temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=1, ignore_eos=True)


def decoder_of(kind: str) -> AbstractDecoder:
    return AbstractDecoder(config_from_hf(CONFIGS[kind]), np.dtype("float32"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of random weights for each kind of model."""
    random = np.random.default_rng(0)
    folders = {}
    for kind, config in CONFIGS.items():
        specs = decoder_of(kind).specs
        params = jax.tree.map(lambda spec: random.normal(size=spec.shape).astype(spec.dtype) * 0.2, specs)
        folders[kind] = tmp_path_factory.mktemp("stores") / kind
        save_store(folders[kind], params, specs, config, {})
    return folders


def two_layers(kind: str, **mesh: int) -> int:
    """The budget of embedding, head and two layers of eight."""
    decoder = decoder_of(kind)
    sizes = plan_stream(decoder, partition(decoder.config, make_mesh(mesh)), 2**40)
    return sizes.top_bytes + 2 * sizes.layer_bytes


def same(outputs: list[Any], expected: list[Any], within: float = 1e-5) -> None:
    """Equal tokens, and log probabilities that differ in their last bits at most."""
    for output, reference in zip(outputs, expected, strict=True):
        ours, theirs = output.outputs[0], reference.outputs[0]
        assert ours.token_ids == theirs.token_ids
        pairs = zip(
            [*ours.logprobs, *output.prompt_logprobs], [*theirs.logprobs, *reference.prompt_logprobs], strict=True
        )
        for entry, other in pairs:
            assert (entry or {}).keys() == (other or {}).keys()
            for token in entry or {}:
                assert abs(entry[token].logprob - other[token].logprob) <= within


def stream_of(runtime: Runtime) -> WeightStream:
    params = runtime._loop._executor._params
    assert isinstance(params, StreamedParams)
    return params.stream


@pytest.fixture(scope="module", params=[pytest.param("dense", marks=pytest.mark.large), "sliding window", "experts"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(kind: str, stores: Mapping[str, Path], open_tiny: OpenTiny) -> list[Any]:
    with open_tiny(stores[kind]) as runtime:
        return runtime.generate(PROMPTS, PARAMS, use_tqdm=False)


def test_streamed_tokens_are_those_of_resident_weights_within_the_budget(
    kind: str, stores: Mapping[str, Path], expected: list[Any], open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts, whenever a layer is about to compute, the buffers of all arrays that have the shape of a weight."""
    specs = [spec for layer in decoder_of(kind).layers for spec in flatten(layer.specs)[0].values()]
    matrices = [spec for spec in specs if len(spec.shape) > 1]
    shapes = {spec.shape for spec in matrices}

    def live_bytes() -> int:
        shards = [shard.data for a in jax.live_arrays() if a.shape in shapes for shard in a.addressable_shards]
        return sum({shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}.values())

    gc.collect()
    assert live_bytes() == 0, "arrays of other tests would be counted"
    counts: list[int] = []
    take = WeightStream.take

    def counted(self: WeightStream, number: int) -> Any:
        params = take(self, number)
        counts.append(live_bytes())
        return params

    monkeypatch.setattr(WeightStream, "take", counted)
    with open_tiny(stores[kind], weights="stream", weights_memory=two_layers(kind)) as runtime:
        sizes = stream_of(runtime).sizes
        assert (sizes.num_rooms, sizes.resident) == (2, frozenset())
        same(runtime.generate(PROMPTS, PARAMS, use_tqdm=False), expected)
    assert 0 < max(counts) <= 2 * sum(spec.num_bytes for spec in matrices) // NUM_LAYERS
    assert len(counts) > 5 * NUM_LAYERS


def test_weights_in_host_memory_give_the_same_tokens(stores: Mapping[str, Path], open_tiny: OpenTiny) -> None:
    with open_tiny(stores["dense"]) as runtime:
        expected = runtime.generate(PROMPTS, PARAMS, use_tqdm=False)
    with open_tiny(stores["dense"], weights="host", weights_memory=two_layers("dense")) as runtime:
        same(runtime.generate(PROMPTS, PARAMS, use_tqdm=False), expected)


def test_streamed_tokens_over_a_mesh_are_those_of_one_device(stores: Mapping[str, Path], open_tiny: OpenTiny) -> None:
    with open_tiny(stores["experts"]) as runtime:
        expected = runtime.generate(PROMPTS, PARAMS, use_tqdm=False)
    mesh = {"data": 2, "tensor": 2}
    budget = two_layers("experts", **mesh)
    with open_tiny(stores["experts"], weights="stream", weights_memory=budget, mesh=mesh) as runtime:
        same(runtime.generate(PROMPTS, PARAMS, use_tqdm=False), expected, within=1e-4)


def test_nothing_compiles_in_a_streamed_step(stores: Mapping[str, Path], open_tiny: OpenTiny) -> None:
    compiled: list[str] = []

    def count(name: str, duration: float, **_: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    with open_tiny(stores["dense"], weights="stream", weights_memory=two_layers("dense")) as runtime:
        jax.monitoring.register_event_duration_secs_listener(count)
        try:
            runtime.generate(PROMPTS, PARAMS, use_tqdm=False)
        finally:
            jax.monitoring.unregister_event_duration_listener(count)
    assert compiled == []


@pytest.mark.parametrize("source", [StoreLayers, HostLayers])
def test_layers_that_go_through_pinned_memory_arrive_unchanged(
    source: type, stores: Mapping[str, Path], kind: str
) -> None:
    """As on a GPU, whose memory is not the host's."""
    decoder, store = decoder_of(kind), open_store(stores[kind])
    placement = partition(decoder.config, make_mesh({"tensor": 2}))
    layers: Any = StoreLayers(store, decoder, placement, staged=True)
    if source is HostLayers:
        layers = HostLayers(layers, lambda numbers, _: numbers)
    for layer, number in zip(decoder.layers, range(NUM_LAYERS), strict=True):
        params = flatten(layers.fetch(number, layers.new_room()))[0]
        for leaf, array in params.items():
            spec = flatten(layer.specs)[0][leaf]
            region = (slice(layer.index, layer.index + 1), *(slice(0, size) for size in spec.shape))
            np.testing.assert_array_equal(array, store.read(f"{layer.path}/{leaf}", region)[0])
            assert array.sharding == placement.sharding(spec.axes)


def test_a_number_without_axes_is_read_into_its_room(fixture_checkpoints: Path, tmp_path: Path) -> None:
    """nvfp4 has a scale for all of a weight: of one layer, an array of no dimensions."""
    checkpoint = open_checkpoint(fixture_checkpoints.parent / "quantized" / "llama_nvfp4")
    store = convert(checkpoint, tmp_path / "store", show_progress=False)
    decoder = AbstractDecoder(config_from_hf(dict(store.config)), np.dtype(store.dtype))
    layers = StoreLayers(store, decoder, partition(decoder.config, make_mesh({})))
    room = layers.new_room()
    room[...] = 0xFF
    found = flatten(layers.fetch(0, room))[0]
    scales = {leaf: array for leaf, array in found.items() if array.ndim == 0}
    assert scales
    for leaf, array in scales.items():
        assert array == store.read(f"{decoder.layers[0].path}/{leaf}", (slice(0, 1),))[0]


def test_a_budget_below_one_layer_is_refused_with_the_least_that_works(
    stores: Mapping[str, Path], open_tiny: OpenTiny
) -> None:
    sizes = plan_stream(decoder_of("dense"), partition(decoder_of("dense").config, make_mesh({})), 2**40)
    least = sizes.top_bytes + sizes.layer_bytes
    with pytest.raises(ConfigError, match=f"least that works is {least:,}"):
        open_tiny(stores["dense"], weights="stream", weights_memory=least - 1)
    with open_tiny(stores["dense"], weights="stream", weights_memory=least) as runtime:
        assert stream_of(runtime).sizes.num_rooms == 1
        assert len(runtime.generate(PROMPTS, PARAMS, use_tqdm=False)) == 3


@given(budget_layers=st.floats(1, 20))
def test_a_stream_fits_its_budget_and_spreads_what_stays(budget_layers: float) -> None:
    decoder = decoder_of("dense")
    placement = partition(decoder.config, make_mesh({}))
    whole = plan_stream(decoder, placement, 2**40)
    assert whole.resident == frozenset(range(NUM_LAYERS)) and whole.num_rooms == 0
    budget = whole.top_bytes + int(budget_layers * whole.layer_bytes)
    sizes = plan_stream(decoder, placement, budget)
    assert sizes.num_bytes <= budget
    assert sizes.num_rooms == min(int(budget_layers), 3) or sizes == whole
    assert len(sizes.resident) == min(int(budget_layers) - sizes.num_rooms, NUM_LAYERS)


# ---- what goes wrong while weights are read


def flip_a_byte(store: Path, layer: int) -> None:
    """In the down projection of one layer."""
    file = store / "params" / "stages.0.0.mlp.down.weight" / "c" / str(layer) / "0" / "0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damage_while_streaming_fails_the_requests_that_it_touches_and_no_others(
    stores: Mapping[str, Path], tmp_path: Path, open_tiny: OpenTiny
) -> None:
    store = shutil.copytree(stores["dense"], tmp_path / "store")
    with open_tiny(store, weights="stream", weights_memory=two_layers("dense")) as runtime:
        before = runtime.generate(PROMPTS, PARAMS, use_tqdm=False)
        flip_a_byte(store, 5)
        handles = [runtime.submit(prompt, PARAMS) for prompt in PROMPTS]
        for handle in handles:
            with pytest.raises(MillraceError, match=r"layer 5 .*stages/0/0/mlp/down/weight"):
                handle.result()
        flip_a_byte(store, 5)
        same(runtime.generate(PROMPTS, PARAMS, use_tqdm=False), before, within=0)


def test_damage_in_what_stays_is_found_before_any_token(
    stores: Mapping[str, Path], tmp_path: Path, open_tiny: OpenTiny
) -> None:
    store = shutil.copytree(stores["dense"], tmp_path / "store")
    flip_a_byte(store, 0)
    with pytest.raises(CheckpointError, match="stages/0/0/mlp/down/weight"):
        open_tiny(store, weights="stream", weights_memory=2**30)


def test_a_hugging_face_checkpoint_without_a_store_cannot_be_streamed(open_tiny: OpenTiny) -> None:
    with pytest.raises(ConfigError, match="no-store"):
        open_tiny("llama_default", weights="stream", weights_memory=2**30, store=False)


def test_a_stream_that_was_given_up_begins_again_with_the_first_layer(stores: Mapping[str, Path]) -> None:
    decoder = decoder_of("dense")
    placement = partition(decoder.config, make_mesh({}))
    sizes = plan_stream(decoder, placement, two_layers("dense"))
    source = StoreLayers(open_store(stores["dense"]), decoder, placement)
    stream = WeightStream(source, sizes, lambda numbers, _: numbers)
    first = jax.tree.map(np.array, stream.take(0))
    for number in (0, 1, 2, 0, 1):
        params = stream.take(number)
        if number == 0:
            jax.tree.map(np.testing.assert_array_equal, params, first)
        stream.give_back(number, jax.numpy.zeros(()))
    stream.close()
