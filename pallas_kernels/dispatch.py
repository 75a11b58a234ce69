"""How an operation finds the implementation that serves a problem: an ordered table, reasons, no silent fallback."""

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from ..errors import KernelError

Platform = Literal["cpu", "gpu"]
Operation = Literal[
    "paged_attention", "quantized_matmul", "grouped_matmul", "row_exchange", "gated_activation", "gated_matmul"
]

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Implementation[Problem]:
    """One way to compute an operation; `unsupported(problem)` is None if it serves, else the reason in words."""

    name: str
    fn: Callable[..., Any]
    unsupported: Callable[[Problem], str | None]
    is_tuned: bool = False  # fn also takes `device_kind`, for the sizes that were tuned for it
    takes_stacks: bool = False  # fn finds a layer's weight in its stack by itself
    several: Callable[..., Any] | None = None  # as fn, for several weights of one format at once


def anywhere(problem: object) -> None:
    """The `unsupported` of an implementation that serves every problem."""
    return None


def choose[Problem](
    operation: str, table: Sequence[Implementation[Problem]], problem: Problem, name: str | None = None
) -> Implementation[Problem]:
    """The first implementation in the table that serves the problem, or the named one.

    Raises KernelError if the named one does not exist or cannot serve, and, with every reason, if none can.
    """
    return _chosen(operation, table, problem, name)[0]


def _chosen[Problem](
    operation: str, table: Sequence[Implementation[Problem]], problem: Problem, name: str | None
) -> tuple[Implementation[Problem], list[str]]:
    """`choose`, and why none above it was taken."""
    named = [entry for entry in table if name in (None, entry.name)]
    if not named:
        names = ", ".join(entry.name for entry in table)
        raise KernelError(f"{operation} has no implementation named {name!r}; choose one of: {names}")
    reasons: list[str] = []
    for entry in named:
        reason = entry.unsupported(problem)
        if reason is None:
            return entry, reasons
        reasons.append(f"{entry.name}: {reason}")
    raise KernelError(f"no implementation of {operation} serves {problem}: " + "; ".join(reasons))


class KernelChoices:
    """One runtime's choices of implementations: the chip it computes on, and the names that were asked for.

    Operations ask it while a program is traced, so nothing is chosen at run time. It remembers what it chose, so that
    each choice is logged once in a runtime and can be shown (`made`).
    """

    def __init__(self, platform: Platform, named: Mapping[str, str] | None = None, *, device_kind: str = "") -> None:
        """`named` maps an operation to the one implementation to use; raises KernelError for unknown words.

        `device_kind` is what jax calls the devices, as in "NVIDIA H200"; "" serves no kernel that is made for a chip.
        """
        named = dict(named or {})
        if platform not in get_args(Platform):
            raise KernelError(f"expected a platform among {get_args(Platform)}, got {platform!r}")
        for operation in named:
            if operation not in get_args(Operation):
                raise KernelError(f"there is no operation {operation!r}; expected one of {get_args(Operation)}")
        self.platform: Platform = platform
        self.device_kind = device_kind
        self._named = named
        self._made: dict[tuple[Operation, str], None] = {}
        self._said: set[str] = set()
        self._lock = threading.Lock()  # programs may be traced in several threads

    @property
    def made(self) -> tuple[tuple[Operation, str], ...]:
        """The (operation, implementation name) pairs chosen so far, each once, in order of first use."""
        with self._lock:
            return tuple(self._made)

    def choose[Problem](
        self, operation: Operation, table: Sequence[Implementation[Problem]], problem: Problem
    ) -> Implementation[Problem]:
        """As the function `choose`, with this runtime's names; logs a choice, and why none above it was taken, where
        either is new.

        The `fn` and `several` of one that is tuned have their `device_kind`.
        """
        entry, passed_over = _chosen(operation, table, problem, self._named.get(operation))
        reasons = "; ".join(f"not {reason}" for reason in passed_over)
        line = f"{operation} on {self.platform}: {entry.name}{reasons and f' ({reasons})'}"
        with self._lock:
            is_new = line not in self._said
            self._made[operation, entry.name] = None
            self._said.add(line)
        if is_new:
            _logger.info("%s", line)
        if not entry.is_tuned:
            return entry
        options = {"device_kind": self.device_kind}
        several = entry.several and functools.partial(entry.several, **options)
        return dataclasses.replace(entry, fn=functools.partial(entry.fn, **options), several=several)
