"""The whole runtime on a tiny checkpoint: what users are promised, end to end."""

import asyncio
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from millrace import (
    ConfigError,
    InvalidRequestError,
    KernelError,
    OutOfMemoryError,
    Runtime,
    RuntimeClosedError,
    SamplingParams,
)

OpenTiny = Callable[..., Runtime]
pytestmark = pytest.mark.usefixtures("quick_compilation")
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=11, max_tokens=10, ignore_eos=True)
FEW_PAGES = 14 * (2 * 3 * 4 * 8 * 8 * 4)  # key and value, layers, KV heads, page size, head dim, float32


@pytest.fixture(scope="module")
def runtime(open_tiny: OpenTiny, quick_compilation: None) -> Iterator[Runtime]:
    with open_tiny() as opened:
        yield opened


def tokens(runtime: Runtime, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return list(runtime.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids)


def mixed_workload(runtime: Runtime) -> None:
    """Chunks, decodes, every sampling feature, streams, cancellations and errors, in one go."""
    features: list[dict[str, Any]] = [
        {"temperature": 0.0}, {"top_k": 3, "seed": 1}, {"top_p": 0.5, "min_p": 0.1}, {"n": 3, "seed": 2},
        {"logprobs": 20, "prompt_logprobs": 5}, {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"frequency_penalty": -0.5, "logit_bias": {5: 3.0}}, {"allowed_token_ids": [3, 4, 5]},
        {"min_tokens": 4, "stop_token_ids": [7, 8]},
    ]  # fmt: skip
    prompts = [[3 + i] * (1 + 9 * i) for i in range(len(features))]
    params = [SamplingParams(max_tokens=9, **feature) for feature in features]
    runtime.generate(prompts, params, use_tqdm=False)
    with pytest.raises(InvalidRequestError):
        runtime.generate([10**6], GREEDY)
    stream = runtime.stream([5, 6, 7], SamplingParams(max_tokens=40, ignore_eos=True))
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    runtime.submit([9] * 60, GREEDY).cancel()
    assert len(tokens(runtime, [4, 4])) == 10


def test_nothing_compiles_after_start(open_tiny: OpenTiny) -> None:
    events: list[str] = []

    def count(name: str, duration: float, **_: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        with open_tiny(kv_cache_bytes=FEW_PAGES) as runtime:
            assert events, "the listener must see the programs that are compiled at start"
            events.clear()
            mixed_workload(runtime)
            mixed_workload(runtime)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert events == []


def test_a_seeded_request_samples_the_same_tokens_alone_and_among_others(runtime: Runtime) -> None:
    alone = tokens(runtime, [7, 8, 9], SEEDED)
    crowd = [[3 + i % 90] * (1 + i) for i in range(31)]
    params = [SamplingParams(temperature=1.0, max_tokens=8)] * 31 + [SEEDED]
    outputs = runtime.generate([*crowd, [7, 8, 9]], params, use_tqdm=False)
    assert list(outputs[-1].outputs[0].token_ids) == alone


def test_a_bad_neighbour_changes_no_bit(runtime: Runtime) -> None:
    params = GREEDY.replace(logprobs=5)
    before = runtime.generate([5, 6, 7], params, use_tqdm=False)[0].outputs[0]
    first = runtime.submit([5, 6, 7], params)
    for bad in ([], [10**9], [1] * 1000, "text"):
        with pytest.raises(InvalidRequestError):
            runtime.submit(bad, params)
    assert first.result().outputs[0].logprobs == before.logprobs


def test_preempted_sequences_give_the_same_tokens(open_tiny: OpenTiny, runtime: Runtime) -> None:
    prompts = [[3 + i, 4, 5, 6 + i] * 5 for i in range(4)]
    params = GREEDY.replace(max_tokens=60)
    expected = [tokens(runtime, prompt, params) for prompt in prompts]
    with open_tiny(kv_cache_bytes=FEW_PAGES) as small:
        outputs = small.generate(prompts, params, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in outputs] == expected
    assert sum(o.metrics.num_preemptions for o in outputs if o.metrics) > 0


def test_a_repeated_prompt_is_found_in_the_cache(runtime: Runtime) -> None:
    prompt = [13, 14, 15, 16] * 8
    first = runtime.generate(prompt, GREEDY, use_tqdm=False)[0]
    again = runtime.generate(prompt, GREEDY, use_tqdm=False)[0]
    assert again.num_cached_tokens == 24 and again.outputs[0].token_ids == first.outputs[0].token_ids


@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [
        ("llama_linear", {"kv_cache_dtype": "int8"}),
        pytest.param("llama_default", {}, marks=pytest.mark.large),
        pytest.param("qwen3_moe_norm", {}, marks=pytest.mark.large),
        ("gpt_oss_plain", {}),
    ],
)
def test_eight_devices_give_the_tokens_of_one(open_tiny: OpenTiny, checkpoint: str, options: dict[str, Any]) -> None:
    prompts = [[3 + i] * (2 + 11 * i) for i in range(6)]
    params = [GREEDY, SEEDED] * 3
    outputs = []
    for mesh in ({}, {"data": 2, "tensor": 4}):
        small = {"num_slots": 2, "max_step_tokens": 16, "mesh": mesh, **options}
        with open_tiny(checkpoint, **small) as runtime:
            made = runtime.generate(prompts, params, use_tqdm=False)
            outputs.append([list(o.outputs[0].token_ids) for o in made])
    assert outputs[0] == outputs[1]


def test_generate_takes_one_prompt_or_many(runtime: Runtime) -> None:
    assert runtime.generate([], GREEDY) == []
    assert len(runtime.generate([4, 5], GREEDY, use_tqdm=False)) == 1
    assert len(runtime.generate([[4, 5], [6]], GREEDY, use_tqdm=False)) == 2
    with pytest.raises(InvalidRequestError, match="2 prompts want as many"):
        runtime.generate([[4], [5]], [GREEDY])


def test_n_continuations_are_independent_and_equal_at_temperature_0(runtime: Runtime) -> None:
    sampled = runtime.generate([4, 5], SEEDED.replace(n=4), use_tqdm=False)[0]
    assert [o.index for o in sampled.outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in sampled.outputs}) > 1
    greedy = runtime.generate([4, 5], GREEDY.replace(n=3), use_tqdm=False)[0]
    assert len({tuple(o.token_ids) for o in greedy.outputs}) == 1


def test_an_unnamed_seed_is_drawn_and_reported(runtime: Runtime) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    first = runtime.generate([4, 5], params, use_tqdm=False)[0].outputs[0]
    assert first.seed is not None
    assert tokens(runtime, [4, 5], params.replace(seed=first.seed)) == list(first.token_ids)


def test_a_runtime_with_a_seed_draws_the_same_seeds_again(open_tiny: OpenTiny) -> None:
    drawn = []
    for seed in (5, 5, 6):
        with open_tiny(seed=seed) as seeded:
            outputs = seeded.generate([[4], [5]], SamplingParams(max_tokens=1), use_tqdm=False)
            drawn.append([output.outputs[0].seed for output in outputs])
    assert drawn[0] == drawn[1] != drawn[2]


def test_logprobs_hold_the_sampled_token_and_sum_up(runtime: Runtime) -> None:
    output = runtime.generate([4, 5, 6], SEEDED.replace(logprobs=2, prompt_logprobs=1), use_tqdm=False)[0]
    completion = output.outputs[0]
    assert completion.logprobs is not None and completion.cumulative_logprob is not None
    chosen = [entry[token] for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert completion.cumulative_logprob == pytest.approx(sum(c.logprob for c in chosen))
    assert all(2 <= len(entry) <= 3 for entry in completion.logprobs)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == 3


def test_the_ending_token_stays_in_token_ids(runtime: Runtime) -> None:
    stop = tokens(runtime, [4, 5])[3]
    first = tokens(runtime, [4, 5]).index(stop)
    completion = runtime.generate([4, 5], GREEDY.replace(stop_token_ids=[stop]), use_tqdm=False)[0].outputs[0]
    assert completion.token_ids[-1] == stop and len(completion.token_ids) == first + 1
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_a_sequence_ends_at_the_context(runtime: Runtime) -> None:
    output = runtime.generate([4] * 90, GREEDY.replace(max_tokens=None), use_tqdm=False)[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (6, "length")


def test_a_checkpoint_without_tokenizer_serves_ids_only(runtime: Runtime) -> None:
    output = runtime.generate([4, 5], GREEDY.replace(logprobs=0), use_tqdm=False)[0].outputs[0]
    assert output.text == "" and output.logprobs is not None
    assert all(entry.decoded_token is None for step in output.logprobs for entry in step.values())
    for call in (
        lambda: runtime.generate("text", GREEDY),
        lambda: runtime.generate([4], GREEDY.replace(stop=["x"])),
        lambda: runtime.generate([4], GREEDY.replace(bad_words=["x"])),
        lambda: runtime.chat([{"role": "user", "content": "hi"}]),
    ):
        with pytest.raises(InvalidRequestError, match="tokenizer"):
            call()


def test_a_stream_brings_only_what_is_new_and_ends_finished(runtime: Runtime) -> None:
    pieces = list(runtime.stream([4, 5], GREEDY))
    assert [t for piece in pieces for t in piece.outputs[0].token_ids] == tokens(runtime, [4, 5])
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_handle_can_be_awaited_piece_by_piece(runtime: Runtime) -> None:
    async def read() -> list[int]:
        return [t async for piece in runtime.submit([4, 5], GREEDY) for t in piece.outputs[0].token_ids]

    assert asyncio.run(read()) == tokens(runtime, [4, 5])


def test_a_named_implementation_is_used_and_an_unknown_one_refused(open_tiny: OpenTiny, runtime: Runtime) -> None:
    with open_tiny(kernels={"paged_attention": "reference"}, num_slots=2) as forced:
        assert tokens(forced, [4, 5] * 9) == tokens(runtime, [4, 5] * 9)
    with pytest.raises(KernelError, match="hopper"):
        open_tiny(kernels={"paged_attention": "hopper"})


def test_a_wrong_option_of_the_runtime_is_refused_before_anything_is_loaded(open_tiny: OpenTiny) -> None:
    wrong: list[dict[str, Any]] = [
        {"dtype": "int7"}, {"max_context_len": 10**6}, {"mesh": {"tensor": 99}}, {"page_size": 0}, {"num_slots": -1},
        {"kv_cache_bytes": True}, {"max_step_tokens": 4}, {"kernels": {"paged_atention": "xla"}},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises((ConfigError, KernelError)) as error:
            open_tiny(**options)
        assert len(str(error.value)) > 15
    with pytest.raises(OutOfMemoryError, match="max_context_len=96 tokens needs"):
        open_tiny(kv_cache_bytes=1000)


def test_a_cancelled_request_ends_with_abort(runtime: Runtime) -> None:
    handle = runtime.submit([4, 5], GREEDY.replace(max_tokens=80))
    handle.cancel()
    assert handle.result().outputs[0].finish_reason in ("abort", "length")
    assert len(tokens(runtime, [4, 5])) == 10


@pytest.mark.parametrize("let_go", [Generator.close, lambda stream: None], ids=["closed", "dropped"])
def test_a_stream_that_is_let_go_before_its_first_output_cancels_its_request(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, let_go: Callable[[Generator[Any]], None]
) -> None:
    cancelled: list[Any] = []
    monkeypatch.setattr(runtime._loop, "cancel", cancelled.append)
    monkeypatch.setattr(runtime._loop, "submit", lambda handles: None)
    let_go(runtime.stream([4, 5], GREEDY))
    assert len(cancelled) == 1


def test_what_is_no_prompt_and_no_place_is_refused(runtime: Runtime) -> None:
    for call in (runtime.generate, runtime.stream):
        with pytest.raises(InvalidRequestError, match="a string"):
            call(np.array(5))  # type: ignore[operator]
    for place in (3, None):
        with pytest.raises(ConfigError, match="save_weights.. takes the path or URL of a new store; got"):
            runtime.save_weights(place)  # type: ignore[arg-type]


def test_many_threads_may_submit(runtime: Runtime) -> None:
    expected = [tokens(runtime, [3 + i, 4]) for i in range(8)]
    found: dict[int, list[int]] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: tokens(runtime, [3 + i, 4])})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(8)] == expected


def test_a_closed_runtime_refuses(open_tiny: OpenTiny) -> None:
    runtime = open_tiny()
    runtime.close()
    runtime.close()
    with pytest.raises(RuntimeClosedError):
        runtime.generate([4], GREEDY)
