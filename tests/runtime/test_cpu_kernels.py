"""The line that a start says of native kernels, and that a runtime without them serves."""

from typing import Any

import numpy as np
import pytest

from millrace import SamplingParams
from millrace.pallas_kernels import native
from millrace.runtime.cpu_kernels import prepare_kernels, usable_kernels

REASON = "there is no C++ compiler on the PATH."


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(native, "_outcome", [f"{REASON}\nmore"])


def test_a_start_without_native_kernels_says_why_whether_it_shows_progress_or_not(without_kernels):
    for shows in (True, False):
        line = prepare_kernels("cpu", show_progress=shows)
        assert line == f"no native CPU kernels, XLA serves instead: {REASON}"
    assert usable_kernels() == REASON


def test_a_start_with_native_kernels_names_the_instruction_set(monkeypatch):
    sets = ("avx512_bf16", "avx512_vnni", "avx512", "avx2")
    library = native.Library(path=native.Path("x"), compiler="c++", instruction_sets=sets, left_out=(), targets=())
    monkeypatch.setattr(native, "_outcome", [library])
    assert prepare_kernels("cpu", show_progress=True) == "native CPU kernels for avx512_bf16"
    assert prepare_kernels("cpu", show_progress=False) is None
    assert usable_kernels() == sets


def test_gpus_need_no_native_kernels(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda _: pytest.fail("built for a GPU"))
    monkeypatch.setattr(native, "_outcome", [])
    assert prepare_kernels("gpu", show_progress=True) is None


def test_a_runtime_without_native_kernels_says_so_once_and_serves(without_kernels, open_tiny, capfd):
    with open_tiny() as runtime:
        outputs = runtime.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    assert len(outputs[0].outputs[0].token_ids) == 3
    assert capfd.readouterr().err.count(f"millrace: no native CPU kernels, XLA serves instead: {REASON}\n") == 1


FORCED = {"quantized_matmul": "xla", "paged_attention": "xla"}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=0, logprobs=0)
PROMPTS = [[5, 6, 7], [9] * 40, list(range(3, 30))]


def answers(runtime: Any) -> tuple[list[list[int]], np.ndarray]:
    """Tokens of each prompt, and the log probabilities of the prompts' own."""
    with runtime:
        outputs = runtime.generate(PROMPTS, GREEDY, use_tqdm=False)
    scores = [next(iter(entry.values())).logprob for output in outputs for entry in output.prompt_logprobs[1:]]
    return [output.outputs[0].token_ids for output in outputs], np.asarray(scores)


# Random weights make near ties, which bfloat16 may decide either way; the scores of the prompts have no such edge.
@pytest.mark.parametrize(
    ("options", "serves", "bound"),
    [
        ({"dtype": "float32", "quantization": "none"}, {"paged_attention"}, 1e-5),
        ({"dtype": "float32", "quantization": "int8"}, {"paged_attention", "quantized_matmul"}, 1e-4),
        ({"dtype": "bfloat16", "quantization": "none"}, {"paged_attention", "quantized_matmul"}, 2e-2),
        ({"dtype": "bfloat16", "quantization": "int8"}, {"paged_attention", "quantized_matmul"}, 2e-2),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("quick_compilation")
def test_native_kernels_give_the_answers_of_xla(options, serves, bound, open_tiny, caplog):
    if reason := native.unavailable():
        pytest.skip(reason)
    tokens, scores = answers(open_tiny(kernels=FORCED, **options))
    with caplog.at_level("INFO"):
        native_tokens, native_scores = answers(open_tiny(**options))
    assert {name for name in FORCED if f"{name} on cpu: cpu" in caplog.text} == serves
    np.testing.assert_allclose(native_scores, scores, atol=bound)
    if options["dtype"] == "float32":
        assert native_tokens == tokens
    print(np.abs(native_scores - scores).max(), native_tokens == tokens)
