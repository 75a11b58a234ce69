"""Starts all processes of a group on this machine, and all of them again when one fails. Imports no jax."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

_LEAVE_S = 30.0  # for the others to notice and end by themselves
_NOTICE_S = 1.0  # for a terminal's Ctrl-C, which reaches all of its processes, to end them without this one's help
# To end by the signal that was passed on: an interrupted process closes its runtime, and jax keeps SIGTERM to itself.
_STOP_S = {signal.SIGINT: 5.0, signal.SIGTERM: 1.0}
_LOOK_S = 0.1


def supervise(command: Sequence[str], num_processes: int, num_restarts: int = 0) -> int:
    """Run `millrace COMMAND` in every process of a group; returns the exit code of the last start.

    Only process 0 has this process' stdin and stdout. A group of which one process fails is ended and started anew, at
    most `num_restarts` times. SIGINT and SIGTERM end the group: the code is then 128 and the signal's number.
    """
    with _noted_signals() as noted:
        for num_left in range(num_restarts, -1, -1):
            code = _run_once(command, num_processes, noted)
            if noted:
                return 128 + noted[0]
            if code == 0 or num_left == 0:
                return code
            print(f"millrace: the group ended with {code}; starting it again ({num_left} left)", file=sys.stderr)
    return 1


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """The signals to end that came, in order: nothing is raised, so that no process is started and then forgotten."""
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in _STOP_S}
    heeded = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]  # as nohup has it
    for number in heeded:
        signal.signal(number, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def _run_once(command: Sequence[str], num_processes: int, noted: Sequence[int]) -> int:
    """One life of a group, until a signal is noted: 0, or the first exit code that is not."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        address = f"127.0.0.1:{free_port()}"
        for number in range(num_processes):
            flags = [f"--num_processes={num_processes}", f"--process_id={number}", f"--coordinator_address={address}"]
            other = None if number == 0 else subprocess.DEVNULL
            argv = [sys.executable, "-m", "millrace.runtime.launch", *command, *flags]
            processes.append(subprocess.Popen(argv, stdin=other, stdout=other))
        codes = _codes(processes)
        while None in codes and not any(codes) and not noted:
            time.sleep(_LOOK_S)
            codes = _codes(processes)
        return next((code for code in codes if code), 0)
    finally:
        _end(processes, noted)


def _codes(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    return [process.poll() for process in processes]


def _end(processes: Sequence[subprocess.Popen[bytes]], noted: Sequence[int]) -> None:
    """Wait for those that still run: they end once one has, or by the noted signal. Kill what does not."""
    _wait(processes, _LEAVE_S, noted)
    if noted:
        if noted[0] == signal.SIGINT:
            _wait(processes, _NOTICE_S)
        for process in processes:
            process.send_signal(noted[0])  # does nothing to one that has ended
        _wait(processes, _STOP_S[signal.Signals(noted[0])])
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], limit_s: float, noted: Sequence[int] = ()) -> None:
    """Until all have ended, a signal is noted, or the time is over."""
    deadline_s = time.monotonic() + limit_s
    while None in _codes(processes) and not noted and time.monotonic() < deadline_s:
        time.sleep(_LOOK_S)


def free_port() -> int:
    """A port of this machine's loopback interface that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
