"""What a step costs a device, against numbers worked out by hand."""

import pytest

from millrace.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, MoeSpec
from millrace.pallas_kernels.quantized_matmul import FORMATS
from millrace.runtime.roofline import Bound, Cost, DeviceModel, product_flops
from millrace.sharding.targets import TARGETS

ATTENTION = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=16, scale=0.25, rope=None)
MLP = MlpSpec(mlp_dim=256)
MOE = MoeSpec(num_experts=8, num_experts_per_token=2, mlp_dim=256)


def device_model(
    mlp: MlpSpec | MoeSpec = MLP, window: int | None = None, cache_dtype: str = "bfloat16", **mesh: int
) -> DeviceModel:
    attention = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=16, scale=0.25, rope=None, window=window)
    layers = (LayerSpec(attention=attention, mlp=mlp),) * 3
    return DeviceModel(
        config=ModelConfig(family="llama", vocab_size=64, embed_dim=128, layers=layers, max_context_len=1000),
        mesh={"data": 1, "expert": 1, "tensor": 1, **mesh},  # type: ignore[dict-item]
        dtype="bfloat16",
        itemsize=2,
        cache_dtype=cache_dtype,
        weight_bytes=10**6,
    )


def step(model: DeviceModel, num_tokens: int = 10, num_keys: int = 100) -> Cost:
    return model.cost(num_tokens=num_tokens, num_sampled=4, num_keys=num_keys, num_cached=1000)


def test_arithmetic_is_twice_the_weights_a_token_meets_and_its_scores() -> None:
    weights = 128 * 16 * (2 * 8 + 2 * 2) + 3 * 128 * 256
    scores = 4 * 8 * 16 * 100
    assert step(device_model()).flops == 10 * 3 * (2 * weights + scores) + 2 * 4 * 64 * 128


def test_memory_is_the_weights_once_and_the_cache() -> None:
    model = device_model()
    unread = 64 * 128 * 2  # the input embedding
    assert model.cache_bytes() == 3 * 2 * 2 * 16 * 2
    assert step(model).memory_bytes == 10**6 - unread + 1000 * model.cache_bytes()


def test_an_int8_cache_has_a_float_for_each_head_of_a_token() -> None:
    assert device_model(cache_dtype="int8").cache_bytes() == 3 * 2 * 2 * (16 + 4)
    assert device_model(cache_dtype="float8_e4m3fn").cache_bytes() == 3 * 2 * 2 * 16


def test_a_tensor_axis_divides_the_arithmetic_and_sends_two_all_reduces_a_layer() -> None:
    whole, part = step(device_model()), step(device_model(tensor=2))
    assert part.flops == whole.flops / 2
    assert part.link_bytes == (2 * 3 + 1) * 2 * (1 / 2) * 10 * 128 * 2


def test_a_device_holds_one_kv_head_at_least() -> None:
    assert device_model(tensor=8).cache_bytes() == device_model(tensor=2).cache_bytes()


def test_data_parallel_devices_send_nothing() -> None:
    assert step(device_model(data=8)).link_bytes == 0


def test_experts_receive_and_return_what_is_not_theirs() -> None:
    assert step(device_model(MOE, expert=4)).link_bytes == 3 * 2 * (3 / 4) * 2 * 10 * 128 * 2


def test_a_window_bounds_scores_and_cache() -> None:
    assert step(device_model(window=50)).flops < step(device_model()).flops
    assert step(device_model(window=50)).memory_bytes < step(device_model()).memory_bytes
    assert step(device_model(window=500)) == step(device_model())


@pytest.mark.parametrize("term", ["compute", "memory", "links"])
def test_the_longest_term_binds(term: str) -> None:
    seconds = {f"{name}_s": 1.0 for name in ("compute", "memory", "links")} | {f"{term}_s": 2.0}
    made = Bound(**seconds)
    assert (made.term, made.seconds) == (term, 2.0)


@pytest.mark.parametrize(
    ("target", "name", "dtype", "terms"),
    [
        ("gb300", "fp8", "float8", 1),
        ("gb300", "fp8_a16", "bfloat16", 1),
        ("gb300", "int4", "bfloat16", 1),
        ("h200", "int4_a8", "bfloat16", 1),
        ("gb300", "mxfp4", "bfloat16", 1),  # no kernel multiplies it as it is
        ("gb300", "mxfp8", "float8", 2),
        ("gb300", "nvfp4", "float4", 3),
        ("h200", "nvfp4", "bfloat16", 1),
        ("h200", "fp8", "float8", 1),
    ],
)
def test_weights_are_multiplied_at_the_rate_of_what_the_kernels_multiply(
    target: str, name: str, dtype: str, terms: int
) -> None:
    flops = TARGETS[target].flops
    assert product_flops(FORMATS[name], TARGETS[target], "bfloat16") == flops[dtype] / terms
