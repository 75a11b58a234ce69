"""The contract of the row exchange, held by every implementation of its table."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from millrace.errors import KernelError
from millrace.pallas_kernels.dispatch import KernelChoices
from millrace.pallas_kernels.row_exchange import TABLE, exchange_rows, segment_rows

NUM_DEVICES, DIM, CAPACITY = 4, 3, 5
SIZES = {
    "uneven": [[1, 0, 5, 2], [0, 0, 3, 0], [4, 1, 1, 1], [0, 5, 0, 0]],
    "none": [[0] * 4] * 4,
    "all to one": [[0, 5, 0, 0]] * 4,
    "full": [[5] * 4] * 4,
}
NUM_ROWS = NUM_DEVICES * CAPACITY


def ragged_all_to_all(operand: Any, output: Any, **arguments: Any) -> jax.Array:
    """jax's definition of it in what XLA has for CPUs: every device looks at what all devices send."""
    axis = arguments.pop("axis_name")
    names = ("input_offsets", "send_sizes", "output_offsets", "recv_sizes")
    starts, sizes, to, received = (jax.lax.all_gather(arguments[name], axis) for name in names)
    rows, me = jax.lax.all_gather(operand, axis), jax.lax.axis_index(axis)
    for sender in range(NUM_DEVICES):
        index = jnp.arange(operand.shape[0])
        size = jnp.where(received[me, sender] == sizes[sender, me], sizes[sender, me], 0)  # disagreement: nothing
        target = jnp.where(index < size, to[sender, me] + index, output.shape[0])
        sent = jnp.take(rows[sender], starts[sender, me] + index, axis=0, mode="clip")
        output = output.at[target].set(sent, mode="drop")
    return output


@pytest.fixture(params=[entry.name for entry in TABLE])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> KernelChoices:
    if request.param == "ragged":
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    platform = "gpu" if request.param == "ragged" else "cpu"
    return KernelChoices(platform, {"row_exchange": request.param})  # type: ignore[arg-type]


def rows_of(sizes: np.ndarray) -> np.ndarray:
    """[X, M, D]: row i from device a for device b is (a, b, i); what is not sent is -1."""
    rows = np.full((NUM_DEVICES, NUM_ROWS, DIM), -1, np.float32)
    for a in range(NUM_DEVICES):
        sent = [(a, b, i) for b in range(NUM_DEVICES) for i in range(sizes[a, b])]
        rows[a, : len(sent)] = np.asarray(sent, np.float32).reshape(-1, DIM)
    return rows


def exchanged(rows: np.ndarray, sizes: np.ndarray, kernels: KernelChoices) -> np.ndarray:
    mesh = Mesh(np.array(jax.devices()[:NUM_DEVICES]), ("expert",))
    exchange = functools.partial(
        exchange_rows, num_received=NUM_ROWS, capacity=CAPACITY, axis="expert", kernels=kernels
    )
    local = lambda rows, sizes: exchange(rows[0], sizes)[None]  # noqa: E731
    split = PartitionSpec("expert")
    run = jax.shard_map(local, mesh=mesh, in_specs=(split, PartitionSpec()), out_specs=split, check_vma=False)
    return np.asarray(jax.jit(run)(rows, jnp.asarray(sizes, jnp.int32)))


@pytest.mark.parametrize("case", SIZES)
def test_every_row_arrives_in_the_order_of_the_senders_and_finds_back(case: str, kernels: KernelChoices) -> None:
    sizes = np.array(SIZES[case])
    sent = rows_of(sizes)
    received = exchanged(sent, sizes, kernels)
    for b in range(NUM_DEVICES):
        expected = [(a, b, i) for a in range(NUM_DEVICES) for i in range(sizes[a, b])]
        np.testing.assert_array_equal(received[b, : len(expected)], np.reshape(expected, (-1, DIM)))
        assert not received[b, len(expected) :].any()
    np.testing.assert_array_equal(exchanged(received, sizes.T, kernels), np.maximum(sent, 0) * (sent[..., :1] >= 0))


def test_a_cpu_has_no_ragged_exchange() -> None:
    with pytest.raises(KernelError, match="no ragged all-to-all for CPUs"):
        exchanged(rows_of(np.zeros((4, 4), int)), np.zeros((4, 4)), KernelChoices("cpu", {"row_exchange": "ragged"}))


def test_sizes_that_are_no_table_of_devices_are_refused() -> None:
    with pytest.raises(KernelError, match=r"got \(4, 3\) and \(2, 3\)"):
        exchange_rows(
            jnp.zeros((4, 3)), jnp.zeros((2, 3), jnp.int32), num_received=4, capacity=2, axis="expert",
            kernels=KernelChoices("cpu"),
        )  # fmt: skip


def test_segments_lie_end_to_end_before_zeros() -> None:
    rows = jnp.arange(10.0)[:, None]
    made = segment_rows(rows, jnp.array([7, 0, 4], jnp.int32), jnp.array([2, 0, 3], jnp.int32), 7)
    assert made[:, 0].tolist() == [7, 8, 4, 5, 6, 0, 0]
