"""From a sequence's tokens to what its user reads: text, log probabilities, and why it ended."""

import dataclasses
from collections.abc import Iterator, Sequence

from .detokenizer import TextStream
from .logprobs import Scores
from .request import CompletionOutput, FinishReason, Logprob, Request
from .tokenizer import Tokenizer


@dataclasses.dataclass(slots=True)  # not frozen: a thousand are made in every step, and freezing triples the cost
class TokenEvent:
    """What one committed step brought one continuation."""

    index: int
    tokens: tuple[int, ...]
    scores: Scores | None  # arrays [len(tokens), ...], if the request asked for logprobs
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    weights_version: int = 0  # that computed the tokens
    first_weights_version: int = 0  # that began the continuation


class Continuation:
    """Turns the events of one continuation into pieces of its output, in order. Not thread-safe."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None) -> None:
        self._request = request
        self._index = index
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, request.prompt_token_ids, request.params)
        self._is_finished = False

    def take(self, event: TokenEvent) -> CompletionOutput | None:
        """The piece that an event adds; None once a stop string has ended the continuation."""
        if self._is_finished:
            return None
        texts: list[str] = []
        num_tokens, reason, stop_reason = len(event.tokens), event.finish_reason, event.stop_reason
        for i, token in enumerate(event.tokens):
            if token in self._request.stop_ids and reason == "stop" and i == len(event.tokens) - 1:
                break  # the ending token is no text
            new, stop = self._text.push(token)
            texts.append(new)
            if stop is not None:
                num_tokens, reason, stop_reason, self._is_finished = i + 1, "stop", stop, True
                break
        if reason is not None and not self._is_finished:
            texts.append(self._text.finish())
            self._is_finished = True
        tokens = list(event.tokens[:num_tokens])
        logprobs = self._logprobs(tokens, event.scores)
        return CompletionOutput(
            index=self._index,
            text="".join(texts),
            token_ids=tokens,
            cumulative_logprob=_sum(logprobs, tokens),
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            seed=self._request.params.seed,
            weights_version=event.weights_version,
            first_weights_version=event.first_weights_version,
        )

    def _logprobs(self, tokens: Sequence[int], scores: Scores | None) -> list[dict[int, Logprob]] | None:
        count = self._request.params.logprobs
        if count is None or scores is None:
            return None if count is None else []
        return [entry(self._tokenizer, scores, i, token, count) for i, token in enumerate(tokens)]


def _sum(logprobs: list[dict[int, Logprob]] | None, tokens: Sequence[int]) -> float | None:
    return None if logprobs is None else sum((d[t].logprob for d, t in zip(logprobs, tokens, strict=True)), 0.0)


def entry(tokenizer: Tokenizer | None, scores: Scores, i: int, token: int, count: int) -> dict[int, Logprob]:
    """The `count` likeliest tokens at row i of the scores, and `token` itself."""

    def tops() -> Iterator[tuple[int, float, int]]:
        yield token, float(scores.logprob[i]), int(scores.rank[i])
        for rank in range(count):
            top = int(scores.top_ids[i, rank])
            if top >= 0 and top != token:
                yield top, float(scores.top_logprobs[i, rank]), rank + 1

    return {
        id: Logprob(logprob, rank, tokenizer.token_text(id) if tokenizer is not None else None)
        for id, logprob, rank in tops()
    }


def join(pieces: Sequence[CompletionOutput]) -> CompletionOutput:
    """The whole continuation from its pieces, of which there is at least one."""
    last = pieces[-1]
    has_logprobs = last.logprobs is not None
    return dataclasses.replace(
        last,
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        cumulative_logprob=sum(p.cumulative_logprob or 0.0 for p in pieces) if has_logprobs else None,
        logprobs=[entry for p in pieces for entry in p.logprobs or ()] if has_logprobs else None,
    )
