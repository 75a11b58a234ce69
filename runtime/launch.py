"""The launcher: `millrace COMMAND --flags`, or `python -m millrace.runtime.launch COMMAND --flags`.

Results go to stdout, words and progress to stderr. Exit codes: 0, 1 for an error (one line on stderr), 2 for a wrong
command line, 130 after Ctrl-C, 141 where the reader of a pipe went away.
"""

import io
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

# All that takes time is imported where interrupts wait.
from ..errors import ConfigError, MillraceError
from .interrupts import interrupts_wait

if TYPE_CHECKING:
    from .api import Runtime
    from .commands import Command, CommandModule, OpenRuntime

HELP = ("--help", "-help", "-h", "help")


def main(argv: Sequence[str] | None = None, open_runtime: "OpenRuntime | None" = None) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of few characters is no reason to end
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments, open_runtime or _open_runtime)
    except KeyboardInterrupt:
        print("millrace: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MillraceError, OSError) as error:
        return _say(str(error), 1)
    except Exception as error:
        if "--log_level=debug" in arguments:
            traceback.print_exc()
        return _say(f"{type(error).__name__}: {error} (a bug; --log_level=debug shows where)", 1)


def _run(arguments: list[str], open_runtime: "OpenRuntime") -> int:
    """Find the command, do it."""
    with interrupts_wait():
        from .commands import COMMANDS
        from .spelling import nearest

    if not arguments or arguments[0] in HELP:
        print(_overview(COMMANDS.values()))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from .. import __version__

        print(f"millrace {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _say(f"unknown command {name!r}: {nearest(name, COMMANDS)}", 2)
    with interrupts_wait():
        module = COMMANDS[name].load()
    return _run_command(name, module, rest, open_runtime)


def _run_command(name: str, module: "CommandModule", rest: list[str], open_runtime: "OpenRuntime") -> int:
    """Parse the command's flags, do it."""
    from .flags import describe, parse

    places: Sequence[str] = getattr(module, "POSITIONALS", ())
    if any(argument in HELP[:3] for argument in rest):
        usage = " ".join(["usage: millrace", name, *map(str.upper, places), "[--flags]"])
        print(f"{usage}\n\n{(module.__doc__ or '').strip()}\n{describe(module.GROUPS)}")
        return 0
    try:
        values = parse(module.GROUPS, rest, f"millrace {name}", places)
    except ConfigError as error:
        return _say(f"{error} (millrace {name} --help lists the flags)", 2)
    _log_at(values["log_level"])
    return module.run(values, open_runtime)


def _overview(commands: "Iterable[Command]") -> str:
    lines = "\n".join(f"  {command.name:<14}{command.summary}" for command in commands)
    return f"usage: millrace COMMAND [--flags]\n\n{lines}\n\nmillrace COMMAND --help lists a command's flags."


def _say(message: str, code: int) -> int:
    """One line on stderr, whatever the message holds."""
    print("millrace: " + " ".join(message.split()), file=sys.stderr)
    return code


def _log_at(level: str) -> None:
    """Write Millrace's log to stderr; jax's own, a page per program, stays at warnings."""
    with interrupts_wait():
        import logging

        from absl import flags
        from absl import logging as absl_logging

    flags.FLAGS([sys.argv[0]])  # absl's logging has flags of its own, and complains where they were never parsed
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(level)
    for noisy in ("jax", "etils", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _open_runtime(values: Mapping[str, Any]) -> "Runtime":
    """The runtime that the flags describe. jax is imported here, and not before."""
    from .overrides import resolve

    config = resolve(values)
    with interrupts_wait():
        from .api import Runtime

    runtime = Runtime(config)
    if runtime.num_processes > 1:  # gloo writes to stdout that it is connected: results alone belong there
        encoding, errors = sys.stdout.encoding, sys.stdout.errors
        sys.stdout = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding=encoding, errors=errors)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if runtime.takes_requests:
        return runtime
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes: process 0 ends them
    with runtime:
        print(f"millrace: process {runtime.process_id} follows process 0", file=sys.stderr, flush=True)
        runtime.follow()
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
