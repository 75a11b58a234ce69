"""What travels between devices, read from the compiled programs: only what the layout needs."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import pytest

from millrace import ConfigError
from millrace.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, MoeSpec, RopeSpec
from millrace.models.decoder import LAYERS_SCOPE, AbstractDecoder
from millrace.models.kv_cache import cache_spec
from millrace.models.partition import partition, with_places
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.runtime.buckets import Bucket
from millrace.runtime.programs import Programs, compile_programs
from millrace.runtime.steps import StepModel
from millrace.sharding.collectives import Collective, collectives, kinds_below
from millrace.sharding.mesh import make_mesh
from millrace.sharding.targets import parse_target

VOCAB = 1040  # no other dimension has this size, nor that of its shards
BUCKETS = (Bucket(True, 4, 4), Bucket(False, 16, 4))
MOE = MoeSpec(num_experts=6, num_experts_per_token=2, mlp_dim=48)


MLP = MlpSpec(mlp_dim=48)


def compiled(
    mesh_sizes: Mapping[str, int], mlp: MlpSpec | MoeSpec = MLP, devices: Sequence[jax.Device] | None = None
) -> Programs:
    rope = RopeSpec(theta=1e4, rotary_dim=8)
    attention = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=8, scale=0.3, rope=rope)
    config = ModelConfig(
        family="llama", vocab_size=VOCAB, embed_dim=32, layers=(LayerSpec(attention=attention, mlp=mlp),) * 2,
        max_context_len=64, tie_embeddings=True,
    )  # fmt: skip
    mesh = make_mesh(mesh_sizes, devices)
    placement = partition(config, mesh)
    model = StepModel(
        decoder=AbstractDecoder(with_places(config, mesh), jnp.dtype("float32")),
        placement=placement,
        kernels=KernelChoices("cpu" if devices is None else "gpu"),
        cache=cache_spec(config, placement, num_pages=64, page_size=8, dtype="float32"),
        num_slots=4,
        pages_per_slot=8,
        max_context_len=64,
        max_decode_steps=4,
    )
    return compile_programs(model, BUCKETS, show_progress=False)


def found(programs: Programs) -> dict[str, list[Collective]]:
    return {str(bucket): collectives(program.as_text()) for bucket, program in programs.steps.items()}


def in_layers(programs: Programs) -> list[dict[str, int]]:
    return [dict(kinds_below(LAYERS_SCOPE, program.as_text())) for program in programs.steps.values()]


@pytest.fixture(scope="module")
def tensor_parallel() -> Programs:
    return compiled({"data": 2, "tensor": 4})


def test_data_shards_exchange_no_more_than_whether_a_row_goes_on() -> None:
    programs = compiled({"data": 8})
    assert in_layers(programs) == [{}, {}]
    for bucket, all_of_them in found(programs).items():
        assert all(one.kind == "all-reduce" and one.num_elements == 1 for one in all_of_them), bucket


def test_tensor_shards_meet_twice_a_layer(tensor_parallel: Programs) -> None:
    assert in_layers(tensor_parallel) == [{"all-reduce": 2}] * 2


def test_no_collective_has_the_width_of_the_vocabulary(tensor_parallel: Programs) -> None:
    for bucket, all_of_them in found(tensor_parallel).items():
        wide = [one for one in all_of_them if any(VOCAB in shape or VOCAB // 4 in shape for shape in one.shapes)]
        assert all_of_them and not wide, bucket


def test_a_slot_is_installed_and_the_state_made_without_a_collective(tensor_parallel: Programs) -> None:
    assert not collectives(tensor_parallel.install.as_text() + tensor_parallel.initial_state.as_text())


@pytest.mark.parametrize(
    "mesh", [pytest.param({"expert": 4}, marks=pytest.mark.large), {"expert": 4, "tensor": 2}], ids=str
)
def test_rows_travel_to_their_experts_and_back(mesh: dict[str, int]) -> None:
    sums = {"all-reduce": 2} if "tensor" in mesh else {}
    programs = compiled(mesh, MOE)
    assert in_layers(programs) == [{"all-to-all": 2, "all-gather": 1, **sums}] * 2
    for all_of_them in found(programs).values():
        (counts,) = [one for one in all_of_them if one.kind == "all-gather" and one.is_below(LAYERS_SCOPE)]
        assert counts.shapes == ((4, 8),), "how many rows each device has for each of 8 places"


@pytest.mark.parametrize(
    ("mesh", "mlp", "expected"),
    [
        ({"data": 72}, MLP, {}),
        ({"data": 18, "tensor": 4}, MLP, {"all-reduce": 2}),
        ({"expert": 72}, MOE, {"ragged-all-to-all": 2, "all-gather": 1}),
    ],
    ids=["data", "tensor", "expert"],
)
def test_a_rack_of_gpus_exchanges_no_more(
    mesh: dict[str, int], mlp: MlpSpec | MoeSpec, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        devices = parse_target("gb300:1x18x4").compile_devices()
    except ConfigError as error:
        pytest.skip(str(error))
    programs = compiled(mesh, mlp, devices)
    assert in_layers(programs) == [expected] * 2
    for all_of_them in found(programs).values():
        assert not [one for one in all_of_them if any(VOCAB in shape for shape in one.shapes)]


def test_every_spelling_of_a_collective_is_counted_once() -> None:
    hlo = """
  %all-reduce.1 = f32[4,32]{1,0} all-reduce(%dot), to_apply=%add, metadata={op_name="jit(f)/layers/while/body/dot"}
  %ag = (f32[2,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(f32[2,8]{1,0} %x), dimensions={0}, metadata={op_name="f/a"}
  %fast = f32[4,8]{1,0} ragged-all-to-all(%x, %y), channel_id=3
  %done = bf16[4,8]{1,0} all-gather-done(%ag)
  ROOT %t = (f32[1,8]{1,0:T(8,128)}, f32[]) all-to-all(%a, %b), channel_id=1
  %fusion = f32[4]{0} fusion(%all-reduce.1), kind=kLoop
"""
    assert collectives(hlo) == [
        Collective("all-reduce", ((4, 32),), "jit(f)/layers/while/body/dot"),
        Collective("all-gather", ((2, 8), (4, 8)), "f/a"),
        Collective("ragged-all-to-all", ((4, 8),), "f/a"),
        Collective("all-to-all", ((1, 8), ()), "f/a"),
    ]
    assert kinds_below("layers", hlo) == {"all-reduce": 1}
