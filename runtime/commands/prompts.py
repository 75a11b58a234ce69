"""Where `millrace generate` takes its prompts from: flags, a file, or a pipe."""

import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError

Prompt = str | list[int]

SOURCES = ("prompt", "prompt_token_ids", "prompt_file")


def read_prompts(values: Mapping[str, Any]) -> list[Prompt]:
    """The prompts of one command, never empty; ConfigError says what is missing, doubled or malformed."""
    named = [name for name in SOURCES if values[name]]
    if len(named) > 1:
        raise ConfigError(f"--{named[0]} and --{named[1]} are both given: use one of them")
    if values["prompt"]:
        return list(values["prompt"])
    if values["prompt_token_ids"]:
        return [list(ids) for ids in values["prompt_token_ids"]]
    if values["prompt_file"]:
        return _read_file(Path(values["prompt_file"]))
    if not sys.stdin or sys.stdin.isatty():
        raise ConfigError("no prompt: give --prompt=TEXT, --prompt_file or --prompt_token_ids=1,2,3, or pipe a text")
    text = read_piped()
    if not text:
        raise ConfigError("no prompt: the piped text is empty; give --prompt=TEXT, --prompt_file or --prompt_token_ids")
    return [text]


def read_piped() -> str:
    """All of standard input."""
    return io.StringIO(_utf8(sys.stdin.buffer.read()), newline=None).read()  # line ends become "\n", as in a file


def piped_lines() -> Iterator[str]:
    """The lines of standard input, each as soon as it is there."""
    offset = 0
    for line in sys.stdin.buffer:
        yield _utf8(line, offset)
        offset += len(line)


def _utf8(content: bytes, offset: int = 0) -> str:
    """The text of what stands on standard input from this offset on."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"standard input must be UTF-8; byte {offset + error.start} (from 0) is 0x{content[error.start]:02x}: "
            f"{error.reason}. Convert it first, as with iconv."
        ) from None


def _read_file(path: Path) -> list[Prompt]:
    """A prompt per line that is not blank; in a .jsonl file each line is a JSON prompt."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() splits inside of texts, as at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt_file={path} cannot be read: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"--prompt_file={path} has no prompt in it")
    if path.suffix == ".jsonl":
        return [_parse_line(line, f"{path}:{number}") for number, line in numbered]
    return [line for _, line in numbered]


def _parse_line(line: str, place: str) -> Prompt:
    """A JSON text, a list of token ids, or an object with one of them as `prompt` or `prompt_token_ids`."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of too many digits, or too many brackets, besides
        raise ConfigError(f"{place} is not JSON: {error}") from None
    if isinstance(value, dict) and len(value) == 1:
        value = value.get("prompt", value.get("prompt_token_ids"))
    if isinstance(value, str) or (isinstance(value, list) and all(type(item) is int for item in value)):
        return value
    forms = '"text", [token ids], {"prompt": "text"} or {"prompt_token_ids": [token ids]}'
    raise ConfigError(f"{place}: expected {forms}, got {line[:60]}")
