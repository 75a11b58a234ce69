"""SamplingParams: how one request is sampled and when it ends. All that can be checked without a model is."""

import dataclasses
import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self, get_args

from ..errors import InvalidRequestError
from .limits import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS
from .spelling import nearest, shown

MAX_TOKEN_COUNT = 2**24  # past every context and vocabulary; a larger number is a mistake, "no limit" is None
MAX_STOP_STRINGS, MAX_STOP_CHARS = 32, 512
OnWeightsUpdate = Literal["drain", "immediate"]
MIN_TEMPERATURE = 0.01  # vLLM's: below it logits / temperature loses its meaning, and near 0 it overflows


class _Range(NamedTuple):
    """The values from low to high; `above_low` leaves out low itself."""

    low: float
    high: float
    above_low: bool = False

    def holds(self, value: Any) -> bool:
        """Whether the value is in range: an int compared exactly, however large; NaN is in none."""
        return bool((self.low < value if self.above_low else self.low <= value) and value <= self.high)

    def __str__(self) -> str:
        return f"{'above' if self.above_low else 'from'} {self.low} up to {self.high}"


_INTEGERS = {
    "n": _Range(1, 128),
    "top_k": _Range(-1, MAX_TOKEN_COUNT),
    "min_tokens": _Range(0, MAX_TOKEN_COUNT),
}
_INTEGERS_OR_NONE = {
    "max_tokens": _Range(1, MAX_TOKEN_COUNT),
    "seed": _Range(0, 2**64 - 1),
    "logprobs": _Range(0, MAX_LOGPROBS),
    "prompt_logprobs": _Range(0, MAX_LOGPROBS),
}
# The outer bounds of temperature and repetition_penalty keep float32 logits finite; vLLM leaves some of them open.
_NUMBERS = {
    "temperature": _Range(0.0, 100.0),
    "top_p": _Range(0.0, 1.0, above_low=True),
    "min_p": _Range(0.0, 1.0),
    "presence_penalty": _Range(-2.0, 2.0),
    "frequency_penalty": _Range(-2.0, 2.0),
    "repetition_penalty": _Range(0.01, 100.0),
}
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize")
_BIAS = _Range(-100.0, 100.0)
_TOKEN_ID = _Range(0, 2**31 - 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it ends; names and meanings are vLLM's where it has them.

    Raises:
      InvalidRequestError: on construction, for an option out of range; names it.
    """

    n: int = 1  # completions of the prompt
    temperature: float = 1.0  # 0 is greedy; a positive one below 0.01 is raised to 0.01
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1, or more than the vocabulary: all tokens
    min_p: float = 0.0  # tokens less likely than this times the likeliest are left out
    presence_penalty: float = 0.0  # off the logits of tokens that are in the output
    frequency_penalty: float = 0.0  # the same, as many times as they are there
    repetition_penalty: float = 1.0  # divides logits, or multiplies negative ones, of tokens in prompt or output
    seed: int | None = None  # unsigned, of 64 bits; None draws a fresh one, which the output reports
    stop: Sequence[str] = ()  # one string or several
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to the context; what meets that first ends with "length"
    # Until so many exist neither EOS nor stop_token_ids can be sampled, and stop strings that end within do not count.
    min_tokens: int = 0
    logprobs: int | None = None  # so many of the likeliest tokens in each place of the output
    prompt_logprobs: int | None = None  # and of the prompt
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)  # by token id
    allowed_token_ids: Sequence[int] | None = None  # no others can be sampled
    bad_words: Sequence[str] = ()  # one or several; their last token cannot be sampled behind the others
    skip_special_tokens: bool = True  # in the text
    detokenize: bool = True
    # "drain" holds new weights back until the request has ended, "immediate" goes on with them; None: as it is told.
    on_weights_update: OnWeightsUpdate | None = None

    def __new__(cls, **options: object) -> Self:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"SamplingParams has no option {name!r}; {nearest(name, known)}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for name, allowed in _INTEGERS.items():
            self._set(name, _integer(name, getattr(self, name), allowed))
        for name, allowed in _INTEGERS_OR_NONE.items():
            if getattr(self, name) is not None:
                self._set(name, _integer(name, getattr(self, name), allowed))
        for name, allowed in _NUMBERS.items():
            self._set(name, _number(name, getattr(self, name), allowed))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        if self.on_weights_update is not None and self.on_weights_update not in get_args(OnWeightsUpdate):
            raise InvalidRequestError(
                f'on_weights_update must be "drain", "immediate" or None, got {shown(self.on_weights_update)}'
            )
        self._normalise_collections()
        if 0 < self.temperature < MIN_TEMPERATURE:
            self._set("temperature", MIN_TEMPERATURE)
        self._set("top_k", max(self.top_k, 0))
        self._check_combinations()

    def replace(self, **changes: Any) -> Self:
        """The same params with some options changed, checked again."""
        return dataclasses.replace(self, **changes)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _normalise_collections(self) -> None:
        self._set("stop", _strings("stop", self.stop))
        self._set("bad_words", _strings("bad_words", self.bad_words))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
        if self.logit_bias is not None:
            self._set("logit_bias", _biases(self.logit_bias))

    def _check_combinations(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.stop and not self.detokenize:
            raise InvalidRequestError(
                "stop strings are found in text: use them with detokenize=True, or stop_token_ids"
            )
        if len(self.stop) > MAX_STOP_STRINGS or any(len(text) > MAX_STOP_CHARS for text in self.stop):
            raise InvalidRequestError(f"stop takes at most {MAX_STOP_STRINGS} strings of {MAX_STOP_CHARS} characters")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(
                f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS} ids, got {len(self.stop_token_ids)}"
            )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError("allowed_token_ids allows nothing: name at least one id, or None for all")


def _integer(name: str, value: object, allowed: _Range) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not allowed.holds(value):
        raise InvalidRequestError(f"{name} must be an integer {allowed}, got {shown(value)}")
    return int(value)


def _number(name: str, value: object, allowed: _Range) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not allowed.holds(value):
        raise InvalidRequestError(f"{name} must be a number {allowed}, got {shown(value)}")
    return float(value)


def _listed(name: str, value: object, of: str) -> list[object]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        raise InvalidRequestError(f"{name} must be a list of {of}, got {shown(value)}")
    return list(value)


def _strings(name: str, value: object) -> tuple[str, ...]:
    """One string or several as a tuple without repeats; None, as vLLM has it, is none."""
    texts = [value] if isinstance(value, str) else _listed(name, () if value is None else value, "strings")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise InvalidRequestError(f"{name} must hold strings that are not empty, got {shown(text)}")
    return tuple(dict.fromkeys(str(text) for text in texts))


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    ids = _listed(name, () if value is None else value, "token ids")
    return tuple(dict.fromkeys(_integer(f"each of {name}", id, _TOKEN_ID) for id in ids))


def _biases(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"logit_bias must be a dict of token id to bias, got {shown(value)}")
    return {
        _integer("each key of logit_bias", id, _TOKEN_ID): _number(f"logit_bias[{shown(id)}]", bias, _BIAS)
        for id, bias in value.items()
    }
