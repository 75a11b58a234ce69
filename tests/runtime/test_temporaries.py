"""The estimate of a step's temporaries is never less than what XLA says of its programs."""

from pathlib import Path
from typing import Any

import pytest

from millrace import RuntimeConfig
from millrace.runtime.deployment import deploy
from millrace.runtime.model_source import open_model_config
from millrace.runtime.programs import compile_programs
from millrace.runtime.temporaries import step_temporaries
from millrace.sharding.mesh import make_mesh

CASES: list[Any] = [
    pytest.param("llama_default", {"data": 2}, {"num_slots": 8, "max_step_tokens": 32}, marks=pytest.mark.large),
    ("gemma3_text", {}, {"num_slots": 128}),
    pytest.param("qwen3_moe_norm", {"expert": 4}, {"num_slots": 8, "max_step_tokens": 256}, marks=pytest.mark.large),
    ("qwen3_moe_norm", {}, {"num_slots": 8, "max_step_tokens": 512, "dtype": "bfloat16", "kv_cache_dtype": "int8"}),
]


@pytest.mark.parametrize(("checkpoint", "mesh", "options"), CASES, ids=lambda case: str(case)[:20])
def test_the_estimate_is_an_upper_one(
    fixture_checkpoints: Path, checkpoint: str, mesh: dict[str, int], options: dict[str, Any]
) -> None:
    model = open_model_config(str(fixture_checkpoints / checkpoint), None)
    config = RuntimeConfig(kv_cache_bytes=2**24, max_context_len=96, mesh=tuple(mesh.items()), **options)
    deployment = deploy(config, model, make_mesh(mesh), None)
    buckets = tuple(max(b for b in deployment.buckets if b.is_decode is kind) for kind in (True, False))
    programs = compile_programs(deployment.model, buckets, show_progress=False)
    estimate = step_temporaries(deployment.config, model, deployment.model.placement)
    for bucket in buckets:
        step: Any = programs.steps[bucket]
        assert step.memory_analysis().temp_size_in_bytes <= estimate, str(bucket)
