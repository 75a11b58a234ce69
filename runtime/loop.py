"""The step loop: plan, run, commit, with commit one step behind, so that the host plans while the device computes.

Before each plan comes a turn. Process 0 decides it, and tells the others of its group, if there are any; all do it.
"""

import contextlib
import dataclasses
import os
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future, InvalidStateError

from ..errors import GroupError, MillraceError, RuntimeClosedError, StepError
from .delivery import Delivery
from .executor import Executor, StepResult
from .group import Group
from .handle import RequestHandle
from .plan import StepPlan
from .sampling_params import OnWeightsUpdate
from .scheduler import Scheduler
from .sequence import Sequence
from .turn import Ending, Turn, plan_digest

_DIGEST_EVERY = 16  # turns


@dataclasses.dataclass(frozen=True, eq=False)
class _Update:
    """New weights that wait for their turn."""

    swap: Callable[[], None]
    store: str  # whence the other processes take them; "" for arrays
    running: OnWeightsUpdate  # what happens to requests that do not say it themselves
    version: Future[int]

    def waits_for(self, sequence: Sequence) -> bool:
        """Whether a sequence that has started must end first."""
        return (sequence.request.params.on_weights_update or self.running) == "drain"


class StepLoop:
    """Owns scheduler and executor: one thread in process 0, which others reach through an inbox; `follow` elsewhere."""

    def __init__(self, scheduler: Scheduler, executor: Executor, group: Group | None = None) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self.group = group or Group()
        self._inbox: list[RequestHandle] = []
        self._cancelled: list[RequestHandle] = []
        self._updates: deque[_Update] = deque()
        self._due: deque[_Update] = deque()  # of this turn
        self._changed = threading.Condition()
        self._is_closing = False
        self._error: BaseException | None = None
        self._delivery = Delivery()
        self._sequences: dict[tuple[int, int], Sequence] = {}  # that have not ended, by arrival
        self._in_flight: tuple[StepPlan, StepResult] | None = None
        self._num_turns = self._num_plans = self._digest = 0
        self._swap_to: Callable[[str], Callable[[], None]] | None = None
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="millrace-step-loop", daemon=True)
        if self.group.leads:
            self.group.before_the_end(self._fail_waiting)
            self._thread.start()

    def submit(self, handles: Items[RequestHandle]) -> None:
        """Queue requests, all before the same plan.

        Raises:
          RuntimeClosedError: the loop has ended.
          GroupError: this is not process 0.
        """
        self._check_here()
        with self._changed:
            self.check_open()
            self._inbox += handles
            self._changed.notify()

    def cancel(self, handle: RequestHandle) -> None:
        """End a request before the next plan; nothing if it has ended, or is the parent's of this forked process."""
        if not self.is_here:
            return
        with self._changed:
            self._cancelled.append(handle)
            self._changed.notify()

    def update_weights(self, swap: Callable[[], None], running: OnWeightsUpdate, store: str = "") -> "Future[int]":
        """Queue new weights: `swap` is called between two steps, once what must end on the old weights has ended.

        Until then no request starts. An error of the tree that `swap` raises says that the old weights stand; any
        other ends the loop. The future brings the new version; cancelling it withdraws what has not begun. The other
        processes of a group take them from `store`.

        Raises:
          RuntimeClosedError: the loop has ended; the future brings it if that happens later.
          GroupError: this is not process 0.
        """
        self._check_here()
        with self._changed:
            self.check_open()
            update = _Update(swap, store, running, Future())
            self._updates.append(update)
            self._changed.notify()
        return update.version

    def follow(self, swap_to: Callable[[str], Callable[[], None]]) -> None:
        """Do what process 0 decides, until it closes; `swap_to` makes the swap to a store's weights.

        Raises:
          GroupError: a process is gone, or plans differ.
        """
        self._swap_to = swap_to
        try:
            self._take_turns(lambda: Turn.from_json(self.group.receive()))
        except BaseException as error:
            self._error = error
            self.group.fail(error)
            raise
        self._is_closing = True

    @property
    def weights_version(self) -> int:
        """How many times the weights were updated."""
        return self._scheduler.weights_version

    @property
    def is_here(self) -> bool:
        """Whether this is the process that made the loop: one that was forked from it has no thread of it."""
        return os.getpid() == self._pid

    def _check_here(self) -> None:
        """Comes before any lock, which a thread that is not in this process may have held when it was forked."""
        if not self.is_here:
            raise RuntimeClosedError(
                f"this process was forked from {self._pid}, which opened the runtime, and has none of its threads; use "
                'it there, or start processes with "spawn" and open a Runtime in each'
            )

    def check_open(self) -> None:
        """Raises RuntimeClosedError if the loop has ended or is not here, GroupError where it takes no requests."""
        self._check_here()
        with self._changed:
            if self._error is not None or self._is_closing:
                raise self._ended() from self._error
        if not self.group.leads:
            raise GroupError(
                f"process {self.group.process_id} of {self.group.num_processes} takes no requests: call follow() "
                "here, and everything else in process 0."
            )

    def close(self) -> None:
        """Abort what is running and end the thread; nothing in a process that was forked."""
        if not self.is_here:
            return
        with self._changed:
            has_followed, self._is_closing = self._is_closing, True
            self._changed.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        if not self.group.leads and not has_followed:
            self.group.fail(GroupError("it closed its runtime before process 0 did"))
        self.group.close()

    def _ended(self) -> RuntimeClosedError:
        if self._error is not None:
            return RuntimeClosedError(f"the step loop died of {self._error!r}; open a new Runtime")
        return RuntimeClosedError("the runtime is closed; open a new one")

    def _run(self) -> None:
        try:
            self._take_turns(self._decide)
        except BaseException as error:  # every waiting reader must learn of it, whatever it is
            self._fail_waiting(error)
            self.group.fail(error)
        for update in (*self._due, *self._updates):
            with contextlib.suppress(InvalidStateError):  # withdrawn
                update.version.set_exception(self._ended())

    def _fail_waiting(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            waiting = [*self._inbox, *self._delivery.waiting()]
        for handle in waiting:
            handle.fail(error)

    # ---- a turn

    def _take_turns(self, next_turn: Callable[[], Turn]) -> None:
        is_last = False
        while not is_last:
            turn = next_turn()
            self._num_turns += 1
            self._check_digest(turn.digest)
            self._take(turn)
            is_last = turn.is_last
            if not is_last:
                self._swap_weights(turn)
                self._step()
        if self._in_flight is not None:
            self._in_flight[1].tokens()  # nobody leaves while others wait in a collective

    def _decide(self) -> Turn:
        """Process 0: wait for work, take what arrived, and tell the others."""
        with self._changed:
            self._changed.wait_for(self._has_news)
            arrived, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
            is_last = self._is_closing
            for handle in arrived:  # from here on it is among those that wait
                self._delivery.take(handle)
        for handle in self._delivery.waiting() if is_last else cancelled:
            self._delivery.cancel(handle)
        ended = self._delivery.endings()
        self._due += () if is_last else self._pop_due(ended)
        turn = Turn(
            arrived=tuple(handle.request for handle in arrived),
            ended=ended,
            weights=tuple(update.store for update in self._due),
            starts_requests=not self._updates,
            is_last=is_last,
            digest=self._digest if self._num_turns % _DIGEST_EVERY == 0 else None,
        )
        if self.group.num_processes > 1:
            self.group.send(turn.to_json())
        return turn

    def _has_news(self) -> bool:
        is_busy = self._sequences or self._in_flight is not None
        return bool(is_busy or self._inbox or self._cancelled or self._updates or self._is_closing)

    def _pop_due(self, ended: Items[Ending]) -> list[_Update]:
        """The updates whose turn has come: nothing that waits has to end first."""
        gone = {ending.arrival for ending in ended}
        started = [sequence for sequence in self._scheduler.started() if sequence.arrival not in gone]
        due = []
        while self._updates:
            update = self._updates[0]
            if not update.version.cancelled() and any(map(update.waits_for, started)):
                break
            self._updates.popleft()
            if update.version.set_running_or_notify_cancel():
                due.append(update)
        return due

    def _check_digest(self, digest: int | None) -> None:
        if digest is not None and digest != self._digest:
            raise GroupError(
                f"process {self.group.process_id} of {self.group.num_processes} planned other steps than process 0, "
                f"somewhere in the last {_DIGEST_EVERY} turns before step {self._num_plans}. Start the group again; "
                "if that happens again, it is a bug."
            )

    def _take(self, turn: Turn) -> None:
        for request in turn.arrived:
            self._sequences.update({sequence.arrival: sequence for sequence in self._scheduler.add(request)})
        for ending in turn.ended:
            sequence = self._sequences.pop(ending.arrival, None)
            if sequence is not None:
                self._scheduler.finish(sequence, ending.reason, ending.stop_reason)
                self._delivery.tell_end(sequence)

    def _swap_weights(self, turn: Turn) -> None:
        """Take the weights whose turn has come; while others wait, no request starts."""
        for store in turn.weights:
            self._commit_in_flight()  # with the version that computed it; and the device lets go of the old weights
            if self.group.leads:
                self._swap(self._due[0])
                self._due.popleft()
            else:
                assert self._swap_to is not None
                self._swap_to(store)()
                self._scheduler.weights_version += 1
        self._scheduler.starts_requests = turn.starts_requests

    def _swap(self, update: _Update) -> None:
        try:
            update.swap()
        except MillraceError as error:
            update.version.set_exception(error)
            if self.group.num_processes > 1:
                raise  # the others may have the new ones
        else:
            self._scheduler.weights_version += 1
            update.version.set_result(self._scheduler.weights_version)

    # ---- a step

    def _step(self) -> None:
        plan = self._scheduler.plan()
        result, failure = None, None
        if plan is not None:
            self._num_plans += 1
            if self.group.num_processes > 1:
                self._digest = plan_digest(plan, self._digest)
            try:
                result = self._executor.run(plan)
            except StepError as error:
                if self.group.num_processes > 1:
                    raise  # the others have run it
                failure = error
        self._commit_in_flight()
        if plan is not None and failure is not None:
            self._delivery.fail_plan(plan, failure)
        if plan is not None and result is not None:
            self._in_flight = plan, result
            if not self._executor.overlaps:  # all of the step is behind us: nothing is gained by planning ahead
                self._commit_in_flight()

    def _commit_in_flight(self) -> None:
        if self._in_flight is None:
            return
        plan, result = self._in_flight
        progress = self._scheduler.commit(plan, result.tokens())
        self._delivery.deliver(progress, result)
        for sequence in progress.ended:
            self._sequences.pop(sequence.arrival, None)
        self._in_flight = None
