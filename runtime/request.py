"""What a user asks and gets back, and validate(), the one validator that stands between."""

import dataclasses
import numbers
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeGuard

from ..errors import InvalidRequestError
from .limits import MAX_BAD_WORD_LEN, MAX_BAD_WORDS
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer

__all__ = [
    "CompletionOutput",
    "FinishReason",
    "Logprob",
    "Prompt",
    "Request",
    "RequestLimits",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "validate",
]

Prompt = str | Sequence[int]
FinishReason = Literal["stop", "length", "abort"]


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """One token's raw log-softmax in float32, before penalties, bias and temperature."""

    logprob: float
    rank: int | None = None  # from 1, the most likely
    decoded_token: str | None = None  # None without a tokenizer


@dataclasses.dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of a request's n continuations; while streaming, only what is new of it."""

    index: int
    text: str
    token_ids: list[int]  # the ending token included, which the text leaves out
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # one entry per token, the sampled token always in it
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # None for EOS, else the id or string that ended it
    seed: int | None = None  # the request's, drawn if it named none: the same seed gives the same tokens
    weights_version: int = 0  # that computed the last of these tokens
    first_weights_version: int = 0  # that began the continuation: another one if the weights were updated meanwhile


@dataclasses.dataclass(frozen=True, slots=True)
class RequestMetrics:
    """How long one request took, measured from its submission."""

    time_to_first_token_s: float | None = None
    total_s: float | None = None
    num_preemptions: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request's answer; while streaming, only what is new of it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None  # None first: nothing predicts the first token
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one runtime can serve."""

    vocab_size: int  # V, the width of the logits
    max_context_len: int  # prompt and output together, in tokens
    eos_ids: tuple[int, ...]
    tokenizer: Tokenizer | None

    @property
    def num_token_ids(self) -> int:
        """Ids from 0 up to this are tokens: the logits may be wider than the tokenizer, or the other way round."""
        return min(self.vocab_size, self.tokenizer.vocab_size) if self.tokenizer else self.vocab_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A checked request, complete: nothing of it is filled in later."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams  # the seed is drawn
    max_new_tokens: int  # max_tokens, or what is left of the context if that is less
    eos_ids: frozenset[int]  # end the sequence with stop_reason None; empty with ignore_eos
    stop_ids: frozenset[int]  # every id that ends it: EOS and stop_token_ids; not sampled before min_tokens
    bad_word_ids: tuple[tuple[int, ...], ...]  # the last token of each must not follow the others


def validate(
    request_id: str, prompt: Prompt, params: SamplingParams, limits: RequestLimits, *, text: str | None = None,
    seeds: random.Random | None = None,
) -> Request:  # fmt: skip
    """Check one request against what the runtime can serve, tokenize it and resolve it.

    `text` is what a prompt of token ids was made from, if it is known (a rendered chat); `seeds` draws the seed of a
    request that names none, the system does if it is None. Raises InvalidRequestError.
    """
    if not isinstance(params, SamplingParams):
        raise InvalidRequestError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
    prompt_ids = _prompt_token_ids(prompt, limits)
    _check_context(len(prompt_ids), params, limits)
    _check_option_ids(params, limits)
    if limits.tokenizer is None and params.stop:
        raise InvalidRequestError("stop needs a tokenizer, which this checkpoint does not have: use stop_token_ids")
    eos_ids = frozenset(() if params.ignore_eos else (id for id in limits.eos_ids if id < limits.vocab_size))
    if params.seed is None:
        params = params.replace(seed=(seeds or random.SystemRandom()).getrandbits(64))
    request = Request(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else text,
        prompt_token_ids=prompt_ids,
        params=params,
        max_new_tokens=min(params.max_tokens or limits.max_context_len, limits.max_context_len - len(prompt_ids)),
        eos_ids=eos_ids,
        stop_ids=eos_ids | frozenset(params.stop_token_ids),
        bad_word_ids=_bad_word_ids(params.bad_words, limits),
    )
    _check_something_can_be_sampled(request, limits)
    return request


def _prompt_token_ids(prompt: object, limits: RequestLimits) -> tuple[int, ...]:
    ids: tuple[Any, ...]
    if isinstance(prompt, str):
        if limits.tokenizer is None:
            raise InvalidRequestError("this checkpoint has no tokenizer: give the prompt as a list of token ids")
        if not prompt:
            raise InvalidRequestError("the prompt is empty: it needs at least one character")
        ids = tuple(limits.tokenizer.encode(prompt))
    else:
        if isinstance(prompt, bytes | Mapping) or not is_iterable(prompt) or not hasattr(prompt, "__len__"):
            raise InvalidRequestError(f"a prompt must be a string or a list of token ids, got {type(prompt).__name__}")
        ids = tuple(prompt)
    if not ids:
        raise InvalidRequestError("the prompt is empty: it needs at least one token")
    if all(type(id) is int and 0 <= id < limits.num_token_ids for id in ids):
        return ids
    for position, id in enumerate(ids):
        if isinstance(id, bool) or not isinstance(id, numbers.Integral):
            raise InvalidRequestError(f"prompt token {position} must be an integer, got a {type(id).__name__}")
        _check_token_id(f"prompt token {position}", int(id), limits)
    return tuple(int(id) for id in ids)


def is_iterable(value: Any) -> TypeGuard[Iterable[Any]]:
    """Whether iter() takes it: an array without dimensions has the method, and refuses."""
    try:
        iter(value)
    except TypeError:
        return False
    return True


def _check_token_id(name: str, id: int, limits: RequestLimits) -> None:
    if not 0 <= id < limits.num_token_ids:
        tokenizer_size = limits.tokenizer.vocab_size if limits.tokenizer else "no"
        # Hexadecimal where decimal would be long: Python refuses to print integers of more than 4300 digits
        shown = id if abs(id) < 2**64 else f"a number of {id.bit_length()} bits"
        raise InvalidRequestError(
            f"{name} must be a token id from 0 to {limits.num_token_ids - 1}, got {shown}"
            f" (logits {limits.vocab_size} wide, {tokenizer_size} ids in the tokenizer)"
        )


def _check_context(prompt_len: int, params: SamplingParams, limits: RequestLimits) -> None:
    if prompt_len + 1 > limits.max_context_len:
        raise InvalidRequestError(
            f"the prompt has {prompt_len} tokens, and max_context_len={limits.max_context_len} leaves no room for one"
            " more: shorten the prompt or raise max_context_len"
        )
    if prompt_len + params.min_tokens > limits.max_context_len:
        raise InvalidRequestError(
            f"min_tokens={params.min_tokens} after a prompt of {prompt_len} tokens is more than"
            f" max_context_len={limits.max_context_len}"
        )


def _check_option_ids(params: SamplingParams, limits: RequestLimits) -> None:
    for name, ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("logit_bias", params.logit_bias or ()),
    ):
        for id in ids:
            _check_token_id(f"each id of {name}", id, limits)


def _bad_word_ids(bad_words: Sequence[str], limits: RequestLimits) -> tuple[tuple[int, ...], ...]:
    """Each bad word as it is tokenized at the start of a text and after a space."""
    if not bad_words:
        return ()
    if limits.tokenizer is None:
        raise InvalidRequestError("bad_words needs a tokenizer, which this checkpoint does not have: use logit_bias")
    sequences: dict[tuple[int, ...], None] = {}
    for word in bad_words:
        bare = word.lstrip(" ")
        for spelling in (bare, f" {bare}") if bare else (word,):
            ids = tuple(limits.tokenizer.encode(spelling, add_special_tokens=False))
            if not ids or len(ids) > MAX_BAD_WORD_LEN:
                raise InvalidRequestError(
                    f"each of bad_words must be 1 to {MAX_BAD_WORD_LEN} tokens; {word[:40]!r} is {len(ids)}"
                )
            sequences[ids] = None
    if len(sequences) > MAX_BAD_WORDS:
        raise InvalidRequestError(
            f"bad_words makes {len(sequences)} token sequences (a word counts with and without a space before it);"
            f" the most is {MAX_BAD_WORDS}"
        )
    return tuple(sequences)


def _check_something_can_be_sampled(request: Request, limits: RequestLimits) -> None:
    """Refuse options that together leave no token; longer bad words depend on what comes before and are not counted."""
    banned = {ids[0] for ids in request.bad_word_ids if len(ids) == 1}
    if request.params.min_tokens > 0:
        banned |= request.stop_ids
    allowed = request.params.allowed_token_ids
    num_left = limits.vocab_size - len(banned) if allowed is None else len(set(allowed) - banned)
    if num_left <= 0:
        raise InvalidRequestError(
            "no token is left to sample: bad_words, and the stop ids while min_tokens holds, ban all that"
            " allowed_token_ids allows"
        )
