"""How layers are grouped into stages: as few kinds to compile as the pattern allows."""

import pytest

from millrace.models.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig


def layer(window: int | None) -> LayerSpec:
    attention = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4, scale=0.5, rope=None, window=window)
    return LayerSpec(attention=attention, mlp=MlpSpec(mlp_dim=8))


def config(pattern: str) -> ModelConfig:
    """One layer per letter."""
    layers = tuple(layer(ord(letter)) for letter in pattern)
    return ModelConfig(family="test", vocab_size=8, embed_dim=8, layers=layers, max_context_len=8)


@pytest.mark.parametrize(
    ("pattern", "stages"),
    [
        ("aaaaaa", [("a", 6)]),
        ("abababab", [("ab", 4)]),
        ("aaaaabaaaaabaaaaabaa", [("aaaaab", 3), ("a", 2)]),
        ("bcaaaa", [("b", 1), ("c", 1), ("a", 4)]),
        ("a", [("a", 1)]),
    ],
)
def test_repeating_patterns_become_few_stages(pattern: str, stages: list[tuple[str, int]]) -> None:
    found = config(pattern).stages
    windows = ["".join(chr(spec.attention.window or 0) for spec in stage.period) for stage in found]
    cost = sum(len(period) for period, _ in stages)
    assert sum(map(len, windows)) == cost
    assert "".join(w * stage.num_repeats for w, stage in zip(windows, found, strict=True)) == pattern


def test_every_layer_belongs_to_one_stage() -> None:
    found = config("aababbbbaacc").stages
    indices = [i for stage in found for p in range(len(stage.period)) for i in stage.layer_indices(p)]
    assert sorted(indices) == list(range(12))
