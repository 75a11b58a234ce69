"""What the compiled programs hold: no second copy of the cache or of the weights, and one program per bucket."""

import gc
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from millrace import Runtime
from millrace.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, RopeSpec
from millrace.models.decoder import AbstractDecoder
from millrace.models.kv_cache import cache_bytes, cache_spec
from millrace.models.partition import partition
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.runtime.buckets import Bucket, make_buckets
from millrace.runtime.programs import Programs, compile_programs
from millrace.runtime.steps import StepModel
from millrace.sharding.mesh import make_mesh


def attention(window: int | None = None) -> AttentionSpec:
    rope = RopeSpec(theta=1e4, rotary_dim=32)
    return AttentionSpec(num_heads=8, num_kv_heads=4, head_dim=32, scale=0.2, rope=rope, window=window)


# Weights and cache are large beside the activations of a step, so that a copy of either cannot hide.
WIDE = LayerSpec(attention=attention(), mlp=MlpSpec(mlp_dim=1024))
LOCAL = LayerSpec(attention=attention(window=16), mlp=MlpSpec(mlp_dim=1024))
CONFIG = ModelConfig(
    family="llama", vocab_size=64, embed_dim=256, layers=(WIDE, LOCAL) * 4, max_context_len=256, tie_embeddings=True
)
BUCKETS = (Bucket(True, 1, 1), Bucket(True, 4, 4), Bucket(False, 16, 4))


def compiled(
    mesh_sizes: dict[str, int], *, streams: bool = False, cache_dtype: str = "float32", num_pages: int = 512
) -> tuple[StepModel, Programs]:
    placement = partition(CONFIG, make_mesh(mesh_sizes))
    model = StepModel(
        decoder=AbstractDecoder(CONFIG, jnp.dtype("float32")),
        placement=placement,
        kernels=KernelChoices("cpu"),
        cache=cache_spec(CONFIG, placement, num_pages=num_pages, page_size=16, dtype=cache_dtype),
        num_slots=4,
        pages_per_slot=16,
        max_context_len=256,
        max_decode_steps=4,
    )
    return model, compile_programs(model, BUCKETS, streams=streams, show_progress=False)


@pytest.fixture(scope="module", params=[{}, {"data": 2, "tensor": 4}], ids=["one device", "data 2 x tensor 4"])
def programs(request: pytest.FixtureRequest) -> tuple[StepModel, Programs]:
    return compiled(request.param)


def test_no_program_holds_a_second_copy_of_the_cache_or_of_the_stacked_weights(
    programs: tuple[StepModel, Programs],
) -> None:
    model, made = programs
    num_bytes = cache_bytes(model.cache, model.placement)
    weight_bytes = sum(s.num_bytes for s in jax.tree.leaves(model.decoder.specs)) // model.placement.size("tensor")
    for bucket, program in made.steps.items():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= num_bytes, f"{bucket}: the cache is not updated in place"
        # On a CPU a scan copies the period that it is at, here a quarter of the weights; never more.
        assert memory.temp_size_in_bytes < weight_bytes / 4 + 2**20, f"{bucket}: {memory}"
        assert memory.temp_size_in_bytes < num_bytes / 4, f"{bucket}: {memory}"


@pytest.mark.parametrize(
    ("dtype", "mesh"), [("int8", {"data": 2, "tensor": 4}), pytest.param("float8_e4m3fn", {}, marks=pytest.mark.large)]
)
def test_no_program_holds_a_second_copy_of_a_quantized_cache(dtype: str, mesh: dict[str, int]) -> None:
    model, made = compiled(mesh, cache_dtype=dtype, num_pages=4096)
    num_bytes = cache_bytes(model.cache, model.placement)
    for bucket, program in made.steps.items():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= num_bytes, f"{bucket}: the cache is not updated in place"
        assert memory.temp_size_in_bytes < num_bytes / 4, f"{bucket}: {memory}"


def test_there_is_exactly_one_program_per_bucket(programs: tuple[StepModel, Programs]) -> None:
    assert set(programs[1].steps) == set(BUCKETS)


def test_no_collective_moves_a_cache_page_or_a_weight_matrix(programs: tuple[StepModel, Programs]) -> None:
    model, made = programs
    if model.placement.mesh.size == 1:
        pytest.skip("one device has no collectives")
    for program in made.steps.values():
        lines = [line for line in program.as_text().splitlines() if " all-gather(" in line or " all-to-all(" in line]
        moved = [line for line in lines if re.search(r"[\[,](512|1024)[,\]]", line.split("=", 1)[1])]
        assert not moved, "512 pages or an MLP of 1024 are gathered"


def test_every_parameter_and_the_cache_name_their_axes(programs: tuple[StepModel, Programs]) -> None:
    model, _ = programs
    for spec in jax.tree.leaves((model.decoder.specs, model.cache)):
        assert len(spec.axes) == len(spec.shape)


def test_buckets_cover_every_step_up_to_the_limits() -> None:
    buckets = make_buckets(num_slots=33, max_step_tokens=700)
    assert max(b.num_tokens for b in buckets if b.is_decode) == 33
    assert max(b.num_tokens for b in buckets if not b.is_decode) == 700


def test_a_streamed_layer_updates_the_cache_in_place_and_layers_of_one_kind_share_a_program() -> None:
    model, made = compiled({}, streams=True)
    for bucket, step in made.steps.items():
        assert len(step.layers) == 8 and len(set(map(id, step.layers))) == 2, "WIDE and LOCAL"
        memory = step.layers[0].memory_analysis()
        assert memory.alias_size_in_bytes >= model.cache.values.num_bytes, (
            f"{bucket}: the cache is not updated in place"
        )
        assert memory.temp_size_in_bytes < model.cache.values.num_bytes / 4, f"{bucket}: {memory}"


def test_a_closed_runtime_leaves_no_program(open_tiny: Callable[..., Runtime]) -> None:
    client = jax.devices()[0].client
    open_tiny().close()  # what loading compiles stays: it is shared
    gc.collect()
    num_before = len(client.live_executables())
    open_tiny().close()
    gc.collect()
    assert len(client.live_executables()) == num_before
