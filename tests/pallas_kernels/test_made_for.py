"""Kernels of a generation of GPUs serve its chips, and no other device."""

import pytest

from millrace.pallas_kernels.made_for import made_for
from millrace.pallas_kernels.paged_attention import PagedAttentionProblem, PagedAttentionSpec


@pytest.mark.parametrize(
    ("chip", "platform", "device_kind", "reason"),
    [
        ("hopper", "cpu", "cpu", "it is made for Hopper, not for cpu"),
        ("hopper", "gpu", "NVIDIA GB300", "it is made for Hopper, not for NVIDIA GB300"),
        ("hopper", "gpu", "NVIDIA A100-SXM4-80GB", "it is made for Hopper, not for NVIDIA A100-SXM4-80GB"),
        ("blackwell", "gpu", "NVIDIA H200", "it is made for Blackwell, not for NVIDIA H200"),
        ("hopper", "gpu", "NVIDIA H200", None),
        ("hopper", "gpu", "NVIDIA GH200 480GB", None),
        ("blackwell", "gpu", "NVIDIA B200", None),
    ],
)
def test_a_generation_serves_its_own_chips(chip: str, platform: str, device_kind: str, reason: str | None) -> None:
    entry = made_for(chip, "millrace.pallas_kernels.paged_attention", "paged_attention")  # type: ignore[arg-type]
    problem = PagedAttentionProblem(
        platform=platform, device_kind=device_kind, spec=PagedAttentionSpec(scale=1.0), num_heads=64, num_kv_heads=8,
        head_dim=128, page_size=64, dtype="bfloat16", cache_dtype="bfloat16", has_sinks=False,
    )  # type: ignore[arg-type]  # fmt: skip
    assert entry.unsupported(problem) == reason
