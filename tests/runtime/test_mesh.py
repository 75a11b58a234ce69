"""One model over many meshes: the tokens of one device, whatever the devices share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace import ConfigError, Runtime, SamplingParams
from millrace.runtime.checkpoint import open_checkpoint
from millrace.runtime.store import open_store

OpenTiny = Callable[..., Runtime]
pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = [[3 + i] * (2 + 5 * i) for i in range(6)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=11, max_tokens=6, ignore_eos=True),
] * 3
UNEVEN = {"expert": 4, "tensor": 2}  # 6 experts in 8 places
SMALL = {"max_step_tokens": 8, "num_slots": 2}  # two programs


def tokens(runtime: Runtime) -> list[list[int]]:
    outputs = runtime.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


# ---- 72 devices


def over_devices(num_devices: int, config: dict[str, Any], meshes: list[dict[str, int]], folder: Path) -> list[Any]:
    """The answers of `rack_process`, one for each mesh."""
    task = json.dumps({"config": config, "meshes": meshes, "folder": str(folder)})
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}", "JAX_PLATFORMS": "cpu"}
    script = str(Path(__file__).parent / "rack_process.py")
    done = subprocess.run(
        [sys.executable, script], input=task, env={**os.environ, **flags}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize(
    "meshes",
    [
        [{"data": 72}, {"data": 18, "tensor": 4}],
        pytest.param([{"data": 9, "tensor": 8}, {"tensor": 8}], marks=pytest.mark.large),
    ],
    ids=str,
)
def test_72_devices_give_the_tokens_of_one_in_every_mesh(
    fixture_checkpoints: Path, tmp_path: Path, meshes: list[dict[str, int]]
) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = {**open_checkpoint(fixture_checkpoints / "llama_default").config, **heads}
    one, *others = over_devices(72, config, [{}, *meshes], tmp_path)
    assert len(set(map(tuple, one))) > 4, "requests answer apart"
    assert others == [one] * 2


@pytest.mark.large
def test_72_devices_of_one_expert_axis_give_the_tokens_of_one(fixture_checkpoints: Path, tmp_path: Path) -> None:
    config = {**open_checkpoint(fixture_checkpoints / "qwen3_moe_norm").config, "num_hidden_layers": 1}
    one, rack = over_devices(72, config, [{}, {"expert": 72}], tmp_path)
    assert rack == one


# ---- experts


@pytest.mark.parametrize(
    ("checkpoint", "mesh"),
    [
        ("qwen3_moe_norm", {"expert": 8}),
        ("gpt_oss_plain", {"data": 2, "expert": 2, "tensor": 2}),
        pytest.param("qwen3_moe_norm", {"data": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.large),
        pytest.param("gpt_oss_plain", {"expert": 8}, marks=pytest.mark.large),
    ],
    ids=str,
)
def test_experts_over_devices_give_the_tokens_of_one(
    open_tiny: OpenTiny, checkpoint: str, mesh: dict[str, int]
) -> None:
    with open_tiny(checkpoint, **SMALL) as one, open_tiny(checkpoint, **SMALL, mesh=mesh) as many:
        assert tokens(many) == tokens(one)


def test_weights_saved_from_expert_places_hold_every_expert_once(open_tiny: OpenTiny, tmp_path: Path) -> None:
    with open_tiny("qwen3_moe_norm", **SMALL, mesh=UNEVEN) as runtime:
        before = tokens(runtime)
        runtime.save_weights(tmp_path / "saved")
        assert isinstance(runtime.config.mesh, tuple)
        runtime.update_weights(tmp_path / "saved")
        assert tokens(runtime) == before
    store = open_store(tmp_path / "saved")
    path = "stages/0/0/moe/up/weight"
    assert store.arrays[path].shape[1] == 6
    with open_tiny(tmp_path / "saved", **SMALL) as one:
        assert tokens(one) == before


def test_experts_given_as_arrays_reach_all_their_places(open_tiny: OpenTiny, tmp_path: Path) -> None:
    path = "stages/0/0/moe/up/weight"
    with open_tiny("qwen3_moe_norm", **SMALL, mesh=UNEVEN) as runtime:
        runtime.save_weights(tmp_path / "saved")
        store = open_store(tmp_path / "saved")
        values = store.read(path, tuple(slice(0, size) for size in store.arrays[path].shape)) * np.float32(2)
        runtime.update_weights({path: values})
        live: Any = runtime._loop._executor.params
        placed = np.asarray(live["stages"]["0"]["0"]["moe"]["up"]["weight"])
        with pytest.raises(ConfigError, match=r"shape \[2, 6, 32, 32\]"):
            runtime.update_weights({path: placed})
    np.testing.assert_array_equal(placed, np.concatenate([values, values[:, :2]], axis=1))


def test_streamed_layers_fill_the_places_of_uneven_experts(open_tiny: OpenTiny) -> None:
    with open_tiny("qwen3_moe_norm", **SMALL) as one:
        expected = tokens(one)
    options = {"mesh": UNEVEN, "weights": "stream", "weights_memory": 1 << 17}
    with open_tiny("qwen3_moe_norm", **SMALL, **options) as streamed:
        assert tokens(streamed) == expected
