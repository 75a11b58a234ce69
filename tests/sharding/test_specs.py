"""Places and experts: which part of a store fills which part of an array."""

import numpy as np
import pytest

from millrace.sharding.specs import ParamSpec

PLACES = ParamSpec((2, 8, 4), np.dtype("float32"), ("layers", "experts", "embed"), num_experts=3)
PLAIN = ParamSpec((2, 8, 4), np.dtype("float32"), ("layers", "mlp", "embed"))


@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize("num", [1, 2, 5, 8])
def test_the_regions_of_a_store_make_up_the_region_of_places(start: int, num: int) -> None:
    stored = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    region = (slice(1, 2), slice(start, min(start + num, 8)), slice(1, 3))
    made = np.full([part.stop - part.start for part in region], -1)
    for source, within in PLACES.stored_regions(region):
        made[within] = stored[source]
    np.testing.assert_array_equal(made, stored[:, np.arange(8) % 3][region])


def test_what_has_no_experts_is_stored_as_it_is() -> None:
    region = (slice(0, 2), slice(4, 8), slice(0, 4))
    assert list(PLAIN.stored_regions(region)) == [(region, (slice(0, 2), slice(0, 4), slice(0, 4)))]
    assert PLAIN.stored_shape == PLAIN.shape and list(PLAIN.indices((1, 5))) == [(1, 5)]


def test_an_expert_belongs_in_all_its_places() -> None:
    assert PLACES.stored_shape == (2, 3, 4)
    assert list(PLACES.indices((1, 1))) == [(1, 1), (1, 4), (1, 7)]
    assert list(PLACES.indices((1,))) == [(1,)]


def test_below_the_experts_nothing_is_of_places() -> None:
    assert PLACES.below(1) == ParamSpec((8, 4), PLACES.dtype, ("experts", "embed"), 3)
    assert PLACES.below(2) == ParamSpec((4,), PLACES.dtype, ("embed",))
