"""The page pool: who owns what, and what can be found again."""

from millrace.runtime.pages import ROOT_DIGEST, PagePool, page_digest


def test_every_page_is_handed_out_once() -> None:
    pool = PagePool(5)
    assert sorted(pool.take() for _ in range(5)) == [0, 1, 2, 3, 4] and pool.num_free == 0


def test_a_remembered_page_is_found_until_it_is_taken_again() -> None:
    pool = PagePool(2)
    page, digest = pool.take(), page_digest(ROOT_DIGEST, [1, 2])
    pool.remember(page, digest)
    pool.release([page])
    assert pool.find(digest) == page and pool.num_owners(page) == 1 and pool.num_free == 1
    pool.release([page])
    assert {pool.take(), pool.take()} == {0, 1}
    assert pool.find(digest) is None


def test_pages_without_content_are_taken_before_findable_ones() -> None:
    pool = PagePool(3)
    known, unknown = pool.take(), pool.take()
    pool.remember(known, page_digest(ROOT_DIGEST, [1]))
    pool.release([known])
    pool.release([unknown])
    assert pool.take() == unknown and pool.take() != known and pool.take() == known


def test_the_least_recently_freed_content_goes_first_and_the_end_of_a_text_before_its_start() -> None:
    pool = PagePool(3)
    pages = [pool.take() for _ in range(3)]
    for i, page in enumerate(pages):
        pool.remember(page, page_digest(ROOT_DIGEST, [i]))
    pool.release(pages[2:])
    pool.release(pages[:2])
    assert [pool.take() for _ in range(3)] == [pages[2], pages[1], pages[0]]


def test_a_shared_page_is_free_only_when_its_last_owner_leaves() -> None:
    pool = PagePool(1)
    page, digest = pool.take(), page_digest(ROOT_DIGEST, [3])
    pool.remember(page, digest)
    assert pool.find(digest) == page and pool.num_owners(page) == 2
    pool.release([page])
    assert pool.num_free == 0
    pool.release([page])
    assert pool.num_free == 1


def test_a_digest_depends_on_everything_before_the_page() -> None:
    first = page_digest(ROOT_DIGEST, [1, 2])
    assert page_digest(first, [3, 4]) != page_digest(page_digest(ROOT_DIGEST, [9, 2]), [3, 4])
    assert page_digest(ROOT_DIGEST, [1, 23]) != page_digest(ROOT_DIGEST, [12, 3])
