"""Processes that measure, and the side that asks them: a JSON line for each question, a JSON line for its answer.

What needs fresh memory, a memory limit or another Python is measured in a process of its own, which stays until it is
closed, so that measurements of several can take turns. Standard library only: a peer's environment has no more.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

FOLDER = Path(__file__).parent
PATIENCE_S = 240.0  # for one answer

Measures = Mapping[str, Callable[..., Mapping[str, Any]]]  # no `type`: a peer's Python may be 3.11


class ProcessEnded(Exception):
    """A process gave no answer; says how it ended and its last words."""


class Process:
    """A script of this folder that runs `serve`, from its start to the end of the with block.

    Raises:
      ProcessEnded: there is no such Python.
    """

    def __init__(
        self, script: str, *, python: str = sys.executable, prefix: Sequence[str] = (), patience_s: float = PATIENCE_S
    ) -> None:
        if not Path(python).exists():
            raise ProcessEnded(f"could not start: there is no {python}")
        self._patience_s = patience_s
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [*prefix, python, str(FOLDER / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    @property
    def pid(self) -> int:
        """Of the process itself."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ctrl-C comes here too: no process outlives the one that asks."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def ask(self, measure: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one question.

        Raises:
          ProcessEnded: there is none, or none within its patience.
        """
        assert self._process.stdin and self._process.stdout
        impatience = threading.Timer(self._patience_s, self._process.kill)
        impatience.start()
        try:
            self._process.stdin.write(json.dumps({"measure": measure, **arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            impatience.cancel()
        if not answer:
            raise ProcessEnded(self._last_words())
        parsed: dict[str, Any] = json.loads(answer)
        return parsed

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        how = f"ended by signal {-code} (9: out of its memory, or of patience)" if code < 0 else f"ended with {code}"
        return f"{how}: {lines[-1]:.300}"


def ask_once(measure: str, **arguments: Any) -> dict[str, Any]:
    """The answer of a fresh process with Millrace in it."""
    with Process("weights_process.py") as process:
        return process.ask(measure, **arguments)


def serve(measures: Measures) -> None:
    """Answer the questions on stdin until it ends; what else is printed goes to stderr."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for line in sys.stdin:
            question = json.loads(line)
            answers.write(json.dumps(measures[question.pop("measure")](**question)) + "\n")
            answers.flush()


def memory() -> dict[str, int]:
    """Bytes that this process has in memory: all of it now and at its peak, and what is not of a file."""
    status = Path("/proc/self/status").read_text()
    names = {"resident": "VmRSS", "peak": "VmHWM", "anonymous": "RssAnon"}
    return {name: 1024 * int(re.findall(rf"^{field}:\s*(\d+) kB$", status, re.M)[0]) for name, field in names.items()}


def disk_bytes() -> int:
    """Bytes that this process has had read from a disk so far."""
    return int(re.findall(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.M)[0])


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has taken so far, over all cores."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """Processor seconds that all processes of the machine have taken so far."""
    user, nice, system, _, _, interrupt, soft, *_ = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def memory_limit(num_bytes: int) -> Iterator[tuple[str, Sequence[str]]]:
    """The kind of limit that this machine lets us set, and the `prefix` of a Process that is to run under it.

    The page cache that the process fills counts too. A limit of the address space (ulimit -v) would not do: mapping a
    file takes address space, not memory.

    Raises:
      ProcessEnded: this machine lets us set none.
    """
    for kind, parent, limit in _memory_groups():
        try:
            group = Path(tempfile.mkdtemp(prefix="millrace-benchmark-", dir=parent))
        except OSError:
            continue
        try:
            (group / limit).write_text(str(num_bytes))
            yield f"{kind} {limit}", ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(group / "cgroup.procs")]
        finally:
            group.rmdir()
        return
    prefix = ["systemd-run", "--scope", "--quiet", *([] if os.geteuid() == 0 else ["--user"])]
    prefix += ["-p", f"MemoryMax={num_bytes}", "-p", "MemorySwapMax=0"]
    with contextlib.suppress(OSError):
        if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            yield "systemd-run MemoryMax", prefix
            return
    raise ProcessEnded("this user may make no memory cgroup, and systemd-run sets no MemoryMax")


def limit_kind(num_bytes: int) -> str:
    """How this machine lets us limit a process' memory."""
    try:
        with memory_limit(num_bytes) as (kind, _):
            return kind
    except ProcessEnded as reason:
        return f"nothing: {reason}"


def _memory_groups() -> Iterator[tuple[str, Path, str]]:
    """Where a group with a memory limit may be made: below our own (v1), or beside it (v2 has no room below)."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield "cgroup v1", Path("/sys/fs/cgroup/memory" + path), "memory.limit_in_bytes"
        elif not controllers and Path("/sys/fs/cgroup" + path, "memory.max").exists():
            yield "cgroup v2", Path("/sys/fs/cgroup" + path).parent, "memory.max"
