"""Groups of processes, each a process of its own with 4 CPU devices."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace import ConfigError, GroupError, RuntimeConfig
from millrace.runtime.distributed import Membership, find, start
from millrace.runtime.supervisor import free_port

SCRIPT = Path(__file__).with_name("group_process.py")
LEAVE_S = 30  # after a death
START_S = 120  # for what comes within seconds on a machine that is not busy
SMALL = {
    "num_slots": 2,
    "max_step_tokens": 16,
    "max_context_len": 64,
    "progress": False,
    "mesh": {"data": 8},
    "dtype": "bf16",
}
MEMORY = {"kv_cache_bytes": 2_000_000}

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_process(program_cache: str) -> Iterator[Start]:
    """Starts one process; none outlives the test."""
    processes = []

    def started(num_devices: int = 4, options: dict[str, Any] | None = None, **given: Any) -> subprocess.Popen[str]:
        merged = {**SMALL, **MEMORY, "compile_cache_dir": program_cache, **(options or {})}
        argument = json.dumps({**given, "num_devices": num_devices, "options": merged})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([sys.executable, str(SCRIPT), argument], **pipes))
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def start_two(start_process: Start) -> Callable[..., list[subprocess.Popen[str]]]:
    def started(*, second: dict[str, Any] | None = None, **given: Any) -> list[subprocess.Popen[str]]:
        group = {"num_processes": 2, "coordinator_address": f"127.0.0.1:{free_port()}"}
        options = [{**group, "process_id": 0}, {**group, "process_id": 1, **(second or {})}]
        return [start_process(options=each, **given) for each in options]

    return started


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Of the last line; C++ may have written others before."""
    output, errors = process.communicate(timeout=START_S)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(output.strip().split("\n")[-1])
    return found


def await_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout
    for read in process.stdout:
        if read.strip() == line:
            return
    raise AssertionError(process.communicate()[1])


def last_words(process: subprocess.Popen[str], timeout_s: float = LEAVE_S) -> list[str]:
    """Our lines on stderr, once the process has ended by itself."""
    errors = process.communicate(timeout=timeout_s)[1]
    assert process.returncode == 1, errors
    return [line for line in errors.split("\n") if line.startswith("millrace: ")]


def test_two_processes_of_four_devices_give_the_tokens_of_one_process_of_eight(
    start_process: Start, start_two: Callable[..., list[subprocess.Popen[str]]]
) -> None:
    alone = answer(start_process(num_devices=8))
    first, second = start_two()
    assert answer(first) == alone
    assert second.wait(LEAVE_S) == 0
    assert alone["reasons"][2] == "stop" and alone["reasons"][-1] == "abort"


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_process_ends_the_other_with_a_line_that_names_it(
    start_two: Callable[..., list[subprocess.Popen[str]]], dead: int
) -> None:
    processes = start_two(is_endless=True)
    await_line(processes[0], "runs")
    processes[dead].kill()
    lines = last_words(processes[1 - dead])
    assert lines and all(f"process {dead} of 2 is gone" in line for line in lines), lines


def test_processes_that_disagree_on_the_config_stop_with_what_differs(
    start_two: Callable[..., list[subprocess.Popen[str]]],
) -> None:
    for process in start_two(second={"num_slots": 3, "page_size": 8}):
        lines = last_words(process, START_S)
        assert len(lines) == 1
        assert "num_slots is 2 in process 0, 3 in process 1" in lines[0]
        assert "page_size is 16 in process 0, 8 in process 1" in lines[0]


def test_processes_that_plan_other_steps_stop_and_name_process_and_step(
    start_two: Callable[..., list[subprocess.Popen[str]]],
) -> None:
    for process in start_two(diverges=True, is_endless=True):
        assert any("process 1 of 2" in line and "before step" in line for line in last_words(process, START_S))


def test_a_coordinator_that_does_not_answer_is_an_error_that_names_it() -> None:
    address = f"127.0.0.1:{free_port()}"
    config = RuntimeConfig(num_processes=2, process_id=1, coordinator_address=address)
    with pytest.raises(GroupError, match=f"process 0 to answer at {address} within 0.2 s"):
        start(config, timeout_s=0.2)


def test_a_process_is_alone_unless_told_otherwise() -> None:
    assert find(RuntimeConfig()) is None and find(RuntimeConfig(num_processes=1)) is None
    config = RuntimeConfig(num_processes=2, process_id=1, coordinator_address="[::1]:77")
    found = find(config)
    assert found == Membership(2, 1, "[::1]:77") and (found.host, found.port) == ("::1", 77)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 2}, "coordinator_address and process_id|process_id and coordinator_address"),
        ({"num_processes": 2, "process_id": 2, "coordinator_address": "a:1"}, "process_id=2 is not below"),
        ({"num_processes": 2, "process_id": 1, "coordinator_address": "a"}, "should be host:port"),
        ({"coordinator_address": "a:1"}, "num_processes"),
    ],
)
def test_options_that_do_not_make_a_group_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find(RuntimeConfig(**options))
