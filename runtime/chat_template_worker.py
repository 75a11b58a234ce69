"""The process that renders chat templates: a script that chat_template starts, which imports nothing of Millrace.

It reads one JSON object per line and answers each with one: first {template, max_chars, memory_bytes, cpu_s}, answered
{"ready": true}, then {variables}, answered {"text": ...} or {"fault": "template" or "messages", "reason": ...}. The
template is somebody else's program: it runs in jinja2's sandbox, under limits on memory, processor time and output.
"""

import contextlib
import datetime
import functools
import json
import resource
import sys
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils


class _RefusedMessagesError(jinja2.TemplateError):
    """The template called raise_exception."""


class _TooLongError(Exception):
    """The rendered text passed the limit."""


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks what an assistant wrote, for training; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without underscore attributes, which Python itself would read."""

    def __init__(self, /, *args: Any, **attributes: Any) -> None:
        for name in dict(*args, **attributes):
            _refuse_underscore(name)
        super().__init__(*args, **attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace attribute starts with an underscore: {name!r}")


def _raise_exception(message: object) -> None:
    raise _RefusedMessagesError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers: unlike jinja2's own filter it does not escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def compile_template(source: str) -> jinja2.Template:
    """The template under the environment that Hugging Face's templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
    }
    return environment.from_string(source)


def render(template: jinja2.Template, variables: dict[str, Any], max_chars: int) -> str:
    """The rendered text; stops as soon as it passes max_chars."""
    pieces = []
    num_chars = 0
    for piece in template.generate(**variables):
        num_chars += len(piece)
        if num_chars > max_chars:
            raise _TooLongError(f"it writes more than {max_chars} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(start: dict[str, Any], request: dict[str, Any]) -> dict[str, str]:
    """Render one request, or say whose fault it is that this fails."""
    try:
        return {"text": render(compile_template(start["template"]), request["variables"], start["max_chars"])}
    except _RefusedMessagesError as error:
        fault, reason = "messages", str(error)
    except MemoryError:
        fault, reason = "template", f"it needs more than {start['memory_bytes'] >> 20} MiB of memory"
    except (jinja2.TemplateSyntaxError, jinja2.exceptions.SecurityError, SyntaxError) as error:
        fault, reason = "template", f"{type(error).__name__}: {error}"
    except (_TooLongError, RecursionError, OverflowError) as error:
        fault, reason = "template", str(error)
    except Exception as error:  # whatever else a template does with values that it did not expect
        fault, reason = "messages", f"{type(error).__name__}: {error}"
    return {"fault": fault, "reason": reason[:500]}


def main() -> None:
    """Answer requests until stdin ends."""
    start = json.loads(sys.stdin.readline())
    with contextlib.suppress(ValueError, OSError):  # macOS refuses to limit the address space
        resource.setrlimit(resource.RLIMIT_AS, (start["memory_bytes"], resource.RLIM_INFINITY))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        # The parent kills a worker that is late; this ends one whose parent is gone
        cpu_s = int(usage.ru_utime + usage.ru_stime) + start["cpu_s"]
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, resource.RLIM_INFINITY))
        print(json.dumps(answer(start, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
