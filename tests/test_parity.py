"""The runtime against transformers: the same greedy tokens, and log probabilities within 1e-4, for every checkpoint.

The expected values come with each checkpoint (tests/fixtures/make.py); `make parity` makes fresh ones.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from millrace import RequestOutput, Runtime, SamplingParams
from millrace.models.decoder import AbstractDecoder
from millrace.models.families import config_from_hf
from millrace.runtime.checkpoint import open_checkpoint
from millrace.runtime.weights import load_params
from millrace.sharding.mesh import make_mesh
from millrace.sharding.rules import Placement

TOLERANCE = 1e-4
COMMITTED = Path(__file__).parent / "fixtures" / "checkpoints"
# Programs take long to compile: of the committed checkpoints those are served by default that have every kind of layer
# between them. All are scored, and `make parity` serves all of its own.
SERVED = {
    "gemma2_caps",  # windows, soft caps, norms on both sides
    "gemma3_nested",  # two ropes, norms of queries and keys
    "gpt_oss_mxfp4",  # sinks, biases, quantized experts
    "llama_llama3",
    "olmo2_bias",  # norms behind
    "phi3_long",  # fused projections, a rope of the context's length
    "qwen3_moe_mixed",  # layers with and without experts
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per checkpoint directory."""
    if "checkpoint" in metafunc.fixturenames:
        given = metafunc.config.getoption("--checkpoints")
        paths = sorted(Path(given or COMMITTED).iterdir())
        is_rare = [not given and "served" in metafunc.fixturenames and path.name not in SERVED for path in paths]
        marks = [[pytest.mark.large] if rare else [] for rare in is_rare]
        metafunc.parametrize(
            "checkpoint", [pytest.param(path, id=path.name, marks=m) for path, m in zip(paths, marks, strict=True)]
        )


@pytest.fixture
def served(request: pytest.FixtureRequest) -> None:
    """What is compiled for the committed checkpoints is not optimized, which takes longer than it saves here."""
    if request.config.getoption("--checkpoints") is None and jax.default_backend() == "cpu":
        request.getfixturevalue("quick_compilation")


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


def test_every_token_is_scored_as_by_transformers(forward: Callable[..., np.ndarray], checkpoint: Path) -> None:
    """In one pass over the longest prompt and its answer."""
    expected = json.loads((checkpoint / "expected.json").read_text())
    prompt = max(expected["prompts"], key=lambda prompt: len(prompt["prompt_token_ids"]))
    source = open_checkpoint(checkpoint)
    model = config_from_hf(dict(source.config))
    specs = AbstractDecoder(model, jnp.dtype("float32")).specs
    params = load_params(source, model, specs, Placement(make_mesh()), show_progress=False)
    ids, first = [*prompt["prompt_token_ids"], *prompt["token_ids"]], len(prompt["prompt_token_ids"])
    rows = forward(model, params, ids, expected["max_context_len"])
    np.testing.assert_allclose(
        rows[np.arange(first - 1), ids[1:first]], prompt["prompt_logprobs"][1:], atol=TOLERANCE, rtol=0
    )
    assert rows[first - 1 : -1].argmax(1).tolist() == prompt["token_ids"]
    for row, wanted in zip(rows[first - 1 :], prompt["logprobs"], strict=False):
        np.testing.assert_allclose(row[[int(token) for token in wanted]], list(wanted.values()), atol=TOLERANCE, rtol=0)


def test_tokens_and_logprobs_equal_transformers(
    checkpoint: Path, served: None, program_cache: str, store_cache: str
) -> None:
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
