"""How many pages a cache gets, and what is said when it cannot be."""

import dataclasses

import numpy as np
import pytest

from millrace import ConfigError, OutOfMemoryError, RuntimeConfig
from millrace.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, RopeSpec
from millrace.models.kv_cache import cache_bytes, cache_spec
from millrace.models.partition import partition
from millrace.runtime import host_memory
from millrace.runtime.sizes import (
    CacheSize,
    bytes_of_page,
    check_host_memory,
    device_memory,
    resolve,
    size_cache,
    slot_bytes,
    weights_budget,
)
from millrace.runtime.temporaries import step_temporaries
from millrace.sharding.mesh import make_mesh
from millrace.sharding.rules import Placement

ATTENTION = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=16, scale=0.25, rope=RopeSpec(theta=1e4, rotary_dim=16))
MODEL = ModelConfig(
    family="llama",
    vocab_size=64,
    embed_dim=128,
    layers=(LayerSpec(attention=ATTENTION, mlp=MlpSpec(mlp_dim=256)),) * 3,
    max_context_len=1000,
)
CONFIG = RuntimeConfig(
    max_context_len=100, num_slots=4, max_step_tokens=8, page_size=16, dtype="float32", kv_cache_dtype="float32"
)
PAGE_BYTES = 2 * 3 * 2 * 16 * 16 * 4  # key and value, layers, KV heads, page size, head dim, float32
PAGES_PER_SLOT = 7
MORE_SLOTS = CONFIG.replace(num_slots=16, max_step_tokens=32)
MUCH = 2**40


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> "Memory":
    return Memory(monkeypatch)


@dataclasses.dataclass
class Memory:
    """The host's memory, as the test has it."""

    monkeypatch: pytest.MonkeyPatch

    def has(self, num_bytes: int) -> None:
        self.monkeypatch.setattr(host_memory, "available_bytes", lambda: num_bytes)


def placement(**mesh: int) -> Placement:
    return partition(MODEL, make_mesh(mesh))


def size(config: RuntimeConfig = CONFIG, weight_bytes: int = 0, **mesh: int) -> CacheSize:
    return size_cache(config, MODEL, placement(**mesh), weight_bytes, device_memory(make_mesh(mesh)))


def test_every_slot_gets_a_full_context_where_there_is_room(memory: Memory) -> None:
    memory.has(MUCH)
    assert size() == CacheSize(num_pages=4 * PAGES_PER_SLOT, page_bytes=PAGE_BYTES)


def test_a_cache_of_a_chosen_size_has_the_pages_that_fit(memory: Memory) -> None:
    memory.has(MUCH)
    chosen = CONFIG.replace(kv_cache_bytes=11 * PAGE_BYTES + 5)
    assert size(chosen).num_pages == 11
    assert size(CONFIG.replace(kv_cache_bytes=1000 * PAGE_BYTES)).num_pages == 1000


@pytest.mark.parametrize("mesh", [{}, {"tensor": 2}, {"tensor": 4}, {"data": 2, "tensor": 2}, {"expert": 2}])
def test_a_page_costs_what_the_cache_takes_of_each_device(memory: Memory, mesh: dict[str, int]) -> None:
    memory.has(MUCH)
    made = size(**mesh)
    spec = cache_spec(MODEL, placement(**mesh), made.num_pages, CONFIG.page_size, "float32").values
    shard = placement(**mesh).sharding(spec.axes).shard_shape(spec.shape)
    assert int(np.prod(shard)) * 4 == made.num_pages * made.page_bytes


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [("bfloat16", 1 / 2), ("float16", 1 / 2), ("fp8", 1 / 4), ("int8", 1 / 4 + 1 / MODEL.head_dim)],
)
def test_a_page_of_narrower_numbers_is_smaller(memory: Memory, dtype: str, factor: float) -> None:
    memory.has(MUCH)
    assert size(CONFIG.replace(kv_cache_dtype=dtype)).page_bytes == PAGE_BYTES * factor


@pytest.mark.parametrize("mesh", [{}, {"tensor": 4}, {"data": 2, "tensor": 2}])
def test_the_scales_of_an_int8_cache_lie_with_its_heads(mesh: dict[str, int]) -> None:
    spec = cache_spec(MODEL, placement(**mesh), 10, CONFIG.page_size, "int8")
    assert spec.scales is not None and spec.scales.shape == spec.values.shape[:-1]
    assert spec.scales.axes == spec.values.axes[:-1]
    values = placement(**mesh).shard_bytes(spec.values)
    assert cache_bytes(spec, placement(**mesh)) == values + 4 * values // MODEL.head_dim


def test_a_small_host_gets_fewer_pages_and_leaves_memory_to_others(memory: Memory) -> None:
    memory.has(100 * PAGE_BYTES * 4)
    made = size(MORE_SLOTS)
    assert PAGES_PER_SLOT <= made.num_pages <= 100 < 16 * PAGES_PER_SLOT


def test_the_devices_of_one_host_share_its_memory(memory: Memory) -> None:
    memory.has(4 * 4 * 100 * PAGE_BYTES)
    assert size(MORE_SLOTS, data=4).num_pages <= 100


def test_weights_that_fill_the_memory_leave_less_to_the_cache(memory: Memory) -> None:
    memory.has(MUCH)
    others = step_temporaries(CONFIG, MODEL, placement()) + slot_bytes(4, MODEL, placement())
    assert size(weight_bytes=MUCH - others - 20 * PAGE_BYTES).num_pages == 20


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_to_lower(memory: Memory) -> None:
    memory.has(MUCH)
    others = step_temporaries(CONFIG, MODEL, placement()) + slot_bytes(4, MODEL, placement())
    asked = CONFIG.replace(kv_cache_bytes=20 * PAGE_BYTES)
    with pytest.raises(OutOfMemoryError, match=r": 1,234 too many. Lower kv_cache_bytes, num_slots or max_step_tokens"):
        size(asked, weight_bytes=MUCH - others - 20 * PAGE_BYTES + 1234)


def test_weights_beyond_the_device_ask_for_a_wider_mesh(memory: Memory) -> None:
    memory.has(2**29)
    with pytest.raises(OutOfMemoryError, match=r"weights alone do not fit: choose a tensor axis .* 3 times as large"):
        size(weight_bytes=5 * 2**28)


def test_a_context_without_room_says_which_would_have(memory: Memory) -> None:
    memory.has(MUCH)
    with pytest.raises(OutOfMemoryError, match=r"max_context_len=100 .*Lower max_context_len to 64"):
        size(CONFIG.replace(kv_cache_bytes=4 * PAGE_BYTES))


def test_a_cache_without_one_page_suggests_no_context_of_nothing(memory: Memory) -> None:
    memory.has(MUCH)
    with pytest.raises(OutOfMemoryError, match="Lower max_context_len, raise kv_cache_bytes") as caught:
        size(CONFIG.replace(kv_cache_bytes=1))
    assert "to 0" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "weight_bytes", "named"),
    [
        (CONFIG.replace(kv_cache_bytes=2**50), 0, "kv_cache_bytes"),
        (CONFIG.replace(num_slots=2**16 - 1, max_step_tokens=2**16), 0, "num_slots=65535"),
        (CONFIG, 2**33, "the weights"),
    ],
)
def test_more_than_there_is_is_refused_before_anything_is_made(
    memory: Memory, config: RuntimeConfig, weight_bytes: int, named: str
) -> None:
    memory.has(2**29)
    with pytest.raises(OutOfMemoryError, match=named):
        size(config, weight_bytes)


def test_resolve_fills_in_what_was_left_open() -> None:
    done = resolve(RuntimeConfig(num_slots=400), MODEL, np.dtype("float32"))
    assert (done.dtype, done.kv_cache_dtype) == ("float32", "float32")
    assert done.max_context_len == 1000 and done.max_step_tokens == 800
    assert resolve(RuntimeConfig(), MODEL, np.dtype("float32")).max_step_tokens == 512


def test_streamed_weights_get_large_steps_of_many_sequences() -> None:
    done = resolve(RuntimeConfig(weights="stream"), MODEL, np.dtype("float32"))
    assert (done.num_slots, done.max_step_tokens, done.max_decode_steps) == (64, 2048, 1)
    chosen = resolve(RuntimeConfig(weights="stream", num_slots=3, max_step_tokens=9), MODEL, np.dtype("float32"))
    assert (chosen.num_slots, chosen.max_step_tokens) == (3, 9)


def test_default_slots_leave_room_for_prompts_in_a_small_step() -> None:
    done = resolve(RuntimeConfig(max_step_tokens=20), MODEL, np.dtype("float32"))
    assert (done.num_slots, done.max_step_tokens) == (10, 20)


def test_streamed_weights_get_half_of_the_memory_unless_told(memory: Memory) -> None:
    memory.has(10**9)
    config = RuntimeConfig(weights="stream")
    assert weights_budget(config, device_memory(make_mesh())) == 5 * 10**8
    assert weights_budget(config, device_memory(make_mesh({"tensor": 2}))) == 25 * 10**7
    assert weights_budget(config.replace(weights_memory=77), 10**9) == 77


def test_weights_that_the_host_cannot_keep_are_refused(memory: Memory) -> None:
    memory.has(1000)
    check_host_memory(1000)
    with pytest.raises(OutOfMemoryError, match="1,001 bytes.*1,000 are there.*weights=stream"):
        check_host_memory(1001)


def test_resolve_keeps_what_was_chosen() -> None:
    chosen = RuntimeConfig(max_context_len=40, max_step_tokens=50, kv_cache_dtype="bf16")
    done = resolve(chosen, MODEL, np.dtype("float32"))
    assert (done.max_context_len, done.max_step_tokens, done.kv_cache_dtype) == (40, 50, "bfloat16")


def test_a_context_beyond_the_checkpoints_is_refused() -> None:
    with pytest.raises(ConfigError, match="1001 is more than the 1000"):
        resolve(RuntimeConfig(max_context_len=1001), MODEL, np.dtype("float32"))


def test_a_long_context_must_be_asked_for() -> None:
    long = dataclasses.replace(MODEL, max_context_len=10**6)
    assert resolve(RuntimeConfig(), long, np.dtype("float32")).max_context_len == 8192
    assert resolve(RuntimeConfig(max_context_len=10**6), long, np.dtype("float32")).max_context_len == 10**6


def test_a_cache_that_fills_what_is_free_on_a_cpu_has_a_size_that_the_next_start_finds_again() -> None:
    one, weight_bytes = placement(), 1000
    config = resolve(RuntimeConfig(max_context_len=64, num_slots=512, max_step_tokens=600), MODEL, np.dtype("float32"))
    page = bytes_of_page(config, MODEL, one)
    sizes = {
        size_cache(config, MODEL, one, weight_bytes, memory).num_pages * page
        for memory in range(80_000_000, 81_000_000, 100_000)
    }
    assert len(sizes) <= 2 and all(0.87 * 20_000_000 < size <= 0.25 * 81_000_000 for size in sizes)
