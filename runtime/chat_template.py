"""Chat messages to a prompt, through the checkpoint's template, rendered in a process that can be killed."""

import dataclasses
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InvalidRequestError

_WORKER = Path(__file__).with_name("chat_template_worker.py")
_PIPE_BYTES = 65536


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatLimits:
    """What one rendering may cost; generous for every template in use."""

    render_s: float = 5.0
    start_s: float = 30.0  # for the process to start, on a busy machine
    memory_bytes: int = 512 << 20  # the whole address space of the process
    max_messages_chars: int = 8 << 20
    max_chars: int = 16 << 20  # of the rendered text
    max_template_chars: int = 1 << 20


class ChatRenderer:
    """One checkpoint's chat template. Starts its process at the first call and keeps it; close() ends it.

    Any thread may call; renderings follow one another.
    """

    def __init__(
        self, template: str | None, special_tokens: Mapping[str, str], limits: ChatLimits | None = None
    ) -> None:
        self._template = template
        self._special_tokens = dict(special_tokens)
        self._limits = limits or ChatLimits()
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for messages of {"role": ..., "content": a string or a list of text parts}.

        `template_kwargs` are more variables for the template (tools, enable_thinking ...). The text holds its special
        tokens written out: encode it with add_special_tokens=False. Raises InvalidRequestError for messages that are
        wrong or that the template refuses, CheckpointError for a template that is malformed, endless or too large.
        """
        template = self._checked_template()
        variables = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **(template_kwargs or {}),
            "messages": [_message(index, message) for index, message in enumerate(_message_list(messages))],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            line = json.dumps({"variables": variables}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(f"messages and template_kwargs must be plain JSON values: {error}") from None
        if len(line) > self._limits.max_messages_chars:
            raise InvalidRequestError(
                f"the messages are {len(line)} characters of JSON; the most is {self._limits.max_messages_chars}"
            )
        answer = self._exchange(template, line)
        if "text" in answer:
            return str(answer["text"])
        if answer["fault"] == "messages":
            raise InvalidRequestError(f"the checkpoint's chat template refuses these messages: {answer['reason']}")
        raise CheckpointError(f"the checkpoint's chat template cannot be used: {answer['reason']}")

    def close(self) -> None:
        """End the process; a later render() starts another."""
        with self._lock:
            self._drop_worker()

    def _checked_template(self) -> str:
        if self._template is None:
            raise InvalidRequestError(
                "this checkpoint has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json):"
                " give a prompt instead of messages"
            )
        if len(self._template) > self._limits.max_template_chars:
            raise CheckpointError(f"the chat template is longer than {self._limits.max_template_chars} characters")
        return self._template

    def _exchange(self, template: str, line: str) -> dict[str, Any]:
        with self._lock:
            if self._worker is not None and not self._worker.is_alive:
                self._drop_worker()
            try:
                self._worker = self._worker or _Worker(template, self._limits)
                return self._worker.exchange(line, self._limits.render_s)
            except TimeoutError:
                self._drop_worker()
                raise CheckpointError(
                    f"the checkpoint's chat template did not finish in {self._limits.render_s} s and was stopped"
                ) from None
            except BaseException as error:
                self._drop_worker()  # what it would answer next belongs to this call
                if isinstance(error, OSError):
                    raise CheckpointError(f"the checkpoint's chat template ended its process: {error}") from None
                raise

    def _drop_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()


class _Worker:
    """One process of chat_template_worker; starting it and exchange() raise TimeoutError or another OSError."""

    def __init__(self, template: str, limits: ChatLimits) -> None:
        # A session of its own: Ctrl-C in a terminal stops a reply, not this process. -P keeps the script's folder out
        # of its path: the files beside it are no top-level modules.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        start = {
            "template": template,
            "max_chars": limits.max_chars,
            "memory_bytes": limits.memory_bytes,
            "cpu_s": int(limits.render_s) + 2,
        }
        try:
            self.exchange(json.dumps(start), limits.start_s)
        except BaseException:
            self.end()
            raise

    def exchange(self, line: str, limit_s: float) -> dict[str, Any]:
        """Send one line and read the answer."""
        deadline = time.monotonic() + limit_s
        unsent, received = memoryview(line.encode() + b"\n"), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdin, selectors.EVENT_WRITE)
            selector.register(self._stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                ready = selector.select(max(deadline - time.monotonic(), 0))
                if not ready:
                    raise TimeoutError
                for key, _ in ready:
                    if key.fd == self._stdin:
                        unsent = unsent[os.write(self._stdin, unsent[:_PIPE_BYTES]) :]
                        if not unsent:
                            selector.unregister(self._stdin)
                    elif piece := os.read(self._stdout, _PIPE_BYTES):
                        received += piece
                    else:
                        raise ConnectionError("it closed its output")
        answer: dict[str, Any] = json.loads(received)
        return answer

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def end(self) -> None:
        """Kill the process and collect it."""
        with self._process:
            self._process.kill()


def _message_list(messages: object) -> Sequence[object]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError(
            'messages must be a list like [{"role": "user", "content": "Hello"}] with at least one message,'
            f" got {'an empty list' if isinstance(messages, Sequence) else type(messages).__name__}"
        )
    return messages


def _message(index: int, message: object) -> dict[str, Any]:
    """One message with its content as one string; other keys pass to the template as they are."""
    if not isinstance(message, Mapping):
        raise InvalidRequestError(
            f"messages[{index}] must be a dict with role and content, got {type(message).__name__}"
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(f"messages[{index}] needs a role: a string like 'user', got {type(role).__name__}")
    return {**message, "content": _content(index, message.get("content"))}


def _content(index: int, content: object) -> str:
    """The content as one string: text parts are joined by newlines, as vLLM joins them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequestError(
            f"messages[{index}] needs content: a string or a list of text parts, got {type(content).__name__}"
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise InvalidRequestError(
                f'messages[{index}]: each part of content must be {{"type": "text", "text": ...}}'
            )
        texts.append(text)
    return "\n".join(texts)
