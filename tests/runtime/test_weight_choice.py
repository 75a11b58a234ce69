"""What plain weights are made where neither dtype nor quantization says: int8 on a CPU, and the user is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millrace import Runtime, SamplingParams
from millrace.models.config import ModelConfig
from millrace.models.quantization import is_quantized, named_format, uniformly, with_formats
from millrace.pallas_kernels.quantized_matmul import FORMATS
from millrace.runtime import weight_choice
from millrace.runtime.artifacts import read_manifest
from millrace.runtime.checkpoint import open_checkpoint
from millrace.runtime.config import PLAIN, RuntimeConfig
from millrace.runtime.convert import convert
from millrace.runtime.launch import main
from millrace.runtime.model_source import open_model_config
from millrace.runtime.weight_choice import WeightChoice, choose_weights

OpenTiny = Callable[..., Runtime]
SMALL: dict[str, Any] = {"num_slots": 2, "max_step_tokens": 8, "max_context_len": 48}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
LINE = (
    "millrace: int8 weights (the default on a CPU; --quantization=none or --dtype=float32 keeps the checkpoint's own)"
)


@pytest.fixture(scope="module")
def model(fixture_checkpoints: Path) -> ModelConfig:
    return open_model_config(str(fixture_checkpoints / "llama_default"), None)


@pytest.fixture(scope="module")
def experts(fixture_checkpoints: Path) -> ModelConfig:
    return open_model_config(str(fixture_checkpoints / "mixtral_default"), None)


# ---- the choice


def test_on_a_cpu_plain_weights_become_int8_and_the_line_says_how_to_keep_them(
    model: ModelConfig, experts: ModelConfig
) -> None:
    for plain in (model, experts):
        choice = choose_weights(RuntimeConfig(), plain, "cpu")
        assert choice.config == RuntimeConfig(quantization="int8") and choice.format == FORMATS["int8"]
        assert choice.model == with_formats(plain, uniformly(FORMATS["int8"]))
        assert f"millrace: {choice.line}" == LINE


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantization": PLAIN}])
def test_what_is_asked_for_is_obeyed(options: dict[str, Any], model: ModelConfig) -> None:
    expected = WeightChoice(config=RuntimeConfig(**{"quantization": PLAIN, **options}), model=model)
    assert choose_weights(RuntimeConfig(**options), model, "cpu") == expected


def test_a_format_that_is_asked_for_stays_with_the_model_that_has_it(model: ModelConfig) -> None:
    config, quantized = RuntimeConfig(quantization="int4"), with_formats(model, uniformly(named_format("int4", 32)))
    assert choose_weights(config, quantized, "cpu") == WeightChoice(config=config, model=quantized)


def test_on_a_gpu_and_where_it_is_quantized_already_a_checkpoint_stays_as_it_is(model: ModelConfig) -> None:
    quantized = with_formats(model, uniformly(FORMATS["fp8"]))
    left = RuntimeConfig(quantization=PLAIN)
    assert choose_weights(RuntimeConfig(), model, "gpu") == WeightChoice(config=left, model=model)
    assert choose_weights(RuntimeConfig(), quantized, "cpu") == WeightChoice(config=left, model=quantized)


def test_shapes_that_do_not_fit_stay_plain_and_the_line_says_why(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_choice, "CPU_DEFAULT", "fp8_block")
    choice = choose_weights(RuntimeConfig(), model, "cpu")
    assert (choice.config.quantization, choice.model, choice.format) == (PLAIN, model, None)
    assert choice.line is not None and "the checkpoint's own weights, not fp8_block" in choice.line
    assert "do not divide into groups of 128" in choice.line


@pytest.mark.parametrize("weights", ["stream", "host"])
def test_without_a_store_what_is_not_resident_is_read_as_it_is(weights: str, model: ModelConfig) -> None:
    choice = choose_weights(RuntimeConfig(weights=weights, store=False), model, "cpu")
    assert (choice.config.quantization, choice.format) == (PLAIN, None)
    assert choice.line is not None and f"weights={weights} reads a store as it is" in choice.line
    assert choose_weights(RuntimeConfig(weights=weights), model, "cpu").config.quantization == "int8"


# ---- runtimes


def tokens(runtime: Runtime) -> list[int]:
    with runtime:
        return list(runtime.generate([5, 6, 7], GREEDY, use_tqdm=False)[0].outputs[0].token_ids)


def test_a_runtime_says_once_what_it_chose_and_holds_it(open_tiny: OpenTiny, capfd: pytest.CaptureFixture[str]) -> None:
    chosen = open_tiny(dtype=None, **SMALL)
    assert (chosen.config.quantization, chosen.config.dtype) == ("int8", "float32")
    assert chosen.config.kv_cache_dtype == "float32"
    assert capfd.readouterr().err.count(LINE) == 1
    asked = open_tiny(dtype=None, quantization="int8", **SMALL)
    assert LINE not in capfd.readouterr().err
    assert tokens(chosen) == tokens(asked)


def test_none_keeps_plain_weights_and_says_nothing(open_tiny: OpenTiny, capfd: pytest.CaptureFixture[str]) -> None:
    with open_tiny(dtype=None, quantization=PLAIN, **SMALL) as plain:
        assert (plain.config.quantization, plain.config.dtype) == (PLAIN, "float32")
        assert not is_quantized(plain._loop._executor._model.decoder.config)
    assert "weights (the default" not in capfd.readouterr().err


@pytest.mark.parametrize("options", [{"store": False}, {"weights": "stream", "weights_memory": 1 << 18}])
def test_a_plain_store_is_quantized_on_its_way_wherever_its_weights_are(
    options: dict[str, Any], open_tiny: OpenTiny, fixture_checkpoints: Path, tmp_path: Path
) -> None:
    store = convert(open_checkpoint(fixture_checkpoints / "llama_default"), tmp_path / "plain", show_progress=False)
    caches = {"store_cache_dir": str(tmp_path / "stores")}
    runtime = open_tiny(store.url, dtype=None, **SMALL, **caches, **options)
    assert runtime.config.quantization == "int8"
    assert tokens(runtime) == tokens(open_tiny(store.url, quantization="int8", **SMALL, **caches))


def test_a_quantized_store_stays_as_it_is(
    open_tiny: OpenTiny, fixture_checkpoints: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = open_checkpoint(fixture_checkpoints / "llama_default")
    store = convert(source, tmp_path / "store", quantization=named_format("int4", 32), show_progress=False)
    with open_tiny(store.url, dtype=None, **SMALL) as runtime:
        assert runtime.config.quantization == PLAIN
        assert is_quantized(runtime._loop._executor._model.decoder.config)
    assert "weights (the default" not in capfd.readouterr().err


# ---- the launcher


@pytest.fixture
def shapes(fixture_checkpoints: Path, tmp_path: Path) -> str:
    """A folder with nothing but shapes."""
    (tmp_path / "config.json").write_text((fixture_checkpoints / "llama_default" / "config.json").read_text())
    return f"--model={tmp_path}"


@pytest.mark.parametrize(
    ("flags", "formats"),
    [
        ((), ["int8"]),
        (("--target=cpu:2",), ["int8"]),
        (("--dtype=float32",), []),
        (("--quantization=none",), []),
        (("--target=h200",), []),
    ],
)
def test_plan_shows_what_a_runtime_on_the_target_would_choose(
    flags: tuple[str, ...], formats: list[str], shapes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--max_context_len=48", "--num_slots=2", "--max_step_tokens=8", "--no-compile")
    assert main(["plan", shapes, *small, "--json=-", *flags]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["formats"] == formats
    assert (LINE in err) == bool(formats)


def test_an_artifact_for_cpus_holds_the_choice(shapes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--max_context_len=48", "--num_slots=2", "--max_step_tokens=8", "--kv_cache_bytes=262144")
    assert main(["compile", shapes, *small, str(tmp_path / "artifact")]) == 0
    assert LINE in capsys.readouterr().err
    options = read_manifest(tmp_path / "artifact").facts["options"]
    assert (options["quantization"], options["dtype"]) == ("int8", "float32")


def test_convert_takes_none_as_plain(fixture_checkpoints: Path, tmp_path: Path) -> None:
    source = str(fixture_checkpoints / "llama_default")
    assert main(["convert", source, str(tmp_path / "store"), "--quantization=none", "--noprogress"]) == 0
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["quantization"] is None
