"""The processes that run one program: process 0 speaks, the others follow, and all end when one of them does.

Process 0 has a connection to each of the others. A message is a frame: its length in 4 bytes, then JSON, its kind and
what it says; an empty frame is a heartbeat. A connection counts once it has shown the group's token. One thread per
process reads them all; a peer that closes, that is silent for `SILENCE_S` or that says it failed ends the group.
"""

import contextlib
import hmac
import json
import queue
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, GroupError

HEARTBEAT_S = 1.0
SILENCE_S = 10.0
MAX_FRAME_BYTES = 1 << 28  # a turn with tens of thousands of prompts; more is not one of ours
_MAX_GREETING_BYTES = 1 << 10
_GREETING_S = 5.0

type OnFailure = Callable[[GroupError], object]


class Link:
    """A connection to one process of the group."""

    def __init__(self, process_id: int, connection: socket.socket) -> None:
        connection.settimeout(SILENCE_S)  # a peer that takes nothing for so long is as good as dead
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.process_id = process_id
        self.connection = connection
        self.messages: queue.SimpleQueue[Any] = queue.SimpleQueue()  # None once there will be no more
        self.heard_s = time.monotonic()
        self._received = bytearray()
        self._sending = threading.Lock()

    def send(self, frame: bytes) -> None:
        """Raises OSError if the peer is gone."""
        with self._sending:
            self.connection.sendall(frame)

    def send_heartbeat(self) -> None:
        """Unless something is being sent, which is a sign of life too."""
        if self._sending.acquire(blocking=False):
            try:
                self.connection.sendall(frame_of(None))
            finally:
                self._sending.release()

    def read(self) -> list[Any]:
        """The messages that what has arrived completes, without waiting for more.

        Raises:
          OSError, ValueError: the connection is closed or broken, or what came is no frame.
        """
        data = self.connection.recv(1 << 20)
        if not data:
            raise ConnectionError("it closed the connection")
        self.heard_s = time.monotonic()
        self._received += data
        messages = []
        while len(self._received) >= 4:
            end = 4 + _frame_len(self._received[:4], MAX_FRAME_BYTES)
            if len(self._received) < end:
                break
            if end > 4:
                messages.append(json.loads(self._received[4:end]))
            del self._received[:end]
        return messages


class Group:
    """One process' view of all of them; of a single process, everything here is a matter of course."""

    def __init__(
        self,
        process_id: int = 0,
        links: Sequence[Link] = (),
        *,
        num_processes: int = 1,
        on_failure: Sequence[OnFailure] = (),
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_failure` are called in the thread that watches, in order, with what ended the group."""
        self.process_id = process_id
        self.num_processes = num_processes
        self.failure: GroupError | None = None
        self._links = {link.process_id: link for link in links}
        self._on_failure = list(on_failure)
        self._on_close = on_close
        self._is_over = threading.Event()  # what happens to the connections from now on is no failure
        self._thread = threading.Thread(target=self._watch, name="millrace-group", daemon=True)
        if links:
            self._thread.start()

    @property
    def leads(self) -> bool:
        """Whether this process takes the requests: process 0."""
        return self.process_id == 0

    def before_the_end(self, call: OnFailure) -> None:
        """Have `call` called when the group fails, before anything else is done about it."""
        self._on_failure.insert(0, call)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send to every process that this one has a connection to: from process 0 to all others.

        Raises:
          GroupError: one of them is gone.
        """
        frame = frame_of(["says", dict(message)]) if self._links else b""
        for link in self._links.values():
            try:
                link.send(frame)
            except OSError as error:
                raise self._failed(link.process_id, _reason(error)) from error

    def receive(self, process_id: int = 0) -> dict[str, Any]:
        """Wait for the next message of a process.

        Raises:
          GroupError: a process of the group is gone.
        """
        message: dict[str, Any] | None = self._links[process_id].messages.get()
        if message is None:
            raise self.failure or GroupError("the group has ended.")
        return message

    def exchange(self, value: Any) -> list[Any]:
        """What every process gave here, by process number; all must call it.

        Raises:
          GroupError: a process is gone.
        """
        if not self._links:
            return [value]
        if not self.leads:
            self.send({"value": value})
            return list(self.receive()["values"])
        values = [value, *(self.receive(number)["value"] for number in range(1, self.num_processes))]
        self.send({"values": values})
        return values

    def least(self, value: int | None) -> int | None:
        """The smallest of what the processes gave; None stands for no limit."""
        return min((each for each in self.exchange(value) if each is not None), default=None)

    def check_alike(self, facts: Mapping[str, object]) -> None:
        """Compare something by name over all processes.

        Raises:
          ConfigError: in every process, with what differs and where.
        """
        everyone = self.exchange({name: str(value) for name, value in facts.items()})
        lines = []
        for name in dict.fromkeys(name for one in everyone for name in one):
            values = [one.get(name, "nothing") for one in everyone]
            others = [f"{value} in process {i}" for i, value in enumerate(values) if value != values[0]]
            if others:
                more = "" if len(others) < 4 else f" and {len(others) - 3} more"
                lines.append(f"{name} is {values[0]} in process 0, {', '.join(others[:3])}{more}")
        if lines:
            raise ConfigError(
                f"the processes of the group should be started alike; these differ: {'; '.join(lines)}. Give all of "
                "them the same options, and the same versions."
            )

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process cannot go on, and stop watching them; nothing once the group is over."""
        if self._is_over.is_set():
            return
        self._is_over.set()
        self.failure = GroupError(f"{error}" or type(error).__name__)
        self._say(["failed", f"process {self.process_id} of {self.num_processes} failed: {self.failure}"])
        self._shut()

    def close(self) -> None:
        """Leave in peace, once every process is here."""
        if self._is_over.is_set():
            return
        with contextlib.suppress(GroupError):  # who watches has said so
            if self.leads:
                for number in self._links:
                    self.receive(number)
                self._is_over.set()
                self._say(["ended", None])
            else:
                self.send({})
                self._links[0].messages.get()
            if self.failure is None:
                self._on_close()
                self._shut()

    def _say(self, message: Sequence[Any]) -> None:
        """Send to whoever is still there."""
        frame = frame_of(message)
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.send(frame)

    def _shut(self) -> None:
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.connection.shutdown(socket.SHUT_WR)  # what was sent still arrives

    # ---- the thread that watches

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for link in self._links.values():
                selector.register(link.connection, selectors.EVENT_READ, link)
                link.heard_s = time.monotonic()  # it may have waited for the others until now
            due_s = 0.0
            while not self._is_over.is_set():
                for key, _ in selector.select(max(0.0, due_s - time.monotonic())):
                    if not self._take(key.data):
                        selector.unregister(key.fileobj)
                if time.monotonic() >= due_s:
                    due_s = time.monotonic() + HEARTBEAT_S
                    self._beat()

    def _take(self, link: Link) -> bool:
        """Read what came; whether more may come."""
        try:
            messages = link.read()
        except (OSError, ValueError) as error:
            self._failed(link.process_id, _reason(error))
            return False
        for kind, content in messages:
            if kind == "failed":
                self._end(GroupError(f"{content.rstrip('.')}. The group ends: start all of it again."))
            elif kind == "says":
                link.messages.put(content)
            else:
                self._is_over.set()
                link.messages.put(None)
        return True

    def _beat(self) -> None:
        for link in self._links.values():
            silence_s = time.monotonic() - link.heard_s
            if silence_s > SILENCE_S:
                self._failed(link.process_id, f"nothing was heard of it for {silence_s:.0f} s")
                continue
            try:
                link.send_heartbeat()
            except OSError as error:
                self._failed(link.process_id, _reason(error))

    def _failed(self, process_id: int, reason: str) -> GroupError:
        return self._end(
            GroupError(
                f"process {process_id} of {self.num_processes} is gone: {reason}. The group ends: start all of it "
                "again."
            )
        )

    def _end(self, failure: GroupError) -> GroupError:
        """Tell everybody once; returns what ended the group first."""
        if self._is_over.is_set():
            return self.failure or failure
        self.failure = failure
        self._is_over.set()
        for link in self._links.values():
            link.messages.put(None)
        if self.leads:
            self._say(["failed", str(failure).partition(" The group ends")[0]])
        for call in self._on_failure:
            call(failure)
        return failure


def frame_of(message: Any) -> bytes:
    """A message as it is sent; None is a heartbeat."""
    data = b"" if message is None else json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_FRAME_BYTES:
        raise GroupError(
            f"a message of {len(data):,} bytes is more than the {MAX_FRAME_BYTES:,} that go to the other processes at "
            "once. Submit fewer prompts at a time."
        )
    return struct.pack(">I", len(data)) + data


def _frame_len(header: bytes | bytearray, limit: int) -> int:
    (num_bytes,) = struct.unpack(">I", header)
    if num_bytes > limit:
        raise ValueError(f"a frame of {num_bytes:,} bytes came; at most {limit:,} were expected")
    return int(num_bytes)


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return "it closed the connection"
    return "it takes no more messages" if isinstance(error, TimeoutError) else f"{error}"


# ---- how the connections come to be


def accept(listener: socket.socket, num_processes: int, token: str, timeout_s: float) -> list[Link]:
    """Process 0's connections to all others; whoever does not know the token is turned away.

    Raises:
      GroupError: not all came in time.
    """
    links: dict[int, Link] = {}
    deadline_s = time.monotonic() + timeout_s
    while len(links) < num_processes - 1:
        listener.settimeout(max(0.01, deadline_s - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            missing = sorted(set(range(1, num_processes)) - set(links))
            raise GroupError(f"expected processes {missing} to connect within {timeout_s:g} s; they did not.") from None
        process_id = _greeted(connection, token)
        if process_id is None or not 0 < process_id < num_processes or process_id in links:
            connection.close()
        else:
            links[process_id] = Link(process_id, connection)
    for link in links.values():
        link.send(frame_of({"token": token}))
    return [links[number] for number in sorted(links)]


def connect(address: tuple[str, int], process_id: int, token: str, timeout_s: float) -> Link:
    """Another process' connection to process 0.

    Raises:
      GroupError: process 0 does not answer, or does not know the token.
    """
    try:
        connection = socket.create_connection(address, timeout_s)
        connection.sendall(frame_of({"token": token, "process": process_id}))
        answer = _greeting(connection, timeout_s)
    except (OSError, ValueError) as error:
        raise GroupError(f"expected process 0 to answer at {address[0]}:{address[1]}; got: {error}.") from error
    if not hmac.compare_digest(str(answer.get("token")), token):
        connection.close()
        raise GroupError(f"expected process 0 of this group at {address[0]}:{address[1]}; something else answers.")
    return Link(0, connection)


def _greeted(connection: socket.socket, token: str) -> int | None:
    """Who connected; None unless it knows the token."""
    try:
        greeting = _greeting(connection, _GREETING_S)
        is_ours = hmac.compare_digest(str(greeting.get("token")), token)
        return int(greeting["process"]) if is_ours else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _greeting(connection: socket.socket, timeout_s: float) -> dict[str, Any]:
    connection.settimeout(timeout_s)
    size = _frame_len(_exactly(connection, 4), _MAX_GREETING_BYTES)
    greeting = json.loads(_exactly(connection, size))
    if not isinstance(greeting, dict):
        raise ValueError("no greeting")
    return greeting


def _exactly(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        more = connection.recv(num_bytes - len(data))
        if not more:
            raise ConnectionError("the connection was closed")
        data += more
    return data
