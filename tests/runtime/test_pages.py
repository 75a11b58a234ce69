"""The page pool: who owns what, and what can be found again."""

from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.runtime.pages import PagePool, page_digest, root_digest

ROOT = root_digest(0)


def test_every_page_is_handed_out_once() -> None:
    pool = PagePool(5)
    assert sorted(pool.take() for _ in range(5)) == [0, 1, 2, 3, 4] and pool.num_free == 0


def test_a_remembered_page_is_found_until_it_is_taken_again() -> None:
    pool = PagePool(2)
    page, digest = pool.take(), page_digest(ROOT, [1, 2])
    pool.remember(page, digest)
    pool.release([page])
    assert pool.find(digest) == page and pool.num_owners(page) == 1 and pool.num_free == 1
    pool.release([page])
    assert {pool.take(), pool.take()} == {0, 1}
    assert pool.find(digest) is None


def test_pages_without_content_are_taken_before_findable_ones() -> None:
    pool = PagePool(3)
    known, unknown = pool.take(), pool.take()
    pool.remember(known, page_digest(ROOT, [1]))
    pool.release([known])
    pool.release([unknown])
    assert pool.take() == unknown and pool.take() != known and pool.take() == known


def test_the_least_recently_freed_content_goes_first_and_the_end_of_a_text_before_its_start() -> None:
    pool = PagePool(3)
    pages = [pool.take() for _ in range(3)]
    for i, page in enumerate(pages):
        pool.remember(page, page_digest(ROOT, [i]))
    pool.release(pages[2:])
    pool.release(pages[:2])
    assert [pool.take() for _ in range(3)] == [pages[2], pages[1], pages[0]]


def test_a_shared_page_is_free_only_when_its_last_owner_leaves() -> None:
    pool = PagePool(1)
    page, digest = pool.take(), page_digest(ROOT, [3])
    pool.remember(page, digest)
    assert pool.find(digest) == page and pool.num_owners(page) == 2
    pool.release([page])
    assert pool.num_free == 0
    pool.release([page])
    assert pool.num_free == 1


def test_a_page_keeps_the_content_that_was_stated_first() -> None:
    pool = PagePool(2)
    page, digest, other = pool.take(), page_digest(ROOT, [1]), page_digest(ROOT, [2])
    pool.remember(page, digest)
    pool.remember(page, other)
    assert pool.find(digest) == page and pool.find(other) is None


def test_a_digest_depends_on_everything_before_the_page() -> None:
    first = page_digest(ROOT, [1, 2])
    assert page_digest(first, [3, 4]) != page_digest(page_digest(ROOT, [9, 2]), [3, 4])
    assert page_digest(ROOT, [1, 23]) != page_digest(ROOT, [12, 3])


def test_a_digest_depends_on_the_version_of_the_weights() -> None:
    digests = {page_digest(root_digest(version), [1, 2]) for version in (0, 1, 2, 2**40)}
    assert len(digests) == 4


@given(num_pages=st.integers(1, 6), data=st.data())
@settings(max_examples=150)
def test_pages_are_free_owned_or_shared_and_found_by_their_own_content_alone(
    num_pages: int, data: st.DataObject
) -> None:
    pool = PagePool(num_pages)
    held: list[list[int]] = []  # by sequence; a page may be held by several
    content: dict[int, bytes] = {}  # of the pages that can be found
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["take", "remember", "find", "release"]))
        digest = page_digest(ROOT, [data.draw(st.integers(0, 3))])
        owned = {page for pages in held for page in pages}
        if action == "take" and pool.num_free:
            page = pool.take()
            assert page not in owned
            content.pop(page, None)
            held.append([page])
        elif action == "remember" and owned - content.keys():
            page = min(owned - content.keys())
            if digest not in content.values():  # the first page with a content keeps it
                content[page] = digest
            pool.remember(page, digest)
        elif action == "find":
            page = pool.find(digest)
            assert (page is None) == (digest not in content.values())
            if page is not None:
                assert content[page] == digest
                held.append([page])
        elif action == "release" and held:
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        everything = [page for pages in held for page in pages]
        assert pool.num_free == num_pages - len(set(everything))
        assert [pool.num_owners(page) for page in range(num_pages)] == [everything.count(p) for p in range(num_pages)]
