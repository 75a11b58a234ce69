"""A KV cache in int8 and fp8: close to the exact one in every family, and the same however it is served."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace import Runtime, SamplingParams

pytestmark = pytest.mark.usefixtures("quick_compilation")
OpenTiny = Callable[..., Runtime]
SMALL: dict[str, Any] = {"num_slots": 2, "max_step_tokens": 8}
CHECKPOINTS = sorted(path.name for path in (Path(__file__).parents[1] / "fixtures" / "checkpoints").iterdir())
# Of the log probabilities of a prompt, in nats: mean and largest difference from the exact cache's. Random weights and
# heads of 8 to 16 numbers are the worst case; where experts are close, what little is lost sends a token to another.
BOUNDS = {"int8": (0.03, 0.2), "fp8": (0.25, 1.2)}
BOUNDS_OF_EXPERTS = {"int8": (0.1, 1.0), "fp8": (0.25, 1.6)}
BOUNDS_OF_CLOSE_EXPERTS = {"int8": (0.1, 1.1), "fp8": (0.3, 3.0)}  # of gpt_oss_mxfp4, by XLA as by native kernels
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
CHECKPOINT = "qwen3_default"  # 2 KV heads
PROMPTS = [[3 + i, 4, 5, 6 + i] * 5 for i in range(3)]


def tokens(runtime: Runtime, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    outputs = runtime.generate(prompts, GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def differences(open_tiny: OpenTiny, folder: Path, dtype: str) -> np.ndarray:
    """Of the prompts' log probabilities, from transformers' in float32."""
    expected = json.loads((folder / "expected.json").read_text())
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    found: list[float] = []
    options = {**SMALL, "max_context_len": expected["max_context_len"], "kv_cache_dtype": dtype}
    with open_tiny(folder.name, **options) as runtime:
        for prompt in expected["prompts"]:
            output = runtime.generate(prompt["prompt_token_ids"], params, use_tqdm=False)[0]
            pairs = zip(output.prompt_token_ids, output.prompt_logprobs or (), prompt["prompt_logprobs"], strict=True)
            found += [entry[token].logprob - exact for token, entry, exact in pairs if entry is not None]
    return np.abs(found)


CASES = [
    pytest.param(checkpoint, dtype, marks=[] if (checkpoint, dtype) == ("gemma2_caps", "int8") else pytest.mark.kernels)
    for checkpoint in CHECKPOINTS
    for dtype in BOUNDS
]


@pytest.mark.parametrize(("checkpoint", "dtype"), CASES)
def test_log_probabilities_stay_close(
    open_tiny: OpenTiny, fixture_checkpoints: Path, checkpoint: str, dtype: str
) -> None:
    found = differences(open_tiny, fixture_checkpoints / checkpoint, dtype)
    has_experts = checkpoint.startswith(("gpt_oss", "mixtral", "qwen3_moe"))
    bounds = BOUNDS_OF_EXPERTS if has_experts else BOUNDS
    mean, largest = (BOUNDS_OF_CLOSE_EXPERTS if checkpoint == "gpt_oss_mxfp4" else bounds)[dtype]
    assert 1e-4 < found.mean() < mean, "a mean of next to nothing would say that nothing was rounded"
    assert found.max() < largest


@pytest.fixture(scope="module")
def resident(open_tiny: OpenTiny, quick_compilation: None) -> list[list[int]]:
    """What one device answers from an int8 cache, without a prefix that it has computed before."""
    with open_tiny(CHECKPOINT, **SMALL, kv_cache_dtype="int8") as runtime:
        answers = tokens(runtime)
        again = runtime.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]
        assert again.num_cached_tokens == 16 and list(again.outputs[0].token_ids) == answers[0]
    return answers


# In the default set tests/test_serving.py has a mesh, and tests/runtime/test_artifacts.py streamed weights.
# The KV heads are repeated: there are 2 of them for 4 parts.
@pytest.mark.kernels
@pytest.mark.parametrize("mesh", [{"data": 2, "tensor": 4}], ids=str)
def test_a_mesh_gives_the_tokens_of_one_device(
    open_tiny: OpenTiny, resident: list[list[int]], mesh: dict[str, int]
) -> None:
    with open_tiny(CHECKPOINT, **SMALL, kv_cache_dtype="int8", mesh=mesh) as runtime:
        assert tokens(runtime) == resident


@pytest.mark.kernels
def test_streamed_weights_give_the_tokens_of_resident_ones(open_tiny: OpenTiny, resident: list[list[int]]) -> None:
    with open_tiny(CHECKPOINT, **SMALL, kv_cache_dtype="int8", weights="stream", weights_memory=1 << 17) as runtime:
        assert tokens(runtime) == resident


@pytest.mark.kernels
def test_preempted_sequences_give_the_same_tokens(open_tiny: OpenTiny, resident: list[list[int]]) -> None:
    page_bytes = 2 * 3 * 2 * 8 * (16 + 4)  # key and value, layers, KV heads, page size, head dim and scale
    with open_tiny(CHECKPOINT, **SMALL, kv_cache_dtype="int8", kv_cache_bytes=14 * page_bytes) as small:
        outputs = small.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == resident
    assert sum(output.metrics.num_preemptions for output in outputs if output.metrics) > 0
