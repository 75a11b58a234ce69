"""The slots and pages of one data shard, and what their sequences do next."""

import numpy as np

from .pages import PagePool
from .plan import numbered
from .sequence import Sequence, Status


class SlotArrays:
    """What each slot does next, the slots of all data shards together, so that no step loops over them to find out."""

    def __init__(self, num_shards: int, num_slots: int, page_size: int, pages_per_slot: int) -> None:
        shape = (num_shards, num_slots)
        self.page_size = page_size
        self.is_decoding = np.zeros(shape, bool)  # feeds its last sampled token next
        self.positions = np.zeros(shape, np.int32)  # of the next token to feed in
        self.remaining = np.zeros(shape, np.int32)  # tokens that may still be sampled; some, where it decodes
        self.num_pages = np.zeros(shape, np.int32)
        self.page_tables = np.zeros((*shape, pages_per_slot), np.int32)

    def missing_pages(self, num_steps: int) -> np.ndarray:
        """[R, S] pages that each decoding slot lacks for its next `num_steps` tokens."""
        last = self.positions + np.minimum(num_steps, self.remaining) - 1
        return np.asarray(np.maximum(last // self.page_size + 1 - self.num_pages, 0) * self.is_decoding)

    def append_pages(self, at: tuple[np.ndarray, np.ndarray], counts: np.ndarray, pages: list[int]) -> None:
        """Enter the next pages of the slots `at` (shards, slots) into their tables; `counts` of them each, in order."""
        entry, offset = numbered(counts)
        shards, slots = at
        self.page_tables[shards[entry], slots[entry], self.num_pages[at][entry] + offset] = pages
        self.num_pages[at] += counts


class Shard:
    """One data shard; its per-slot numbers are rows of the arrays of all."""

    def __init__(self, index: int, slots: SlotArrays, num_pages: int) -> None:
        num_slots = slots.is_decoding.shape[1]
        self.index = index
        self.page_size = slots.page_size
        self.pool = PagePool(num_pages)
        self.free_slots = list(range(num_slots))[::-1]
        self.sequences: list[Sequence | None] = [None] * num_slots
        self.prefilling: list[Sequence] = []  # in order of admission
        self.is_decoding, self.positions = slots.is_decoding[index], slots.positions[index]
        self.remaining, self.num_pages = slots.remaining[index], slots.num_pages[index]
        self.page_tables = slots.page_tables[index]

    def try_admit(self, sequence: Sequence, find_pages: bool) -> bool:
        """Give a waiting sequence a slot and pages for all tokens that it knows; False if they are not to be had."""
        if not self.free_slots:
            return False
        found = self._find(sequence) if find_pages else []
        num_new = -(-len(sequence.tokens) // self.page_size) - len(found)
        if num_new > self.pool.num_free:
            self.pool.release(found)
            return False
        slot = self.free_slots.pop()
        sequence.shard, sequence.slot, sequence.status = self.index, slot, Status.RUNNING
        sequence.pages = found + [self.pool.take() for _ in range(num_new)]
        sequence.num_computed = len(found) * self.page_size
        sequence.num_findable_pages = len(found)
        self.sequences[slot] = sequence
        self.page_tables[slot, : len(sequence.pages)] = sequence.pages
        self.num_pages[slot] = len(sequence.pages)
        self.prefilling.append(sequence)
        return True

    def _find(self, sequence: Sequence) -> list[int]:
        """Shared pages that hold the start of its tokens; at least one token is left to compute."""
        pages: list[int] = []
        for i in range((len(sequence.tokens) - 1) // self.page_size):
            page = self.pool.find(sequence.page_digest(i, self.page_size))
            if page is None:
                break
            pages.append(page)
        return pages

    def remember_pages(self, sequence: Sequence, num_written: int) -> None:
        """Make the full pages among its first `num_written` tokens findable."""
        while (sequence.num_findable_pages + 1) * self.page_size <= num_written:
            page = sequence.num_findable_pages
            self.pool.remember(sequence.pages[page], sequence.page_digest(page, self.page_size))
            sequence.num_findable_pages += 1

    def start_decoding(self, sequence: Sequence) -> None:
        """All known tokens are planned and the next one is sampled by the same step."""
        slot = sequence.slot
        self.prefilling.remove(sequence)
        self.positions[slot] = len(sequence.tokens)
        self.remaining[slot] = sequence.max_len - len(sequence.tokens) - 1
        self.is_decoding[slot] = self.remaining[slot] > 0

    def evict(self, sequence: Sequence) -> None:
        """Take slot and pages back. Steps in flight may still write there: the device runs later ones after them."""
        slot = sequence.slot
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        self.is_decoding[slot] = False
        self.sequences[slot] = None
        self.free_slots.append(slot)
        self.pool.release(sequence.pages)
        self.num_pages[slot] = 0
        sequence.pages, sequence.slot = [], -1
