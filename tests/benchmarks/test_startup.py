"""What is timed from outside: the command of every start."""

import sys

import artifact
import pytest
import startup


@pytest.fixture
def commands(monkeypatch):
    """Those that are timed by either benchmark, none of which runs."""
    timed = []
    for module in (startup, artifact):
        monkeypatch.setattr(module, "first_byte_s", lambda command: timed.append(list(command)) or 1.0)
        monkeypatch.setattr(module, "report", lambda *arguments: None)
    monkeypatch.setattr(artifact.subprocess, "run", lambda *arguments, **options: None)
    return timed


@pytest.mark.parametrize("benchmark", [startup, artifact])
def test_every_run_generates_for_the_same_prompt(commands, monkeypatch, benchmark):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--repeats=2"])
    benchmark.main()
    assert len(commands) == (3 if benchmark is startup else 4)
    for command in commands:
        assert command[:4] == [sys.executable, "-m", "millrace.runtime.launch", "generate"]
        assert "--prompt=def fibonacci(n):" in command


def test_warm_starts_find_what_the_cold_one_left(commands, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["startup.py", "--repeats=2"])
    startup.main()
    assert commands[0] == commands[1] == commands[2]
    assert any(flag.startswith("--store_cache_dir=") for flag in commands[0])


def test_a_start_that_says_nothing_is_told_with_its_last_words():
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with pytest.raises(SystemExit, match="ended with 1: no such model"):
        startup.first_byte_s(command)
