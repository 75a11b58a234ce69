"""An artifact is compiled in one process and serves in another that may not compile; what does not fit is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from millrace import ConfigError, ProgramError, Runtime, RuntimeConfig, SamplingParams
from millrace.models.quantization import uniformly, with_formats
from millrace.pallas_kernels import native
from millrace.pallas_kernels.quantized_matmul import FORMATS
from millrace.runtime import artifacts
from millrace.runtime.artifacts import differences, load_programs, read_manifest, with_options_of, write_artifact
from millrace.runtime.deployment import Deployment, deploy
from millrace.runtime.executables import compiler_flags, processor
from millrace.runtime.model_source import open_model_config
from millrace.sharding.mesh import make_mesh

SMALL: dict[str, Any] = {
    "dtype": "float32", "quantization": "none", "num_slots": 2, "page_size": 8, "max_step_tokens": 8,
    "max_context_len": 48, "kv_cache_bytes": 2**18, "progress": False,
}  # fmt: skip
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 10, 11]]
PARAMS: dict[str, Any] = {"max_tokens": 6, "temperature": 0.8, "seed": 7, "ignore_eos": True}


def deployment_of(model: Path, **options: Any) -> Deployment:
    config = RuntimeConfig(model=str(model), **{**SMALL, **options})
    mesh = make_mesh(dict(config.mesh or ()))
    return deploy(config, open_model_config(config.model, None), mesh, 2**30)


@pytest.fixture(scope="module")
def model(fixture_checkpoints: Path) -> Path:
    return fixture_checkpoints / "llama_default"


@pytest.fixture(scope="module")
def deployment(model: Path) -> Deployment:
    return deployment_of(model)


@pytest.fixture(scope="module")
def artifact(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    write_artifact(folder, deployment, "cpu:1x1x1", show_progress=False)
    return folder


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """An artifact to spoil."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / artifacts.MANIFEST_FILE
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


# ---- the circle


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.large),
        {"mesh": {"data": 4, "tensor": 2}, "kv_cache_dtype": "int8"},
        {"weights": "stream", "kv_cache_dtype": "fp8"},
    ],
    ids=["one device", "data 4 x tensor 2", "streamed weights"],
)
def test_another_process_that_may_not_compile_gives_the_same_tokens(
    options: dict[str, Any], model: Path, artifact: Path, tmp_path: Path, program_cache: str, store_cache: str
) -> None:
    caches = {"store_cache_dir": store_cache, "compile_cache_dir": program_cache}
    with Runtime.from_pretrained(str(model), **SMALL, **options, **caches) as runtime:
        outputs = runtime.generate(PROMPTS, SamplingParams(**PARAMS), use_tqdm=False)
        expected = [list(output.outputs[0].token_ids) for output in outputs]
    folder = tmp_path if options else artifact
    if options:
        write_artifact(folder, deployment_of(model, **options), "cpu", show_progress=False)
    given = {
        "model": str(model),
        "num_devices": 8 if "mesh" in options else 1,
        "options": {**SMALL, **options, "artifact": str(folder), "store_cache_dir": store_cache},
        "prompts": PROMPTS,
        "params": PARAMS,
    }
    command = [sys.executable, str(Path(__file__).parent / "artifact_process.py"), json.dumps(given)]
    served = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert served.returncode == 0, served.stderr[-2000:]
    assert json.loads(served.stdout) == expected


def test_a_loaded_program_updates_the_state_in_place(artifact: Path, deployment: Deployment) -> None:
    programs = load_programs(artifact, deployment)
    state = programs.initial_state()
    row = jax.tree.map(lambda a: np.zeros(a.shape[2:], a.dtype), state.slots)
    before, cache = state.cache.values.unsafe_buffer_pointer(), state.cache.values
    state = programs.install(state, np.zeros(1, np.int32), row)
    assert state.cache.values.unsafe_buffer_pointer() == before and cache.is_deleted()


def test_a_loaded_program_refuses_other_shapes(artifact: Path, deployment: Deployment) -> None:
    programs = load_programs(artifact, deployment)
    state = programs.initial_state()
    row = jax.tree.map(lambda a: np.zeros(a.shape[2:], a.dtype), state.slots)
    with pytest.raises(ProgramError, match="install: expected arguments"):
        programs.install(state, np.zeros(2, np.int32), row)


def test_an_artifact_decides_what_a_config_leaves_open(artifact: Path, deployment: Deployment, model: Path) -> None:
    config = with_options_of(RuntimeConfig(model=str(model), artifact=str(artifact), num_slots=3))
    assert config.num_slots == 3 and config.dtype == "float32" and config.max_step_tokens == 8
    assert config.kv_cache_bytes == deployment.config.kv_cache_bytes and config.mesh == deployment.config.mesh


def test_a_manifest_says_what_each_program_takes(artifact: Path, deployment: Deployment) -> None:
    manifest = read_manifest(artifact)
    assert set(manifest.programs) == {"decode-1", "decode-2", "mixed-8", "install", "initial-state"}
    assert manifest.programs["decode-1"].in_place >= deployment.model.cache.values.num_bytes
    assert manifest.num_bytes == sum(path.stat().st_size for path in artifact.glob("*.xla"))
    assert manifest.kernels and manifest.facts["jax"]["jax"] == jax.__version__
    calls_native = any(name == "cpu" for _, name in manifest.kernels)
    assert manifest.facts["native_kernels"] == (list(native.library().instruction_sets) if calls_native else None)


# ---- what is refused


@pytest.mark.parametrize(
    "place, value, shown",
    [
        (("source",), "0" * 64, "source: "),
        (("jax", "jaxlib"), "0.0.1", 'jax.jaxlib: "0.0.1" in the artifact'),
        (("devices", "kind"), "NVIDIA GB300", 'devices.kind: "NVIDIA GB300" in the artifact, "cpu" here'),
        (("devices", "processes"), [0, 1], "devices.processes: "),
        (("options", "num_slots"), 99, "options.num_slots: 99 in the artifact, 2 here"),
        (("model", "embed_dim"), 33, "model.embed_dim: 33 in the artifact, 32 here"),
        (("compiler_flags", "xla_of_old"), "true", 'compiler_flags.xla_of_old: "true" in the artifact, null here'),
        (("processor", "features"), ["x87-of-1980"], "the artifact needs x87-of-1980"),
        (("native_kernels",), ["mmx"], "native_kernels: the artifact's programs may call those for mmx; here"),
    ],
)
def test_an_artifact_made_of_something_else_is_refused(
    place: tuple[str, ...], value: object, shown: str, copy: Path, deployment: Deployment
) -> None:
    def change(fields: dict[str, Any]) -> None:
        facts = fields["facts"]
        for key in place[:-1]:
            facts = facts[key]
        facts[place[-1]] = value

    edit(copy, change)
    with pytest.raises(ConfigError, match="does not fit") as caught:
        load_programs(copy, deployment)
    assert shown in str(caught.value)


def test_every_difference_is_named_at_once(copy: Path, fixture_checkpoints: Path) -> None:
    other = deployment_of(fixture_checkpoints / "qwen3_default", num_slots=3, mesh={"data": 2})
    (copy / "install.xla").unlink()
    with pytest.raises(ConfigError) as caught:
        load_programs(copy, other)
    for text in ("model.family", "options.num_slots", "devices.mesh.data", "install.xla: it cannot be read"):
        assert text in str(caught.value)


def test_a_damaged_program_is_refused(copy: Path, deployment: Deployment) -> None:
    path = copy / "mixed-8.xla"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="mixed-8.xla: it is damaged"):
        load_programs(copy, deployment)


def test_a_folder_without_a_manifest_is_refused(copy: Path, deployment: Deployment) -> None:
    (copy / artifacts.MANIFEST_FILE).unlink()
    with pytest.raises(ConfigError, match="there is none. Was millrace compile interrupted"):
        load_programs(copy, deployment)


def test_a_newer_format_is_refused(copy: Path, deployment: Deployment) -> None:
    edit(copy, lambda fields: fields.update(format_version=artifacts.FORMAT_VERSION + 1))
    with pytest.raises(ConfigError, match=r"of version 2.*Compile it again"):
        load_programs(copy, deployment)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "millrace-artifact", "format_version": 1}'])
def test_a_manifest_that_is_none_is_refused(content: str, copy: Path, deployment: Deployment) -> None:
    (copy / artifacts.MANIFEST_FILE).write_text(content)
    with pytest.raises(ConfigError, match="is damaged"):
        load_programs(copy, deployment)


def test_a_folder_of_something_else_is_not_written_to(tmp_path: Path, deployment: Deployment) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"it holds thesis.tex"):
        write_artifact(tmp_path, deployment, "cpu", show_progress=False)


def test_differences_are_none_between_equal_facts(deployment: Deployment) -> None:
    facts = artifacts.facts_of(deployment)
    assert list(differences(facts, facts)) == []


def test_a_processor_may_have_more_than_an_artifact_needs() -> None:
    needs, has = {"processor": {"features": ["avx2"]}}, {"processor": {"features": ["avx2", "avx512f"]}}
    assert list(differences(needs, has)) == []
    assert list(differences(has, needs)) == [
        "processor.features: the artifact needs avx512f, which this processor has not"
    ]


@pytest.mark.parametrize(
    "needs, has, problem",
    [
        (None, ["avx2"], None),
        (None, "no compiler", None),
        (["avx2"], ["avx512", "avx2"], None),
        (["avx512", "avx2"], ["avx2"], "may call those for avx512; here there are those for avx2"),
        (["avx2"], "no compiler", "may call those for avx2; here there are none: no compiler"),
        (["avx2"], None, "may call those for avx2; here there are none"),
    ],
)
def test_an_artifact_needs_the_native_kernels_that_its_programs_call(
    needs: object, has: object, problem: str | None
) -> None:
    found = list(differences({"native_kernels": needs}, {"native_kernels": has}))
    expected = [] if problem is None else [f"native_kernels: the artifact's programs {problem}"]
    assert found == expected


def test_the_dtype_of_a_checkpoint_is_not_the_models(deployment: Deployment) -> None:
    decoder = deployment.model.decoder
    other = dataclasses.replace(decoder.config, dtype="float16")
    assert artifacts._model_facts(decoder.config) == artifacts._model_facts(other)


def test_the_formats_of_all_weights_are_facts(deployment: Deployment) -> None:
    config = deployment.model.decoder.config
    quantized = with_formats(dataclasses.replace(config, tie_embeddings=False), uniformly(FORMATS["int8"]))
    facts = json.loads(json.dumps(artifacts._model_facts(quantized)))
    assert facts["head_format"]["name"] == "int8"
    assert facts["layers"][0]["period"][0]["mlp"]["formats"][0][1]["name"] == "int8"


def test_flags_of_the_compiler_are_named() -> None:
    assert compiler_flags()["xla_backend_optimization_level"].isdigit()
    assert not any(name.startswith("xla_dump") for name in compiler_flags())


@pytest.mark.parametrize("line", ["flags\t\t: sse2 avx2 fpu", "Features\t: sse2 avx2 fpu"])
def test_what_a_processor_can_do_is_read_from_the_system(line: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    assert processor(tmp_path / "cpuinfo")["features"] == ["avx2", "fpu", "sse2"]
    assert processor(tmp_path / "nothing")["features"]
