"""Starts all processes of a group on this machine, and all of them again when one fails. Imports no jax."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

_LEAVE_S = 30.0  # for the others to notice and end by themselves
_LOOK_S = 0.1


def supervise(command: Sequence[str], num_processes: int, num_restarts: int = 0) -> int:
    """Run `millrace COMMAND` in every process of a group; returns the exit code of the last start.

    Only process 0 has this process' stdin and stdout. A group of which one process fails is ended and started anew, at
    most `num_restarts` times.
    """
    for num_left in range(num_restarts, -1, -1):
        code = _run_once(command, num_processes)
        if code == 0 or num_left == 0:
            return code
        print(f"millrace: the group ended with {code}; starting it again ({num_left} left)", file=sys.stderr)
    return 1


def _run_once(command: Sequence[str], num_processes: int) -> int:
    """One life of a group: 0, or the first exit code that is not."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        address = f"127.0.0.1:{free_port()}"
        for number in range(num_processes):
            flags = [f"--num_processes={num_processes}", f"--process_id={number}", f"--coordinator_address={address}"]
            other = None if number == 0 else subprocess.DEVNULL
            argv = [sys.executable, "-m", "millrace.runtime.launch", *command, *flags]
            processes.append(subprocess.Popen(argv, stdin=other, stdout=other))
        codes = _codes(processes)
        while None in codes and not any(codes):
            time.sleep(_LOOK_S)
            codes = _codes(processes)
        return next((code for code in codes if code), 0)
    finally:
        _end(processes)


def _codes(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    return [process.poll() for process in processes]


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for those that still run, which end by themselves once one has; kill what does not."""
    deadline_s = time.monotonic() + _LEAVE_S
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline_s - time.monotonic()))
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port of this machine's loopback interface that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
