"""The pages of one data shard: reference-counted, found again by the content of full pages."""

import array
import hashlib
from collections import OrderedDict
from collections.abc import Sequence

_DIGEST_BYTES = 16


def root_digest(weights_version: int) -> bytes:
    """What stands before the first page: a page computed with one version of the weights is never found by another."""
    return weights_version.to_bytes(_DIGEST_BYTES, "little")


def page_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The identity of a full page: its own tokens and, through `parent`, all tokens before them."""
    return hashlib.blake2b(parent + array.array("i", tokens).tobytes(), digest_size=_DIGEST_BYTES).digest()


class PagePool:
    """Hands out page numbers 0 to num_pages - 1.

    A page is free (no owner), or owned by one sequence that may write to it, or shared by several that only read.
    Free pages whose content is known stay findable until they are handed out again, least recently freed first.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._owners = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be taken now, findable ones included."""
        return len(self._free)

    def take(self) -> int:
        """A page for one writer; its former content is forgotten. The caller checks num_free first."""
        page, _ = self._free.popitem(last=False)
        if digest := self._digest_of.pop(page, None):
            del self._page_of[digest]
        self._owners[page] = 1
        return page

    def find(self, digest: bytes) -> int | None:
        """The page that holds this content, with one more owner; None if there is none."""
        page = self._page_of.get(digest)
        if page is not None:
            self._owners[page] += 1
            self._free.pop(page, None)
        return page

    def remember(self, page: int, digest: bytes) -> None:
        """State the content of a full page, so that others find it. The first page with a content keeps it."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """One owner less for each. The last page is freed first: the start of a text is found again most often."""
        for page in reversed(pages):
            self._owners[page] -= 1
            assert self._owners[page] >= 0, f"page {page} was released more often than taken"
            if self._owners[page] == 0:
                self._free[page] = None
                if page not in self._digest_of:  # nothing to find: the next to be handed out
                    self._free.move_to_end(page, last=False)

    def num_owners(self, page: int) -> int:
        """How many sequences hold the page."""
        return self._owners[page]
