"""What is read off the compilers' output about kernels."""

import pytest
from kernel_resources import KernelResources, parse_dump


def kernel(**changes):
    facts = {"name": "k", "threads": 128, "registers": 64, "spill_bytes": 0, "shared_bytes": 1024}
    return KernelResources(**facts | changes)


def test_kernels_of_a_program_are_lowered_first_and_compiled_then(dump):
    resources, compiled = dump.split("\n\n")
    small = resources.replace("229376", "2048"), compiled.replace("matmul", "reduce").replace("158", "40")
    first, second = parse_dump(f"{resources}\n{small[0]}\n{compiled}\n{small[1]}")
    assert (first.name, first.threads, first.registers, first.spill_bytes) == ("matmul", 384, 158, 24)
    assert first.shared_bytes == 229376 + 8 * 8  # eight barriers
    assert (second.name, second.registers, second.shared_bytes) == ("reduce", 40, 2048 + 8 * 8)


def test_a_kernel_that_is_not_compiled_is_missed(dump):
    other = dump.split("\n\n")[0].replace("229376", "2048")
    with pytest.raises(ValueError, match="2 kernels were lowered and 1 compiled"):
        parse_dump(other + dump)


def test_kernels_that_are_alike_are_compiled_once(dump):
    assert parse_dump(dump.split("\n\n")[0] + dump) == parse_dump(dump)


def test_output_of_another_form_is_refused(dump):
    with pytest.raises(ValueError, match="registers"):
        parse_dump(dump.replace("registers", "things"))


def test_a_program_without_kernels_gives_none():
    assert parse_dump("nothing to see\n") == []


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, 8),
        ({"registers": 255, "threads": 256}, 1),
        ({"registers": 24}, 16),
        ({"registers": 24, "threads": 64}, 32),
        ({"shared_bytes": 100 * 1024}, 2),
        ({"registers": 24, "tensor_memory_columns": 256}, 2),
    ],
)
def test_occupancy_is_what_the_scarcest_resource_allows(changes, blocks):
    assert kernel(**changes).occupancy == blocks
