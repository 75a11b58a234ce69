"""`millrace chat`: a conversation on the terminal, or one user message per line of a pipe.

Ctrl-C stops a reply and keeps what was said; at the prompt it clears the line. /reset forgets the conversation,
/exit or Ctrl-D leaves. Replies go to stdout, all else to stderr.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, InvalidRequestError
from ..flags import RUNTIME, SAMPLING, Group, Option, request_params
from .prompts import piped_lines
from .small import fitted

if TYPE_CHECKING:
    from ..api import Runtime
    from ..sampling_params import SamplingParams
    from . import OpenRuntime

GROUPS = (
    Group("Conversation", (Option("system", "text", "a system message that every reply sees"),)),
    SAMPLING,
    RUNTIME,
)

Message = dict[str, str]


def run(values: Mapping[str, Any], open_runtime: "OpenRuntime") -> int:
    """The exit code: 0, or 1 where a piped message was refused."""
    _check_one(values["n"] or 1)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() its line editing and history
    with open_runtime(fitted(values, num_sequences=1)) as runtime:
        params = request_params(values, runtime.default_sampling_params)
        _check_one(params.n)
        if interactive:
            print("Ctrl-C stops a reply, /reset forgets the conversation, /exit leaves.", file=sys.stderr)
        opening = [{"role": "system", "content": values["system"]}] if values["system"] else []
        return _converse(runtime, params, opening, interactive)


def _check_one(n: int) -> None:
    if n > 1:
        raise ConfigError(f"chat goes on from one reply: n must be 1; got {n}, by flag or of the model. Give --n=1.")


def _converse(runtime: "Runtime", params: "SamplingParams", opening: list[Message], interactive: bool) -> int:
    """Read a message, write its reply, until the end of the input."""
    messages = list(opening)
    for line in _typed_lines() if interactive else piped_lines():
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            messages = list(opening)
        elif text.startswith("/"):
            print(f"unknown command {text}: there are /exit and /reset", file=sys.stderr)
        elif text:
            try:
                reply = _reply(runtime, [*messages, {"role": "user", "content": text}], params)
            except InvalidRequestError as error:
                print(f"millrace: {error}", file=sys.stderr)
                if not interactive:
                    return 1
                continue
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    return 0


def _typed_lines() -> Iterator[str]:
    """What a person types, line by line, until the end of the input."""
    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)
        except UnicodeDecodeError as error:
            print(f"millrace: that was not {error.encoding}: {error.reason}", file=sys.stderr)
        except EOFError:
            print()
            return
        else:
            yield line


def _reply(runtime: "Runtime", messages: list[Message], params: "SamplingParams") -> str:
    """Write the reply as it comes and return it; Ctrl-C ends it where it is, and closing the stream frees its slot."""
    pieces: list[str] = []
    stream: Any = runtime.stream_chat(messages, params)
    try:
        for output in stream:
            pieces.append(output.outputs[0].text)
            print(pieces[-1], end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr, flush=True)
    finally:
        stream.close()
        print(flush=True)
    return "".join(pieces)
