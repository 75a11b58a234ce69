"""A process that converts again and again, each time in a fork that may be killed at a given line of Millrace's code.

For test_convert: importing takes longer than converting a tiny checkpoint. Reads a JSON object per line, {"place", and
"kill_at": which line, in order of execution, is the last; 0 for none}, and answers each with the exit status and how
many lines were executed.
"""

import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax.numpy as jnp

from millrace.models.decoder import AbstractDecoder
from millrace.models.families import config_from_hf
from millrace.runtime import convert as module
from millrace.runtime.checkpoint import Checkpoint, open_checkpoint


def tracer(lines: "itertools.count[int]", kill_at: int) -> Callable[..., Any]:
    """Counts the lines of the store's modules that any thread executes."""

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if os.path.basename(frame.f_code.co_filename) not in FILES:
            return None
        if event == "line" and next(lines) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


FILES = {"convert.py", "store_array.py", "store_format.py", "store_journal.py", "store_root.py", "store_writer.py"}


def convert(checkpoint: Checkpoint, place: str, kill_at: int, answer: int) -> None:
    """In the fork: convert, then say how many lines that took."""
    lines = itertools.count(1)
    threading.settrace(tracer(lines, kill_at))
    sys.settrace(tracer(lines, kill_at))
    module.convert(checkpoint, place, show_progress=False)
    sys.settrace(None)
    os.write(answer, str(next(lines)).encode())


def main() -> None:
    """Answer until the input ends."""
    checkpoint = open_checkpoint(sys.argv[1])
    model = config_from_hf(dict(checkpoint.config))
    decoder = AbstractDecoder(model, jnp.dtype(model.dtype))
    module.AbstractDecoder = lambda *_: decoder  # type: ignore  # once for all: it takes longer than the rest
    for line in sys.stdin:
        order = json.loads(line)
        answer, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            convert(checkpoint, order["place"], order["kill_at"], write_end)
            os._exit(0)
        os.close(write_end)
        _, status = os.waitpid(child, 0)
        num_lines = int(os.read(answer, 20) or 0)
        os.close(answer)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "num_lines": num_lines}), flush=True)


if __name__ == "__main__":
    main()
