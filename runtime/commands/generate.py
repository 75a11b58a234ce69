"""`millrace generate`: complete prompts, as text or as one JSON object per line.

The fields of an object of --format=jsonl, in the order of the prompts, are those of RequestOutput:
    request_id, prompt (null for token ids), prompt_token_ids, num_cached_tokens,
    prompt_logprobs   null, or per prompt token null or {token id: {"logprob", "rank", "decoded_token"}}
    outputs           one per completion: index, text, token_ids, finish_reason ("stop", "length", "abort"),
                      stop_reason, seed, cumulative_logprob, logprobs (null, or per token as above)
A prompt that is refused gives {"prompt" or "prompt_token_ids", "error"} in its place, and exit code 1.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import InvalidRequestError
from ..flags import RUNTIME, SAMPLING, Group, Option, request_params
from .pace import Pace
from .prompts import Prompt, read_prompts
from .small import fitted, most_tokens

if TYPE_CHECKING:
    from ..api import Runtime
    from ..request import CompletionOutput, Logprob, RequestOutput, SamplingParams
    from . import OpenRuntime

GROUPS = (
    Group(
        "Prompts (one of these, or a text on standard input)",
        (
            Option("prompt", "texts", "a text to complete; may be repeated"),
            Option("prompt_token_ids", "integer lists", "token ids to complete; may be repeated"),
            Option("prompt_file", "text", "a prompt per line; a .jsonl file has a JSON text, list or object per line"),
            Option("format", "text", "how completions are written to stdout", "text", ("text", "jsonl")),
        ),
    ),
    SAMPLING,
    RUNTIME,
)


def run(values: Mapping[str, Any], open_runtime: "OpenRuntime") -> int:
    """The exit code: 0, or 1 where a prompt was refused."""
    prompts = read_prompts(values)
    sizes = fitted(values, len(prompts) * (values["n"] or 1), most_tokens(prompts))
    with open_runtime(sizes) as runtime:
        params = request_params(values, runtime.default_sampling_params)
        if values["format"] == "jsonl":
            return _write_jsonl(runtime, prompts, params)
        if len(prompts) == 1 and params.n == 1:
            return _stream(runtime, prompts[0], params)
        return _write_texts(runtime, prompts, params)


def _stream(runtime: "Runtime", prompt: Prompt, params: "SamplingParams") -> int:
    """Write one completion as it comes; its speed goes to stderr."""
    pace, last, ids = Pace(), "", []
    for output in runtime.stream(prompt, params):
        piece = output.outputs[0]
        pace.note(len(piece.token_ids), output.metrics)
        ids += piece.token_ids
        last = piece.text or last
        print(piece.text, end="", flush=True)
    if not _has_text(runtime, params):
        print(",".join(map(str, ids)), end="")
    if not last.endswith("\n"):
        print()
    print(pace.sentence(), file=sys.stderr)
    return 0


def _has_text(runtime: "Runtime", params: "SamplingParams") -> bool:
    """Whether completions are written as text, which may be empty; else their token ids are."""
    return runtime.has_tokenizer and params.detokenize


def _results(
    runtime: "Runtime", prompts: Sequence[Prompt], params: "SamplingParams"
) -> Iterator[tuple[Prompt, "RequestOutput | InvalidRequestError"]]:
    """Every prompt with its output or its refusal, in order, each as soon as it and all before it are done."""
    handles: list[Any] = []
    for prompt in prompts:
        try:
            handles.append(runtime.submit(prompt, params))
        except InvalidRequestError as error:
            handles.append(error)
    for prompt, handle in zip(prompts, handles, strict=True):
        if isinstance(handle, InvalidRequestError):
            yield prompt, handle
            continue
        try:
            yield prompt, handle.result()
        except InvalidRequestError as error:
            yield prompt, error


def _write_texts(runtime: "Runtime", prompts: Sequence[Prompt], params: "SamplingParams") -> int:
    code = 0
    for number, (prompt, result) in enumerate(_results(runtime, prompts, params), 1):
        if isinstance(result, InvalidRequestError):
            print(f"millrace: prompt {number}: {result}", file=sys.stderr)
            code = 1
            continue
        for completion in result.outputs:
            print(f"--- prompt {number}, completion {completion.index + 1}: {prompt!r:.60}")
            ids = ",".join(map(str, completion.token_ids))
            print(completion.text if _has_text(runtime, params) else ids, flush=True)
    return code


def _write_jsonl(runtime: "Runtime", prompts: Sequence[Prompt], params: "SamplingParams") -> int:
    code = 0
    for prompt, result in _results(runtime, prompts, params):
        if isinstance(result, InvalidRequestError):
            code = 1
            record = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt, "error": str(result)}
        else:
            record = request_record(result)
        print(_json_line(record), flush=True)
    return code


def _json_line(record: Mapping[str, Any]) -> str:
    """A record as JSON, with escapes where stdout's encoding cannot hold it: half a surrogate pair is in none."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(record, allow_nan=False)
    return line


def request_record(output: "RequestOutput") -> dict[str, Any]:
    """The JSON object of one request."""
    return {
        "request_id": output.request_id,
        "prompt": output.prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "prompt_logprobs": _logprob_records(output.prompt_logprobs),
        "outputs": [_completion_record(completion) for completion in output.outputs],
    }


def _completion_record(completion: "CompletionOutput") -> dict[str, Any]:
    return {
        "index": completion.index,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "seed": completion.seed,
        "cumulative_logprob": completion.cumulative_logprob,
        "logprobs": _logprob_records(completion.logprobs),
    }


def _logprob_records(positions: "Sequence[dict[int, Logprob] | None] | None") -> list[dict[str, Any] | None] | None:
    """JSON has neither integer keys nor infinity: keys become texts, -inf becomes null."""
    if positions is None:
        return None
    return [
        None if position is None else {str(token): _logprob_record(entry) for token, entry in position.items()}
        for position in positions
    ]


def _logprob_record(entry: "Logprob") -> dict[str, Any]:
    logprob = entry.logprob if math.isfinite(entry.logprob) else None
    return {"logprob": logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}
