import os
import subprocess
import sys
from pathlib import Path

import pytest

import millrace
from millrace.errors import CheckpointError
from millrace.runtime.commands import COMMANDS
from millrace.runtime.launch import main

STORE = Path(millrace.__file__).parent / "models" / "embedded" / "store"
needs_embedded = pytest.mark.skipif(not (STORE / "manifest.json").exists(), reason="the embedded model is not there")


def raising(error):
    def open_runtime(values):
        raise error

    return open_runtime


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_on_stdout_and_exits_with_0(capsys, command):
    assert main([*([command] if command else []), "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: millrace") and not err


def test_without_a_command_the_commands_are_listed(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["genrate"], "did you mean generate?"),
        (["generate", "--modle=x"], "did you mean --model?"),
        (["generate", "--temprature=1"], "did you mean --temperature?"),
        (["generate", "--temperature=hot"], "expected a number"),
        (["generate", "--n=1.5"], "expected an integer"),
        (["generate", "--prompt_token_ids=1,x"], "integers with commas"),
        (["generate", "--logit_bias=5"], "pairs of token id and bias"),
        (["generate", "--format=xml"], "text|jsonl"),
        (["generate", "def f():"], "--prompt='def f():'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exits_with_2(capsys, argv, message):
    assert main(argv, raising(AssertionError)) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--set=num_slotz=4", "did you mean num_slots?"),
        ("--set=num_slots=four", "expected an integer"),
        ("--num_slots=four", "expected an integer"),
        ("--set=num_slots=0", "num_slots"),
        ("--config=embeded", "did you mean embedded?"),
        ("--dtype=int3", "dtype"),
    ],
)
def test_a_wrong_option_is_one_line_and_exits_with_1(capsys, setting, message):
    assert main(["generate", "--prompt=a", setting]) == 1
    out, err = capsys.readouterr()
    assert not out and message in err and err.count("\n") == 1


def test_an_error_of_several_lines_is_written_on_one(capsys):
    assert main(["generate", "--prompt=a"], raising(CheckpointError("no config.json\n  in x"))) == 1
    assert capsys.readouterr().err == "millrace: no config.json in x\n"


def test_a_bug_has_no_traceback_unless_asked_for(capsys):
    assert main(["generate", "--prompt=a"], raising(TypeError("boom"))) == 1
    err = capsys.readouterr().err
    assert "TypeError: boom" in err and err.count("\n") == 1
    assert main(["generate", "--prompt=a", "--log_level=debug"], raising(TypeError("boom"))) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_exits_with_130(capsys):
    assert main(["generate", "--prompt=a"], raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_while_modules_are_imported_exits_with_130_and_no_traceback():
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # where tests run in the background it is ignored
        "class Finder:\n"
        "    def find_spec(name, *_): name == 'absl' and signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
        "from millrace.runtime.launch import main\n"
        "sys.exit(main(['--help']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "millrace: interrupted\n")


def test_help_and_wrong_flags_do_not_import_jax():
    script = (
        "import sys; from millrace.runtime.launch import main\n"
        "main(['generate', '--help']); main(['generate', '--modle=x']); main(['--version'])\n"
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


@needs_embedded
@pytest.mark.embedded
def test_the_module_completes_a_piped_prompt_from_another_folder(tmp_path):
    command = [sys.executable, "-m", "millrace.runtime.launch", "generate", "--max_tokens=8", "--ignore_eos"]
    done = subprocess.run(
        command, input="def add(a, b):\n", capture_output=True, text=True, cwd=tmp_path, timeout=300, check=True
    )
    assert done.stdout and "Traceback" not in done.stderr
    assert "8 tokens" in done.stderr


@needs_embedded
@pytest.mark.embedded
def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    command = f"{sys.executable} -m millrace.runtime.launch generate --prompt='def f():' --max_tokens=64 | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.stderr.count("Error") == 0, done.stderr


def test_a_broken_pipe_exits_with_141(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr("sys.stdout", gone)
        assert main(["generate", "--prompt=a"], raising(BrokenPipeError())) == 141
