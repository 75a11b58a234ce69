"""The library of native CPU kernels at a start: there before a program that calls it is compiled or loaded."""

from ..pallas_kernels import native
from ..pallas_kernels.dispatch import Platform


def prepare_kernels(platform: Platform, *, show_progress: bool) -> str | None:
    """Build and load the library where programs for this platform may call it; what a start says of it."""
    if platform != "cpu":
        return None
    reason = native.unavailable(show_progress=show_progress)
    if reason is not None:
        return f"no native CPU kernels, XLA serves instead: {_first_line(reason)}"
    return f"native CPU kernels for {native.library().instruction_sets[0]}" if show_progress else None


def usable_kernels() -> tuple[str, ...] | str:
    """The instruction sets that native kernels may use here, best first, or why there are none."""
    reason = native.unavailable()
    return native.library().instruction_sets if reason is None else _first_line(reason)


def _first_line(reason: str) -> str:
    """The reason without a compiler's command and output."""
    return reason.partition("\n")[0]
