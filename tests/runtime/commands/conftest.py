"""A runtime that answers without a model, and a launcher that uses it."""

import dataclasses
import io
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import pytest

from millrace.errors import InvalidRequestError
from millrace.runtime.config import RuntimeConfig
from millrace.runtime.launch import main
from millrace.runtime.overrides import resolve
from millrace.runtime.request import CompletionOutput, Logprob, Prompt, RequestOutput
from millrace.runtime.sampling_params import SamplingParams

PIECES = ["    return", " a", " + b\n"]


@dataclasses.dataclass
class FakeHandle:
    output: RequestOutput

    def result(self) -> RequestOutput:
        return self.output


class FakeRuntime:
    """Completes every prompt with PIECES, refuses the prompt "bad", and remembers what it was asked."""

    default_sampling_params = SamplingParams()
    has_tokenizer = True

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config
        self.asked: list[tuple[Any, SamplingParams]] = []
        self.closed = False
        self.interrupt_after: int | None = None  # pieces, then Ctrl-C
        self.pieces = list(PIECES)

    def __enter__(self) -> "FakeRuntime":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def stream(self, prompt: Any, params: SamplingParams) -> Generator[RequestOutput, None, None]:
        self._note(prompt, params)
        for number, text in enumerate(self.pieces):
            if number == self.interrupt_after:
                raise KeyboardInterrupt
            yield self._output(prompt, [CompletionOutput(0, text, [number])])

    def stream_chat(
        self, messages: Sequence[Mapping[str, str]], params: SamplingParams
    ) -> Generator[RequestOutput, None, None]:
        self._note([dict(message) for message in messages], params)
        if messages[-1]["content"] == "bad":
            raise InvalidRequestError("bad is refused")
        yield from self.stream(messages[-1]["content"], params)

    def submit(self, prompt: Prompt, params: SamplingParams) -> FakeHandle:
        self._note(prompt, params)
        if prompt in ("bad", "half \udc80"):
            raise InvalidRequestError("bad is refused")
        entry = Logprob(-0.5, 1, "a")
        logprobs = None if params.logprobs is None else [{7: entry}]
        text = "" if not params.detokenize else "".join(PIECES)
        completions = [
            CompletionOutput(index, text, [7], -0.5, logprobs, "length", None, 11) for index in range(params.n)
        ]
        return FakeHandle(self._output(prompt, completions))

    def _note(self, prompt: Any, params: SamplingParams) -> None:
        self.asked.append((prompt, params))

    def _output(self, prompt: Any, completions: list[CompletionOutput]) -> RequestOutput:
        text, ids = (prompt, [1, 2]) if isinstance(prompt, str) else (None, list(prompt))
        return RequestOutput("0", text, ids, [None, {2: Logprob(float("-inf"), 2, "b")}], completions, True)


class Launcher:
    """Runs command lines against one FakeRuntime."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.runtime = FakeRuntime(RuntimeConfig())

    def pipe(self, content: str | bytes) -> None:
        """What stands on standard input."""
        content = content.encode() if isinstance(content, str) else content
        self._monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    def type(self, *lines: str | type[BaseException]) -> None:
        """What a person types at a terminal: lines, or an exception where a key raises one; then Ctrl-D."""
        terminal = io.StringIO()
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        self._monkeypatch.setattr("sys.stdin", terminal)
        typed = iter([*lines, EOFError])

        def read(prompt: str = "") -> str:
            line = next(typed)
            if isinstance(line, str):
                return line
            raise line

        self._monkeypatch.setattr("builtins.input", read)

    def __call__(self, *argv: str) -> int:
        return main(argv, self._open)

    def _open(self, values: Mapping[str, Any]) -> Any:
        self.runtime.config = resolve(values)
        return self.runtime


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    launcher = Launcher(monkeypatch)
    launcher.pipe("")
    return launcher


@pytest.fixture
def last_params(launch: Launcher) -> Callable[[], SamplingParams]:
    return lambda: launch.runtime.asked[-1][1]
