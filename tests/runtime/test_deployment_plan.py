"""What a deployment is said to take and to do, for devices that are not here."""

import dataclasses
from pathlib import Path

import pytest

from millrace import ConfigError, RuntimeConfig
from millrace.models.config import ModelConfig
from millrace.runtime.deployment_plan import DeploymentPlan, plan_deployment, sweep
from millrace.runtime.model_source import open_model_config
from millrace.runtime.records import records_of
from millrace.runtime.roofline import Workload
from millrace.sharding.targets import parse_target

WORKLOAD = Workload(prompt_len=20, output_len=40)
CONFIG = RuntimeConfig(max_context_len=96, num_slots=4, max_step_tokens=32, kv_cache_bytes=2**22, progress=False)


@pytest.fixture
def model(fixture_checkpoints: Path) -> ModelConfig:
    return open_model_config(str(fixture_checkpoints / "llama_default"), None)


def plan(model: ModelConfig, target: str, config: RuntimeConfig = CONFIG, *, compiles: bool = False) -> DeploymentPlan:
    return plan_deployment(config, model, parse_target(target), WORKLOAD, compiles=compiles)


def test_parts_and_what_is_left_are_what_may_be_used(model: ModelConfig) -> None:
    memory = plan(model, "h200").memory
    assert memory.total + memory.free == memory.usable_bytes < memory.memory_bytes
    assert memory.kv_cache <= 2**22 and memory.temporaries.is_estimate


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "int8"])
def test_a_token_costs_what_a_page_has_for_each(model: ModelConfig, dtype: str) -> None:
    config = CONFIG.replace(kv_cache_dtype=dtype, page_size=8)
    made = plan(model, "h200", config)
    assert made.memory.kv_cache % (8 * made.token_bytes) == 0
    assert made.memory.kv_cache > 2**22 - 8 * made.token_bytes, "a whole page more would have fit"


def test_data_parallel_devices_multiply_the_speed_of_one(model: ModelConfig) -> None:
    one, four = plan(model, "h200"), plan(model, "h200:1x1x4", CONFIG.replace(mesh=(("data", 4),)))
    assert four.prediction.tokens_per_s == pytest.approx(4 * one.prediction.tokens_per_s)
    assert four.memory == one.memory


def test_temporaries_of_a_cpu_target_are_its_compilers_own(model: ModelConfig) -> None:
    memory = plan(model, "cpu", compiles=True).memory
    assert not memory.temporaries.is_estimate and memory.temporaries.num_bytes > 0


def test_longer_contexts_fit_less_often(model: ModelConfig) -> None:
    counts = [fit.shard_sequences for fit in plan(model, "h200").fits]
    assert counts == sorted(counts, reverse=True) and counts[-1] > 0


def test_a_mesh_larger_than_the_target_is_refused(model: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"needs 4 devices; target h200:1x1x1 has 1.*--target=h200:1x1x4"):
        plan(model, "h200", CONFIG.replace(mesh=(("data", 4),)))


def test_a_sweep_has_every_mesh_that_splits_best_first(model: ModelConfig) -> None:
    found = sweep(CONFIG, model, parse_target("h200:1x1x4"), WORKLOAD)
    speeds = [one.prediction.tokens_per_s for one in found]
    assert {one.mesh for one in found} == {"data=4", "data=2,tensor=2", "tensor=4"}
    assert speeds == sorted(speeds, reverse=True) or speeds[0] == pytest.approx(max(speeds), rel=0.01)


def test_a_sweep_leaves_out_meshes_that_hold_no_sequence(model: ModelConfig) -> None:
    machine = parse_target("h200:1x1x4")
    small = dataclasses.replace(machine, target=dataclasses.replace(machine.target, memory_bytes=1000))
    assert sweep(CONFIG, model, small, WORKLOAD) == ()


def test_the_record_stands_beside_its_hardware_and_model_alone() -> None:
    assert records_of("gb300", "meta-llama/Llama-2-70b-hf")[0].device_tokens_per_s == 15_291
    assert [record.device_tokens_per_s for record in records_of("h200", "meta-llama/Llama-2-70b-hf")] == [4_488, 3_862]
    assert records_of("gb300", "embedded") == ()
