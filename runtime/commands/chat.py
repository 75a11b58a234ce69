"""`millrace chat`: a conversation on the terminal, or one user message per line of a pipe.

Ctrl-C stops a reply and keeps what was said; at the prompt it clears the line. /reset forgets the conversation,
/exit or Ctrl-D leaves. Replies go to stdout, all else to stderr.
"""

import contextlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import InvalidRequestError
from ..flags import RUNTIME, SAMPLING, Group, Option, request_params
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
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() its line editing and history
    with open_runtime(fitted(values, num_sequences=values["n"] or 1)) as runtime:
        params = request_params(values, runtime.default_sampling_params)
        if interactive:
            print("Ctrl-C stops a reply, /reset forgets the conversation, /exit leaves.", file=sys.stderr)
        opening = [{"role": "system", "content": values["system"]}] if values["system"] else []
        return _converse(runtime, params, opening, interactive)


def _converse(runtime: "Runtime", params: "SamplingParams", opening: list[Message], interactive: bool) -> int:
    """Read a message, write its reply, until the end of the input."""
    messages = list(opening)
    while (line := _read_line(interactive)) is not None:
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


def _read_line(interactive: bool) -> str | None:
    """The next message, None at the end of the input."""
    if not interactive:
        return sys.stdin.readline() or None
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)
        except EOFError:
            print()
            return None


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
