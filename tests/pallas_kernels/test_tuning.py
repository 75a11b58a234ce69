"""Which chips are alike, and where their tuned sizes are found."""

import pytest

from millrace.errors import KernelError
from millrace.pallas_kernels.tuning import generation, tuned
from millrace.sharding.targets import TARGETS


@pytest.mark.parametrize(
    ("device_kind", "expected"),
    [("NVIDIA H200", "hopper"), ("NVIDIA H100 80GB HBM3", "hopper"), ("NVIDIA GB300", "blackwell"),
     ("NVIDIA H20-3e", "hopper"), ("NVIDIA GH200 480GB", "hopper"), ("NVIDIA H100 PCIe", "hopper"),
     ("NVIDIA A100-SXM4-80GB", None), ("cpu", None), ("", None)],
)  # fmt: skip
def test_a_device_kind_names_its_generation(device_kind: str, expected: str | None) -> None:
    assert generation(device_kind) == expected


def test_every_target_from_hopper_on_has_a_generation() -> None:
    kinds = {name: target.device_kind for name, target in TARGETS.items() if name not in ("cpu", "a100")}
    assert all(generation(kind) for kind in kinds.values()), kinds


def test_a_chip_without_a_file_has_the_sizes_of_its_generation() -> None:
    assert tuned("paged_attention", "NVIDIA H100 80GB HBM3", "split") == tuned(
        "paged_attention", "NVIDIA H200", "split"
    )


def test_sizes_that_nobody_tuned_are_named() -> None:
    with pytest.raises(KernelError, match="no sizes for 'decode_16bit_17'; it has split, decode_16bit_64"):
        tuned("paged_attention", "NVIDIA H200", "decode_16bit_17")
    with pytest.raises(KernelError, match="no tuned sizes for 'NVIDIA A100'"):
        tuned("paged_attention", "NVIDIA A100", "split")
