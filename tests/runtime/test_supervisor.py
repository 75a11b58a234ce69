"""Groups on this machine whose command needs no runtime."""

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
