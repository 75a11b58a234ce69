"""Expert places: which of them a token uses."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from millrace.models.config import MoeSpec
from millrace.models.moe import Moe

SPEC = MoeSpec(num_experts=6, num_experts_per_token=2, mlp_dim=8)


@pytest.mark.parametrize(("num_parts", "num_places"), [(1, 6), (2, 6), (4, 8), (8, 8), (72, 72)])
def test_every_part_has_as_many_places(num_parts: int, num_places: int) -> None:
    assert dataclasses.replace(SPEC, num_expert_parts=num_parts).num_places == num_places


def test_256_experts_on_72_devices_have_288_places() -> None:
    assert MoeSpec(num_experts=256, num_experts_per_token=8, mlp_dim=8, num_expert_parts=72).num_places == 288


def places_of(experts: np.ndarray, num_parts: int) -> np.ndarray:
    moe = nnx.eval_shape(
        lambda: Moe(
            dataclasses.replace(SPEC, num_expert_parts=num_parts), 4, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)
        )
    )
    mesh = Mesh(np.array(jax.devices()[:1]), ("expert",))
    run = jax.shard_map(moe.places, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    return np.asarray(jax.jit(run)(experts))


def test_the_tokens_of_an_expert_spread_evenly_over_its_places() -> None:
    places = places_of(np.full((64, 2), [1, 5]), num_parts=16)
    assert Counter(places[:, 0].tolist()) == {1: 22, 7: 21, 13: 21}
    assert Counter(places[:, 1].tolist()) == {5: 32, 11: 32}


def test_a_place_holds_the_expert_that_was_picked() -> None:
    experts = np.random.default_rng(0).integers(0, 6, (40, 2))
    np.testing.assert_array_equal(places_of(experts, num_parts=16) % 6, experts)
    np.testing.assert_array_equal(places_of(experts, num_parts=1), experts)
