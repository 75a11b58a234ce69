"""Implementations that are made for a generation of GPUs: their modules are imported where such a GPU is, or asked for.

Pallas for GPUs takes long to import, and a start on a CPU needs none of it.
"""

import importlib
from collections.abc import Callable
from typing import Any, Protocol

from .dispatch import Implementation, Platform
from .tuning import Generation, generation


class ChipProblem(Protocol):
    """What every operation's problem says of the chip."""

    @property
    def platform(self) -> Platform: ...

    @property
    def device_kind(self) -> str: ...


def made_for(chip: Generation, package: str, function: str, *, several: str | None = None) -> Implementation[Any]:
    """`function` of the module named after the chip in an operation's `package`; `several` names that for several
    weights, if there is one. The module's `unsupported` is asked where the chip is there."""

    def named(function: str) -> Callable[..., Any]:
        def fn(*args: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(f".{chip}", package), function)(*args, **options)

        return fn

    def unsupported(problem: ChipProblem) -> str | None:
        if problem.platform != "gpu" or generation(problem.device_kind) != chip:
            return f"it is made for {chip.title()}, not for {problem.device_kind or problem.platform}"
        reason: str | None = importlib.import_module(f".{chip}", package).unsupported(problem)
        return reason

    at_once = None if several is None else named(several)
    return Implementation(chip, named(function), unsupported, is_tuned=True, several=at_once)
