"""The runtime against transformers: the same greedy tokens, and log probabilities within 1e-4, for every checkpoint.

The expected values come with each checkpoint (tests/fixtures/make.py); `make parity` makes fresh ones.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace import RequestOutput, Runtime, SamplingParams

TOLERANCE = 1e-4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per checkpoint directory."""
    if "checkpoint" in metafunc.fixturenames:
        root = Path(metafunc.config.getoption("--checkpoints"))
        metafunc.parametrize("checkpoint", sorted(root.iterdir()), ids=lambda path: path.name)


def params_for(expected: dict[str, Any]) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=len(expected["token_ids"]), logprobs=5, prompt_logprobs=1, ignore_eos=True
    )


def check(output: RequestOutput, expected: dict[str, Any]) -> None:
    completion = output.outputs[0]
    assert list(completion.token_ids) == expected["token_ids"]
    assert completion.logprobs is not None and output.prompt_logprobs is not None
    for found, wanted in zip(completion.logprobs, expected["logprobs"], strict=True):
        for token, logprob in wanted.items():
            assert found[int(token)].logprob == pytest.approx(logprob, abs=TOLERANCE)
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    scores = [entry[token].logprob for token, entry in pairs if entry is not None]
    np.testing.assert_allclose(scores, expected["prompt_logprobs"][1:], atol=TOLERANCE, rtol=0)


def test_tokens_and_logprobs_equal_transformers(checkpoint: Path, program_cache: str, store_cache: str) -> None:
    # Chunks of 29 tokens, pages of 8 and windows from 9 to 15 are all shorter than the longest prompt.
    expected = json.loads((checkpoint / "expected.json").read_text())
    with Runtime.from_pretrained(
        str(checkpoint),
        dtype="float32",
        max_context_len=expected["max_context_len"],
        num_slots=3,
        page_size=8,
        max_step_tokens=32,
        compile_cache_dir=program_cache,
        store_cache_dir=store_cache,
        progress=False,
    ) as runtime:
        prompts = expected["prompts"]
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        together = runtime.generate(ids, [params_for(prompt) for prompt in prompts], use_tqdm=False)
        for output, prompt in zip(together, prompts, strict=True):
            check(output, prompt)
        for prompt in prompts:
            check(runtime.generate(prompt["prompt_token_ids"], params_for(prompt), use_tqdm=False)[0], prompt)
