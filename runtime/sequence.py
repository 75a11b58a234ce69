"""One continuation of a request as the scheduler sees it."""

import dataclasses
import enum

from .pages import page_digest, root_digest
from .request import FinishReason, Request


class Status(enum.Enum):
    """Waiting for a slot, holding one, or ended."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """Mutated by the scheduler alone.

    `tokens` are the committed ones. While prefilling, `num_computed` of them have keys and values in `pages`, or will
    have when the device gets to the steps planned so far; once decoding, the shard's arrays count instead.
    """

    request: Request
    index: int  # among the request's n continuations
    arrival: tuple[int, int]  # order of age: request number, index
    max_len: int  # tokens at which it ends by length
    tokens: list[int]
    status: Status = Status.WAITING
    shard: int = -1
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are written by the steps planned so far
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    digests: list[bytes] = dataclasses.field(default_factory=list)  # of its first full pages, as far as asked for
    num_findable_pages: int = 0
    pages_version: int = 0  # of the weights when it got its slot: in the digests of its pages
    first_weights_version: int = 0  # of the weights that began it
    weights_version: int = 0  # of the weights that computed its last token
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        """Committed tokens past the prompt."""
        return len(self.tokens) - self.prompt_len

    def begin(self, weights_version: int) -> None:
        """It is about to get a slot, and what its pages lack is computed with these weights from the start."""
        if weights_version != self.pages_version:
            self.pages_version = weights_version
            self.digests.clear()
        if self.num_preemptions == 0:
            self.first_weights_version = self.weights_version = weights_version

    def page_digest(self, page: int, page_size: int) -> bytes:
        """The identity of one of its full pages; each is computed once, whatever is tried with the sequence."""
        while len(self.digests) <= page:
            start = len(self.digests) * page_size
            parent = self.digests[-1] if self.digests else root_digest(self.pages_version)
            self.digests.append(page_digest(parent, self.tokens[start : start + page_size]))
        return self.digests[page]
