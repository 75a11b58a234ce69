"""Groups whose processes are threads of this one, over real connections."""

import contextlib
import queue
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from millrace import ConfigError, GroupError
from millrace.runtime.group import MAX_FRAME_BYTES, Group, Link, accept, connect, frame_of

TOKEN = "a token"
WAIT_S = 20  # for what comes at once unless something is broken


class Processes:
    """Three of them; what ended each is in its queue."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(3)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            others = [self.pool.submit(connect, address, number, TOKEN, WAIT_S) for number in (2, 1)]
            links = [accept(listener, 3, TOKEN, WAIT_S), *([other.result(WAIT_S)] for other in reversed(others))]
        self.links: list[list[Link]] = links
        self.ends: list[queue.SimpleQueue[GroupError]] = [queue.SimpleQueue() for _ in range(3)]
        self.groups = [
            Group(number, links[number], num_processes=3, on_failure=[self.ends[number].put]) for number in range(3)
        ]

    def all(self, do: Callable[[Group], Any]) -> list[Any]:
        """What all give who do the same; an error is a result too."""

        def one(group: Group) -> Any:
            try:
                return do(group)
            except Exception as error:
                return error

        return list(self.pool.map(one, self.groups, timeout=WAIT_S))


@pytest.fixture
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    made.groups[0].fail(GroupError("the test is over"))
    for link in (link for links in made.links for link in links):
        with contextlib.suppress(OSError):
            link.connection.shutdown(socket.SHUT_RDWR)
    for group, links in zip(made.groups, made.links, strict=True):
        group._thread.join(WAIT_S)
        for link in links:
            link.connection.close()
    made.pool.shutdown()


def test_a_process_alone_exchanges_with_itself() -> None:
    group = Group()
    assert group.leads and group.exchange(3) == [3] and group.least(None) is None
    group.check_alike({"a": 1})
    group.send({})
    group.close()


def test_every_process_learns_what_all_gave_in_order(processes: Processes) -> None:
    assert processes.all(lambda group: group.exchange(10 * group.process_id)) == [[0, 10, 20]] * 3
    assert processes.all(lambda group: group.least(None if group.leads else group.process_id)) == [1] * 3


def test_messages_of_process_0_arrive_in_order(processes: Processes) -> None:
    for number in range(50):
        processes.groups[0].send({"number": number, "ended": "x" * 10_000 * (number % 3)})
    assert [processes.groups[2].receive()["number"] for _ in range(50)] == list(range(50))


def test_what_differs_is_listed_in_every_process(processes: Processes) -> None:
    assert processes.all(lambda group: group.check_alike({"dtype": "float32"})) == [None] * 3
    facts = {"dtype": "float32", "num_slots": 4}
    errors = processes.all(lambda group: group.check_alike({**facts, "num_slots": 4 + (group.process_id == 2)}))
    assert all(isinstance(error, ConfigError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert "num_slots is 4 in process 0, 5 in process 2" in str(errors[0]) and "dtype" not in str(errors[0])


def test_all_learn_which_process_is_gone(processes: Processes) -> None:
    processes.links[1][0].connection.shutdown(socket.SHUT_RDWR)
    for number in (0, 2):
        assert "process 1 of 3 is gone: it closed the connection" in str(processes.ends[number].get(timeout=WAIT_S))
    with pytest.raises(GroupError, match="process 1 of 3"):
        processes.groups[2].receive()


def test_all_learn_why_a_process_failed(processes: Processes) -> None:
    processes.groups[2].fail(ValueError("no weights here."))
    for number in (0, 1):
        assert "process 2 of 3 failed: no weights here. The group" in str(processes.ends[number].get(timeout=WAIT_S))
    assert processes.ends[2].empty()


def test_processes_that_close_leave_in_peace(processes: Processes) -> None:
    assert processes.all(Group.close) == [None] * 3
    assert all(group.failure is None for group in processes.groups)


def test_a_connection_without_the_token_is_turned_away_and_the_others_are_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        address = listener.getsockname()
        accepting = pool.submit(accept, listener, 2, TOKEN, WAIT_S)
        strangers = [b"GET / HTTP/1.1\r\n\r\n", frame_of({"token": "another", "process": 1}), frame_of([1])]
        for words in strangers:
            with socket.create_connection(address, WAIT_S) as stranger:
                stranger.sendall(words)
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(1) == b""
        connect(address, 1, TOKEN, WAIT_S).connection.close()
        for link in accepting.result(WAIT_S):
            link.connection.close()


def test_processes_that_do_not_come_are_named() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(GroupError, match=r"processes \[1, 2\] to connect within 0.05 s"),
    ):
        accept(listener, 3, TOKEN, 0.05)


def test_a_message_beyond_the_bound_is_refused_before_it_is_sent() -> None:
    with pytest.raises(GroupError, match="Submit fewer prompts"):
        frame_of("x" * MAX_FRAME_BYTES)
