"""A sequence's text as its tokens arrive: whole characters only, and stop strings found wherever the pieces are cut."""

from collections.abc import Iterable, Sequence

from .sampling_params import SamplingParams
from .tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_PARTIAL_LEN = 3  # tokens that an unfinished UTF-8 character can span: it has at most 3 of its 4 bytes
_CONTEXT_LEN = 6  # tokens of the prompt that are decoded before the first new one
_MAX_WINDOW_LEN = 32  # reached only by tokens that never show any text


class IncrementalDetokenizer:
    """New text per token, at a constant cost per token.

    The last few tokens are decoded together (a window), because the text of a token depends on its neighbours: on
    whether a text starts there, and on the rest of a character. The window moves on where characters end. The pieces
    joined are decode(prompt + output) without decode(prompt). A character is held back until it is whole; bytes that
    cannot become one are given out as U+FFFD after at most three more tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = self._tail(prompt_ids)
        self._num_context = len(self._window)  # tokens at the window's start that the next settling drops
        self._num_held = 0  # tokens since the last whole character
        self._text = tokenizer.decode(self._window, False)
        self._num_shown = len(self._text)  # characters of the window's text that were given out

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens make known."""
        return "".join(self._push(id) for id in self._tokenizer.visible(ids, self._skip))

    def finish(self) -> str:
        """What was held back: the bytes of a character that never came to its end."""
        rest = self._text[self._num_shown :]
        self._num_shown = len(self._text)
        return rest

    def _push(self, id: int) -> str:
        self._window.append(id)
        self._text = self._tokenizer.decode(self._window, False)
        if self._text.endswith(_REPLACEMENT):
            self._num_held += 1
            return "" if self._num_held <= _MAX_PARTIAL_LEN else self._give_out_broken_bytes()
        self._num_held = 0
        new = self._text[self._num_shown :]
        self._settle()
        return new

    def _settle(self) -> None:
        """All characters are whole: keep only the newest tokens, as the context of the next."""
        rest = self._window[self._num_context :]
        rest_text = self._tokenizer.decode(rest, False)
        if rest_text or len(self._window) > _MAX_WINDOW_LEN:
            self._window, self._text = rest, rest_text
            self._num_context = len(rest)
        # Otherwise the newest token shows no text by itself (a lone space at a text's start): it is no context
        self._num_shown = len(self._text)

    def _give_out_broken_bytes(self) -> str:
        """More tokens than a character can span end in U+FFFD: all but the last of those can never change."""
        new = self._text[self._num_shown : -1]
        self._window = self._window[-_MAX_PARTIAL_LEN:]
        self._num_context = 0
        self._text = self._tokenizer.decode(self._window, False)
        self._num_shown = max(len(self._text) - 1, 0)
        return new

    def _tail(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens, from the start of a character if one starts within reach."""
        near = prompt_ids[-4 * _CONTEXT_LEN :]  # special tokens may be among them
        ids = self._tokenizer.visible(near, self._skip)
        length = _CONTEXT_LEN
        while length < len(ids) and self._tokenizer.decode(ids[-length:], False).startswith(_REPLACEMENT):
            length += 1
        return ids[-length:]


class StopChecker:
    """Finds the stop string that ends first, and holds back text that may be the start of one.

    The answer does not depend on how the text is cut into pieces. Of two stop strings that end together the longer
    one counts.
    """

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        self._stop = tuple(stop)
        self._first_chars = frozenset(text[0] for text in stop)
        self._max_len = max(map(len, stop), default=0)
        self._include = include_stop_str_in_output
        self._tail = ""  # the longest end of the text so far that starts a stop string
        self._num_shown = 0  # characters of the tail that were given out
        self._num_barred = 0  # a stop string that ends within this many characters of the tail does not count

    def push(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """The text that can be given out, and the stop string that ends it, if one does.

        Text pushed with may_stop=False (min_tokens is not reached) may begin a stop string but not complete one.
        """
        buffer = self._tail + text
        if not may_stop:
            self._num_barred = len(buffer)
        found = self._find(buffer)
        if found is not None:
            start, end, stop = found
            shown, self._tail, self._num_shown = self._num_shown, "", 0
            return buffer[shown : end if self._include else start], stop
        start = self._tail_start(buffer)
        end = len(buffer) if self._include else start
        new = buffer[self._num_shown : end]
        self._tail, self._num_shown = buffer[start:], end - start
        self._num_barred = max(self._num_barred - start, 0)
        return new, None

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        rest, self._tail, self._num_shown = self._tail[self._num_shown :], "", 0
        return rest

    def _find(self, buffer: str) -> tuple[int, int, str] | None:
        """Start, end and string of the stop string that ends first, the longest of those."""
        found = []
        for stop in self._stop:
            start = buffer.find(stop, max(self._num_barred - len(stop) + 1, 0))
            if start >= 0:
                found.append((start, start + len(stop), stop))
        return min(found, key=lambda match: (match[1], match[0]), default=None)

    def _tail_start(self, buffer: str) -> int:
        for start in range(max(len(buffer) - self._max_len + 1, 0), len(buffer)):
            if buffer[start] in self._first_chars and any(stop.startswith(buffer[start:]) for stop in self._stop):
                return start
        return len(buffer)


class TextStream:
    """One sequence's text under its SamplingParams: detokenizing, then stop strings. Empty without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, params.skip_special_tokens)
        self._stops = StopChecker(params.stop, params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    def push(self, id: int) -> tuple[str, str | None]:
        """The new text of one sampled token, and the stop string that ends the sequence with it, if one does.

        Not for a token of Request.stop_ids, which ends the sequence and is no text: call finish().
        """
        self._num_tokens += 1
        if self._detokenizer is None:
            return "", None
        return self._stops.push(self._detokenizer.push((id,)), self._num_tokens > self._min_tokens)

    def finish(self) -> str:
        """The text still held back, when the sequence ends otherwise than by a stop string."""
        if self._detokenizer is None:
            return ""
        new, _ = self._stops.push(self._detokenizer.finish(), may_stop=False)
        return new + self._stops.flush()
