"""A bar on stderr that counts bytes and their speed; threads may share it."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from tqdm import tqdm

DELAY_S = 1.0  # what is done before that needs no bar


@contextlib.contextmanager
def byte_bar(title: str, total: int, *, show: bool, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields what to call with every number of bytes more."""
    bar = tqdm(
        total=total, initial=done, desc=title, unit="B", unit_scale=True, unit_divisor=1024, delay=DELAY_S,
        disable=not show,
    )  # fmt: skip
    lock = threading.Lock()

    def advance(num_bytes: int) -> None:
        with lock:
            bar.update(num_bytes)

    with bar:
        yield advance
