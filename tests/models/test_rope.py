"""Rope frequencies against transformers' (tests/fixtures/rope.json), and the rotation."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from millrace.models.families.reader import ConfigReader
from millrace.models.families.rope import read_rope
from millrace.models.rope import frequencies, rotate, table

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "fixtures" / "rope.json").read_text())


def spec_of(case: dict[str, Any]) -> Any:
    keys = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings")
    config = {key: case[key] for key in keys if key in case}
    return read_rope(ConfigReader(config, {}), case["head_dim"], theta=10_000.0)


@pytest.mark.parametrize("kind", sorted({case["rope_parameters"]["rope_type"] for case in CASES}))
def test_frequencies_equal_transformers(kind: str) -> None:
    for case in CASES:
        if case["rope_parameters"]["rope_type"] == kind:
            inverse, factor = frequencies(spec_of(case), case["seq_len"])
            np.testing.assert_allclose(inverse, case["inv_freq"], rtol=2e-6, err_msg=str(case))
            assert factor == pytest.approx(case["attention_factor"], rel=1e-6)


def test_every_kind_is_covered() -> None:
    kinds = {case["rope_parameters"]["rope_type"] for case in CASES}
    assert kinds == {"default", "linear", "dynamic", "yarn", "llama3", "longrope"}


def test_rotation_keeps_lengths_and_depends_on_the_distance_alone() -> None:
    spec = spec_of(next(c for c in CASES if c["rope_parameters"]["rope_type"] == "default"))
    dim = spec.rotary_dim
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, 1, 1, 1, dim))
    scores = []
    for start in (0, 5):
        positions = jnp.array([[start]]), jnp.array([[start + 3]])
        turned = [rotate(jnp.array(x, jnp.float32), table(spec, p, 64)) for x, p in zip((q, k), positions, strict=True)]
        assert float(jnp.linalg.norm(turned[0])) == pytest.approx(np.linalg.norm(q), rel=1e-5)
        scores.append(float(jnp.sum(turned[0] * turned[1])))
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_dimensions_past_the_rotary_ones_pass_through() -> None:
    spec = spec_of(next(c for c in CASES if c["rope_parameters"]["rope_type"] == "default"))
    x = jnp.ones((1, 1, 2, spec.rotary_dim + 6))
    turned = rotate(x, table(spec, jnp.array([[7]]), 64))
    np.testing.assert_array_equal(turned[..., spec.rotary_dim :], 1.0)
