"""Groups on this machine whose command needs no runtime."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.runtime.launch import main
from millrace.runtime.supervisor import supervise


def test_a_group_that_ends_well_is_not_started_again(capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(["--version"], 2, num_restarts=3) == 0
    assert capfd.readouterr().out.count("millrace") == 1, "process 0 alone writes to stdout"


def test_a_group_that_fails_is_started_again_as_often_as_asked(capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(["nonsense"], 2, num_restarts=1) == 2
    errors = capfd.readouterr().err
    assert errors.count("unknown command 'nonsense'") == 4
    assert errors.count("the group ended with 2; starting it again") == 1


def test_the_flags_behind_two_dashes_are_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["group", "--processes=2", "--", "generate", "--nonsense=1"]) == 2
    assert capfd.readouterr().err.count("unknown flag --nonsense: ") == 2


def test_a_group_without_a_command_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["group"]) == 1
    assert "the command that every process runs" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_supervisor_alone_ends_the_whole_group(tmp_path: Path, number: signal.Signals) -> None:
    started, member = tmp_path / "started", tmp_path / "member"
    os.mkfifo(started)
    member.write_text(f"#!/bin/sh\necho $$ > {started}\nexec sleep 600\n")
    member.chmod(0o700)
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # though it be ignored here
    script += f"import sys; from millrace.runtime.supervisor import supervise; sys.executable = {str(member)!r}\n"
    script += "sys.exit(supervise(['generate'], 2, num_restarts=3))"
    with subprocess.Popen([sys.executable, "-c", script], start_new_session=True) as supervisor:
        pids: list[int] = []
        while len(pids) < 2:
            pids += map(int, started.read_text().split())
        supervisor.send_signal(number)
        assert supervisor.wait(60) == 128 + number
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
